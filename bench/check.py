"""Check the CUDA kernels on this GPU, bit for bit: python -m bench.check [--small] [--wgmma] [--output_path FILE]

Kernels are held to the op in PyTorch, on the CPU for small shapes and on the GPU for real ones.  scripts/gpu_check.sh runs this with
compute-sanitizer as well.  Exit status 1 if anything differs.
"""

import argparse
import sys

import numpy as np
import torch

import kernels
from bench.shapes import LAYERS
from bench.timing import about
from bench.tune import SPLITS, equal, random_weight
from kernels import build, cuda
from recipe import UsageError
from runtime import write_json

TYPES = (torch.float16, torch.bfloat16)
GROUPS = (-1, 128, 64)
SETTINGS = (  # per token, symmetric, with lengths
    (False, False, False),
    (True, False, False),
    (True, True, False),
    (False, False, True),
)
GRIDS = (GROUPS, SETTINGS)  # of weights, and of activations
FEW_GRIDS = ((-1, 64), (SETTINGS[1], SETTINGS[3]))
PRODUCED_ACTS = ((8, True, False), (8, True, True), (6, False, False))  # act_bits, per token, symmetric
WGMMA = ("wgmma256x128",)  # a process of their own: whatever they do to the GPU, the others are still checked
CONFIGS = tuple(config for config in cuda.CONFIGS if config not in WGMMA)
SHAPES = (  # sequences, tokens of each, rows, columns
    (2, 5, 104, 256),
    (1, 3, 33, 200),
    (3, 4, 130, 328),
    (9, 1, 256, 448),
    (1, 16, 300, 1600),
    (1, 130, 256, 192),
    (2, 150, 700, 64),
)


