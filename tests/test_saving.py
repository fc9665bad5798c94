"""--save, --load, --checkpoint_dir and --export as a user types them, and what cannot be."""

import errno
import json
import os
import resource
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import in_child, save_model, tiny_model
from test_checkpoint import DAMAGE, saved
from test_checkpoint import folder as folder
from test_checkpoint import spoilt as spoilt
from test_runs import cli as cli

import main
from formats.checkpoint import Store
from run import pipeline


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
        (("--seqlen", 8, "--eval_windows", 1, "--benchmark", 9), ["--benchmark 9", "own has 8 tokens"]),
        (("--seqlen", 8, "--eval_windows", 1, "--benchmark_prefill", 9), ["--benchmark_prefill 9", "own has 8 tokens"]),
        (("--export", "onnx", "out"), ["--export onnx", "compressed-tensors"]),
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


RTN = ("--method", "rtn", "--wbits", 4, "--calib_data", "own", "--seqlen", 16, "--nsamples", 2)


def test_targets_inside_each_other(refused, tiny_opt, tmp_path):
    """Found before: at the end the outer one could not get its name, or would have gone with what is in it."""
    a = tmp_path / "a"
    for flags in (
        ("--save", a, "--checkpoint_dir", a / "blocks"),
        ("--checkpoint_dir", a, "--save", a / "saved"),
        ("--save", a, "--export", "compressed-tensors", a / "exported"),
        ("--save", a, "--checkpoint_dir", a),
        ("--save", a, "--output_path", a / "results.json"),
    ):
        refused(["is in --", "beside each other"], tiny_opt, *RTN, *flags)
        assert not [path for path in tmp_path.iterdir() if path != a or any(a.iterdir())]


def test_an_empty_folder_and_a_link_to_one(cli, corpora, tiny_opt, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    status, _, err = cli(tiny_opt, *RTN, "--save", tmp_path / "link", "--data_dir", corpora, "--device", "cpu")
    assert status == 0, err
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").is_file() and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_nothing_can_replace(refused, tiny_opt, tmp_path, monkeypatch):
    """As a mounted one, or the one that the user is in."""
    monkeypatch.chdir(tmp_path)
    refused(["--save .", "give a name in it"], tiny_opt, *RTN, "--save", ".")
    (tmp_path / "mounted").mkdir()

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    refused(["--save mounted", "resource busy", "give a name in it"], tiny_opt, *RTN, "--save", "mounted")
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_a_disk_without_room_is_found_before_quantizing(refused, tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "quantize_blocks", lambda *_: pytest.fail("quantized first"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for flags in (("--save", tmp_path / "a"), ("--checkpoint_dir", tmp_path / "b"), ("--export", "compressed-tensors", tmp_path / "c")):
        refused([flags[0], flags[-1], "are needed", "are free"], tiny_opt, *RTN, *flags)


def test_a_save_is_read_back(cli, corpora, tiny_opt, tmp_path, monkeypatch):
    def damaged(store, folder, *args):
        finish(store, folder, *args)
        path = next(folder.glob("awrq-00001*"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    finish = Store.finish
    monkeypatch.setattr(Store, "finish", damaged)
    status, _, err = cli(tiny_opt, *RTN, "--save", tmp_path / "a", "--data_dir", corpora, "--device", "cpu")
    assert status == 2 and "is damaged" in err[-1] and not (tmp_path / "a").exists()


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


@pytest.mark.slow
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
