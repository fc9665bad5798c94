"""The benchmarks on a CPU: what their JSON has, what the tables and pictures show, that a bad cell is no end and bad input is one line."""

import copy
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from matplotlib import image
from transformers.utils import import_utils

import kernels
from bench import blocks, contenders, linears, quantizing, shapes, tune
from families import LLAMA
from kernels import build, cuda
from quant import Part
from scripts import plot

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

TIME = {"median", "p20", "p80"}


def run(module, *arguments):
    """The report of a benchmark, as written."""
    path = arguments[-1]
    module.main(module.parser().parse_args(list(map(str, ("--output_path", path, *arguments[:-1])))))
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A layers.json of the smallest sizes, and what is in it."""
    path = tmp_path_factory.mktemp("bench") / "layers.json"
    return path, run(linears, "--models", "tiny-llama", "--tokens", "1,17", path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "blocks.json"
    return path, run(linears, "--block", "--prefill", "8", "--context", "6", "--batch", "1,2", path)


# ---------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("name", shapes.MODELS | shapes.TINY)
def test_shapes_are_those_of_transformers(name):
    with torch.device("meta"):
        block = blocks.AutoModelForCausalLM.from_config(blocks.configuration(name, 16)).get_decoder().layers[0]
    linears = [tuple(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(linears) == sorted(shapes.block_linears(name))
    with torch.device("meta"):
        blocks.fuse(block)
    assert sorted(tuple(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Linear)) == sorted(
        shapes.block_linears(name, True)
    )
    assert set(shapes.linears(name)) == set(linears)


def test_everything_that_is_timed_is_tuned():
    assert {s for n in shapes.TIMED for fused in (False, True) for s in shapes.linears(n, fused)} <= set(tune.layers(None))
    assert tune.layers("llama-13b") == ((5120, 5120), (13824, 5120), (5120, 13824), (15360, 5120), (27648, 5120))
    with pytest.raises(ValueError, match="llama-13: no such model; choose from llama-7b"):
        tune.layers("llama-7b,llama-13")


# ---------------------------------------------------------------------------
# Layers


def test_layers_json(layers):
    report = layers[1]
    assert report["schema"] == linears.SCHEMA and report["kind"] == "layers" and report["finished"] and report["note"] == linears.CPU_NOTE
    assert set(report["about"]) >= {"device", "gpu", "machine", "threads", "versions", "commit"} and report["about"]["gpu"] is None
    assert set(report["ceilings"]) == {"bytes", "float16", "bfloat16", "int8"}
    assert [(layer["rows"], layer["columns"]) for layer in report["layers"]] == list(shapes.linears("tiny-llama"))
    seen = {(c["rows"], c["columns"], c["contender"], c["tokens"]): c for c in report["cells"]}
    for rows, columns in shapes.linears("tiny-llama"):
        for name in ("w4a8", "w4a8 batch", "float16", "bfloat16"):
            for tokens in (1, 17):
                cell = seen.pop((rows, columns, name, tokens))
                assert set(cell) == set(linears.NOTHING) | {"rows", "columns", "contender", "tokens"}
                assert set(cell["eager"]) == TIME and cell["graph"] is None and cell["reason"] is None
                took = cell["eager"]["median"] * 1e-6
                assert cell["tops"] == pytest.approx(2 * rows * columns * tokens / took * 1e-12)
                assert cell["roofline"] == pytest.approx(cell["ideal_us"] * 1e-6 / took)
        assert seen.pop((rows, columns, "int8 product", 1))["reason"] == "torch._int_mm takes more than 16 tokens"
        assert seen.pop((rows, columns, "int8 product", 17))["eager"]
        assert seen.pop((rows, columns, "Marlin W4A16", None))["reason"] == "needs an NVIDIA GPU"
    assert all(c["tokens"] is None and c["reason"] and c["eager"] is None for c in seen.values())
    before = {(c["columns"], c["tokens"], c["contender"]): c for c in report["quantizers"]}
    assert set(before) == {(columns, tokens, name) for columns in (64, 160) for tokens in (1, 17) for name in contenders.QUANTIZERS}
    for (_, _, name), cell in before.items():
        alone = name in ("norm", "gate")
        assert (cell["eager"] is not None) == alone and cell["reason"] == (None if alone else "is a step of the CUDA kernels")


def test_the_share_of_what_comes_before_a_product():
    def cell(us, **where):
        return where | {"graph": us and {"median": us}, "eager": None}

    report = {
        "layers": [{"rows": 8, "columns": 4}],
        "cells": [cell(us, rows=8, columns=4, tokens=m, contender=name) for m in (1, 2) for name, us in (("w4a8 product", 6), ("w4a8", 8))],
        "quantizers": [
            cell(us if m == 1 else None, columns=4, tokens=m, contender=name)
            for m in (1, 2)
            for name, us in zip(contenders.QUANTIZERS, (2, 4, 6, 1, 1), strict=True)
        ],
    }
    heads, *rows = (line.split() for line in linears.shares(report))
    assert heads[-2:] == ["1", "2"] and [row[-2:] for row in rows] == [["25%", "25%"], ["40%", "–"], ["50%", "–"]]


def test_quantization_alone_is_the_first_step(monkeypatch):
    """Its calls on a stand-in for the library: per token, behind its producer, in the layout of the kernel that would follow."""
    seen = []
    monkeypatch.setattr(cuda, "library", lambda device: "library")
    monkeypatch.setattr(cuda, "launch", lambda *args: seen.append(args))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    monkeypatch.setattr(contenders, "random_weight", lambda *shape, device: "weight")
    fake = type("GPU", (), {"type": "cuda"})()
    for name in ("empty", "ones", "randn"):
        monkeypatch.setattr(torch, name, partial(lambda make, *size, device=None, **how: make(*size, **how), getattr(torch, name)))
    for what, width, number in (("", 32, 0), ("norm", 32, 1), ("gate", 64, 2)):
        for tokens, config in ((16, "decode"), (17, "128x64")):
            (call,) = contenders.quantization(what, 32, fake)(tokens)
            call()
            _, x, y, weight, acts, _, found, *_, producer, steps = seen.pop()
            assert (weight, acts, found, steps, cuda.producer_number(producer)) == (
                "weight",
                (8, True, False),
                config,
                cuda.QUANTIZE,
                number,
            )
            assert (x.shape, y.shape) == ((1, tokens, width), (1, tokens, 128))


def test_roofline():
    """By hand, of 1024 x 2048 and 4 tokens: bytes of weights, inputs and outputs; operations; the slower of both."""
    w4a8, fp16 = (contenders.CONTENDERS[name] for name in ("w4a8", "float16"))
    memory_bound = {"bytes": 1e12, "int8": 1e15, "float16": 1e15}
    moved = 1024 * 2048 / 2 + 4 * (2048 * 2 + 1024 * 2)
    assert linears.ideal_seconds(w4a8, memory_bound, 1024, 2048, 4) == (moved, 2 * 1024 * 2048 * 4, pytest.approx(moved / 1e12))
    assert linears.ideal_seconds(fp16, {"bytes": 1e15, "float16": 1e12}, 1024, 2048, 4)[2] == pytest.approx(2 * 1024 * 2048 * 4 / 1e12)


def test_a_contender_that_fails_costs_only_its_own_cells():
    def calls(tokens):
        if tokens == 1:
            raise contenders.Missing("not for 1")
        return [lambda: (_ for _ in ()).throw(RuntimeError("misaligned\nand more"))]

    def broken(rows, columns, device):
        raise ImportError("no such thing")

    tested = {
        "late": contenders.Contender(lambda *shape: calls, "", 4, 1, 1, "int8"),
        "never": contenders.Contender(broken, "", 4, 1, 1, "int8"),
        "float16": contenders.CONTENDERS["float16"],
    }
    ceiling = dict.fromkeys(("bytes", "float16", "int8"), 1e12)
    cells = list(linears.bench_layer(8, 16, (1, 2), CPU, ceiling, tested))
    shown = [(c["contender"], c["tokens"], c["reason"]) for c in cells]
    assert shown == [
        ("never", None, "ImportError: no such thing"),
        ("late", 1, "not for 1"),
        ("float16", 1, None),
        ("late", 2, "eager: RuntimeError: misaligned"),
        ("float16", 2, None),
    ]


def test_contenders_of_ours_and_pytorch_compute_a_layer():
    """The op's own contender gives what kernels.w4a8_linear gives; those of PyTorch have the shape of the layer."""
    for name, shape in {"w4a8": (1, 20), "w4a8 batch": (20, 1), "float16": (20,), "bfloat16": (20,), "int8 product": (20,)}.items():
        (y,) = (call() for call in contenders.CONTENDERS[name].make(48, 32, CPU)(20))
        assert y.shape == (*shape, 48)
    (weight,) = contenders.packed_copies(48, 32, CPU)
    q = kernels.unpack_w4(weight.packed)[:48, :32]
    assert len(q.unique()) == 16, "random data, never zeros"


