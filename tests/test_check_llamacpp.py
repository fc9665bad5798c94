"""scripts/check_llamacpp.py, with our own model in the place of llama.cpp's."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, tiny_model
from test_checkpoint import TYPES, saved

from modelutils import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_llamacpp  # noqa: E402


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A stand-in for the package: of any file that is there, a Llama that is what --save wrote to "saved", its logits times `factor`."""

    class Llama:
        factor = 1.0
        merged = False  # whether it reads a text as other tokens

        def __init__(self, path, **_):
            if not Path(path).exists():
                raise ValueError(f"Model path does not exist: {path}")
            self.model = check_llamacpp.without_activations(tmp_path / "saved").materialize(CPU)
            self.tokenizer = load_tokenizer(tmp_path / "saved")

        def reset(self):
            self.scores = None

        def eval(self, tokens):
            with torch.no_grad():
                self.scores = (self.model(torch.tensor([tokens])).logits[0] * self.factor).numpy()

        def generate(self, prompt, **_):
            while True:
                yield 7

        def tokenize(self, text, **_):
            return self.tokenizer(text.decode(), add_special_tokens=False)["input_ids"][: 1 if self.merged else None]

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    return Llama


def test_comparing_with_llama_cpp(run_script, llama_cpp, corpora, tmp_path, monkeypatch):
    """Green where it computes what we do, whose activations are not quantized; red where perplexity or tokens are others."""
    saved(tmp_path / "saved", tiny_model(*TYPES[2]), {"act_bits": 4})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.gguf").touch()
    (tmp_path / "original.gguf").touch()
    arguments = (tmp_path / "saved", tmp_path / "out", "--data_dir", corpora, "--eval", "own", "--seqlen", 16, "--windows", 2)
    status, out, _ = run_script(check_llamacpp, *arguments, "--original", tmp_path / "original.gguf")
    assert status == 0 and "within 1% of ours" in out and out.count("The capital of France is") == 3, out
    corpus, windows, w4a4, w4a16, export, original, off = (cell.strip() for cell in out.splitlines()[2].strip("|").split("|"))
    assert (corpus, windows, off) == ("own", "2", "+0.00%") and export == original
    assert float(export) == pytest.approx(float(w4a16), rel=1e-5) != pytest.approx(float(w4a4), rel=1e-5)
    for change, part in (({"factor": 3.0}, "NOT what we compute"), ({"merged": True}, "llama.cpp reads 'The capital of France is' as")):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(llama_cpp, name, value)
            status, out, _ = run_script(check_llamacpp, *arguments)
        assert status == 1 and part in out, out


def test_what_cannot_be_compared(run_script, llama_cpp, tmp_path, monkeypatch):
    saved(tmp_path / "saved", tiny_model(*TYPES[2]))
    for wrong, part in (
        ((tmp_path / "saved", tmp_path / "nowhere"), "nowhere/model.gguf: llama.cpp does not open it"),
        ((tmp_path / "saved", tmp_path / "nowhere", "--seqlen", 1), "--seqlen 1"),
        ((tmp_path / "nowhere", tmp_path / "nowhere"), "no checkpoint there"),
    ):
        status, _, err = run_script(check_llamacpp, *wrong)
        assert status == 2 and len(err) == 1 and part in err[0], err
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    status, _, err = run_script(check_llamacpp, tmp_path / "saved", tmp_path / "nowhere")
    assert status == 2 and "llama-cpp-python is not here" in err[0], err
