"""The numbers: perplexity equals the plain computation with the whole model; a report is whole, says where it is from, and has no NaN."""

import json
import math
import re
import subprocess
from copy import deepcopy

import pytest
import torch
from conftest import tiny_model, token_ids

import evalutils
import opt
from evalutils import check_writable, perplexity, report, table, write_json
from kernels import timing
from modelutils import METHODS, Clock, Layer, decoder_blocks, make_recipe, quantize_blocks
from quant import Recipe

KEYS = {
    "schema",
    "model",
    "model_type",
    "recipe",
    "protocol",
    "results",
    "full",
    "layers",
    "seconds",
    "peak_bytes",
    "versions",
    "commit",
    "hardware",
}


def plain_perplexity(model, ids, seqlen):
    """exp of the mean over windows of the mean negative log-likelihood, one window and one token at a time, in float64."""
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[start : start + seqlen]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        nll = [logits[t].logsumexp(0) - logits[t, window[t + 1]] for t in range(seqlen - 1)]
        losses.append(sum(nll) / (seqlen - 1))
    return math.exp(sum(losses) / len(losses)), len(losses)


# ---------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("walk_batch", [1, 3, 100])
@pytest.mark.parametrize("seqlen", [2, 24])
def test_perplexity_is_the_plain_computation(model, seqlen, walk_batch):
    """Five windows and a tail that is dropped."""
    ids = token_ids(1, 5 * seqlen + seqlen - 1)[0]
    expected, windows = plain_perplexity(model, ids, seqlen)
    result = perplexity(model, ids, seqlen, "cpu", walk_batch)
    assert result == {"ppl": pytest.approx(expected, rel=1e-5), "windows": windows, "seqlen": seqlen, "tokens": 5 * seqlen} and windows == 5
    assert result["ppl"] == perplexity(model, ids[: 5 * seqlen], seqlen, "cpu", walk_batch)["ppl"]


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_of_a_quantized_model_is_the_plain_computation(model, method):
    """The plain one runs window by window, ours three at a time: activation scales are per window in both."""
    row, ids = METHODS[method], token_ids(1, 24 * 7)[0]
    recipe = Recipe(method=method, wbits=4 if row.weights else 16, act_bits=6 if row.acts[-1] else 16, smooth=row.smooth[-1])
    full = perplexity(model, ids, 24)["ppl"]
    if row.weights or row.acts[-1]:
        for _ in quantize_blocks(model, ids.view(7, 24), recipe):
            pass
    expected, _ = plain_perplexity(model, ids, 24)
    assert perplexity(model, ids, 24, "cpu", 3)["ppl"] == pytest.approx(expected, rel=1e-3)
    assert (expected == pytest.approx(full, rel=1e-6)) == (method == "full"), "the test would not see quantization"


def test_perplexity_of_a_half_precision_model_takes_its_loss_in_float32():
    model = tiny_model().to(torch.bfloat16)
    ids = token_ids(1, 24 * 5)[0]
    expected, _ = plain_perplexity(model, ids, 24)
    assert perplexity(model, ids, 24)["ppl"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_changes_nothing(model):
    before = deepcopy(model.state_dict())
    ids = token_ids(1, 48)[0]
    assert perplexity(model, ids, 24) == perplexity(model, ids, 24)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_perplexity_shows_progress(capsys):
    perplexity(tiny_model(), token_ids(1, 48)[0], 24, desc="my corpus")
    err = capsys.readouterr().err
    assert re.search(r"my corpus:.*/2 .*block", err) and re.search(r"my corpus: logits.*/2 .*batch", err)


def test_a_perplexity_that_is_not_finite_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.mul_(1e6)  # logits of a million: exp of the loss overflows
    with pytest.raises(FloatingPointError, match="^my corpus: the perplexity is (nan|inf)$"):
        perplexity(model, token_ids(1, 48)[0], 24, desc="my corpus")
    model = tiny_model()
    with torch.no_grad():
        decoder_blocks(model)[1].fc2.bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match="block 1: .*fc2"):
        perplexity(model, token_ids(1, 48)[0], 24)


# ---------------------------------------------------------------------------
# Report


def run_report(line="--method awrq --wbits 4 --smooth"):
    args = opt.parser().parse_args(["a/model", *line.split(), "--device", "cpu", "--walk_batch", "1"])
    clock = Clock("cpu")
    with clock("evaluation"):
        pass
    recipe = make_recipe(args, 64)
    calibration = {"nsamples": 3, "seqlen": 64, "corpus": "c4", "split": "train", "seed": 0, "source": "there", "rule": "random"}
    protocol = {"calibration": calibration if recipe.method != "full" else None, "evaluation": {"ptb": {}}}
    results = {"perplexity": {"ptb": {"ppl": 12.5, "windows": 2, "seqlen": 64, "tokens": 128}}, "tasks": {}}
    return report(args, recipe, tiny_model(), protocol, [], results, None, [Layer(0, "fc1", 0.25), Layer(1, "fc2", 0.5)], clock), recipe


