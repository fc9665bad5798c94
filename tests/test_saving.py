"""--save, --load, --checkpoint_dir and --export as a user types them, and what cannot be."""

import json
import resource
import sys

import pytest
from conftest import in_child, save_model, tiny_model
from test_checkpoint import DAMAGE, saved
from test_checkpoint import folder as folder
from test_checkpoint import spoilt as spoilt
from test_runs import cli as cli

import main


@pytest.fixture
def refused(cli, corpora, folder):
    """refused(parts, *arguments): exit status 2, and one line that has every part."""

    def run(parts, *arguments):
        status, out, err = cli(*arguments, "--data_dir", corpora, "--eval", "own", "--device", "cpu")
        assert status == 2 and len(err) == 1 and all(str(part) in err[0] for part in parts), err
        assert "| own" not in out

    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_loading_a_damaged_checkpoint(refused, spoilt, damage):
    spoil, _, parts = DAMAGE[damage]
    spoil(spoilt)
    refused(parts, "--load", spoilt)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--method", "rtn"), ["--method", "--load"]),
        (("--smooth",), ["--smooth", "--load"]),
        (("--true-sequential",), ["--true-sequential", "--load"]),
        (("--calib_data", "own"), ["--calib_data", "--load"]),
        (("--checkpoint_dir", "blocks"), ["--checkpoint_dir", "--load"]),
        (("--compare_full",), ["--compare_full", "as MODEL"]),
        (("--seqlen", 1000), ["--seqlen 1000", "64 tokens"]),
        (("--benchmark", 1), ["--benchmark 1", "2 to 64"]),
        (("--benchmark", 65), ["--benchmark 65", "2 to 64"]),
        (("--benchmark_prefill", 65), ["--benchmark_prefill 65", "1 to 64"]),
        (("--export", "gguf", "out"), ["--export gguf", "compressed-tensors"]),
    ],
    ids=lambda x: str(x[0]),
)
def test_what_does_not_go_with_load(refused, folder, arguments, parts):
    refused(parts, "--load", folder, *arguments)


def test_a_checkpoint_of_another_model(refused, folder, tmp_path):
    refused(["activation_function", "gelu"], save_model(tmp_path / "gelu", tiny_model("opt", "gelu")), "--load", folder)
    saved(tmp_path / "llama", tiny_model("llama", "plain"))
    refused(["llama", "main.py"], "--load", tmp_path / "llama")


def test_what_is_no_checkpoint_of_ours(refused, tiny_opt, folder, tmp_path):
    refused(["nothing of a quantization", "--save"], "--load", tiny_opt)
    refused([tmp_path / "nowhere", "config.json"], "--load", tmp_path / "nowhere")
    refused(["--load"], folder)
    refused(["MODEL", "--load"])


def test_a_target_that_cannot_be(refused, tiny_opt, folder, tmp_path):
    awrq = (tiny_opt, "--method", "awrq", "--wbits", 4)
    (tmp_path / "file").write_text("")
    refused([f"--save {folder}", "already"], *awrq, "--save", folder)
    refused(["--save", tmp_path / "file"], *awrq, "--save", tmp_path / "file" / "saved")
    refused(
        ["--checkpoint_dir", "other files"], *awrq, "--calib_data", "own", "--nsamples", 3, "--seqlen", 16, "--checkpoint_dir", tmp_path
    )
    for flag in (("--save", "x"), ("--checkpoint_dir", "x"), ("--export", "compressed-tensors", "x")):
        refused(["act_only", "pack"], tiny_opt, "--method", "act_only", *flag)


def test_a_disk_that_is_full(refused, tiny_opt, tmp_path):
    """As test_a_full_disk, on the command line: one line, exit status 2, nothing under the name or beside it, no half of a block."""
    rtn = (tiny_opt, "--method", "rtn", "--wbits", 4, "--calib_data", "own", "--seqlen", 16, "--nsamples", 2)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        refused(["awrq-00001", "cannot be written", "too large"], *rtn, "--save", tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        refused(["blocks/awrq-00001", "cannot be written", "too large"], *rtn, "--checkpoint_dir", tmp_path / "blocks")
        assert [path.name for path in (tmp_path / "blocks").glob("awrq*")] == []

    assert in_child(write) == 0


def test_main_too(corpora, tmp_path, monkeypatch, capfd):
    source = save_model(tmp_path / "llama", tiny_model("llama", "grouped"))
    common = ("--data_dir", corpora, "--eval", "own", "--seqlen", 16, "--device", "cpu")
    ppl = []
    for name, arguments in (
        (
            "saving",
            (source, "--method", "awrq", "--wbits", 4, "--smooth", "--calib_data", "own", "--nsamples", 3, "--save", tmp_path / "s"),
        ),
        ("loading", (source, "--load", tmp_path / "s", "--export", "compressed-tensors", tmp_path / "exported")),
    ):
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, (*arguments, *common, "--output_path", path))])
        main.main()
        ppl.append(json.loads(path.read_text())["results"]["perplexity"]["own"]["ppl"])
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-3) and (tmp_path / "exported" / "config.json").is_file()
    assert "linears in integers (torch kernel)" in capfd.readouterr().out
    report = json.loads((tmp_path / "loading.json").read_text())
    assert report["protocol"]["calibration"]["corpus"] == "own" and report["recipe"]["method"] == "awrq" and report["model"] == str(source)
