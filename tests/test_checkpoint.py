"""Packed checkpoints against the model that was saved, resuming after SIGKILL against a run in one piece, exports in transformers alone."""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from hashlib import sha256
from itertools import product
from pathlib import Path

import checkpoint
import pytest
import reference
import torch
from checkpoint import FORMAT, Store, Writer, load, pack, unpack
from conftest import TINY, WORDS, save_model, tiny_model, token_ids, toy_tokenizer
from evalutils import perplexity
from safetensors.torch import load_file
from test_cli import cli  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM

import main
import modelutils
import quant
from modelutils import decoder_blocks, load_model, quantize_blocks
from quant import IntLinear, QuantLinear
from recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import compare_export  # noqa: E402

IDS, TEXT = token_ids(4, 16), token_ids(1, 320, seed=3)[0]
TYPES = ("opt", "pre-norm"), ("opt", "post-norm"), ("llama", "grouped"), ("llama", "llama3"), ("qwen3", "wide")


def recipe(**settings):
    return Recipe(**{"method": "awrq", "wbits": 4, "act_bits": 8, "nsamples": 4, "seqlen": 16} | settings)


def saved(folder, model, settings=None, layout="awrq", **more):
    """Quantize a model and save it: {block: {name: (codes, Grid)}} and the Writer."""
    chosen, codes = recipe(**settings or {}), {}
    with Writer(folder, model, toy_tokenizer(), chosen, layout, **more) as writer:
        for layers, found in quantize_blocks(model, IDS, chosen):
            codes[layers[0].block] = found
            writer.add(layers[0].block, found)
    return codes, writer


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
MATRIX = [
    (kind, {"wbits": wbits, "groupsize": groupsize, "smooth": smooth, "sym": sym})
    for kind, wbits, groupsize, smooth, sym in product(TYPES[:3], (4, 3), (-1, 64, 48), (False, True), (False, True))
]
OTHERS = [
    *((kind, {"wbits": wbits, "smooth": True}) for kind in TYPES[3:] for wbits in (3, 4)),
    (TYPES[0], {"wbits": 2, "act_pertoken": True}),
    (TYPES[2], {"sym": True, "act_bits": 6, "actorder": True}),
    (TYPES[0], {"wbits": 5}),
    (TYPES[2], {"wbits": 8, "groupsize": 24}),
    (TYPES[1], {"method": "gptq", "act_bits": 16, "smooth": True}),
    (("opt", "bare"), {"method": "smoothquant", "smooth": True}),
]


def settings_id(value):
    return "-".join(map(str, value if isinstance(value, tuple) else value.items()))


@pytest.mark.parametrize(("kind", "settings"), MATRIX + OTHERS, ids=settings_id)
def test_round_trip(kind, settings, tmp_path, monkeypatch):
    """What is loaded has the same codes, grids and other tensors, and computes the same, in integers where it can."""
    monkeypatch.setitem(TINY[kind[0]], "settings", TINY[kind[0]]["settings"] | WIDE)
    model, chosen = tiny_model(*kind), recipe(**settings)
    codes, _ = saved(tmp_path / "saved", model, settings)
    in_scales = {name for name, linear in decoder_blocks(model)[0].named_modules() if getattr(linear, "in_scale", None) is not None}
    assert in_scales == set(TINY[kind[0]]["in_scale"][kind[1]] if chosen.smooth else ())
    restored = checkpoint.empty_model(model.config, torch.float32)
    for i, found in checkpoint.restore(tmp_path / "saved", restored, chosen):
        assert found.keys() == codes[i].keys()
        for name, (q, grid) in found.items():
            expected, expected_grid = codes[i][name]
            assert q.equal(expected) and grid.scale.equal(expected_grid.scale) and grid.zero.equal(expected_grid.zero), (i, name)
    state, expected = restored.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(t.equal(expected[name]) for name, t in state.items())

    loaded = load(tmp_path / "saved")
    kinds = {type(m) for m in loaded.modules() if isinstance(m, QuantLinear | IntLinear)}
    assert kinds == {IntLinear if chosen.wbits <= 4 and chosen.act_bits <= 8 else QuantLinear}
    ppl, again = (perplexity(m, TEXT, 16, walk_batch=20)["ppl"] for m in (model, loaded))
    assert again == pytest.approx(ppl, rel=1e-3)
    with torch.no_grad():
        logits, ours = model(IDS).logits, loaded(IDS).logits
    assert (logits - ours).norm() < 1e-2 * logits.norm()  # an activation that is a tie may be rounded to either side