def test_the_product_alone_is_the_second_step(monkeypatch):
    """Its calls on a stand-in for the library: one quantization, then as many products as one likes, on the same memory."""
    seen = []
    monkeypatch.setattr(cuda, "library", lambda device: "library")
    monkeypatch.setattr(cuda, "dispatch", lambda *shape: ("128x16", 2))
    monkeypatch.setattr(cuda, "launch", lambda *args: seen.append((args[-1], args[-3](64).data_ptr())))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    monkeypatch.setattr(contenders, "packed_copies", lambda *shape: [1, 2])
    fake = type("GPU", (), {"type": "cuda"})()
    for name in ("empty", "randn"):
        monkeypatch.setattr(torch, name, partial(lambda make, *size, device=None, **how: make(*size, **how), getattr(torch, name)))
    calls = contenders.w4a8_product(48, 32, fake)(17)
    for call in calls * 2:
        call()
    steps, memory = zip(*seen, strict=True)
    assert steps == (cuda.QUANTIZE, *[cuda.MULTIPLY] * 4) and len(set(memory)) == 1


# ---------------------------------------------------------------------------
# Blocks


def test_blocks_json(whole):
    report = whole[1]
    assert report["kind"] == "blocks" and report["finished"] and report["note"] == linears.CPU_NOTE
    assert [(m["name"], m["blocks"], m["of"]) for m in report["models"]] == [("tiny-llama", 2, 2), ("tiny-opt", 2, 2)]
    cases = [("prefill", 1, 8), ("decode", 1, 6), ("decode", 2, 6)]
    wanted = [(model, c, *case) for model in shapes.TINY for c in ("float16", "w4a8") for case in cases]
    assert [(c["model"], c["contender"], c["phase"], c["batch"], c["tokens"]) for c in report["cells"]] == wanted
    for cell in report["cells"]:
        assert cell["finite"] and cell["reason"] is None and cell["peak_bytes"] is None
        assert set(cell["whole"]["eager"]) == set(cell["block"]["eager"]) == TIME
        tokens = cell["batch"] * (cell["tokens"] if cell["phase"] == "prefill" else 1)
        assert cell["tokens_per_second"] == pytest.approx(tokens / cell["whole"]["eager"]["median"] * 1e6)


