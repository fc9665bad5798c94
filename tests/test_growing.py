"""Results are printed and written as they are known, and what fails late takes nothing with it."""

import json
from functools import partial

import pytest
from conftest import save_model, tiny_model

import main
from run import pipeline

pytestmark = pytest.mark.slow

LATE = 'def score(doc, results):\n    raise LookupError("Resource not found;\\ndownload it first")\n'


def task_file(folder, name, **more):
    (folder / "rows.jsonl").write_text('{"choices": ["word1 word2", "word3"], "gold": 0}\n' * 3)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "word4",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    late = ', "process_results": !function late.score}' if name == "late" else "}"
    (folder / f"{name}.yaml").write_text(json.dumps(task | more)[:-1] + late)
    return str(folder / f"{name}.yaml")


@pytest.fixture
def run(run_script, tmp_path, corpora):
    """run(*arguments) -> (status, out, err, JSON) of main.py, rounding to nearest."""
    (tmp_path / "late.py").write_text(LATE)
    model = save_model(tmp_path / "llama", tiny_model("llama", "grouped"))

    def call(*arguments):
        path = tmp_path / "run.json"
        short = ("--data_dir", corpora, "--seqlen", 16, "--method", "rtn", "--wbits", 4, "--device", "cpu")
        status, out, err = partial(run_script, main)(model, *short, *arguments, "--output_path", path)
        return status, out, err, json.loads(path.read_text())

    return call


def test_a_task_that_fails_is_named_and_the_others_are_kept(run, tmp_path):
    names = ",".join(task_file(tmp_path, name) for name in ("early", "late", "after"))
    status, out, err, found = run("--eval", "own", "--tasks", names, "--compare_full", "--table_results")
    assert status == 1
    assert err[-2:] == [f"main.py: failed: late, {m}: LookupError: Resource not found; download it first" for m in ("full", "rtn W4A8")]
    assert found["complete"] is False and set(found["failed"]) == {"late, full", "late, rtn W4A8"}
    for part in ("full", "results"):
        assert set(found[part]["tasks"]["results"]) == {"early", "after"} and found[part]["perplexity"]["own"]["ppl"] > 1
    assert "| average" in out, "both have the same tasks"
    assert "early, rtn W4A8: acc " in out and "late, full: failed" in out and "| after" in out


def test_all_tasks_fail(run, tmp_path):
    status, out, _, found = run("--tasks", task_file(tmp_path, "late"))
    assert status == 1 and found["results"]["tasks"] == {} and "late, rtn W4A8: failed" in out


@pytest.mark.parametrize(("stops", "status"), [(FloatingPointError("block 1: NaN"), 2), (KeyboardInterrupt(), None)], ids=["NaN", "Ctrl-C"])
def test_what_is_known_when_a_run_stops_is_in_the_json(run, tmp_path, monkeypatch, stops, status):
    known = []

    def once(*arguments):
        if known:
            raise stops
        known.append(pipeline_perplexity(*arguments))
        return known[0]

    pipeline_perplexity = pipeline.perplexity
    monkeypatch.setattr(pipeline, "perplexity", once)
    try:
        assert run("--eval", "own,one")[0] == status
    except KeyboardInterrupt:
        assert status is None
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["results"]["perplexity"] == {"own": known[0]} and found["complete"] is False
    assert not list(tmp_path.glob("*.partial"))


def test_a_whole_run_says_so(run, tmp_path):
    status, out, err, found = run("--eval", "own", "--tasks", task_file(tmp_path, "early"))
    assert status == 0 and not err and found["complete"] is True and found["failed"] == {}
    assert out.index("own, rtn W4A8: perplexity ") < out.index("early, rtn W4A8: acc ") < out.index("| own")