def test_in_scale_comes_back(tmp_path):
    model = tiny_model("opt", "post-norm")
    saved(tmp_path / "saved", model, {"smooth": True})
    for block, again in zip(decoder_blocks(model), decoder_blocks(load(tmp_path / "saved")), strict=True):
        assert again.fc1.in_scale.equal(block.fc1.in_scale) and again.fc1.in_scale.std() > 0 and again.fc2.in_scale is None


def test_a_loaded_model_generates(folder):
    model, loaded = tiny_model(), load(folder)
    for _ in quantize_blocks(model, IDS, recipe(smooth=True)):
        pass
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens, ours = (m.generate(IDS, **length) for m in (model, loaded))
    assert tokens.equal(ours) and ours.shape == (4, 28)
    assert ours.equal(torch.cat([loaded.generate(ids, **length) for ids in IDS.split(1)])), "a sequence does not depend on the others"


def test_a_generation_config_that_transformers_would_not_save(tmp_path):
    """Some on the hub are like this: LLaMA 2's once had a temperature without do_sample."""
    model = tiny_model()
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="do_sample"):
        model.generation_config.save_pretrained(tmp_path)
    saved(tmp_path / "saved", model, {"method": "rtn"})
    checkpoint.export(tmp_path / "saved", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert load(tmp_path / "saved").generation_config.temperature == exported.generation_config.temperature == 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    model = tiny_model("llama", "grouped").to(dtype)
    saved(tmp_path / "saved", model)
    loaded = load(tmp_path / "saved", str(dtype).removeprefix("torch."))
    assert loaded.dtype == dtype and loaded(IDS).logits.dtype == dtype
    assert perplexity(loaded, TEXT, 16)["ppl"] == pytest.approx(perplexity(model, TEXT, 16)["ppl"], rel=0.05)
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


def test_what_is_not_quantized_keeps_its_type(tmp_path):
    """A model of halves that was run in float32: its embeddings are stored as halves; folded norms are no halves any more."""
    source = save_model(tmp_path / "source", tiny_model().half())
    model = load_model(source)
    assert model.dtype == torch.float32
    saved(tmp_path / "saved", model, {"smooth": True}, dtype=torch.float16)
    state = checkpoint.load_packed_config(tmp_path / "saved")[0]
    assert state.dtype == torch.float16
    rest, block = (load_file(tmp_path / "saved" / f"awrq-0000{i}-of-00003.safetensors") for i in (3, 1))
    assert {t.dtype for t in rest.values()} == {torch.float16}
    assert block["model.decoder.layers.0.self_attn_layer_norm.weight"].dtype == torch.float32
    assert block["model.decoder.layers.0.self_attn.q_proj.bias"].dtype == torch.float16
    for name, t in load(tmp_path / "saved").state_dict().items():
        if "norm" in name or "embed" in name:
            assert t.equal(model.state_dict()[name]), name


def test_the_size(tmp_path):
    """At most 0.29 of FP16 for 256 columns and more, per channel, and it is what lies on the disk."""
    config = tiny_model("llama", "grouped").config
    config.hidden_size = config.intermediate_size = 256
    config.head_dim = 64
    model = AutoModelForCausalLM.from_config(config).eval()
    _, writer = saved(tmp_path / "saved", model, {"method": "rtn"})
    stored = load_file(tmp_path / "saved" / "awrq-00001-of-00003.safetensors")
    assert writer.packed == 2 * sum(t.nbytes for name, t in stored.items() if "proj" in name)
    assert writer.packed / writer.fp16 < 0.29 and f"{writer.packed / writer.fp16:.3f} of" in writer.size()


def test_transformers_alone_refuses_it(folder):
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
    "truncated": (lambda f: (f / BLOCK).write_bytes((f / BLOCK).read_bytes()[:-100]), OSError, [BLOCK, "model.decoder.layers.1."]),
    "empty": (lambda f: (f / BLOCK).write_bytes(b""), OSError, [BLOCK]),
    "a flipped bit": (lambda f: flip(f / BLOCK, -1), OSError, [BLOCK, "model.decoder.layers.1.", "damaged"]),
    "a flipped bit in the header": (lambda f: flip(f / BLOCK, 12), OSError, [BLOCK, "model.decoder.layers.1."]),
    "no shard": (lambda f: (f / BLOCK).unlink(), OSError, [BLOCK, "missing"]),
    "no index": (lambda f: (f / "awrq.safetensors.index.json").unlink(), OSError, ["index.json", "missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), OSError, ["config.json"]),
    "half an index": (lambda f: (f / "awrq.safetensors.index.json").write_text('{"weight'), OSError, ["index.json", "damaged"]),
    "no checksums": (
        lambda f: edit(f / "awrq.safetensors.index.json", lambda c: c.pop("sha256")),
        OSError,
        ["index.json", "damaged", "sha256"],
    ),
    "no generation config": (lambda f: (f / "generation_config.json").unlink(), OSError, ["generation_config.json", "missing"]),
    "a setting out of range": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(wbits=99)),
        ValueError,
        ["--load", "config.json", "99"],
    ),
    "shards swapped": (
        lambda f: shutil.copy(f / "awrq-00001-of-00003.safetensors", f / BLOCK),
        OSError,
        [BLOCK, "model.decoder.layers.1.", "missing"],
    ),
    "a newer format": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"].update(format=FORMAT + 1)),
        ValueError,
        [f"format {FORMAT + 1}", f"up to {FORMAT}"],
    ),
    "an unknown setting": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(magic=1)),
        ValueError,
        ["config.json", "magic"],
    ),
    "another width": (lambda f: edit(f / "config.json", lambda c: c.update(ffn_dim=60)), ValueError, ["fc1", "another model"]),
    "another depth": (lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=3)), ValueError, ["2 blocks", "3"]),
    "other biases": (lambda f: edit(f / "config.json", lambda c: c.update(enable_bias=False)), ValueError, ["bias", "another model"]),
    "another group size": (
        lambda f: edit(f / "config.json", lambda c: c["quantization_config"]["recipe"].update(groupsize=16)),
        ValueError,
        ["scale", "(32, 2)"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(spoilt, damage):
    spoil, error, parts = DAMAGE[damage]
    spoil(spoilt)
    with pytest.raises(error) as e:
        load(spoilt)
    assert all(part in str(e.value) for part in parts), e.value


@pytest.mark.parametrize("what", ["codes", "scale", "zero", "bias", "weight"])
def test_every_tensor_is_checked(spoilt, what):
    """A flipped bit anywhere in the data of a shard is found, and its tensor named."""
    path = spoilt / BLOCK
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    name = next(name for name in header if name.endswith(f".{what}"))
    flip(path, 8 + size + header[name]["data_offsets"][0])
    with pytest.raises(OSError, match=name):
        load(spoilt)


def in_child(action):
    """Run action() in a fork of this process: what os.waitpid says of it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # a fork has no other threads
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_a_full_disk(tmp_path):
    """No file may be larger than 8 KiB, which ends the writing of a block as a full disk does: nothing is left."""

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(OSError, match="saved"):
            saved(tmp_path / "saved", tiny_model(), {"method": "rtn"})

    assert in_child(write) == 0
    assert not list(tmp_path.iterdir())


def test_an_error_while_quantizing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "saved", tiny_model(), toy_tokenizer(), recipe()):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def kill_while_saving(folder):
    """In a fork: SIGKILL when the second shard is half-written."""

    def act():
        with Writer(folder, tiny_model(), toy_tokenizer(), recipe(method="rtn")) as writer:
            for layers, codes in quantize_blocks(tiny_model(), IDS, recipe(method="rtn")):
                if layers[0].block == 1:
                    (writer.partial / "awrq-00002-of-00003.safetensors.partial").write_bytes(b"half")
                    (writer.partial / "chat_templates").mkdir()  # as some tokenizers write
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.add(layers[0].block, codes)

    return in_child(act)


def test_what_a_killed_run_left_of_a_folder_is_removed_by_the_next(tmp_path):
    assert os.WTERMSIG(kill_while_saving(tmp_path / "saved")) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["saved.partial"]
    saved(f"{tmp_path}/saved/", tiny_model(), {"method": "rtn"})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir() or path.suffix == ".partial"]
    assert load(tmp_path / "saved")


def test_two_runs_do_not_write_one_folder(tmp_path):
    def writer():
        return Writer(tmp_path / "saved", tiny_model(), toy_tokenizer(), recipe())

    with pytest.raises(KeyboardInterrupt), writer():
        with pytest.raises(OSError, match="saved: another run"), writer():
            pass
        raise KeyboardInterrupt
    store = Store(tmp_path / "store", tiny_model(), IDS, recipe())
    with pytest.raises(OSError, match="--checkpoint_dir .*store: another run"):
        Store(tmp_path / "store", tiny_model(), IDS, recipe())
    del store
    Store(tmp_path / "store", tiny_model(), IDS, recipe())


def test_nothing_to_pack(tmp_path):
    for settings in ({"method": "full", "wbits": 16, "act_bits": 16}, {"method": "act_only", "wbits": 16}):
        with pytest.raises(ValueError, match="nothing to pack"):
            Writer(tmp_path / "saved", tiny_model(), toy_tokenizer(), recipe(**settings))


# ---------------------------------------------------------------------------
# Resuming


def run(store=None, wbits=4, walk_batch=2, kind=TYPES[0], **settings):
    """A whole run: every number of its result, as one hash, and the blocks that the store had."""
    model, chosen = tiny_model(*kind), recipe(smooth=True, wbits=wbits, **settings)
    store = Store(store, model, IDS, chosen, "cpu", walk_batch) if store else None
    digest = sha256()
    for layers, codes in quantize_blocks(model, IDS, chosen, "cpu", walk_batch, store=store):
        digest.update(repr(layers).encode())
        for q, grid in codes.values():
            for t in (q, grid.scale, grid.zero):
                digest.update(checkpoint.sha256(t).encode())
    return digest.hexdigest() + checkpoint.weights_sha256(model), store and store.finished


def killed_runs(folder, n=10):
    """Kill a run at n moments spread over it, in the middle of blocks and of writes, and go on.  Patches modules: for a fork."""
    count, last = 0, None

    def tick(name, path=None):
        nonlocal count
        count += 1
        if count == last:
            if path:
                Path(path).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(module, name, writes=False):
        function = getattr(module, name)

        def call(*args, **kwargs):
            tick(name, args[1] if writes else None)
            return function(*args, **kwargs)

        setattr(module, name, call)

    for module, name in ((modelutils, "run_block"), (modelutils, "round_group"), (os, "replace"), (os, "fsync"), (Path, "unlink")):
        counted(module, name)
    counted(checkpoint, "save_file", writes=True)
    whole, _ = run()
    count = 0
    assert run(f"{folder}/0")[0] == whole
    moments = [1 + i * (count - 1) // (n - 1) for i in range(n)]
    for last in moments:
        count, store = 0, f"{folder}/{last}"
        status = in_child(lambda store=store: run(store))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (last, status)
        count, done = -(10**9), len(list(Path(store).glob("block-*.json")))
        result, finished = run(store)
        assert result == whole and finished == done, (last, finished, done)
        files = {path.name for path in Path(store).iterdir()}
        assert files == {"run.json", *(f"block-0000{i}.{ending}" for i in (0, 1) for ending in ("json", "safetensors"))}, (last, files)
        yield finished


def test_a_killed_run_goes_on(tmp_path):
    assert in_child(lambda: (tmp_path / "finished").write_text(json.dumps(list(killed_runs(tmp_path / "stores"))))) == 0
    finished = json.loads((tmp_path / "finished").read_text())
    assert len(finished) == 10 and {0, 1} <= set(finished) <= {0, 1, 2}


def test_a_finished_run_is_read_again(tmp_path):
    first = run(tmp_path / "store")
    assert run(tmp_path / "store") == (first[0], 2) and first[1] == 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"wbits": 3}, ["recipe.wbits is 4 there, 3 here"]),
        ({"alpha": 0.7, "seed": 5}, ["recipe.alpha", "recipe.seed"]),
        ({"walk_batch": 4}, ["walk_batch is 2 there, 4 here"]),
        ({"kind": ("opt", "gelu")}, ["model.activation_function is relu there, gelu here"]),
        ({"kind": ("llama", "plain")}, ["model.model_type is opt there, llama here"]),
    ],
    ids=str,
)
def test_a_store_of_another_run(tmp_path, settings, parts):
    run(tmp_path / "store")
    with pytest.raises(ValueError, match="another run") as e:
        run(tmp_path / "store", **settings)
    assert all(part in str(e.value) for part in parts), e.value


def test_a_store_of_other_weights_or_text(tmp_path):
    store = tmp_path / "store"
    Store(store, tiny_model(), IDS, recipe())
    with pytest.raises(ValueError, match="model.weights"):
        Store(store, tiny_model(seed=1), IDS, recipe())
    with pytest.raises(ValueError, match="calibration"):
        Store(store, tiny_model(), IDS + 1, recipe())


def test_a_store_in_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="other files"):
        Store(tmp_path, tiny_model(), IDS, recipe())


def test_a_damaged_store(tmp_path):
    run(tmp_path / "store")
    flip(tmp_path / "store" / "block-00001.safetensors", -1)
    with pytest.raises(OSError, match=r"block-00001.*damaged"):
        run(tmp_path / "store")


# ---------------------------------------------------------------------------
# Export


EXPORTED = [
    *((kind, settings) for kind in TYPES[:3] for settings in ({}, {"groupsize": 16}, {"sym": True})),
    (TYPES[0], {"smooth": True}),
    (TYPES[2], {"smooth": True, "act_pertoken": True}),
    (TYPES[3], {"act_pertoken": True, "groupsize": 16, "sym": True}),
    (TYPES[4], {"wbits": 8}),
    (TYPES[0], {"wbits": 3, "groupsize": 16}),
    (TYPES[2], {"wbits": 3, "sym": True, "act_bits": 6}),
    (TYPES[1], {"wbits": 5}),
    (TYPES[2], {"method": "gptq", "act_bits": 16, "groupsize": 32}),
]


@pytest.mark.parametrize(("kind", "settings"), EXPORTED, ids=settings_id)
def test_transformers_alone_loads_an_export(kind, settings, tmp_path, monkeypatch):
    model = tiny_model(*kind)
    saved(tmp_path / "saved", model, settings)
    saved(tmp_path / "at once", tiny_model(*kind), settings, "compressed-tensors")
    checkpoint.export(tmp_path / "saved", tmp_path / "exported")
    weights = [load_file(tmp_path / name / "model-00001-of-00003.safetensors") for name in ("at once", "exported")]
    assert weights[0].keys() == weights[1].keys() and all(t.equal(weights[1][name]) for name, t in weights[0].items())
    exported, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32), load(tmp_path / "saved")
    for ids in (IDS[:1], IDS[1:2, :5]):
        with torch.no_grad():
            logits, fake, ours = (m(ids).logits for m in (exported, model, loaded))
        for expected in (fake, ours):
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    # Rounding that moves an activation to the next code is all that is left: in float64 it moves none.
    monkeypatch.setattr(quant, "fake_quant_act", reference.fake_quant_act)
    with torch.no_grad():
        logits, fake = (m.double()(IDS[:1]).logits for m in (exported, model))
    torch.testing.assert_close(logits, fake, rtol=0, atol=1e-10 * fake.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "settings", "parts"),
    [
        (TYPES[0], {"groupsize": 24}, ["--groupsize 24", "fc1"]),
        (TYPES[0], {"act_pertoken": True}, ["fc1, fc2", "--act_pertoken"]),
        (TYPES[1], {"smooth": True}, ["q_proj", "fc1", "--no-smooth"]),
        (TYPES[0], {"method": "act_only", "wbits": 16}, ["act_only"]),
    ],
    ids=str,
)
def test_what_the_format_cannot_say(kind, settings, parts, tmp_path):
    with pytest.raises(ValueError) as e:
        Writer(tmp_path / "exported", tiny_model(*kind), toy_tokenizer(), recipe(**settings), "compressed-tensors")
    assert all(part in str(e.value) for part in parts), e.value


def test_comparing_an_export(run_script, tmp_path):
    """The script finds no difference in an export, and every difference in one of another model."""
    folders = {seed: (tmp_path / f"saved {seed}", tmp_path / f"exported {seed}") for seed in (0, 1)}
    for seed, (folder, exported) in folders.items():
        saved(folder, tiny_model("llama", "grouped", seed))
        checkpoint.export(folder, exported)
    rows = [{"text": " ".join(WORDS[10 + k : 20 + k]), "choices": [WORDS[4 + k], " ".join(WORDS[40 + k : 43 + k])]} for k in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}}}
    task |= {"validation_split": "validation", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task |= {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    arguments = ("--tasks", tmp_path / "toy.yaml", "--runs", 1)
    status, out, _ = run_script(compare_export, *folders[0], *arguments)
    assert status == 0 and "no answer differs" in out and "10 log-likelihoods differ by 0.0e+00" in out
    status, out, _ = run_script(compare_export, folders[0][0], folders[1][1], *arguments, "--no-float64")
    assert status == 1 and "NO NEAR TIE" in out and "float64" not in out


# ---------------------------------------------------------------------------
# On the command line


@pytest.fixture
def refused(cli, corpora, folder):  # noqa: F811
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
        refused(["block-00000", "cannot be written", "too large"], *rtn, "--checkpoint_dir", tmp_path / "blocks")
        assert [path.name for path in (tmp_path / "blocks").glob("block*")] == []

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
        main.parser().run(main.main)
        ppl.append(json.loads(path.read_text())["results"]["perplexity"]["own"]["ppl"])
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-3) and (tmp_path / "exported" / "config.json").is_file()
    assert "linears in integers (torch kernel)" in capfd.readouterr().out
    report = json.loads((tmp_path / "loading.json").read_text())
    assert report["protocol"]["calibration"]["corpus"] == "own" and report["recipe"]["method"] == "awrq" and report["model"] == str(source)