def test_a_report_has_everything_and_goes_through_json():
    run, recipe = run_report()
    assert set(run) == KEYS
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert run["schema"] == evalutils.SCHEMA and run["model"] == "a/model" and run["model_type"] == "opt"
    assert Recipe(**run["recipe"]) == recipe
    assert run["protocol"]["dtype"] == "float32" and {"calibration", "evaluation", "walk_batch"} < set(run["protocol"])
    assert run["results"] == {"perplexity": {"ptb": {"ppl": 12.5, "windows": 2, "seqlen": 64, "tokens": 128}}, "tasks": {}}
    assert run["layers"] == [{"block": 0, "name": "fc1", "error": 0.25}, {"block": 1, "name": "fc2", "error": 0.5}]
    assert set(run["seconds"]) == {"evaluation"}
    assert set(run["peak_bytes"]) == {"host", "device"} and 2**24 < run["peak_bytes"]["host"] < 2**44
    assert run["peak_bytes"]["device"] is None
    assert run["hardware"]["device"] == "cpu" and run["hardware"]["gpu"] is None and run["hardware"]["threads"] > 0


def test_what_is_printed_under_the_table():
    run, _ = run_report()
    text = evalutils.describe(run)
    for part in ("a/model: awrq, W4A8, group -1, float32", "smooth", "3 x 64 tokens of c4 train, seed 0", "evaluation 0.0", "host"):
        assert part in text, text
    assert "calibrated" not in evalutils.describe(run_report("--method full")[0])


def test_versions():
    found = evalutils.versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "torch", "transformers", "datasets", "numpy", "safetensors"} <= set(found)
    assert all(version is None or re.match(r"\d+\.\d+", version) for version in found.values())


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    monkeypatch.setattr(evalutils, "PACKAGES", ("torch", "no-such-package"))
    assert evalutils.versions()["no-such-package"] is None


def test_commit(monkeypatch, tmp_path):
    """Of the folder of the code, wherever one stands; changed files are told; None outside a checkout or without git."""

    def git(*args):
        who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, "-C", tmp_path, *args], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    assert timing.commit() is None
    git("init", "-q")
    assert timing.commit() is None, "no commit yet"
    (tmp_path / "timing.py").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one", "--no-verify")
    assert timing.commit() == git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert timing.commit() == git("rev-parse", "HEAD")
    (tmp_path / "timing.py").write_text("two")
    assert timing.commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", "")
    assert timing.commit() is None


def test_table():
    assert table(("corpus", "perplexity"), [("wikitext2", 5.5), ("c4", "10.25")]).split("\n") == [
        "| corpus    | perplexity |",
        "|-----------|-----------:|",
        "| wikitext2 |        5.5 |",
        "| c4        |      10.25 |",
    ]
    assert table(("a", "b"), []).split("\n") == ["| a | b |", "|---|--:|"]


# ---------------------------------------------------------------------------
# Files


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"ppl": 1.5, "layers": [1, 2]})
    assert json.loads(path.read_text()) == {"ppl": 1.5, "layers": [1, 2]} and path.read_text().endswith("\n")
    write_json(str(path), {"ppl": 2})
    assert json.loads(path.read_text()) == {"ppl": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
@pytest.mark.parametrize("there", [True, False])
def test_or_not_at_all(tmp_path, there, bad):
    path = tmp_path / "run.json"
    if there:
        path.write_text("the old one")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"much": list(range(10**5)), "ppl": bad})  # it fails after much has been written
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the old one"] * there


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("the old one")

    def full(content, f, **kwargs):
        f.write('{"half')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timing.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the old one"]


def test_where_one_can_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("the old one")
    for path in (None, "run.json", str(tmp_path / "run.json"), "new/folder/run.json", "there.json"):
        check_writable(path)
    assert (tmp_path / "there.json").read_text() == "the old one"
    assert not list(tmp_path.glob("**/run.json")) and not list(tmp_path.glob("**/*.partial"))


def test_where_one_cannot_write(tmp_path):
    """A file stands for a folder without permission, which would not stop root."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.json", tmp_path / "file" / "deep" / "run.json"):
        with pytest.raises(OSError) as caught:
            check_writable(str(path))
        message = str(caught.value)
        assert "--output_path" in message and str(path) in message and "\n" not in message and "give" in message
