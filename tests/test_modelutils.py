"""Opening a model: its configuration, weights and tokenizer, and one line for each that cannot be used."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, WORDS, save_model, tiny_model, token_ids, toy_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTForCausalLM

import modelutils
from datautils import eval_tokens
from families import FAMILIES
from formats.checkpoint import write_about
from modelutils import decoder_of, open_decoder
from recipe import UsageError

GPT2 = Path(__file__).parents[2] / "shared/data/tokenizers/gpt2"

# ---------------------------------------------------------------------------
# Configuration and weights


@contextmanager
def one_line(error, *parts):
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.fixture
def folder(tiny_opt, tmp_path):
    """A copy of the tiny model to spoil."""
    return shutil.copytree(tiny_opt, tmp_path / "opt")


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_good_folder_loads(folder):
    config = modelutils.load_config(folder)
    model = open_decoder(folder).materialize(CPU)
    assert config.model_type == "opt" and not model.training
    expected = tiny_model()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in expected.state_dict().items())
    assert modelutils.load_tokenizer(folder)("word3 word1")["input_ids"] == [WORDS.index("word3"), WORDS.index("word1")]


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_the_type_of_a_model(tmp_path, dtype, device, expected):
    """And the type that it is saved in: the checkpoint's, if no other is asked for."""
    decoder = open_decoder(save_model(tmp_path / "half", tiny_model().half()), dtype, torch.device(device))
    assert decoder.dtype == expected == next(decoder.block(0).parameters()).dtype
    assert decoder.stored_dtype == torch.float16  # the checkpoint's, whatever is computed in


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/nowhere/opt", ""])
def test_no_model_there(name):
    with one_line(UsageError, name, "no model there"):
        modelutils.load_config(name)


def test_a_model_of_another_family(folder):
    edit_config(folder, model_type="gpt2")
    with one_line(UsageError, folder, "gpt2", *FAMILIES):
        modelutils.load_config(folder)