def random_x(B, T, C, dtype, seed=0):
    """Sequences and tokens of different ranges, and an outlier channel: (B, T, C) on the CPU, the same on every machine."""
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed))
    x *= torch.linspace(0.3, 4, B)[:, None, None] * torch.linspace(1, 2, T)[:, None]
    x[..., C // 2] *= 20
    return (x + 0.2).to(dtype)


def poisoned(library, x, weight, config, parts, settings=((8, False, False), None), producer=kernels.NOTHING):
    """y of one configuration, y and the workspace garbage before.  settings: (act_bits, per_token, sym), lengths."""
    y = torch.full((*x.shape[:2], weight.rows), float("nan"), dtype=x.dtype, device=x.device)
    stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None

    def empty(size):
        memory = torch.full((size + 256,), 255, dtype=torch.uint8, device=x.device)
        return memory[-memory.data_ptr() % 256 :]

    return cuda.launch(library, x, y, weight, *settings, config, parts, stream, empty, producer)


def random_producers(columns, dtype):
    """{name: (how wide x is, Producer)} on the CPU."""
    norm = torch.randn(columns, generator=torch.Generator().manual_seed(columns)) + 1
    return {"norm": (columns, kernels.Producer(norm.to(dtype), 1e-5)), "gate": (2 * columns, kernels.Producer(gated=True))}


# ---------------------------------------------------------------------------
# Checks: each yields (what, whether it is right)


def every_configuration(library, device, shapes=SHAPES, types=(*TYPES, torch.float32), splits=SPLITS, configs=CONFIGS, grids=GRIDS):
    """All kernels, split and not, of any type, on shapes that need padding, with and without lengths."""
    for config in configs:
        for B, T, rows, columns in shapes:
            for groupsize in grids[0]:
                size = columns if groupsize == -1 else min(groupsize, columns)
                taken = [parts for parts in splits if cuda.takes(library, config, parts, B * T, rows, columns, size)]
                if not taken:
                    continue
                weight = random_weight(rows, columns, groupsize)
                on_device = weight.to(device)
                for i, dtype in enumerate(types):
                    x = random_x(B, T, columns, dtype, seed=i)
                    some = torch.arange(B, dtype=torch.int32) * T // B
                    for *how, with_lengths in grids[1]:
                        acts, lengths = (8 - i, *how), some if with_lengths else None
                        wanted = kernels.w4a8_linear(x, weight, *acts, lengths)
                        for parts in taken:
                            there = None if lengths is None else lengths.to(device)
                            y = poisoned(library, x.to(device), on_device, config, parts, (acts, there))
                            yield f"{config} / {parts}, {B}x{T}, {rows}x{columns} g{groupsize}, {dtype}", equal(y.cpu(), wanted, weight)


def a_few_configurations(library, device):
    """Few enough for compute-sanitizer, which is slow: each kernel, whole rows and groups, split and not, both passes over x.

    Left out is what differs in numbers only, not in what is read and written when: symmetric ranges, other groups, other types.
    """
    yield from every_configuration(library, device, SHAPES[:4], TYPES[:1], (1, 3), grids=FEW_GRIDS)


def every_number_of_tokens(library, device):
    """1 to 129 tokens and the edges of the default rules, by dispatch."""
    for groupsize in GROUPS[:2]:
        weight = random_weight(384, 512, groupsize)
        on_device = weight.to(device)
        for tokens in (*range(1, 130), 255, 256, 257, 1023, 1024, 1025, 4097):
            x = random_x(1, tokens, 512, TYPES[tokens % 2], seed=tokens)
            y = kernels.w4a8_linear(x.to(device), on_device)
            yield f"{tokens} tokens g{groupsize}", equal(y.cpu(), kernels.w4a8_linear(x, weight), weight)


def every_layer(library, device):
    """The layers of all models, against PyTorch on the same GPU."""
    for rows, columns in LAYERS:
        for groupsize in GROUPS[:2]:
            weight = random_weight(rows, columns, groupsize, device)
            for tokens in (1, 9, 16, 17, 64, 65, 1030):
                x = random_x(1, tokens, columns, TYPES[tokens % 2], seed=tokens).to(device)
                wanted = kernels.w4a8_linear(x, weight, kernel="torch")
                yield f"{rows}x{columns} g{groupsize}, {tokens} tokens", equal(kernels.w4a8_linear(x, weight), wanted, weight)


PRODUCED = (*SHAPES, (1, 3, 128, 33000), (1, 300, 128, 5120))


def every_producer(library, device, shapes=PRODUCED, types=(*TYPES, torch.float32), configs=("torch", *CONFIGS), every_acts=PRODUCED_ACTS):
    """A norm and a gate in the pass that quantizes, and in PyTorch on the GPU ("torch"): as PyTorch has them on the CPU."""
    configs = [config for config in configs if config != "decode_fused"]
    for B, T, rows, columns in shapes:
        weight = random_weight(rows, columns)
        on_device = weight.to(device)
        for dtype in types:
            for name, (width, producer) in random_producers(columns, dtype).items():
                there = producer._replace(norm=None if producer.norm is None else producer.norm.to(device))
                x = random_x(B, T, width, dtype)
                x[:, T // 2] = 0
                for acts in every_acts:
                    what = f"{name}, {B}x{T}, {rows}x{columns}, {dtype}, {acts}"
                    wanted = kernels.w4a8_linear(x, weight, *acts, producer=producer)
                    for config in configs:
                        if config == "torch":
                            y = kernels.w4a8_linear(x.to(device), on_device, *acts, kernel="torch", producer=there)
                        elif cuda.takes(library, config, 1, B * T, rows, columns, columns):
                            y = poisoned(library, x.to(device), on_device, config, 1, (acts, None), there)
                        else:
                            continue
                        yield f"{config}, {what}", torch.equal(y.cpu(), wanted)


def a_few_producers(library, device):
    """Few enough for compute-sanitizer, and none of PyTorch's kernels."""
    yield from every_producer(library, device, SHAPES[:4], TYPES[:1], CONFIGS, (PRODUCED_ACTS[0], PRODUCED_ACTS[2]))


def largest_sums(library, device, configs=CONFIGS):
    """36,864 columns, all codes at their largest: the kernels' sums pass 2^31."""
    rows = 160  # padded to 256, as the widest tiles want
    q, x = torch.full((rows, 36864), 15, dtype=torch.uint8), torch.full((1, 17, 36864), 255.0)
    weight = kernels.prepare(q, torch.ones(rows, 1), torch.zeros(rows, 1)).to(device)
    for config in configs:
        tokens = 1 if config.startswith("decode") else 17
        if cuda.takes(library, config, 1, tokens, rows, 36864, 36864):
            y = poisoned(library, x[:, :tokens].to(device), weight, config, 1)
            yield config, bool((y.cpu() == float(np.float32(36864 * 15 * 255))).all())


def largest_sizes(library, device):
    """65,536 tokens, and more than 2^31 numbers in and out: the last tokens, each with its own scale, as they are alone.  Takes 10 GB."""
    for rows, columns in ((128, 36864), (36864, 64)):
        weight = random_weight(rows, columns, device=device)
        x = torch.randn(1, 65536, columns, dtype=torch.float16, device=device)
        y = kernels.w4a8_linear(x, weight, per_token=True)[:, -64:]
        yield f"{rows}x{columns}", torch.equal(y, kernels.w4a8_linear(x[:, -64:].contiguous(), weight, per_token=True, kernel="torch"))


def largest_fused(library, device):
    """Quantization and product in one kernel, on as many columns as its shared memory takes."""
    for columns in (2048, 3072, 4096, 6144):
        if cuda.takes(library, "decode_fused", 1, 16, 128, columns, columns):
            weight, x = random_weight(128, columns), random_x(1, 16, columns, torch.float16)
            y = poisoned(library, x.to(device), weight.to(device), "decode_fused", 1)
            yield f"{columns} columns", torch.equal(y.cpu(), kernels.w4a8_linear(x, weight))


def twice_the_same(library, device, configs=CONFIGS[1:]):
    """Runs of split columns and of groups, eight times over."""
    for config in configs:
        for groupsize in GROUPS[:2]:
            weight, x = random_weight(512, 4096, groupsize).to(device), random_x(1, 16, 4096, torch.float16).to(device)
            if cuda.takes(library, config, 8, 16, 512, 4096, weight.groupsize):
                first, *others = (poisoned(library, x, weight, config, 8).cpu() for _ in range(8))
                yield f"{config} g{groupsize}", all(torch.equal(first, y) for y in others)


def graphs_and_streams(library, device):
    """Captured, replayed with other data, on another stream, with no wait for the GPU in between."""
    weight = random_weight(768, 1024)
    on_device = weight.to(device)
    for tokens in (1, 9, 16, 40, 200, 1030):
        x, other = (random_x(1, tokens, 1024, torch.float16, seed=seed) for seed in (1, 2))
        fixed = x.to(device)
        kernels.w4a8_linear(fixed, on_device)  # chooses the kernel
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                y = kernels.w4a8_linear(fixed, on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
        yield f"{tokens} tokens, stream", torch.equal(y.cpu(), kernels.w4a8_linear(x, weight))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.w4a8_linear(fixed, on_device)
        for data in (other, x, other):
            fixed.copy_(data)
            graph.replay()
            yield f"{tokens} tokens, graph", torch.equal(y.cpu(), kernels.w4a8_linear(data, weight))


def every_gpu(library, device):
    """Every GPU of the machine, whichever is the current one."""
    weight, x = random_weight(104, 256), random_x(2, 5, 256, torch.float16)
    wanted = kernels.w4a8_linear(x, weight)
    for i in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", i)
        yield str(gpu), torch.equal(kernels.w4a8_linear(x.to(gpu), weight.to(gpu)).cpu(), wanted)


def refusals(library, device):
    """What the kernels cannot take is a ValueError."""
    weight = random_weight(64, 128).to(device)
    x = random_x(1, 3, 128, torch.float16).to(device)
    unaligned = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(1, 3, 128)
    groups = random_weight(64, 128, 32).to(device)
    for what, args in (
        ("device", (x.cpu(), weight)),
        ("alignment", (unaligned, weight)),
        ("strides", (x.expand(2, 3, 128), weight)),
        ("groups", (x, groups)),
    ):
        try:
            kernels.w4a8_linear(*args)
            yield what, False
        except ValueError:
            yield what, True


def by_wgmma(library, device):
    """The kernel that only compute capability 9.0 has: small shapes first, then those of all models."""
    if not cuda.takes(library, WGMMA[0], 1, 128, 256, 128, 128):
        return
    yield from every_configuration(library, device, ((1, 1, 256, 128), (1, 130, 256, 1856), *SHAPES), configs=WGMMA)
    yield from every_producer(library, device, ((2, 150, 250, 200), *SHAPES), configs=WGMMA)
    yield from largest_sums(library, device, configs=WGMMA)
    yield from twice_the_same(library, device, configs=WGMMA)
    for rows, columns in LAYERS:
        weight = random_weight(rows, columns, device=device)
        for tokens in (64, 129, 1030):
            x = random_x(1, tokens, columns, TYPES[tokens % 2], seed=tokens).to(device)
            wanted = kernels.w4a8_linear(x, weight, kernel="torch")
            for parts in (1, 3):
                if cuda.takes(library, WGMMA[0], parts, tokens, rows, columns, columns):
                    y = poisoned(library, x, weight, WGMMA[0], parts)
                    yield f"{rows}x{columns}, {tokens} tokens / {parts}", torch.equal(y, wanted)


def a_few_by_wgmma(library, device):
    """Of the same kernel, few enough for compute-sanitizer: whole tiles and padded ones, one round of its stages and several, split too."""
    yield from every_configuration(library, device, ((1, 1, 256, 128), (1, 130, 400, 1856)), TYPES[:1], (1, 3), WGMMA, FEW_GRIDS)


SMALL = (a_few_producers, a_few_configurations, largest_sums, refusals)
CHECKS = (
    every_configuration,
    every_number_of_tokens,
    every_layer,
    every_producer,
    largest_sums,
    largest_sizes,
    largest_fused,
    twice_the_same,
    graphs_and_streams,
    every_gpu,
    refusals,
)


def run_checks(checks, library, device):
    """Yields {"check", "cases", "wrong": [what], "error": what ended it early, or None} of each, and prints it."""
    for check in checks:
        cases, wrong, error, what = 0, [], None, "nothing"
        try:
            for what, ok in check(library, device):
                cases += 1
                wrong += [] if ok else [what]
        except Exception as e:  # whatever a driver raises: what is known so far, and the other checks, are still worth having
            error = f"after {what}: {type(e).__name__}: {e}"
        verdict = "all equal" if not wrong else f"{len(wrong)} WRONG, as {wrong[:3]}"
        print(f"{check.__name__:24} {cases:6} cases  {f'FAILED {error}' if error else verdict}", flush=True)
        yield {"check": check.__name__, "cases": cases, "wrong": wrong, "error": error}


def main(args):
    if not torch.cuda.is_available():
        raise UsageError("no GPU: PyTorch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    library = cuda.library(device)
    print(torch.cuda.get_device_name(device), flush=True)
    report = about(device) | {"finished": False, "checks": []}

    def save():
        if args.output_path:
            write_json(args.output_path, report)

    save()  # before long work, as it may not be possible
    chosen = {(False, False): CHECKS, (True, False): SMALL, (False, True): (by_wgmma,), (True, True): (a_few_by_wgmma,)}
    for result in run_checks(chosen[args.small, args.wgmma], library, device):
        report["checks"].append(result)
        save()
    report["finished"] = True
    save()
    return any(check["wrong"] or check["error"] for check in report["checks"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.check", description="Check the CUDA kernels on this GPU against PyTorch.")
    parser.add_argument("--small", action="store_true", help="only small shapes, for compute-sanitizer")
    parser.add_argument("--wgmma", action="store_true", help="only the kernel by wgmma, of compute capability 9.0; without it all others")
    parser.add_argument("--output_path", metavar="FILE", help="write results to this JSON")
    try:
        sys.exit(main(parser.parse_args()))
    except (build.BuildError, UsageError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")
