"""Folders of ours in transformers' own classes, and whole models that write such folders again."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, tiny_model, token_ids
from safetensors.torch import load_file
from test_checkpoint import TYPES, saved, settings_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import awrq_hf
from formats import hub
from formats.checkpoint import open_checkpoint
from formats.whole import load, saves_itself
from quant import IntLinear, Part
from recipe import UsageError

IDS = token_ids(2, 16)
CASES = [
    *((kind, {"wbits": 3, "groupsize": 24}) for kind in (TYPES[0], TYPES[2])),
    (TYPES[1], {"smooth": True}),  # keeps in_scale
    (TYPES[3], {"rotate": True, "act_pertoken": True, "act_sym": True, "smooth": True}),
    (TYPES[3], {"wbits": 4}),  # tied
    (TYPES[4], {"wbits": 4}),
    (TYPES[0], {"wbits": 6}),
    (TYPES[2], {"method": "gptq", "act_bits": 16}),
]


def in_transformers(folder, arithmetic="auto", **arguments):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["arithmetic"] = arithmetic
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **arguments)


def weights(folder):
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for file in a:
        assert a[file].keys() == b[file].keys()
        assert all(t.dtype == b[file][name].dtype and t.equal(b[file][name]) for name, t in a[file].items())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=settings_id)
def test_transformers_loads_a_folder_as_we_do(kind, settings, tmp_path):
    """The same logits to the last bit, in either arithmetic and in another type; padding is no part of a row, whoever generates."""
    saved(tmp_path / "a", tiny_model(*kind), settings)
    for arithmetic, dtype in (("auto", "float32"), ("integers", "float32"), ("integers", "bfloat16")):
        ours, theirs = load(tmp_path / "a", dtype, arithmetic=arithmetic), in_transformers(tmp_path / "a", arithmetic, dtype=dtype)
        assert theirs(IDS).logits.equal(ours(IDS).logits)
    padded = torch.cat((torch.ones_like(IDS[:1, :5]), IDS[:1, :11]), 1)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    logits = [model(torch.cat((padded, IDS[1:])), attention_mask=mask).logits for model in (ours, theirs)]
    with ours.batch.padded(mask.bool()):
        expected = ours(torch.cat((padded, IDS[1:])), attention_mask=mask).logits
    assert all(found[mask.bool()].equal(expected[mask.bool()]) for found in logits) and theirs.batch.real is None
    assert theirs.generate(IDS, max_new_tokens=3, do_sample=False).equal(ours.generate(IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["integers", "dequantized"])
@pytest.mark.parametrize(
    ("kind", "settings"), [(("opt", "bare"), {"smooth": True}), (("llama", "plain"), {"groupsize": 24}), CASES[3]], ids=settings_id
)
def test_a_model_in_another_type_is_as_if_loaded_in_it(kind, settings, arithmetic, tmp_path):
    """As scales stay float32: without biases, which stay so too, the same logits to the last bit, whoever loaded it."""
    saved(tmp_path / "a", tiny_model(*kind), settings)
    for made, dtype in (
        (load(tmp_path / "a", "float32", arithmetic=arithmetic).half(), "float16"),
        (load(tmp_path / "a", "float32", arithmetic=arithmetic).to(torch.bfloat16), "bfloat16"),
        (in_transformers(tmp_path / "a", arithmetic, dtype="float32").to(torch.bfloat16), "bfloat16"),
    ):
        wanted = load(tmp_path / "a", dtype, arithmetic=arithmetic)
        if kind[0] != "opt":
            made.model.rotary_emb = wanted.model.rotary_emb  # whose frequencies transformers leaves in float32 only when it loads
        logits = made(IDS).logits
        assert logits.dtype == made.dtype == getattr(torch, dtype) and logits.equal(wanted(IDS).logits)
        buffers = dict(made.named_buffers())
        assert all(b.dtype == buffers[name].dtype and b.equal(buffers[name]) for name, b in wanted.named_buffers())


def test_padding_is_found_out_by_itself(tmp_path):
    """A row of a padded batch gets the logits that it has alone."""
    saved(tmp_path / "a", tiny_model(*TYPES[2]))
    model = in_transformers(tmp_path / "a", "integers")
    mask = torch.ones_like(IDS)
    mask[0, 11:] = 0
    together, alone = model(IDS, attention_mask=mask).logits[0, :11], model(IDS[:1, :11]).logits[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (model(IDS).logits[0, :11] - alone).abs().max() > 1e-4, "else padding would not matter"


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 6])
def test_a_whole_model_writes_its_folder_again(number, tmp_path):
    kind, settings = CASES[number]
    saved(tmp_path / "a", tiny_model(*kind).half().float(), settings, stored_dtype=torch.float16)
    expected = load(tmp_path / "a")(IDS).logits
    for name, whole in (
        ("dequantized", load(tmp_path / "a")),
        ("integers", load(tmp_path / "a", arithmetic="integers")),
        ("copied", copy.deepcopy(load(tmp_path / "a"))),
        ("transformers", AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="auto", dtype="float32")),
        ("transformers in integers", in_transformers(tmp_path / "a", "integers", dtype="float32")),
        ("visiting", open_checkpoint(tmp_path / "a")),
    ):
        if name == "visiting":  # its blocks are packed, in host memory
            whole, decoder = whole.materialize(CPU, memory=0), whole
            whole.name_or_path = str(tmp_path / "a")
            saves_itself(whole, decoder.source.recipe, {}, decoder.stored_dtype)
        whole.save_pretrained(tmp_path / name)
        same_weights(tmp_path / "a", tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
        assert load(tmp_path / name)(IDS).logits.equal(expected)


def test_linears_that_read_one_input_are_one_in_transformers_too(tmp_path):
    """As in our own `load`: an input is quantized and multiplied once for q, k and v."""
    saved(tmp_path / "a", tiny_model(*TYPES[2]))
    counts = [
        {kind.__name__: sum(isinstance(module, kind) for module in model.modules()) for kind in (IntLinear, Part)}
        for model in (load(tmp_path / "a", arithmetic="integers"), in_transformers(tmp_path / "a", "integers"))
    ]
    assert counts[0] == counts[1] == {"IntLinear": 2 * 4, "Part": 2 * 5}


def test_what_wrote_a_folder_is_said_by_whoever_writes_it_again(tmp_path):
    """Its origin stays; versions and commit are those of the writer."""
    saved(tmp_path / "a", tiny_model())
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"model": "me/base", "commit": "old", "versions": {"torch": "old"}}
    path.write_text(json.dumps(config))
    for name, model in (("ours", load(tmp_path / "a")), ("theirs", in_transformers(tmp_path / "a"))):
        model.save_pretrained(tmp_path / name)
        about = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert about["model"] == "me/base" and about["commit"] != "old" and about["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_saving_what_was_changed_beside_a_tokenizer(tmp_path):
    """A changed norm is saved; files that are there stay, old shards go."""
    saved(tmp_path / "a", tiny_model(*TYPES[2]))
    model = load(tmp_path / "a")
    model.model.norm.weight.data.mul_(2)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "awrq-00009-of-00009.safetensors").write_text("of another model")
    model.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b")(IDS).logits.equal(model(IDS).logits) and not list((tmp_path / "b").glob("*00009*"))
    assert all(path.is_file() for path in (tmp_path / "b").iterdir())
    with pytest.raises(UsageError, match="variant"):
        model.save_pretrained(tmp_path / "c", variant="fp16")
    assert not (tmp_path / "c").exists()


def test_what_cannot_replace_a_model_is_not_lost(tmp_path, monkeypatch):
    """Where a file cannot be moved there is no model, the rest is beside it, in the same folder, and moving it makes the new model."""
    saved(tmp_path / "a", tiny_model(*TYPES[2]))
    model, replace = load(tmp_path / "a"), os.replace
    model.model.norm.weight.data.mul_(2)

    def fail(source, target):
        if Path(target) == tmp_path / "a" / "awrq-00002-of-00003.safetensors":
            raise OSError(errno.ENOSPC, "disk full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="a: not all .*disk full.*the rest is in ") as e:
            model.save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="index.json: missing"):
        load(tmp_path / "a")
    (rest,) = (path for path in (tmp_path / "a").iterdir() if path.is_dir())
    assert str(rest) in str(e.value)
    for path in rest.iterdir():
        replace(path, tmp_path / "a" / path.name)
    assert load(tmp_path / "a")(IDS).logits.equal(model(IDS).logits)


@pytest.mark.slow
def test_sending_a_whole_model(tmp_path, monkeypatch):
    saved(tmp_path / "a", tiny_model(*TYPES[0]))
    sent = []

    def upload(folder, repo, token=None, **arguments):
        assert load(folder)(IDS).logits.equal(model(IDS).logits)
        sent.append((repo, token, arguments))

    monkeypatch.setattr("formats.whole.upload", upload)
    monkeypatch.setattr("formats.whole.create_repo", lambda repo, token=None, private=None: f"me/{repo}")
    model = load(tmp_path / "a")
    model.push_to_hub("a", token="t", commit_message="new")
    model.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert sent == [("me/a", "t", {"commit_message": "new"}), ("me/b", None, {})]


def test_what_transformers_cannot_load(tmp_path):
    saved(tmp_path / "a", tiny_model(*TYPES[0]))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for change, parts in (
        ({"format": 99}, ["format 99", "update the code"]),
        ({"arithmetic": "float"}, ["arithmetic float", "integers"]),
        ({"recipe": config["quantization_config"]["recipe"] | {"new": 1}}, ["damaged", "another version"]),
    ):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        with pytest.raises(UsageError) as e:
            AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert all(part in str(e.value) for part in parts), e.value
    assert awrq_hf.AwrqConfig(**config["quantization_config"]).to_dict() == config["quantization_config"]


# ---------------------------------------------------------------------------
# The hub


class Hub:
    """Stands for huggingface_hub.HfApi."""

    fails = False
    sent = ()
    role = "write"

    def whoami(self, token=None):
        return {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo, **_):
        return type("Url", (), {"repo_id": repo if "/" in repo else f"me/{repo}"})

    def upload_folder(self, **arguments):
        if Hub.fails:
            raise RuntimeError("no room\nat all")
        Hub.sent = (arguments["repo_id"], arguments["folder_path"])


def test_the_hub(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no name of a repository"):
        hub.check_push("a/b/c")
    with pytest.raises(UsageError, match="me/x: .*(no token|cannot be reached)"):  # no test reaches the network
        hub.check_push("me/x")
    monkeypatch.setattr(hub, "HfApi", Hub)
    hub.check_push("me/x")
    hub.check_push("us/x")
    hub.check_push("x")
    with pytest.raises(UsageError, match="of me, us, not of them"):
        hub.check_push("them/x")
    monkeypatch.setattr(Hub, "role", "read")
    with pytest.raises(UsageError, match="me/x: this token may only read"):
        hub.check_push("me/x")
    assert hub.push(tmp_path, "x") == "me/x" and Hub.sent == ("me/x", str(tmp_path))
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(OSError, match=f"not sent .no room.; {tmp_path} is complete: hf upload me/x {tmp_path}"):
        hub.push(tmp_path, "me/x")