@pytest.mark.parametrize("settings", [{"model_type": "not-a-type"}, {"hidden_size": "wide"}])
def test_a_config_that_transformers_refuses(folder, settings):
    edit_config(folder, **settings)
    with one_line(UsageError, folder, next(iter(settings.values()))):
        modelutils.load_config(folder)


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    with one_line(UsageError, folder, "config.json"):
        modelutils.load_config(folder)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_of_a_model_never_runs_and_nothing_is_asked(what, family, tmp_path, monkeypatch):
    """transformers would ask on stdin, and run the code if it is told yes."""
    folder = save_model(tmp_path, tiny_model(family, next(iter(TINY[family]["variants"]))))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the model's code"))
    (folder / "acme.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    if what == "config":
        edit_config(folder, model_type="acmelm", auto_map={"AutoConfig": "acme.AcmeConfig"})
        with one_line(UsageError, folder, "no class of its own for its model_type", "never run"):
            modelutils.load_config(folder)
    else:
        settings = {"tokenizer_class": "AcmeTokenizer", "auto_map": {"AutoTokenizer": ["acme.AcmeTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if family == "opt":  # transformers knows the type's own class, and takes that
            modelutils.load_tokenizer(folder)
        else:
            with one_line(UsageError, folder, "no class of its own for its tokenizer_class", "never run"):
                modelutils.load_tokenizer(folder)
    assert not (folder / "RAN").exists()


def test_a_type_that_transformers_knows_loads_its_own_class_whatever_auto_map_says(folder):
    (folder / "acme.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoConfig": "acme.AcmeConfig", "AutoModelForCausalLM": "acme.Acme"})
    assert type(open_decoder(folder).skeleton) is OPTForCausalLM and not (folder / "RAN").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"use_cache": False},
        {"torchscript": True},
    ],
    ids=str,
)
def test_settings_of_a_run_in_config_json_change_nothing(settings, folder, tmp_path):
    ids = token_ids(2, 16)
    with torch.no_grad():
        expected = tiny_model()(ids).logits
        edit_config(folder, **settings)
        decoder = open_decoder(folder)
        torch.testing.assert_close(decoder.materialize(CPU)(ids).logits, expected)
    decoder.config.save_pretrained(tmp_path / "saved")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with one_line(UsageError, folder, "safetensors", "pytorch_model"):
        open_decoder(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with one_line(UsageError, folder):
        open_decoder(folder)


def test_a_weight_that_is_not_in_the_file(folder):
    """transformers would draw it at random, and say so on a log that we silence."""
    edit_weights(folder, lambda tensors: tensors.pop("model.decoder.layers.1.fc1.weight"))
    with one_line(UsageError, folder, "layers.1.fc1.weight"):
        open_decoder(folder)


def test_a_weight_of_another_shape(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.decoder.layers.1.fc1.weight": torch.zeros(8, 8)}))
    with one_line(UsageError, folder, "layers.1.fc1.weight"):
        open_decoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    edit_weights(folder, lambda tensors: tensors["model.decoder.layers.1.fc1.weight"][2, 3].fill_(value))
    decoder = open_decoder(folder)
    decoder.block(0)
    with one_line(FloatingPointError, folder, "layers.1.fc1.weight"):
        decoder.block(1)


# ---------------------------------------------------------------------------
# Tokenizer


@pytest.fixture
def bpe(tmp_path):
    """A byte-level BPE as OPT's: vocab.json and merges.txt, </s> is 2; the tokenizer alone knows of no first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.model.save(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return folder, tokenizer


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("beside", [True, False], ids=["with tokenizer.json", "without"])
def test_opt_begins_each_text_with_its_first_token(bpe, beside, asks):
    folder, plain = bpe
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": asks}))
    if beside:
        plain.save(str(folder / "tokenizer.json"))
    tokenizer = modelutils.load_tokenizer(folder)
    for text in ("word1 word2", "", "\n\n = Title = \n\n the"):
        assert tokenizer(text)["input_ids"] == [2] * asks + plain.encode(text).ids, repr(text)


def test_the_first_token_is_not_put_twice(bpe):
    """A tokenizer.json that adds it by itself, under a configuration that asks for it."""
    folder, _ = bpe
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    modelutils.load_tokenizer(folder).save_pretrained(folder)
    assert "TemplateProcessing" in (folder / "tokenizer.json").read_text()
    assert modelutils.load_tokenizer(folder)("word1")["input_ids"].count(2) == 1


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPTNeoXTokenizer"])
def test_a_saved_tokenizer_begins_each_text_as_before(bpe, kind, tmp_path):
    """Also one whose class makes nothing of what tokenizer.json says of a first token."""
    folder, plain = bpe
    plain.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind, "add_bos_token": True}))
    tokenizer = modelutils.load_tokenizer(folder)
    for saved in (tmp_path / "once", tmp_path / "twice"):
        saved.mkdir()
        write_about(saved, decoder_of(tiny_model()), tokenizer, {})
        tokenizer = modelutils.load_tokenizer(saved)
        assert tokenizer("word1 word2")["input_ids"] == [2, *plain.encode("word1 word2").ids]


@pytest.mark.skipif(not GPT2.exists(), reason="no ../shared with GPT-2's vocabulary, which OPT renumbers")
def test_wikitext2_has_as_many_tokens_as_everybody_says(tmp_path):
    """287,645 with OPT's tokenizer: GPT-2's 287,644, and </s> before them."""
    words = [word for word in json.loads((GPT2 / "vocab.json").read_text()) if word != "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    shutil.copy(GPT2 / "merges.txt", tmp_path)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ids, _ = eval_tokens("wikitext2", modelutils.load_tokenizer(tmp_path), 2048, GPT2.parents[1])
    assert len(ids) == 287_645 and ids[0] == vocab["</s>"]


@pytest.mark.parametrize("gone", [["tokenizer.json", "tokenizer_config.json"], ["tokenizer.json"]])
def test_no_tokenizer(folder, gone):
    """transformers would make an empty one, which turns every text into nothing."""
    for name in gone:
        (folder / name).unlink()
    with one_line(UsageError, folder, "tokenizer"):
        modelutils.load_tokenizer(folder)


@pytest.mark.parametrize("gone", [["vocab.json", "merges.txt"], ["vocab.json"], ["merges.txt"]])
def test_half_a_tokenizer(bpe, gone):
    for name in gone:
        (bpe[0] / name).unlink()
    with one_line(UsageError, bpe[0], "tokenizer"):
        modelutils.load_tokenizer(bpe[0])


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with one_line(UsageError, folder, "tokenizer"):
        modelutils.load_tokenizer(folder)


def test_a_vocabulary_that_does_not_fit():
    config = tiny_model().config
    modelutils.check_vocabulary(config, [torch.tensor([1, config.vocab_size - 1]), torch.zeros(2, 3)])
    with one_line(UsageError, config.vocab_size):
        modelutils.check_vocabulary(config, [torch.tensor([1]), torch.tensor([[0, config.vocab_size]])])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": -64, "num_attention_heads": 4}, "negative dimension"),
        ({"hidden_act": "wow"}, "'wow'"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1}}, "'nope'"),
        ({"pad_token_id": 99999}, "Padding_idx"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_a_configuration_that_makes_no_model_is_a_line(changes, reason, tmp_path):
    folder = save_model(tmp_path / "m", tiny_model("llama", "plain"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with one_line(UsageError, folder, "config.json", reason, "correct it"):
        modelutils.open_decoder(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_generation_config_is_a_line(text, tmp_path):
    folder = save_model(tmp_path / "m", tiny_model("llama", "plain"))
    (folder / "generation_config.json").write_text(text)
    with one_line(UsageError, folder / "generation_config.json", "correct it or take it away"):
        modelutils.open_decoder(folder)


def test_a_tokenizer_that_cannot_tokenize_is_a_line(tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with one_line(UsageError, tmp_path, "no usable tokenizer there"):
        modelutils.load_tokenizer(tmp_path)
