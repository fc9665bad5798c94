"""Predict how fast the kernels are, without a GPU: python -m bench.predict [--gpu NAMES] [--models NAMES] [--tokens M,...] [--best]

A MODEL, not a measurement, and never to stand in a table of results.  It takes the kernels' machine code and a replay of their main loops
(machine_code.py), the tables that choose a kernel (kernels/tuning.json), and what it assumes of each GPU (GPUS): clocks under load, the
bandwidth that can be had, the time between two kernels of a CUDA graph, and cuBLAS.  Use it to compare two states of the code.  Where
results/gpu_check has times of the same GPU they stand beside the prediction, with the commit that they were measured at.
"""

import argparse
import functools
import json
import math
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import machine_code, shapes
from bench.linears import numbers
from bench.tune import candidates
from kernels import build, cuda
from recipe import UsageError

MEASURED = Path(__file__).parent.parent / "results" / "gpu_check"
TOKENS = (1, 16, 64, 256, 512, 2048)
NOTE = "A MODEL of the kernels' machine code, not a measurement."


@dataclass(frozen=True)
class GPU:
    product: str  # as PyTorch names it
    arch: int
    processors: int
    ghz: float  # of kernels that wait for memory or for their own instructions
    tensor_ghz: float  # of those that keep the tensor cores busy: at the limit of power it falls
    bandwidth: float  # bytes per us, as can be reached
    l2_bytes: float
    l2_bandwidth: float
    gap: float  # us from the end of a kernel to the next one's start, in a CUDA graph
    l2_cycles: int  # latency
    memory_cycles: int
    float16: float  # TFLOP/s of cuBLAS on large products
    waves: bool  # whether it loses where its tiles do not fill the multiprocessors; on an H100 it was measured not to
    derate: float = 0.87  # of the replayed loop, what a real kernel reaches: CUTLASS int8 on an A100

    def us(self, cycles):
        return cycles / (self.ghz * 1e3)

    def tensor_us(self, cycles):
        return cycles / (self.tensor_ghz * 1e3)


GPUS = {
    "a100-40": GPU("NVIDIA A100-SXM4-40GB", 80, 108, 1.38, 1.38, 1.40e6, 40e6, 3.6e6, 1.3, 280, 650, 258, True),
    "a100-80": GPU("NVIDIA A100-SXM4-80GB", 80, 108, 1.38, 1.38, 1.75e6, 40e6, 3.6e6, 1.3, 280, 650, 258, True),
    "h100": GPU("NVIDIA H100 80GB HBM3", 90, 132, 1.70, 1.70, 2.95e6, 50e6, 5.5e6, 1.1, 290, 750, 700, False),
    # Clocks, bandwidths, size of the L2 cache and float16: measured on one, see docs/LOG.md.  The rest is the H100's, whose chip it has.
    "h200": GPU("NVIDIA H200", 90, 132, 1.98, 1.47, 4.25e6, 62.9e6, 9.2e6, 1.1, 290, 750, 760, False),
}


@dataclass(frozen=True)
class Code:
    """The kernels of one architecture."""

    library: object  # bound
    cycles: dict  # {tile config: [of a step of 64 columns, by blocks on a multiprocessor]}
    shares: dict  # {tile config: share of the tensor cores' rate with all blocks that fit}
    decoders: dict  # {(most tokens, fused): blocks on a multiprocessor}