@pytest.mark.parametrize("name", shapes.TINY)
@torch.no_grad()
def test_fused_linears_compute_the_same(name):
    with torch.device("cpu"):
        model = blocks.AutoModelForCausalLM.from_config(blocks.configuration(name, 16)).eval()
    ids = torch.arange(9)[None]
    wanted = model(ids).logits
    blocks.fuse(blocks.layers_of(model)[0])
    torch.testing.assert_close(model(ids).logits, wanted)
    fused = [m for m in model.modules() if isinstance(m, Part)]
    assert len(fused) == (5 if name == "tiny-llama" else 3) and all(part.together.x is None for part in fused)


@torch.no_grad()
def test_norms_are_the_same_in_one_kernel():
    with torch.device("cpu"):
        model = blocks.AutoModelForCausalLM.from_config(blocks.configuration("tiny-llama", 16)).eval()
    ids = torch.arange(9)[None]
    wanted = model(ids).logits
    blocks.fuse_norms(blocks.layers_of(model)[0], LLAMA)
    assert sum(isinstance(m, torch.nn.RMSNorm) for m in model.modules()) == 2
    torch.testing.assert_close(model(ids).logits, wanted)


@torch.no_grad()
def test_a_timed_block_normalizes_and_gates_as_a_packed_one():
    """And computes what its linears compute behind transformers' own modules, but for ties."""
    model = blocks.build("tiny-llama", 1, "w4a8", CPU, 16)
    block, x = blocks.layers_of(model)[0], torch.randn(1, 9, 64).half()
    linears = [m for m in block.modules() if isinstance(m, blocks.IntegerLinear)]
    assert [(m.norm is not None, m.gated) for m in linears] == [(True, False), (False, False), (True, False), (False, True)]
    plain = copy.deepcopy(block.mlp)
    plain.gate_proj.together.whole.norm, plain.down_proj.gated = None, False
    y = plain.gate_proj.together.whole(kernels.rms_norm(x, block.post_attention_layernorm.weight, block.post_attention_layernorm.eps))
    torch.testing.assert_close(block.mlp(x), plain.down_proj(kernels.gated_silu(y)), rtol=0, atol=0)


