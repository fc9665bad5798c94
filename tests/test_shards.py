"""Tensors by name: from safetensors and pickles, single or sharded, whole in memory of their own, and never unpickled unsafely."""

import json
import os
import pickle
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CPU, save_model, tiny_model, token_ids, toy_tokenizer
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from formats import shards
from formats.checkpoint import Store
from formats.shards import Claim, Tensors, find_weights, new_folder, read_shard, sha256, write_shard
from formats.whole import load
from modelutils import decoder_of, open_decoder
from recipe import Recipe, UsageError
from run.quantize import quantize_blocks

IDS = token_ids(2, 12)
BLOCK = "model.decoder.layers.1."


@contextmanager
def one_line(*parts, error=UsageError):
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def pickled(folder, tensors, n=1, zipped=True):
    """Write pytorch_model.bin, or n shards of it with an index."""
    names = list(tensors)
    files = [f"pytorch_model-{k + 1:05}-of-{n:05}.bin" for k in range(n)] if n > 1 else ["pytorch_model.bin"]
    parts = {file: {name: tensors[name] for name in names[k::n]} for k, file in enumerate(files)}
    for file, part in parts.items():
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    if n > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def folder_of(folder, model, kind):
    """A model saved as a kind says: "safetensors" or "bin", "old" bin; "sharded"; of the "body" alone, as real OPT ones are."""
    source = model.model if "body" in kind else model
    save_model(folder, source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OPTForCausalLM"]}))
    if "sharded" in kind and "bin" not in kind:
        source.save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
    if "bin" in kind or "old" in kind:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        pickled(folder, source.state_dict(), 3 if "sharded" in kind else 1, "old" not in kind)
    return folder


KINDS = ["safetensors", "safetensors sharded", "bin", "bin sharded", "old", "safetensors body", "bin body", "bin sharded body", "old body"]


TYPES = (torch.float32, torch.float16, torch.bfloat16)
BY_FORMAT = [[kind for kind in KINDS if kind.startswith(name)] for name in ("safetensors", "bin", "old")]
LAYOUTS = [(kind, TYPES[k % 3]) for kinds in BY_FORMAT for k, kind in enumerate(kinds)] + [("old", TYPES[2])]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), LAYOUTS, ids=str)  # every layout, and every format with every type
def test_every_layout_is_the_model(kind, dtype, tmp_path, capsys):
    model = tiny_model().to(dtype)
    decoder = open_decoder(folder_of(tmp_path, model, kind), str(dtype).removeprefix("torch."))
    whole = decoder.materialize(CPU)
    assert whole.state_dict().keys() == model.state_dict().keys()
    assert all(t.equal(whole.state_dict()[name]) for name, t in model.state_dict().items())
    out = capsys.readouterr().out
    assert ("in torch's old format" in out and "GiB" in out) == ("old" in kind)
    assert decoder.source.digest(1) == decoder_of(model).source.digest(1), "whatever file a tensor is in"


def test_sharded_means_sharded(tmp_path):
    for kind in ("safetensors sharded", "bin sharded"):
        folder = tmp_path / kind
        assert len(find_weights(folder_of(folder, tiny_model(), kind)).states) > 2


def test_safetensors_are_preferred(tmp_path):
    folder = folder_of(tmp_path, tiny_model(), "safetensors")
    pickled(folder, {})
    assert find_weights(folder).opened is shards._safetensors


def test_a_head_of_its_own_although_the_class_ties(tmp_path):
    """Both are in the file, and differ: transformers does not tie them either."""
    folder = folder_of(tmp_path, tiny_model(), "safetensors")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    decoder = open_decoder(folder)
    assert not decoder.source.tied
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        torch.testing.assert_close(decoder.materialize(CPU)(IDS).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("there", ["embedding", "head", "both", "head of its own"])
def test_tied_tensors_survive_a_save(there, tmp_path):
    """Whichever of the two a file has, what is saved of it loads again, and is the same model."""
    folder = folder_of(tmp_path / "source", tiny_model(), "safetensors")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.decoder.embed_tokens.weight"]
    if there != "embedding":
        tensors["lm_head.weight"] = embedding * 2 if there == "head of its own" else embedding.clone()
    if there == "head":
        del tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    decoder, recipe = open_decoder(folder), Recipe("rtn", wbits=8, act_bits=8)
    store = Store(decoder, recipe)
    list(quantize_blocks(decoder, IDS, recipe, store))
    store.save(tmp_path / "saved", toy_tokenizer())
    with torch.no_grad():
        assert load(tmp_path / "saved")(IDS).logits.equal(store.decoder().materialize(CPU)(IDS).logits)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_no_mapping_survives_a_read(kind, tmp_path):
    folder = folder_of(tmp_path, tiny_model(), kind)
    found = find_weights(folder)
    tensors = found.read(list(found.shapes))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors.values())