@functools.cache
def read_code(arch):
    """The Code of the kernels as they are, compiled if need be."""
    library = build.build(str(arch))
    with tempfile.TemporaryDirectory() as folder:
        kernels = machine_code.kernels(library, folder)
    cycles, shares, decoders = {}, {}, {}
    for kernel in kernels:
        if "decode_kernel" in kernel.name and not kernel.parameters[2]:
            tokens, fused, _ = kernel.parameters
            decoders[tokens, bool(fused)] = machine_code.blocks_that_fit(kernel.registers, 256, 8 * tokens * 36 * 4 + 8192 * fused)
        elif "tile_kernel" in kernel.name and not kernel.parameters[5]:
            n, m, warp_n, warp_m, stages, _ = kernel.parameters
            warps = n // warp_n * (m // warp_m)
            shared_bytes = max(stages * (n * 32 + m * 64), warp_m * (n + 4) * 4)
            (loop,) = kernel.loops("IMMA")
            steps = sum(i.name == "IMMA" for i in loop) / (warp_n * warp_m / 64)  # nvcc may have unrolled it
            fit = machine_code.blocks_that_fit(kernel.registers, 32 * warps, shared_bytes)
            found = [machine_code.replay(loop, warps, blocks, arch) for blocks in range(1, fit + 1)]
            cycles[f"{n}x{m}"], shares[f"{n}x{m}"] = [replayed.cycles / steps for replayed in found], found[-1].tensor
        elif "warpgroup_kernel" in kernel.name:
            loop = min(kernel.loops("IGMMA"), key=len)  # around it is one that waits for copies
            found = machine_code.replay(loop, 8, 1, arch)
            cycles["wgmma256x128"], shares["wgmma256x128"] = [found.cycles / 2], found.tensor  # 128 columns a round
    return Code(cuda.bind(library), cycles, shares, decoders)


# ---------------------------------------------------------------------------
# Times in us of a product of M tokens with a weight of N rows and K columns