@pytest.mark.parametrize("name", shapes.TINY)
@torch.no_grad()
def test_decoding_is_the_last_token_of_a_prompt(name):
    """With the keys and values of a prompt in the cache, a step gives what reading the prompt gives, and leaves the cache as it was."""
    model = blocks.build(name, 2, "float16", CPU, 16).float()
    ids = torch.randint(128, (2, 7))
    out = model(ids, use_cache=True)
    step = blocks.decode_step(model, 2, 7, CPU)
    step.args[0].copy_(ids[:, -1:])
    step()
    for layer, seen in zip(step.keywords["past_key_values"].layers, out.past_key_values.layers, strict=True):
        assert layer.keys.std() > 0.5, "random, not zeros"
        layer.keys.copy_(seen.keys)
        layer.values.copy_(seen.values)
    for _ in range(2):
        torch.testing.assert_close(step().logits[:, -1], out.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", blocks.STEPS)
@pytest.mark.parametrize("name", shapes.TINY)
@torch.no_grad()
def test_a_graph_has_the_attention_of_a_plain_call(monkeypatch, name, phase):
    """Without a mask, which would keep PyTorch from its fastest: transformers decides by whether a graph is being captured, too."""
    model, attention, masks = blocks.build(name, 2, "float16", CPU, 16), F.scaled_dot_product_attention, []

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    step = blocks.STEPS[phase](model, 1, 7, CPU)
    for capturing in (False, True):
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda capturing=capturing: capturing)
        step()
    assert masks == [None] * 4


@pytest.mark.parametrize("phase", blocks.STEPS)
@pytest.mark.parametrize("name", shapes.TINY)
@torch.no_grad()
def test_the_cache_of_a_timed_block_does_not_grow(name, phase):
    model = blocks.build(name, 2, "float16", CPU, 16).float()
    calls = blocks.block_calls(model, blocks.STEPS[phase](model, 1, 7, CPU))
    caches = [call.keywords["past_key_values"] for call in calls]

    def tokens():
        return [cache.layers[i].keys.shape[-2] for i, cache in enumerate(caches) if cache is not None]

    first, before = [call() for call in calls], tokens()
    torch.testing.assert_close([call() for call in calls], first, rtol=0, atol=0)
    assert tokens() == before == ([7, 7] if phase == "decode" else [])


@torch.no_grad()
def test_the_integer_side_runs_the_op_on_sequences_of_their_own():
    """OPT flattens its tokens before fc1: two sequences decoded together give what each gives alone."""
    model = blocks.build("tiny-opt", 2, "w4a8", CPU, 16)
    assert sum(isinstance(m, blocks.IntegerLinear) for m in model.modules()) == 2 * len(shapes.block_linears("tiny-opt", True))
    ids = torch.randint(128, (2, 5))

    def logits(ids):
        for module in model.modules():
            if isinstance(module, blocks.IntegerLinear):
                module.batch = len(ids)
        return model(ids).logits

    torch.testing.assert_close(logits(ids), torch.cat([logits(ids[:1]), logits(ids[1:])]))


