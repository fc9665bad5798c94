"""Model cards, sizes by part, and the type of what is not quantized."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_model, tiny_model, token_ids, toy_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_checkpoint import TYPES, recipe, saved
from test_runs import AWRQ
from test_runs import cli as cli

from formats.card import base_license, base_name, calibration_line, model_card, size_line, tensor_bytes
from formats.checkpoint import stored
from formats.export import export
from formats.whole import load

TEXT = ("--calib_data", "own", "--nsamples", 3, "--seqlen", 16, "--device", "cpu")


def test_every_folder_has_a_valid_card(cli, tmp_path, corpora):
    """With what was measured, and the licence of the base model."""
    base = save_model(tmp_path / "base", tiny_model())
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en\n---\n# Base\n")
    text = (*TEXT, "--data_dir", corpora, "--eval", "own")
    folders = [tmp_path / name for name in ("saved", "exported")]
    path = tmp_path / "run.json"
    status, out, err = cli(base, *AWRQ, *text, "--save", folders[0], "--export", "compressed-tensors", folders[1], "--output_path", path)
    assert status == 0 and out.count("MB are unquantized") == 2, err
    ppl = json.loads(path.read_text())["results"]["perplexity"]["own"]["ppl"]
    for folder, library, command in zip(folders, ("awrq", "compressed-tensors"), ("import awrq_hf", "from_pretrained"), strict=True):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("base", "quantized", "transformers")
        assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE") and "language" not in data
        assert {library, "w4a8"} <= set(data["tags"]) and command in card.text and str(tmp_path) not in card.content
        assert f"{ppl:.4f}" in card.text and "windows of 16 tokens" in card.text and "wbits: 4" in card.text
        assert ("before the export" in card.text) == (folder.name == "exported"), "a reader of it can compute otherwise"
    assert base_name("meta-llama/Llama-2-7b") == "meta-llama/Llama-2-7b" and base_license(tmp_path) == {}


def test_what_a_card_says_of_calibration():
    used = {"nsamples": 3, "seqlen": 16, "corpus": "c4", "split": "train", "seed": 0}
    assert calibration_line(used, recipe()) == "Calibrated on 3 x 16 tokens of c4 train, seed 0."
    assert calibration_line(used | {"tune_samples": 8}, recipe()) == "Calibrated on 3 x 16 tokens of c4 train, seed 0, tuned on 8 more."
    assert "not known" in calibration_line(None, recipe())


@pytest.mark.parametrize(
    ("settings", "calibrated"),
    [({}, False), ({"smooth": True}, True), ({"bias_correction": True}, True), ({"tune_steps": 1}, True), ({"method": "gptq"}, True)],
    ids=str,
)
def test_what_needs_no_calibration_text_says_so(settings, calibrated):
    about = {"calibration": {"nsamples": 3, "seqlen": 16, "corpus": "c4", "split": "train", "seed": 0}}
    card = model_card(about, recipe(**{"method": "rtn"} | settings), ("transformers", ()), [], "")
    assert ("Calibrated on" in card, "needed no calibration text" in card) == (calibrated, not calibrated)


def test_sizes_by_part(tmp_path):
    """They add up to the files' own, whatever the format."""
    store = saved(tmp_path / "saved", tiny_model(*TYPES[3]), {"rotate": True})
    export(store, tmp_path / "exported", "compressed-tensors", toy_tokenizer())
    matrix = 100 * 32 * 4  # embedding, and the head that a rotation unties
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        sizes = tensor_bytes(folder)
        assert sizes == {name: t.nbytes for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        line = size_line({name: 1000 * size for name, size in sizes.items()}, store.original.family)
        linears = sum(size for name, size in sizes.items() if "proj" in name)
        whole = sum(sizes.values())
        assert line.startswith(f"{(whole - linears) / 1000:.1f} of {whole / 1000:.1f} MB are unquantized"), line
        assert f"embedding {matrix / 1000:.1f}, head {matrix / 1000:.1f}" in line


@pytest.mark.slow
def test_what_is_not_quantized_in_16_bits(tmp_path):
    """And in no larger type than the checkpoint's.  What was measured is what is saved."""
    ids = token_ids(2, 16)
    for rotate in (False, True):
        store = saved(tmp_path / f"{rotate}", tiny_model(*TYPES[2]), {"rotate": rotate, "rest_dtype": "bfloat16"}, torch.bfloat16)
        for path in (tmp_path / f"{rotate}").glob("*.safetensors"):
            kinds = {name: t.dtype for name, t in load_file(path).items()}
            assert all(kind == torch.bfloat16 for name, kind in kinds.items() if not name.endswith(("codes", "scale", "zero"))), kinds
        measured = store.decoder().materialize(torch.device("cpu"))(ids).logits
        assert measured.equal(load(tmp_path / f"{rotate}", arithmetic="dequantized")(ids).logits)
    half = torch.ones(3, dtype=torch.float16)
    assert stored(half, "norm.weight", torch.float32).dtype == torch.float16
    assert stored(half / 3, "norm.weight", torch.bfloat16).dtype == torch.float16, "as it would change"
    assert stored(half / 3, "norm.weight", torch.bfloat16, forced=True).dtype == torch.bfloat16
    assert stored(half.float(), "fc1.in_scale", torch.bfloat16, forced=True).dtype == torch.float32
    with pytest.raises(FloatingPointError, match="--rest_dtype float16: norm.weight"):
        stored(torch.tensor([1e6]), "norm.weight", torch.float16, forced=True)
    assert recipe().rest_dtype == "auto"


@pytest.mark.slow
def test_in_which_arithmetic_a_loaded_model_computes(cli, tmp_path, corpora):
    saved(tmp_path / "saved", tiny_model())
    common = ("--load", tmp_path / "saved", "--data_dir", corpora, "--eval", "own", "--device", "cpu")
    dequantized, integers = "12 linears in floating point, on dequantized numbers", "12 linears in integers (torch kernel)"
    for flags, evaluates, decodes in (
        ((), integers, dequantized),
        (("--arithmetic", "integers"), integers, integers),
        (("--arithmetic", "dequantized"), dequantized, dequantized),
    ):
        status, out, err = cli(*common, *flags, "--benchmark", 4, "--benchmark_prefill", 4)
        assert status == 0 and f"arithmetic: {evaluates}" in out and out.count(f"call by call, a fixed cache, {decodes}") == 1, (out, err)
        assert f"call by call, {decodes}" in out
    saved(tmp_path / "wide", tiny_model(), {"wbits": 5})
    for flags, parts in (
        (("--load", tmp_path / "wide", "--arithmetic", "integers"), ["--arithmetic integers", "5-bit"]),
        (("--load", tmp_path / "saved", "--arithmetic", "dequantized", "--kernel", "torch"), ["--kernel", "--arithmetic integers"]),
        (("--load", tmp_path / "saved", "--push_to_hub", "me/x"), ["--push_to_hub", "--save or --export"]),
        (("--load", tmp_path / "saved", "--gguf_like", "x"), ["--gguf_like", "--export gguf"]),
        (("--load", tmp_path / "saved", "--export", "gguf", "x"), ["--gguf_like FILE"]),
        (("--load", tmp_path / "saved", "--rest_dtype", "float16"), ["--rest_dtype", "--load"]),
    ):
        status, _, err = cli(*flags, "--data_dir", corpora, "--eval", "own", "--device", "cpu")
        assert status == 2 and len(err) == 1 and all(part in err[0] for part in parts), err


def test_sending_a_finished_folder(cli, tiny_opt, tmp_path, corpora, monkeypatch):
    """The token is looked at before anything long; the folder that is sent has its numbers."""
    sent = []

    def push(folder, repo):
        sent.append((folder, repo, Path(folder, "README.md").read_text()))
        return f"me/{repo}"

    monkeypatch.setattr("run.pipeline.push", push)
    monkeypatch.setattr("run.checks.check_push", lambda repo: sent.append(repo))
    arguments = (tiny_opt, *AWRQ, *TEXT, "--data_dir", corpora, "--eval", "own", "--push_to_hub", "x")
    status, out, err = cli(*arguments, "--save", tmp_path / "saved")
    assert status == 0 and sent[0] == "x" and sent[1][:2] == (str(tmp_path / "saved"), "x") and "perplexity" in sent[1][2], err
    assert "https://huggingface.co/me/x" in out
    status, _, err = cli(*arguments, "--save", tmp_path / "a", "--export", "compressed-tensors", tmp_path / "b")
    assert status == 2 and "one folder" in err[0]