def test_views_and_tied_tensors_of_a_pickle(tmp_path):
    """Transposed, a slice of a large storage, and two names for one storage."""
    big = torch.arange(1000.0)
    tensors = {"transposed": big[:6].view(2, 3).T, "slice": big[10:14], "one": big[:4], "two": big[:4]}
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        found = find_weights(tmp_path)
        assert found.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
        for name, t in found.read(list(tensors)).items():
            assert t.equal(tensors[name]) and t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes


def test_tensors_in_memory_are_copied():
    tensors = Tensors({"a": torch.ones(2, requires_grad=True)})
    tensors.read(["a"])["a"].zero_()
    assert tensors.shapes == {"a": (2,)} and tensors.tensors["a"].sum() == 2


# ---------------------------------------------------------------------------
# What cannot be read


class Ran:
    """Unpickling this runs code."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_index(path, change):
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


SPOILT = {  # layout, how it is spoilt, what the message names
    "no weights": ("safetensors", lambda f: (f / "model.safetensors").unlink(), ["no weights", "pytorch_model"]),
    "a truncated file": ("safetensors", lambda f: truncate(f / "model.safetensors"), ["model.safetensors", "damaged"]),
    "an empty file": ("safetensors", lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
    "a truncated pickle": ("bin", lambda f: truncate(f / "pytorch_model.bin"), ["pytorch_model.bin", "damaged"]),
    "a truncated old pickle": ("old", lambda f: truncate(f / "pytorch_model.bin"), ["pytorch_model.bin", "damaged"]),
    "no pickle at all": ("bin", lambda f: (f / "pytorch_model.bin").write_text("<html>"), ["pytorch_model.bin"]),
    "a pickle that runs code": (
        "bin",
        lambda f: torch.save({"a": Ran()}, f / "pytorch_model.bin"),
        ["pytorch_model.bin", "without running"],
    ),
    "a raw pickle that runs code": (
        "bin",
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Ran())),
        ["pytorch_model.bin", "without running"],
    ),
    "a nested pickle": ("bin", lambda f: torch.save({"state_dict": {}}, f / "pytorch_model.bin"), ["no flat list of tensors"]),
    "a list": ("bin", lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), ["no flat list of tensors"]),
    "a missing shard": ("safetensors sharded", lambda f: sorted(f.glob("*00002-of*"))[0].unlink(), ["00002-of", "missing"]),
    "a missing pickled shard": ("bin sharded", lambda f: sorted(f.glob("*00002-of*"))[0].unlink(), ["00002-of-00003.bin", "missing"]),
    "a truncated shard": ("safetensors sharded", lambda f: truncate(sorted(f.glob("*00002-of*"))[0]), ["00002-of", "damaged"]),
    "a truncated pickled shard": ("bin sharded", lambda f: truncate(sorted(f.glob("*00002-of*"))[0]), ["00002-of-00003.bin", "damaged"]),
    "an index that lists too much": (
        "bin sharded",
        lambda f: edit_index(f / "pytorch_model.bin.index.json", lambda m: m.update({"what": next(iter(m.values()))})),
        ["index.json", "the tensor what", "no shard has"],
    ),
    "an index that lists nothing by name": (
        "bin sharded",
        lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map": ["a"]}'),
        ["index.json", "damaged", "weight_map"],
    ),
    "half an index": ("bin sharded", lambda f: truncate(f / "pytorch_model.bin.index.json"), ["index.json", "damaged"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_read_is_named(case, tmp_path, monkeypatch):
    kind, spoil, parts = SPOILT[case]
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path / "model", tiny_model(), kind)
    spoil(folder)
    with one_line(folder, *parts):
        open_decoder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_changes_while_it_is_read(kind, tmp_path):
    decoder = open_decoder(folder_of(tmp_path, tiny_model(), kind))
    decoder.block(0)
    os.utime(next(tmp_path.glob("*model.*")), (1, 1))
    with one_line("model.", "has changed while it was read"):
        decoder.block(1)


def with_tensors(folder, more):
    """A LLaMA of two blocks in a folder, whose file has more tensors than the model: {name: tensor}."""
    save_model(folder, tiny_model("llama", "plain"))
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "mlp.up_proj.weight_scale", "self_attn.q_proj.lora_A.weight", "input_layernorm.bias"]
)
def test_a_tensor_without_a_place_in_a_block_is_refused(name, tmp_path):
    """transformers drops it and says nothing: every number would be that of another model."""
    folder = with_tensors(tmp_path, {f"model.layers.{i}.{name}": torch.ones(3) for i in range(2)})
    with one_line(tmp_path, f"model.layers.0.{name} (2 such", "config.json"):
        open_decoder(folder)


@pytest.mark.parametrize(("name", "parts"), [("model.layers.2.mlp.up_proj.weight", "config.json's 2"), ("lm_head.bias", "outside")])
def test_a_tensor_beyond_the_blocks_is_warned_of(name, parts, tmp_path):
    with pytest.warns(UserWarning, match=f"no place for 1 weights .*{parts}.*{name}"):
        open_decoder(with_tensors(tmp_path, {name: torch.ones(3)}))


@pytest.mark.parametrize("name", ["self_attn.rotary_emb.inv_freq", "attention.masked_bias"])
def test_what_old_versions_saved_is_left_out_without_a_word(name, tmp_path):
    with warnings.catch_warnings(action="error"):
        open_decoder(with_tensors(tmp_path, {f"model.layers.1.{name}": torch.ones(3)}))


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    save_model(tmp_path, tiny_model())
    (tmp_path / "adapter_config.json").write_text("{}")
    with one_line(tmp_path, "adapter_config.json", "merge it"):
        open_decoder(tmp_path)


def test_experts_are_refused(tmp_path):
    """transformers merges their tensors when it loads them."""
    config = AutoConfig.for_model("mixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.num_key_value_heads, config.vocab_size = 2, 32
    model = AutoModelForCausalLM.from_config(config)
    from formats.names import model_names

    with one_line("experts", "merges or splits"):
        model_names(model, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])


# ---------------------------------------------------------------------------
# The hub, made up where its client sends its requests


def test_a_hub_model_of_pickles_is_read_without_its_conversion_service(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "source", tiny_model(), "bin body")
    toy_tokenizer().save_pretrained(source)
    http = sys.modules[type(default_client_factory()).__module__.partition(".")[0]]
    asked = []

    def answer(request):
        asked.append(request.url.path)
        name = request.url.path.rpartition("/")[2]
        file = source / name
        if "/resolve/" not in request.url.path or not file.is_file():
            return http.Response(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{name}"', "Content-Length": str(file.stat().st_size)}
        return http.Response(200, headers=headers, content=b"" if request.method == "HEAD" else file.read_bytes())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_client_factory(lambda: http.Client(transport=http.MockTransport(answer)))
    try:
        found = find_weights("someone/opt")
    finally:
        set_client_factory(default_client_factory)
    assert found.read(["decoder.layers.1.fc1.weight"])["decoder.layers.1.fc1.weight"].equal(tiny_model().model.decoder.layers[1].fc1.weight)
    assert {path for path in asked if "opt" in path} == {
        f"/someone/opt/resolve/main/{name}" for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    }
    assert not [path for path in asked if "convert" in path or "discussions" in path]


# ---------------------------------------------------------------------------
# Our own shards and folders


def test_a_shard_is_read_as_it_was_written(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5, dtype=torch.uint8)}
    sums = write_shard(tmp_path / "s.safetensors", tensors)
    assert sums == {name: sha256(t) for name, t in tensors.items()}
    found = read_shard(tmp_path / "s.safetensors", sums)
    assert all(t.equal(tensors[name]) for name, t in found.items()) and found.keys() == tensors.keys()
    with one_line("s.safetensors", "tensor c is missing"):
        read_shard(tmp_path / "s.safetensors", {"c": ""})
    with one_line("s.safetensors", "tensor a is damaged"):
        read_shard(tmp_path / "s.safetensors", {"a": ""})


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and (tmp_path / "new/file").is_file()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_get_its_name_is_kept(tmp_path):
    with one_line("new.partial", "rename", error=OSError), new_folder(tmp_path / "new") as partial:
        (partial / "work").write_text("of hours")
        (tmp_path / "new").mkdir()
        (tmp_path / "new/something").write_text("")
    assert (tmp_path / "new.partial/work").read_text() == "of hours"


def test_a_claim_ends_with_its_object(tmp_path):
    claim = Claim(tmp_path, "that folder")
    with one_line("that folder", "another run"):
        Claim(tmp_path, "that folder")
    del claim
    Claim(tmp_path, "that folder")