def test_blocks_beyond_the_memory_are_said(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(blocks.STEPS, "decode", full)
    cell = blocks.bench_cell(blocks.build("tiny-llama", 1, "float16", CPU, 8), "decode", 1, 4, CPU)
    assert cell["reason"] == "out of memory" and cell["whole"] is None
    where = {"model": "a", "phase": "decode", "batch": 1, "tokens": 4, "contender": "w4a8"}
    assert "out of memory" in blocks.line(cell | where)
    timed, untimed = ({"graph": None, "eager": dict.fromkeys(TIME, us)} if us else {"graph": None, "eager": None} for us in (5000, 0))
    line = blocks.line(cell | where | {"whole": timed, "block": untimed, "tokens_per_second": 200.0, "reason": "eager: no"})
    assert "5.000 ms, eager: no," in line


# ---------------------------------------------------------------------------
# Pictures and tables


def png(path):
    """(height, width) of a picture that is one and not of a single colour."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(path)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    return pixels.shape[:2]


def test_speedup_sh_draws_from_json(layers, whole, tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "a folder")}
    done = subprocess.run(["bash", ROOT / "scripts/speedup.sh", layers[0], whole[0]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "a folder"
    assert sorted(p.name for p in out.iterdir()) == ["speedup.md", "speedup_models.png", "speedup_tokens.png"]
    n = len(layers[1]["layers"])
    high, wide = (plot.PANEL[1] * -(-n // 4) + 1.4) * plot.DPI, (plot.PANEL[0] * min(4, n) + 0.5) * plot.DPI
    assert png(out / "speedup_tokens.png") == (int(high), int(wide))
    assert png(out / "speedup_models.png")[1] == 6 * plot.DPI
    text = (out / "speedup.md").read_text()
    assert text.count(linears.CPU_NOTE) == 2
    for line in ("| 64 x 64 ", "## Blocks and models", "| tiny-opt   | 2 of 2 ", "Not measured: Marlin W4A16: needs an NVIDIA GPU."):
        assert line in text


def made_up(layers):
    """A report whose times are known: w4a8 takes half of float16's at 1 token, twice at 17; its name says that it is no measurement."""
    report = json.loads(json.dumps(layers[1])) | {"note": "MADE UP"}
    for cell in report["cells"]:
        if cell["tokens"] and cell["eager"]:
            us = {"float16": 100, "w4a8": 50 if cell["tokens"] == 1 else 200}.get(cell["contender"], 80)
            cell["eager"] = dict.fromkeys(TIME, us)
            cell["graph"] = dict.fromkeys(TIME, us - 10)
    return report


def test_every_contender_that_was_timed_is_drawn(layers, tmp_path, monkeypatch):
    """However many there are, each with a look of its own; those without a time take none."""
    report, drawn = made_up(layers), {}
    names = [f"contender {i}" for i in range(20)]
    report["contenders"] |= dict.fromkeys(names)
    report["cells"] += [cell | {"contender": name} for name in names for cell in report["cells"] if cell["contender"] == "bfloat16"]

    def plotted(axis, *points, real=plot.plt.Axes.plot, **how):
        drawn[how.get("label")] = how.get("color"), how["linestyle"]
        return real(axis, *points, **how)

    monkeypatch.setattr(plot.plt.Axes, "plot", plotted)
    plot.draw_tokens(report, tmp_path / "tokens.png")
    looks = [drawn[name] for name in (*names, "w4a8", "w4a8 batch", "bfloat16", "int8 product")]
    assert len(set(looks)) == 24 and "Marlin W4A16" not in drawn


def test_only_times_of_one_kind_are_compared():
    graph, eager = ({"graph": a, "eager": dict.fromkeys(TIME, b)} for a, b in ((dict.fromkeys(TIME, 10), 30), (None, 60)))
    assert linears.speedup(graph, eager) == 0.5 and linears.speedup(eager, graph) == 2 and linears.speedup(graph, graph) == 1
    assert linears.speedup(graph, None) is linears.speedup(None, graph) is linears.speedup(graph, {"graph": None, "eager": None}) is None


def test_layer_table_has_the_losing_cells(layers):
    text = plot.layer_table(made_up(layers))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 64 x 64 ")]
    assert rows[0][1:6] == ["1", "90.0", "40.0", "2.25x", "2.00x"] and rows[1][1:6] == ["17", "90.0", "190.0", "**0.47x**", "**0.50x**"]
    n = len(layers[1]["layers"])
    assert f"Slower than FP16 in {n} of {2 * n} cells, in bold." in text and "**MADE UP**" in text
    head, first, *_ = linears.summary(made_up(layers)).splitlines()
    assert head.split() == ["speedup,", "tokens", "1", "17"] and first.split() == ["64", "x", "64", "2.25", "0.47"]


def test_block_table_says_why_a_cell_is_empty(whole):
    report = json.loads(json.dumps(whole[1]))
    report["cells"][0] |= {"whole": None, "block": None, "tokens_per_second": None, "reason": "out of memory"}
    for cell in report["cells"][1:]:
        for part in ("whole", "block"):
            cell[part]["eager"] = dict.fromkeys(TIME, 2000 if cell["contender"] == "float16" else 3000)
    text = plot.block_table(report)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| tiny-llama")]
    assert rows[0][5:8] == ["–", "3.000", "–"] and rows[0][-1] == "float16: out of memory"
    assert rows[1][5:8] == ["2.000", "3.000", "**0.67x**"] and "Slower than FP16 in 5 of 6 cells" in text
    assert "the same attention (transformers' sdpa)" in text
    assert plot.model_speedup(report, "tiny-llama", ("prefill", 1, 8)) == (None, "float16: out of memory")
    assert plot.model_speedup(report, "tiny-llama", ("decode", 1, 6))[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "not JSON"), ("[]", "no result"), ('{"kind": "layers", "schema": 0}', "no result"), (None, "No such file")],
    ids=["broken", "list", "old", "missing"],
)
def test_what_is_no_result_is_one_line(content, part, tmp_path, run_script):
    path = tmp_path / "layers.json"
    if content:
        path.write_text(content)
    status, _, err = run_script(plot, path, "--out", tmp_path / "out")
    assert status == 2 and len(err) == 1 and part in err[0] and "layers.json" in err[0]
    assert not (tmp_path / "out").exists()