def float16_us(gpu, M, N, K):
    """cuBLAS: its roofline, with the waves of the best of some tiles."""
    efficiency = 0 if gpu.waves else 1
    for tile_m, tile_n, rate in ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (64, 128, 0.82), (64, 64, 0.65)):
        tiles_m, tiles = -(-M // tile_m), -(-M // tile_m) * -(-N // tile_n)
        for splits in (1, 2, 3, 4):
            waves = tiles * splits / gpu.processors
            efficiency = max(efficiency, rate * waves / math.ceil(waves) * (1 if splits == 1 else 0.92) * M / (tiles_m * tile_m))
    bandwidth = gpu.bandwidth * (0.97 if M <= 16 else 0.93 if M <= 64 else 0.9)
    operations = 2 * M * N * K / (gpu.float16 * 1e6 * efficiency)
    return gpu.gap + 1.5 + max(2 * (N * K + M * K + M * N) / bandwidth, operations)


def in_l2(gpu, size):
    return size < 0.6 * gpu.l2_bytes


@dataclass(frozen=True)
class Rows:
    """How many instructions a warp of the quantizer issues, counted in the machine code for float16 of sm_90.

    A thread reads eight columns at a time, an "eight", and holds `held` of them in registers, a "batch".
    """

    once: int  # per warp, whatever the number of columns
    held: int  # eights per batch
    load: int  # per batch: reading it
    range: int  # per batch: its range; the same for eights beyond the end of the row
    made: int  # per eight: the norm or the gate in front of the quantizer


ROWS = {"": Rows(250, 4, 100, 95, 0), "norm": Rows(345, 2, 150, 48, 119), "gate": Rows(250, 4, 60, 96, 345)}
RANGE_ONCE, PARTS_ONCE = 110, 50  # per warp: of a pass that finds the range alone; to read that range in the next pass
SKIP, CODES = 15, 105  # per eight: to test whether it is in the row and still in registers; its codes
# Fitted to the quantizer's 30 times of results/gpu_check/NVIDIA_H200_bench.json, see docs/LOG.md: cycles to start and end a kernel;
# instructions per cycle of a busy scheduler; cycles per instruction of a warp that is alone on its scheduler.
AROUND, ISSUE, ALONE = 670, 0.74, 6
FEW = 256  # rows: kFewRows of w4a8.cu


def warp_instructions(rows, columns, threads, ranged, coded, count=1):
    """Instructions of a warp that finds the range (`ranged`), the codes (`coded`), or both, of `count` rows."""
    eights = columns / (8 * threads)
    batches = math.ceil(eights / rows.held)
    again = batches * rows.load if ranged and coded and batches > 1 else 0  # only the last batch is still in registers
    found = batches * (rows.load + rows.range * ranged + SKIP * rows.held * coded) + eights * (rows.made + CODES * coded) + again
    return (rows.once if coded else RANGE_ONCE) + count * found


def quantizer_threads(M, columns, what):
    """Threads of a block that takes so many columns of a row; see quantize in w4a8.cu."""
    if M > FEW and not what:
        return 256
    threads = math.ceil(columns / 8) if M <= FEW else max(256, math.ceil(columns / (8 * ROWS[what].held)))
    return min(1024, math.ceil(threads / 32) * 32)


def quantizer_pass_us(gpu, M, K, what, ranged, coded, parts=1):
    """The time of one kernel of the quantizer, which finds the range, the codes, or both; `parts` blocks share a row."""
    count = 1 if coded or what else math.ceil(M / 1024)  # rows of a block
    moved = 2 * M * K * (2 if what == "gate" else 1) + M * K * coded
    columns = math.ceil(K / parts / 64) * 64
    threads = quantizer_threads(M, columns, what)
    instructions = warp_instructions(ROWS[what], columns, threads, ranged, coded, count) + PARTS_ONCE * (coded and not ranged)
    warps = math.ceil(math.ceil(M / count) * parts / gpu.processors) * threads / 128  # of the busiest scheduler
    issued = gpu.us(AROUND + instructions * max(warps / ISSUE, ALONE))
    return gpu.gap + max(issued, 1 + moved / (gpu.l2_bandwidth if in_l2(gpu, moved) else gpu.bandwidth))


def produced_us(gpu, M, K, what):
    """Quantization per token, with the norm or the gate in front of it, if any: one pass, or two over a gate of few rows, as in w4a8.cu."""
    parts = min(FEW // M, K // 2048)
    if what == "gate" and parts >= 5:
        return quantizer_pass_us(gpu, M, K, what, True, False, parts) + quantizer_pass_us(gpu, M, K, what, False, True, parts)
    return quantizer_pass_us(gpu, M, K, what, True, True)


def quantizer_us(gpu, M, K):
    """The time to quantize one sequence of M tokens: a pass for the range and one for the codes; one pass for a single token."""
    if M == 1:
        return produced_us(gpu, M, K, "")
    ranges = quantizer_pass_us(gpu, M, K, "", True, False)
    return ranges + quantizer_pass_us(gpu, M, K, "", False, True, max(1, min(FEW // M, K // 2048)))


def elementwise_us(gpu, size):
    """A kernel of PyTorch's that moves so many bytes."""
    return gpu.gap + 1.5 + size / (gpu.l2_bandwidth if in_l2(gpu, size) else gpu.bandwidth)


def apart_us(gpu, M, K, what):
    """The same norm, or gate, in kernels of its own: RMSNorm is one, silu and the product are two."""
    sizes = {"": (), "norm": (4,), "gate": (4, 6)}[what]  # bytes of an element, read and written
    return sum(elementwise_us(gpu, size * M * K) for size in sizes)


@functools.cache
def shared_bandwidth_us(gpu, blocks, slots, block_bytes, quantized, round_us, end):
    """Until `blocks` blocks have read block_bytes each, `slots` at a time, and share the memory's bandwidth.

    A warp asks for 4 KB at a time, every round_us; no block gets more than its first 32 KB before it has quantized x.
    """
    step, now, waiting, first = 0.1, 0.0, blocks, gpu.us(gpu.memory_cycles)
    got, start, finished = np.zeros(0), np.zeros(0), np.zeros(0)
    while waiting or len(got):
        new = min(waiting, slots - len(got))
        waiting -= new
        got, start, finished = (np.append(a, np.full(new, v)) for a, v in ((got, 0.0), (start, now), (finished, np.inf)))
        age = now - start
        most = np.where(age >= max(quantized, first), block_bytes, min(block_bytes, 32768))
        wanted = np.where(age >= first, np.clip(most - got, 0, 32768 / round_us * step), 0)
        got += wanted * min(1, gpu.bandwidth * step / max(wanted.sum(), 1))
        done = (got >= block_bytes - 1) & (age >= max(quantized, first)) & np.isinf(finished)
        finished[done] = now + end
        live = now < finished
        got, start, finished = got[live], start[live], finished[live]
        now += step
    return now


def decode_us(gpu, code, M, N, K, config, splits):
    most, fused, blocks = 8 if M <= 8 else 16, config == "decode_fused", -(-N // 32) * splits
    fit = code.decoders[most, fused]
    warps = 2 * min(fit, math.ceil(blocks / gpu.processors))  # on a scheduler; each block quantizes all of x
    quantized = gpu.us(M * warp_instructions(ROWS[""], K, 256, True, True) * max(warps / ISSUE, ALONE)) if fused else 0
    round_us = gpu.us(gpu.memory_cycles + (430 if most == 8 else 650))
    end = gpu.us(500 + 2200 * (splits > 1))
    return gpu.gap + 0.5 + shared_bandwidth_us(gpu, blocks, fit * gpu.processors, 16 * K / splits, quantized, round_us, end)


def tile_us(gpu, code, M, N, K, config, splits):
    n, m = cuda.CONFIGS[config]
    tiles, steps, cycles = -(-N // n) * -(-M // m), math.ceil(K / 64 / splits), code.cycles[config]
    blocks, busy = tiles * splits, 0
    start = gpu.tensor_us(gpu.memory_cycles + 900) * (0.5 if len(cycles) > 1 else 1)
    for first in range(0, blocks, len(cycles) * gpu.processors):
        wave = min(blocks - first, len(cycles) * gpu.processors)
        busy += gpu.tensor_us(steps * cycles[-(-wave // gpu.processors) - 1]) / gpu.derate + start
    from_l2 = blocks * steps * (n * 32 + m * 64) / gpu.l2_bandwidth
    moved = (N * K / 2 + M * K * (not in_l2(gpu, M * K)) + 2 * M * N) / (gpu.bandwidth * 0.95)
    slabs = blocks * n * m * 4
    through = slabs / 2 / gpu.l2_bandwidth if in_l2(gpu, slabs) else slabs / gpu.bandwidth  # written and read, half of it beside products
    gather = through + gpu.tensor_us(splits * max(600, n * m / 12) + 1500) if splits > 1 else 0
    return gpu.gap + gpu.tensor_us(gpu.memory_cycles) + 0.8 + max(busy, from_l2, moved) + gather


def product_us(gpu, code, M, N, K, config, splits):
    """The product; decode_fused quantizes in it."""
    return (decode_us if config.startswith("decode") else tile_us)(gpu, code, M, N, K, config, splits)


def linear_us(gpu, code, M, N, K, config, splits):
    """Quantization and product."""
    return product_us(gpu, code, M, N, K, config, splits) + (0 if config == "decode_fused" else quantizer_us(gpu, M, K))


def chosen(gpu, code, M, N, K, produced=False):
    """(config, splits) of the tables.  produced: see cuda.choose."""
    return cuda.choose(code.library, gpu.product, gpu.processors, M, N, K, K, produced)


def best(gpu, code, M, N, K):
    """(config, splits) that is fastest in this model."""
    return min(candidates(code.library, M, N, K, K), key=lambda c: linear_us(gpu, code, M, N, K, *c))


# ---------------------------------------------------------------------------
# Tables


def report(gpu, kind):
    """The JSON of this GPU and kind in results/gpu_check, or None."""
    path = MEASURED / f"{gpu.product.replace(' ', '_')}_{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measured_kernels(gpu):
    """{(rows, columns, tokens): {"float16" or config/splits: us}} of every kernel that bench.sweep timed, {} if it did not."""
    cells = (report(gpu, "kernels") or {"cells": ()})["cells"]
    return {(c["rows"], c["columns"], c["tokens"]): {"float16": c["float16"]} | c["times"] for c in cells}


def measured(gpu):
    """({(rows, columns, tokens): [times of bench.linears, of bench.sweep]}, "commit, ..."): each as of measured_kernels.

    They are kept apart, as what the two do to the clock of a GPU is not the same.
    """
    sweep, found, commits = measured_kernels(gpu), {}, {}
    for kind in ("bench", "kernels"):
        if timed := report(gpu, kind):
            commits[timed["about"]["commit"][:7]] = None
            for c in timed["cells"] if kind == "bench" else ():
                if c["graph"] and c["contender"] in ("float16", "w4a8"):
                    name = "{}/{}".format(*c["config"]) if c["contender"] == "w4a8" else "float16"
                    found.setdefault((c["rows"], c["columns"], c["tokens"]), [{}])[0][name] = c["graph"]["median"]
    for cell, times in sweep.items():
        found.setdefault(cell, []).append(times)
    return found, ", ".join(commits)


def beside(measurements, kernel):
    """What was measured of a cell, in brackets: of the same kernel, or of the fastest one, with its name."""
    whole = [times for times in measurements if "float16" in times and len(times) > 1]
    if not whole:
        return ""
    times = next((times for times in whole if kernel in times), whole[-1])
    name = kernel if kernel in times else min(times.keys() - {"float16"}, key=times.get)
    return f"   [{times['float16']:.1f} / {times[name]:.1f}  {times['float16'] / times[name]:.2f}{'' if name == kernel else f'  {name}'}]"


def table(gpu, code, names, tokens, choose):
    """Lines: a linear each, its cells predicted float16 us / W4A8 us, speedup, kernel; measured times in brackets behind."""
    times, commits = measured(gpu)
    yield f"us of float16 / W4A8, speedup, kernel/splits{f'; in brackets measured at {commits}' if commits else ''}"
    for N, K in dict.fromkeys(shape for name in names for shape in shapes.linears(name)):
        for M in tokens:
            choice = choose(gpu, code, M, N, K)
            base, ours, kernel = float16_us(gpu, M, N, K), linear_us(gpu, code, M, N, K, *choice), "{}/{}".format(*choice)
            predicted = f"{base:7.1f} / {ours:7.1f}  {base / ours:5.2f}  {kernel:14}"
            yield f"  {N:6} x {K:5}  {M:5} tokens  {predicted}{beside(times.get((N, K, M), ()), kernel)}"


def mean_of_ratios(ratios):
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):8.2f}" if ratios else " " * 8


def comparison(gpu, code):
    """Lines: predicted over measured time of every kernel that bench.sweep timed, by tokens; what the model's choice of them would cost."""
    cells = measured_kernels(gpu)
    if not cells:
        return
    columns = sorted({M for _, _, M in cells})
    ratios, costs = defaultdict(list), defaultdict(list)
    for (N, K, M), times in cells.items():
        ratios["float16", M].append(float16_us(gpu, M, N, K) / times.pop("float16"))
        predicted = {kernel: linear_us(gpu, code, M, N, K, *split_name(kernel)) for kernel in times}
        for kernel, us in times.items():
            ratios[split_name(kernel)[0], M].append(predicted[kernel] / us)
        costs[M].append(times[min(predicted, key=predicted.get)] / min(times.values()))
    yield f"{'predicted / measured, tokens':30}" + "".join(f"{M:8}" for M in columns)
    for name in ("float16", *cuda.CONFIGS):
        yield f"{name:30}" + "".join(mean_of_ratios(ratios[name, M]) for M in columns)
    yield f"{'chosen by it / fastest':30}" + "".join(mean_of_ratios(costs[M]) for M in columns)


def split_name(kernel):
    """(config, splits) of config/splits."""
    config, splits = kernel.split("/")
    return config, int(splits)


def block_speedup(gpu, code, name, M, choose):
    """Of all linears of a block, q/k/v and gate/up as one each."""
    linears = shapes.block_linears(name, fused=True)
    base = sum(float16_us(gpu, M, N, K) for N, K in linears)
    return base / sum(linear_us(gpu, code, M, N, K, *choose(gpu, code, M, N, K)) for N, K in linears)


def producers_of(name):
    """What stands in front of each linear of a block, q/k/v and gate/up as one each; None for a family whose norms stay as they are."""
    return ("norm", "", "norm", "gate") if shapes.model(name).family == "llama" else None


def block_with_producers(gpu, code, name, M):
    """Of the linears of a block, its norms and its gate, quantized per token: (speedup with norms and gate in kernels of their own, and as
    part of quantization; share of the latter's time that is before the products).
    """
    base = apart = before = products = 0
    for (N, K), what in zip(shapes.block_linears(name, fused=True), producers_of(name), strict=True):
        alone = apart_us(gpu, M, K, what)
        base += float16_us(gpu, M, N, K) + alone
        plain, behind = (chosen(gpu, code, M, N, K, produced) for produced in (False, what != ""))
        quantized = 0 if plain[0] == "decode_fused" else produced_us(gpu, M, K, "")
        apart += alone + quantized + product_us(gpu, code, M, N, K, *plain)
        before += produced_us(gpu, M, K, what) if what else quantized
        products += product_us(gpu, code, M, N, K, *behind)
    return base / apart, base / (before + products), before / (before + products)


def producer_table(gpu, code, names, tokens):
    """Lines of block_with_producers."""
    yield "linears, norms and gate of a block, per token"
    for name in names:
        found = [block_with_producers(gpu, code, name, M) for M in tokens]
        for what, cells in zip(("apart", "in one pass", "share before products"), zip(*found, strict=True), strict=True):
            yield f"{f'{name}, {what}':40}" + "".join(f"{cell:8.0%}" if what.startswith("share") else f"{cell:8.2f}" for cell in cells)


def main(args):
    for name in args.gpu.split(","):
        if name not in GPUS:
            raise UsageError(f"--gpu {name}: not modelled; choose from {', '.join(GPUS)}")
    models = args.models.split(",")
    print(NOTE)
    for name in args.gpu.split(","):
        gpu, choose = GPUS[name], best if args.best else chosen
        code = read_code(gpu.arch)
        print(f"\n{gpu.product}, {'the fastest kernels of this model' if args.best else 'the kernels that would run'}")
        loops = "  ".join(f"{config} {share:.0%}" for config, share in code.shares.items())
        print(f"main loops, share of the rate of mma.sync, or of wgmma: {loops}")
        print(*table(gpu, code, models, args.tokens, choose), sep="\n")
        print(f"{'linears of a block':24}" + "".join(f"{M:8}" for M in args.tokens))
        for model in models:
            print(f"{model:24}" + "".join(f"{block_speedup(gpu, code, model, M, choose):8.2f}" for M in args.tokens), flush=True)
        for line in comparison(gpu, code):
            print(line)
        print(*producer_table(gpu, code, [model for model in models if producers_of(model)], args.tokens), sep="\n")


def parser():
    parser = argparse.ArgumentParser("python -m bench.predict", description=f"{NOTE} It needs nvcc, and no GPU.")
    parser.add_argument("--gpu", default="a100-40,h100", metavar="NAMES", help=f"of {', '.join(GPUS)} (default %(default)s)")
    parser.add_argument(
        "--models", default="llama-13b,llama-30b,opt-30b", metavar="NAMES", help="as in bench.linears (default %(default)s)"
    )
    parser.add_argument("--tokens", type=numbers, default=TOKENS, metavar="M,...", help="of one sequence (default 1 to 2048)")
    parser.add_argument("--best", action="store_true", help="take the kernel that the model finds fastest, not the one of the tables")
    return parser


if __name__ == "__main__":
    p = parser()
    try:
        main(p.parse_args())
    except (build.BuildError, UsageError) as e:
        p.exit(2, f"{p.prog}: error: {e}\n")
    sys.exit()
