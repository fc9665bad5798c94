"""The CUDA implementation of the op: a packed checkpoint through it, on an emulator and on a GPU; when it is chosen."""

import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from test_kernels import activations, prepared

import kernels
from evaluation.perplexity import perplexity
from formats.checkpoint import Store, open_checkpoint
from kernels import build, cuda
from modelutils import load_tokenizer, open_decoder
from recipe import Recipe
from run.quantize import quantize_blocks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("emulator")]  # one process: what they share takes seconds to make

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------
# A packed checkpoint


@pytest.fixture
def stand_in(emulated, monkeypatch):
    """The op's CUDA implementation, for tensors in host memory: (configuration, number of the producer) of what the emulator ran."""
    launched = []

    def launch(library, x, y, weight, acts, lengths, config, parts, stream, empty, producer, launch=cuda.launch):
        launched.append((config, cuda.producer_number(producer)))
        return launch(library, x, y, weight, acts, lengths, config, parts, stream, empty, producer)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "library", lambda device: emulated)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="emulator", multi_processor_count=4))
    emulated.emulator_settings(False, False)
    override = torch.library.Library("awrq", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # PyTorch's, that this overrides
        override.impl("w4a8_linear", kernels._cuda_linear, "CPU", allow_override=True)
    yield launched
    override._destroy()
    cuda.dispatch.cache_clear()


CHECKPOINTS = [
    ("opt", {}, "float16"),
    ("llama", {"groupsize": 64, "act_pertoken": True}, "bfloat16"),
    ("llama", {"act_pertoken": True, "act_sym": True}, "float16"),
]


def saved_demo(family, settings, folder):
    """A demo model, quantized and saved, and the first tokens of its held-out text (N,)."""
    decoder, tokenizer = open_decoder(ROOT / "demo" / family), load_tokenizer(ROOT / "demo" / family)
    text = tokenizer((ROOT / "demo" / "data" / "world" / "test.txt").read_text(), return_tensors="pt")["input_ids"][0, :194]
    recipe = Recipe(method="rtn", wbits=4, act_bits=8, nsamples=1, seqlen=8, **settings)
    store = Store(decoder, recipe)
    for _ in quantize_blocks(decoder, text[None, :8], recipe, store):
        pass
    store.save(folder, tokenizer)
    return text


def same_perplexity(folder, texts, dtype, device=CPU):
    """Whether a model reads texts (N,) and goes on alike by both kernels."""
    opened = {kernel: open_checkpoint(folder, dtype, device, kernel) for kernel in ("torch", "cuda")}
    for text in texts:
        wanted, found = (perplexity(decoder, text, len(text), device)["ppl"] for decoder in opened.values())
        assert 1 < found < 50 and found == pytest.approx(wanted, rel=1e-3)
    prompt = texts[0][None].to(device)
    tokens = [decoder.materialize(device).generate(prompt, max_new_tokens=2, do_sample=False) for decoder in opened.values()]
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize(("family", "settings", "dtype"), CHECKPOINTS)
def test_a_checkpoint_has_the_perplexity_of_the_torch_path(stand_in, family, settings, dtype, tmp_path):
    """From the file to the perplexity through all that runs on a GPU, but that an emulator runs the kernels."""
    text = saved_demo(family, settings, tmp_path / "saved")
    same_perplexity(tmp_path / "saved", (text[:9], text[:33]), dtype)
    configs = {config for config, _ in stand_in}
    large = {"128x64"} if family == "opt" or "groupsize" in settings else set()  # at 33 tokens, by the rules of these shapes
    assert configs == {"decode_fused", "128x32"} | large | ({"decode"} if family == "llama" else set())
    blocks, passes, groups = 4, 4, 4  # two texts, a prompt and a step; q/k/v and gate/up are one product each
    assert len(stand_in) == passes * blocks * groups
    of_a_block = [1, 0, 1, 2] if family == "llama" else [0, 0, 0, 0]  # two norms and a gate
    assert [producer for _, producer in stand_in] == passes * blocks * of_a_block


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_are_those_of_the_torch_path(stand_in, dtype, per_token, tmp_path):
    """To the last bit, norms and gates included, through all blocks."""
    text = saved_demo("llama", {"act_pertoken": per_token}, tmp_path / "saved")
    wanted, found = (open_checkpoint(tmp_path / "saved", dtype, CPU, kernel).materialize(CPU) for kernel in ("torch", "cuda"))
    with torch.no_grad():
        for ids in (text[None, :1], text[None, :21], text[:18].view(3, 6)):
            assert torch.equal(found(ids).logits, wanted(ids).logits)
    assert {producer for _, producer in stand_in} == {0, 1, 2}


def test_the_gpu_of_x_is_the_current_one_at_the_launch(stand_in, monkeypatch):
    """Its own stream, and its own memory, of whichever of several GPUs was current before."""
    current = []

    @contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    def stream():
        assert current == [x.device]
        return SimpleNamespace(cuda_stream=0)

    x, weight = activations(1, 3, 64, torch.float16), prepared(32, 64)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert torch.equal(kernels.w4a8_linear(x, weight), kernels.w4a8_linear(x, weight, kernel="torch"))
    assert stand_in == [("decode_fused", 0)] and current == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("family", "settings", "dtype"), CHECKPOINTS[:2])