def test_one_result_of_each_kind(layers, tmp_path, run_script):
    status, _, err = run_script(plot, layers[0], layers[0], "--out", tmp_path / "out")
    assert status == 2 and "a second result of layers" in err[0]


# ---------------------------------------------------------------------------
# Command lines


def test_bad_input_of_the_bench_is_named(capsys):
    for arguments, part in ((("--tokens", "1,x"), "1,x: must be whole numbers"), (("--batch", "0"), "0: must be at least 1")):
        with pytest.raises(SystemExit):
            linears.parser().parse_args(arguments)
        assert part in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="--blocks 0: must be at least 1"):
        linears.main(linears.parser().parse_args(["--block", "--blocks", "0"]))
    with pytest.raises(OSError, match="--output_path no/such/folder/a.json: cannot write"):
        linears.main(linears.parser().parse_args(["--output_path", "no/such/folder/a.json"]))
    done = subprocess.run([sys.executable, "-m", "bench.linears", "--models", "llama-1t"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "llama-1t: no such model; choose from llama-7b" in done.stderr


def test_quantizing(tmp_path, run_script):
    path = tmp_path / "q.json"
    tiny = ("--shape", "tiny-opt", "--blocks", 1, "--nsamples", 2, "--seqlen", 16, "--smooth", "--device", "cpu", "--output_path", path)
    status, out, err = run_script(quantizing, *tiny)
    assert status == 0 and not err, err
    report = json.loads(path.read_text())
    assert report["kind"] == "quantize" and report["note"] == quantizing.CPU_NOTE and report["note"] in out
    assert set(report["seconds"]["block"]) == {"smoothing", "statistics", "solving", "propagation", "the rest"}
    a_block = sum(report["seconds"]["block"].values())
    assert report["seconds"]["model"] == pytest.approx(report["seconds"]["capture"] + 2 * a_block)
    assert report["bare_passes"]["passes"] == 3 and report["solver"]["equal_codes"] > 0.99
    status, _, err = run_script(quantizing, "--shape", "llama")
    assert status == 2 and "llama: no such model" in err[0]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", ["linears", "check", "tune"])
def test_kernels_that_cannot_be_built_are_one_line(module, monkeypatch, capsys):
    """As on a machine with a GPU and without nvcc."""

    def unable(device):
        raise build.BuildError("no nvcc")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "library", unable)
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"bench.{module}", run_name="__main__")
    assert stopped.value.code == 2 and capsys.readouterr().err == f"python -m bench.{module}: error: no nvcc\n"


