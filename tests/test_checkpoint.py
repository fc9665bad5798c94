"""Packed checkpoints against the model that was saved, and every way in which a folder can be damaged."""

import json
import os
import resource
import shutil
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, decoder_blocks, in_child, quantize, tiny_model, token_ids, toy_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from evaluation.perplexity import perplexity
from formats.card import tensor_bytes
from formats.checkpoint import FORMAT, Store, check_packable, load_packed_config, open_checkpoint, packed_bytes
from formats.codes import pack, unpack
from formats.export import export
from formats.shards import new_folder
from formats.whole import load
from modelutils import decoder_of
from quant import IntLinear, QuantLinear
from recipe import Recipe, UsageError
from rotate import rotated
from run.quantize import quantize_blocks

IDS, TEXT = token_ids(4, 16), token_ids(1, 320, seed=3)[0]
TYPES = ("opt", "pre-norm"), ("opt", "post-norm"), ("llama", "grouped"), ("llama", "llama3"), ("qwen3", "wide")


def recipe(**settings):
    return Recipe(**{"method": "awrq", "wbits": 4, "act_bits": 8, "nsamples": 4, "seqlen": 16} | settings)


def saved(folder, model, settings=None, stored_dtype=None):
    """Quantize a model and save it: its Store, which reads from the folder."""
    decoder, chosen = decoder_of(model), recipe(**settings or {})
    decoder.stored_dtype = stored_dtype or decoder.stored_dtype
    decoder = rotated(decoder, chosen.seed) if chosen.rotate else decoder
    with new_folder(folder) as partial:
        store = Store(decoder, chosen, partial)
        for _ in quantize_blocks(decoder, IDS, chosen, store):
            pass
        store.finish(partial, toy_tokenizer())
    store.folder = Path(folder)
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of the tiny OPT.  Copy it before you change it."""
    folder = tmp_path_factory.mktemp("saved") / "opt"
    saved(folder, tiny_model(), {"smooth": True})
    return folder


@pytest.fixture
def spoilt(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "spoilt"))


# ---------------------------------------------------------------------------
# Codes on disk


@pytest.mark.parametrize("C", [1, 2, 7, 8, 9, 43, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_pack(bits, C):
    q = torch.randint(2**bits, (5, C), dtype=torch.uint8)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and unpack(packed, bits, C).equal(q)
    for row, bytes_ in zip(q.tolist(), packed.tolist(), strict=True):
        if bits in (3, 4):
            stream = "".join(format(code, f"0{bits}b")[::-1] for code in row)  # lowest bit first
            stream += "0" * (-len(stream) % 8)
            assert bytes_ == [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
        else:
            assert bytes_ == row


def test_the_even_column_is_in_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


# ---------------------------------------------------------------------------
# Round trip


WIDE = {"hidden_size": 64, "ffn_dim": 128, "intermediate_size": 128}  # 64 columns are a group, 48 leave a shorter last one
MATRIX = [  # nine rows in which every pair of settings meets
    (TYPES[k], {"wbits": (4, 3)[(k + (g > 0)) % 2], "groupsize": (-1, 64, 48)[g], "smooth": (2 * k + g) % 3 != 0, "sym": (k + g) % 3 == 0})
    for k, g in product(range(3), repeat=2)
]
OTHERS = [
    *((kind, {"wbits": wbits, "smooth": True}) for kind in TYPES[3:] for wbits in (3, 4)),
    (TYPES[0], {"wbits": 2, "act_pertoken": True}),
    (TYPES[2], {"sym": True, "act_bits": 6, "actorder": True}),
    (TYPES[0], {"wbits": 5}),
    (TYPES[2], {"wbits": 8, "groupsize": 24}),
    (TYPES[1], {"method": "gptq", "act_bits": 16, "smooth": True}),
    (("opt", "bare"), {"method": "smoothquant", "smooth": True}),
    (TYPES[2], {"rotate": True, "act_sym": True}),
    (TYPES[3], {"rotate": True, "act_pertoken": True, "act_sym": True, "smooth": True}),
]


def settings_id(value):
    return "-".join(map(str, value if isinstance(value, tuple) else value.items()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), MATRIX + OTHERS, ids=settings_id)
def test_round_trip(kind, settings, tmp_path, monkeypatch):
    """What is loaded has the same codes, grids and other tensors, and computes the same, in integers where it can."""
    monkeypatch.setitem(TINY[kind[0]], "settings", TINY[kind[0]]["settings"] | WIDE)
    chosen, store = recipe(**settings), saved(tmp_path / "saved", tiny_model(*kind), settings)
    model = store.decoder().materialize(CPU)
    in_scales = {name for name, linear in decoder_blocks(model)[0].named_modules() if getattr(linear, "in_scale", None) is not None}
    assert in_scales == set(TINY[kind[0]]["in_scale"][kind[1]] if chosen.smooth else ())
    opened = open_checkpoint(tmp_path / "saved")
    for i in range(len(opened)):
        found, made = opened.source.codes(i), store.codes(i)
        assert found.keys() == made.keys()
        for name, (q, grid) in found.items():
            expected, expected_grid = made[name]
            assert q.equal(expected) and grid.scale.equal(expected_grid.scale) and grid.zero.equal(expected_grid.zero), (i, name)
    opened.source.kernel = None
    state, expected = opened.materialize(CPU).state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(t.equal(expected[name]) for name, t in state.items())

    loaded = load(tmp_path / "saved", arithmetic="integers")
    kinds = {type(m) for m in loaded.modules() if isinstance(m, QuantLinear | IntLinear)}
    assert kinds == {IntLinear if chosen.wbits <= 4 and chosen.act_bits <= 8 else QuantLinear}
    ppl, again = (perplexity(d, TEXT, 16, walk_batch=20)["ppl"] for d in (store.decoder(), open_checkpoint(tmp_path / "saved")))
    assert again == pytest.approx(ppl, rel=5e-3)
    with torch.no_grad():
        logits, ours = (m(TEXT.view(-1, 16)).logits for m in (model, loaded))
    off = (logits - ours).norm(dim=-1) / logits.norm(dim=-1)
    # An activation that is a tie may be rounded to either side, which changes its own token and those after it: few, and by little.
    # The largest of a symmetric grid is one.
    assert chosen.act_sym or (off.median() < 1e-5 and off.quantile(0.8) < 1e-3), off
    assert off.max() < 0.3, off


@pytest.mark.slow
def test_in_scale_comes_back(tmp_path):
    model = saved(tmp_path / "saved", tiny_model("opt", "post-norm"), {"smooth": True}).decoder().materialize(CPU)
    for block, again in zip(decoder_blocks(model), decoder_blocks(load(tmp_path / "saved", arithmetic="integers")), strict=True):
        assert again.fc1.in_scale.equal(block.fc1.in_scale) and again.fc1.in_scale.std() > 0 and again.fc2.in_scale is None


@pytest.mark.slow
def test_a_loaded_model_generates(folder):
    (model, *_), loaded = quantize(tiny_model(), IDS, recipe(smooth=True)), load(folder, arithmetic="integers")
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens, ours = (m.generate(IDS, **length) for m in (model, loaded))
    assert tokens.equal(ours) and ours.shape == (4, 28)
    assert ours.equal(torch.cat([loaded.generate(ids, **length) for ids in IDS.split(1)])), "a sequence does not depend on the others"


@pytest.mark.slow
def test_a_generation_config_that_transformers_would_not_save(tmp_path):
    """Some on the hub are like this: LLaMA 2's once had a temperature without do_sample."""
    model = tiny_model()
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="do_sample"):
        model.generation_config.save_pretrained(tmp_path)
    saved(tmp_path / "saved", model, {"method": "rtn"})
    export(open_checkpoint(tmp_path / "saved").source, tmp_path / "exported", "compressed-tensors", toy_tokenizer())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert load(tmp_path / "saved").generation_config.temperature == exported.generation_config.temperature == 0.6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    store = saved(tmp_path / "saved", tiny_model("llama", "grouped").to(dtype))
    opened = open_checkpoint(tmp_path / "saved", str(dtype).removeprefix("torch."))
    assert opened.dtype == dtype and opened.materialize(CPU)(IDS).logits.dtype == dtype
    assert perplexity(opened, TEXT, 16)["ppl"] == pytest.approx(perplexity(store.decoder(), TEXT, 16)["ppl"], rel=0.05)
    assert load(tmp_path / "saved").dtype == torch.float32, "on a CPU"