def test_a_checkpoint_on_a_gpu_has_the_perplexity_of_the_torch_path(family, settings, dtype, tmp_path):
    text = saved_demo(family, settings, tmp_path / "saved")
    same_perplexity(tmp_path / "saved", (text[:9], text[:33], text), dtype, torch.device("cuda", 0))


# ---------------------------------------------------------------------------
# Which implementation


def test_select_says_what_runs(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for kind in ("auto", "torch"):
        assert kernels.select(kind, cpu) == ("torch", "kernel: torch, exact integers computed in PyTorch")
    assert kernels.select("torch", gpu)[0] == "torch"
    with pytest.raises(ValueError, match="--kernel cuda: needs an NVIDIA GPU, not --device cpu"):
        kernels.select("cuda", cpu)

    def unable(device):
        raise build.BuildError("no nvcc")

    monkeypatch.setattr(cuda, "library", unable)
    kernel, line = kernels.select("auto", gpu)
    assert kernel == "torch" and line.endswith("slowly, as the CUDA kernels are not there: no nvcc")
    with pytest.raises(ValueError, match="--kernel cuda: no nvcc"):
        kernels.select("cuda", gpu)
    monkeypatch.setattr(cuda, "library", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert kernels.select("auto", gpu) == kernels.select("cuda", gpu) == ("cuda", "kernel: cuda, on A GPU")
    assert kernels.select("auto", gpu, 128) == kernels.select("cuda", gpu, 128) == kernels.select("cuda", gpu, -1)
    for size in (24, 32, 2048):  # before a block is read
        kernel, line = kernels.select("auto", gpu, size)
        assert kernel == "torch" and f"slowly: groupsize {size}: the CUDA kernels take multiples of 64 up to 1024, or whole rows" in line
        with pytest.raises(ValueError, match=f"--kernel cuda: groupsize {size}: .* choose torch or auto"):
            kernels.select("cuda", gpu, size)


def test_groups_that_the_kernels_lack_are_named():
    with pytest.raises(ValueError, match="groupsize 24: the CUDA kernels take multiples of 64 up to 1024"):
        cuda.linear(activations(1, 1, 100), prepared(32, 100, 24), 8, False, False, None, kernels.NOTHING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: scripts/gpu_check.sh is the whole test on one")
def test_op_on_a_gpu_equals_op_on_a_cpu():
    weight, x = prepared(104, 200), activations(2, 3, 200, torch.float16)
    assert torch.equal(kernels.w4a8_linear(x.cuda(), weight.to("cuda")).cpu(), kernels.w4a8_linear(x, weight))