# ---------------------------------------------------------------------------
# Kernels of others


class Ops:
    """vllm._custom_ops, as far as Machete goes: with its signatures and what its kernels ask of their tensors."""

    @staticmethod
    def machete_prepack_B(b_q_weight, a_type, b_type, group_scales_type):  # noqa: N802  vLLM's name
        assert (
            b_q_weight.dtype == torch.int32
            and b_q_weight.stride(0) == 1
            and (a_type, b_type, group_scales_type) == (torch.float16, 4, torch.float16)
        )
        return torch.empty_like(b_q_weight, memory_format=torch.contiguous_format)

    @staticmethod
    def machete_mm(a, b_q, b_type, out_type=None, b_group_scales=None, b_group_zeros=None, b_group_size=None, schedule=None):
        assert a.is_contiguous() and a.shape[1] == 8 * b_q.shape[0] and b_type == 4 and b_group_size == -1
        assert b_group_scales.shape == (1, b_q.shape[1]) and b_group_scales.dtype == a.dtype == torch.float16
        return a.new_zeros(len(a), b_q.shape[1])


class HummingLayer(torch.nn.Module):
    """humming.layer.HummingLayer: with its arguments, and in its order of calls."""

    def __init__(self, shape_n, shape_k, weight_config, input_config=None, torch_dtype=None):
        super().__init__()
        assert weight_config == {"dtype": "int4"} and input_config["dtype"] in ("float16", "int8") and torch_dtype == torch.float16
        self.shape, self.ready = (shape_n, shape_k), None
        self.weight = torch.nn.Parameter(torch.zeros(shape_n, shape_k // 8, dtype=torch.int32), requires_grad=False)

    def load_from_unquantized(self, tensor):
        assert tensor.shape == self.shape and tensor.dtype == torch.float16
        self.ready = False

    def transform(self):
        assert self.ready is False
        self.ready = True

    def forward(self, inputs):
        assert self.ready and inputs.shape[1] == self.shape[1]
        return inputs.new_zeros(len(inputs), self.shape[0])


def test_kernels_of_others_are_called_as_published(monkeypatch):
    """By stand-ins with their signatures, which check what they are given; each copy of a weight in memory of its own."""
    types = type("Types", (), {"uint4b8": 4})
    modules = {"vllm._custom_ops": Ops, "vllm.scalar_type": type("", (), {"scalar_types": types}), "humming.layer": type("", (), {})}
    modules["humming.layer"].HummingLayer = HummingLayer
    monkeypatch.setattr(contenders, "installed", lambda name, device: modules[name])
    monkeypatch.setattr(contenders, "enough_copies", lambda device, size: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("vLLM Machete W4A16", "Humming W4A16", "Humming W4A8"):
        calls = contenders.CONTENDERS[name].make(256, 128, CPU)(5)
        assert [call().shape for call in calls] == [(5, 256)] * 3
        held = [call.keywords.get("b_q", getattr(call.func, "weight", None)) for call in calls]
        assert len({weight.data_ptr() for weight in held}) == 3
    with pytest.raises(contenders.Missing, match="multiples of 128"):
        contenders.vllm_machete(100, 128, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(contenders.Missing, match="compute capability 9.0"):
        contenders.vllm_machete(256, 128, CPU)


def test_pytorchs_4_bit_product_of_many_tokens_is_not_timed(monkeypatch):
    gpu = type("GPU", (), {"type": "cuda"})()
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(contenders, "copies", lambda *_: [])
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda *_: None)
    monkeypatch.setattr(contenders, "random_matrix", lambda *_: None)
    calls = contenders.tinygemm(128, 128, gpu)
    assert calls(64) == []
    with pytest.raises(contenders.Missing, match="made for few tokens"):
        calls(65)
