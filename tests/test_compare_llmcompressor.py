"""scripts/compare_llmcompressor.py where llmcompressor is not installed."""

from scripts import compare_llmcompressor


def test_without_llmcompressor_there_is_a_line_about_it(run_script):
    status, _, err = run_script(compare_llmcompressor, "a-model", "--data_dir", "a-folder", "--out", "another")
    assert status == 2 and len(err) == 1 and "llmcompressor cannot be imported" in err[0] and "0.14.0.1" in err[0]