# ---------------------------------------------------------------------------
# The folder


def test_the_folder(folder):
    files = sorted(path.name for path in folder.iterdir())
    shards = [f"awrq-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(files) >= {*shards, "awrq.safetensors.index.json", "config.json", "tokenizer.json", "generation_config.json"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all as readable as the others"
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["format"]) == ("awrq", FORMAT)
    assert Recipe(**about["recipe"]) == recipe(smooth=True) and about["versions"]["torch"] == torch.__version__
    block = load_file(folder / shards[0])
    assert {name.rpartition(".")[2] for name in block} == {"codes", "scale", "zero", "bias", "weight"}
    assert block["model.decoder.layers.0.fc2.codes"].shape == (32, 32) and block["model.decoder.layers.0.fc2.codes"].dtype == torch.uint8
    assert "lm_head.weight" not in load_file(folder / shards[2]), "tied"


@pytest.mark.slow
def test_what_is_not_quantized_keeps_its_type(tmp_path):
    """A model of halves that was run in float32: its embeddings are stored as halves; folded norms are no halves any more."""
    model = tiny_model().half().float()
    saved(tmp_path / "saved", model, {"smooth": True}, torch.float16)
    state = load_packed_config(tmp_path / "saved")[0]
    assert state.dtype == torch.float16
    rest, block = (load_file(tmp_path / "saved" / f"awrq-0000{i}-of-00003.safetensors") for i in (3, 1))
    assert {t.dtype for t in rest.values()} == {torch.float16}
    assert block["model.decoder.layers.0.self_attn_layer_norm.weight"].dtype == torch.float32
    assert block["model.decoder.layers.0.self_attn.q_proj.bias"].dtype == torch.float16
    quantized, _, _ = quantize(model, IDS, recipe(smooth=True))
    for name, t in load(tmp_path / "saved").state_dict().items():
        if "norm" in name or "embed" in name:
            assert t.equal(quantized.state_dict()[name]), name


