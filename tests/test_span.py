"""The solver's kernel in Triton: its arithmetic in Triton's interpreter, its machine code without a GPU.

Each in a process of its own, as Triton decides when it is imported whether it interprets.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch

import awrq
from recipe import Recipe

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton, which PyTorch for NVIDIA GPUs brings along")

INTERPRETED = """
import json
import awrq, gptq, reference
import torch
from kernels.span import round_span
from quant import find_grid
from recipe import Recipe

results = []
for R, C, bits, groups, published in ((40, 24, 4, False, False), (33, 17, 3, True, True), (1, 2, 2, False, True)):
    W, X = reference.layer(R, C, outliers=1)
    U = reference.inverse_factor((X.flatten(0, 1).T @ X.flatten(0, 1)).double(), 0.01).float()
    grid = find_grid(W, bits, 4 if groups else -1)
    scale, zero = (grid.columns(p, C).T.contiguous().expand(C, -1) for p in (grid.scale, grid.zero))
    first = W + 0.3 * grid.columns(grid.scale, C) if published else W
    w, q = W.T.clone(memory_format=torch.contiguous_format), torch.full((C + 1, R), 77.0)
    round_span(w, q[:C], U, scale, zero, bits, first[:, 0] if published else None)
    errors = torch.zeros(R, C, dtype=torch.double)
    left, wanted = W.double(), torch.empty(R, C)
    for c in range(C):
        source = (first if c == 0 else left)[:, c]
        wanted[:, c] = reference.codes(source, scale[c].double(), zero[c].double(), bits)
        errors[:, c] = (left[:, c] - (wanted[:, c] - zero[c]) * scale[c].double()) / U[c, c]
        left[:, c + 1 :] -= errors[:, c, None] * U[c, c + 1 :]
    same = (q[:C].T == wanted).float().mean().item()
    off = ((w.T - errors).abs().max() / errors.abs().max()).item()
    results.append({"same": same, "off": off, "untouched": bool((q[C] == 77).all())})
for C, groupsize, options in ((160, -1, {}), (300, 64, {"actorder": True}), (70, 32, {})):  # whole layers: spans by the kernel, or without
    W, X = reference.layer(20, C, dead=2)
    recipe = Recipe("awrq", wbits=4, act_bits=8, groupsize=groupsize, **options)
    both = []
    for kernel in (None, round_span):
        gptq.span_kernel = lambda device, blocksize, kernel=kernel: kernel
        stats = awrq.Moments(C, recipe, "cpu")
        stats.add(X)
        both.append(awrq.quantize(W, stats, recipe, "layer"))
    (q, grid), (other, again) = both
    same = (q == other).float().mean().item()
    results.append({"same": float(same > 0.999), "off": (grid.scale - again.scale).abs().max().item(), "untouched": True})
print(json.dumps(results))
"""

COMPILED = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.span import ROWS, SPAN, WARPS, span_kernel

pointers = dict.fromkeys(("w", "codes", "U", "scale", "zero", "first"), "*fp32")
numbers = {name: "i32" for name in span_kernel.arg_names if name.endswith("stride")} | {"levels": "fp32", "R": "i32", "n": "i32"}
constants = {"FIRST": True, "SPAN": SPAN, "ROWS": ROWS}
source = ASTSource(span_kernel, pointers | numbers | dict.fromkeys(constants, "constexpr"), constants)
arch = int(sys.argv[1])
assembly = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS}).asm
cubin = Path(tempfile.mkdtemp(), "span.cubin")
cubin.write_bytes(assembly["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
spills = sass.count("LDL") + sass.count("STL")
print(json.dumps({"rounded": "div.rn.f32" in assembly["ptx"], "spills": spills, "lines": sass.count(";")}))
"""


def run(code, *args, **env):
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path} | env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_arithmetic():
    for case in run(INTERPRETED, TRITON_INTERPRET="1"):
        assert case["same"] == 1 and case["off"] < 1e-4 and case["untouched"], case


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiles_without_spills(arch, tmp_path):
    found = run(COMPILED, arch, TRITON_CACHE_DIR=str(tmp_path))
    assert found["rounded"] and found["spills"] == 0 and found["lines"] > 100, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"groupsize": 64, "actorder": True}, {"blocksize": 8}, {"beam": 4}], ids=str)
def test_a_layer_on_a_gpu_is_that_on_a_cpu(settings, dtype):
    """Statistics on tensor cores and columns by the kernel, against float64 statistics and PyTorch on a CPU."""
    W, X = reference.layer(200, 520, dead=2)
    X, recipe = X.to(dtype), Recipe("awrq", wbits=4, act_bits=8, **settings)
    stats, on_gpu = awrq.Moments(520, recipe, "cpu"), awrq.Moments(520, recipe, "cuda")
    on_gpu.add(X.cuda())
    on_gpu.finish()
    x, xq = X.double().flatten(0, 1), reference.fake_quant_act(X, 8).flatten(0, 1)
    stats.H, stats.M, stats.sequences = (xq.T @ xq).float(), ((x - xq).T @ xq).float(), len(X)
    for name, within in (("H", 1e-6), ("M", 1e-3)):
        ours, wanted = getattr(on_gpu, name).cpu(), getattr(stats, name)
        assert (ours - wanted).norm() <= within * wanted.norm(), name
    q, _ = awrq.quantize(W, stats, recipe, "layer")
    other, _ = awrq.quantize(W.cuda(), on_gpu, recipe, "layer")
    assert (q == other.cpu()).double().mean() > 0.98