def test_the_size(tmp_path):
    """At most 0.29 of FP16 for 256 columns and more, per channel, and it is what lies on the disk."""
    config = tiny_model("llama", "grouped").config
    config.hidden_size = config.intermediate_size = 256
    config.head_dim = 64
    model = AutoModelForCausalLM.from_config(config).eval()
    size = saved(tmp_path / "saved", model, {"method": "rtn"}).size()
    stored = load_file(tmp_path / "saved" / "awrq-00001-of-00003.safetensors")
    packed = 2 * sum(t.nbytes for name, t in stored.items() if "proj" in name)
    fp16 = 2 * sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert packed / fp16 < 0.29 and f"take {packed / 2**20:.2f} MiB, {packed / fp16:.3f} of the {fp16 / 2**20:.2f} MiB" in size


@pytest.mark.parametrize("settings", [{"wbits": 2}, {"wbits": 3, "groupsize": 24}, {"wbits": 4}, {"wbits": 5}], ids=settings_id)
def test_the_size_is_known_before(tmp_path, settings):
    store = saved(tmp_path / "saved", tiny_model("llama", "plain"), {"method": "rtn"} | settings)
    assert packed_bytes(store.original, store.recipe) == sum(tensor_bytes(tmp_path / "saved").values())


def test_transformers_alone_refuses_it(folder, monkeypatch):
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "awrq", raising=False)  # that of awrq_hf, if another test imported it
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------------------
# Damage


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BLOCK = "awrq-00002-of-00003.safetensors"
DAMAGE = {
    "truncated": (lambda f: (f / BLOCK).write_bytes((f / BLOCK).read_bytes()[:-100]), UsageError, [BLOCK, "model.decoder.layers.1."]),
    "empty": (lambda f: (f / BLOCK).write_bytes(b""), UsageError, [BLOCK]),
    "a flipped bit": (lambda f: flip(f / BLOCK, -1), UsageError, [BLOCK, "model.decoder.layers.1.", "damaged"]),
    "a flipped bit in the header": (lambda f: flip(f / BLOCK, 12), UsageError, [BLOCK, "model.decoder.layers.1."]),
    "no shard": (lambda f: (f / BLOCK).unlink(), UsageError, [BLOCK, "missing"]),
    "no index": (lambda f: (f / "awrq.safetensors.index.json").unlink(), UsageError, ["index.json", "missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), UsageError, ["config.json"]),
    "half an index": (lambda f: (f / "awrq.safetensors.index.json").write_text('{"weight'), UsageError, ["index.json", "damaged"]),
    "no checksums": (
        lambda f: edit(f / "awrq.safetensors.index.json", lambda c: c.pop("sha256")),
        UsageError,
        ["index.json", "damaged", "sha256"],
    ),
    "a checksum less": (
        lambda f: edit(f / "awrq.safetensors.index.json", lambda c: c["sha256"].pop("model.decoder.layers.1.fc1.codes")),
        UsageError,
        ["index.json", "damaged", "sha256", "model.decoder.layers.1.fc1.codes"],
    ),
    "a list of tensors": (
        lambda f: edit(f / "awrq.safetensors.index.json", lambda c: c.update(weight_map=[*c["weight_map"]])),
        UsageError,
        ["index.json", "damaged", "weight_map"],
    ),
    "no generation config": (lambda f: (f / "generation_config.json").unlink(), UsageError, ["generation_config.json", "missing"]),
    "a setting out of range": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(wbits=99)),
        UsageError,
        ["--load", "config.json", "99"],
    ),
    "shards swapped": (
        lambda f: shutil.copy(f / "awrq-00001-of-00003.safetensors", f / BLOCK),
        UsageError,
        [BLOCK, "model.decoder.layers.1.", "missing"],
    ),
    "a newer format": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"].update(format=FORMAT + 1)),
        UsageError,
        [f"format {FORMAT + 1}", f"up to {FORMAT}"],
    ),
    "an unknown setting": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(magic=1)),
        UsageError,
        ["config.json", "magic"],
    ),
    "another width": (lambda f: edit(f / "config.json", lambda c: c.update(ffn_dim=60)), UsageError, ["fc1", "another model"]),
    "another depth": (lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=3)), UsageError, ["2 blocks", "3"]),
    "other biases": (lambda f: edit(f / "config.json", lambda c: c.update(enable_bias=False)), UsageError, ["bias", "another model"]),
    "another group size": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(groupsize=16)),
        UsageError,
        ["scale", "(32, 2)"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(spoilt, damage):
    spoil, error, parts = DAMAGE[damage]
    spoil(spoilt)
    with pytest.raises(error) as e:
        load(spoilt)
    assert all(part in str(e.value) for part in parts), e.value


@pytest.mark.slow
@pytest.mark.parametrize("what", ["codes", "scale", "zero", "bias", "weight"])
def test_every_tensor_is_checked(spoilt, what):
    """A flipped bit anywhere in the data of a shard is found, and its tensor named."""
    path = spoilt / BLOCK
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    name = next(name for name in header if name.endswith(f".{what}"))
    flip(path, 8 + size + header[name]["data_offsets"][0])
    with pytest.raises(UsageError, match=name):
        load(spoilt)


def test_a_full_disk(tmp_path):
    """No file may be larger than 8 KiB, which ends the writing of a block as a full disk does: nothing is left."""

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(OSError, match="saved"):
            saved(tmp_path / "saved", tiny_model(), {"method": "rtn"})

    assert in_child(write) == 0
    assert not list(tmp_path.iterdir())


def test_an_error_while_quantizing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "saved") as partial:
        next(quantize_blocks(decoder := decoder_of(tiny_model()), IDS, recipe(), Store(decoder, recipe(), partial)))
        assert list(partial.iterdir())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def kill_while_saving(folder):
    """In a fork: SIGKILL when the second shard is half-written."""

    def act():
        decoder, chosen = decoder_of(tiny_model()), recipe(method="rtn")
        with new_folder(folder) as partial:
            next(quantize_blocks(decoder, IDS, chosen, Store(decoder, chosen, partial)))
            (partial / "awrq-00002-of-00003.safetensors.partial").write_bytes(b"half")
            (partial / "chat_templates").mkdir()  # as some tokenizers write
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child(act)


@pytest.mark.slow
def test_what_a_killed_run_left_of_a_folder_is_removed_by_the_next(tmp_path):
    assert os.WTERMSIG(kill_while_saving(tmp_path / "saved")) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["saved.partial"]
    saved(f"{tmp_path}/saved/", tiny_model(), {"method": "rtn"})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir() or path.suffix == ".partial"]
    assert load(tmp_path / "saved")


def test_two_runs_do_not_write_one_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "saved"):
        with pytest.raises(UsageError, match="saved: another run"), new_folder(tmp_path / "saved"):
            pass
        raise KeyboardInterrupt


def test_a_store_in_memory_is_saved_too(tmp_path, folder):
    _, store, _ = quantize(tiny_model(), IDS, recipe(smooth=True))
    store.save(tmp_path / "saved", toy_tokenizer())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert all((tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes() for name in shards) and len(shards) == 3


def test_nothing_to_pack():
    for settings in ({"method": "full", "wbits": 16, "act_bits": 16}, {"method": "act_only", "wbits": 16}):
        with pytest.raises(UsageError, match="nothing to pack"):
            check_packable(recipe(**settings))
