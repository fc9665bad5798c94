"""Time W4A8 against FP16 on this GPU: python -m bench.linears [--block] [--models NAMES] [--output_path FILE]

Without --block, the linears of the models, one by one, against PyTorch's products and others' kernels (contenders.py); with it, whole
decoder blocks and models of random weights (blocks.py).  Every time is a median of rounds, with its 20th and 80th percentile, over so many
copies of the weights that the L2 cache holds none: replayed as one CUDA graph, and called one by one.  scripts/speedup.sh draws the JSON.
On a machine without a GPU, tiny models run through the PyTorch path, to see that all of this works; those times say nothing about speed.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from bench import shapes
from bench.contenders import CONTENDERS, OTHERS, OURS, QUANTIZERS
from bench.timing import SCHEMA, SHORTEST, about, best_time, both_ways_in_turn, ceilings, reason, speedup, watched
from kernels import build, cuda
from recipe import UsageError
from runtime import write_json

TOKENS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CPU_TOKENS = (1, 17)
CPU_NOTE = "no GPU: tiny models through the PyTorch path on a CPU, to see that the benchmark runs; these times say nothing about speed"
NOTHING = dict.fromkeys(("config", "graph", "eager", "reason", "gb_per_second", "tops", "roofline", "ideal_us"))


def ideal_seconds(contender, ceiling, rows, columns, tokens):
    """The roofline: (bytes that must be moved, operations, seconds that the slower of both takes at the measured ceilings)."""
    moved = rows * columns * contender.weight_bits / 8 + tokens * (columns * contender.in_bytes + rows * contender.out_bytes)
    operations = 2 * rows * columns * tokens
    return moved, operations, max(moved / ceiling["bytes"], operations / ceiling[contender.operations])


def rated(found, contender, ceiling, rows, columns, tokens):
    """What a cell's time means: bytes and operations a second, and the share of the roofline."""
    moved, operations, ideal = ideal_seconds(contender, ceiling, rows, columns, tokens)
    time = best_time(found)
    if time is None:
        return {"ideal_us": ideal * 1e6}
    took = time["median"] * 1e-6
    return {"gb_per_second": moved / took * 1e-9, "tops": operations / took * 1e-12, "roofline": ideal / took, "ideal_us": ideal * 1e6}


def bench_layer(rows, columns, tokens, device, ceiling, contenders):
    """Yields the cells of one layer, the contenders in turn; one without tokens for a contender that cannot take the layer."""
    layer, makers = {"rows": rows, "columns": columns}, {}
    for name, contender in contenders.items():
        try:
            makers[name] = contender.make(rows, columns, device)
        except Exception as e:  # see rounds_in_turn
            yield layer | NOTHING | {"contender": name, "tokens": None, "reason": reason(e)}
    for m in tokens:
        calls, missing = {}, {}
        for name, make in makers.items():
            try:
                calls[name] = make(m), contenders[name].graph
            except Exception as e:  # see rounds_in_turn
                missing[name] = reason(e)
        found, chosen = both_ways_in_turn(calls, device), {name: getattr(made, "chosen", None) for name, (made, _) in calls.items()}
        for name in makers:
            config = configuration(device, m, rows, columns) if name.startswith("w4a8") else chosen.get(name)
            cell = layer | NOTHING | {"contender": name, "tokens": m, "config": config, "reason": missing.get(name)}
            yield cell | (found[name] | rated(found[name], contenders[name], ceiling, rows, columns, m) if name in found else {})


def configuration(device, tokens, rows, columns):
    """Which of the CUDA kernels runs, [name, splits]; None on a CPU."""
    return list(cuda.dispatch(device, tokens, rows, columns, columns)) if device.type == "cuda" else None


def bench_layers(models, tokens, device, report, save):
    """Fill in a report: every layer of some models, each shape once."""
    report["contenders"] = {name: {"computes": c.computes, "weight_bits": c.weight_bits} for name, c in CONTENDERS.items()}
    report["layers"], report["quantizers"] = [], []
    layers = dict.fromkeys(shape for name in models for shape in shapes.linears(name))
    for contenders in (OURS, OTHERS):  # others' last: a kernel that leaves its bounds breaks all that this process does after it
        for rows, columns in layers:
            with watched(device) as clocks:
                for cell in bench_layer(rows, columns, tokens, device, report["ceilings"], contenders):
                    report["cells"].append(cell)
                    print(line(cell), flush=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises what broke it
            if contenders is OURS:
                users = [name for name in models if (rows, columns) in shapes.linears(name)]
                report["layers"].append({"rows": rows, "columns": columns, "models": users, "clocks": clocks})
            save()
        if contenders is OURS:
            for columns in dict.fromkeys(columns for _, columns in layers):
                report["quantizers"] += bench_quantizers(columns, tokens, device)
            save()


def bench_quantizers(columns, tokens, device):
    """Yields cells without rows: what comes before a product of so many columns, the quantizers in turn."""
    for m in tokens:
        calls, missing = {}, {}
        for name, make in QUANTIZERS.items():
            try:
                calls[name] = make(columns, device)(m), True
            except Exception as e:  # see rounds_in_turn
                missing[name] = reason(e)
        found = both_ways_in_turn(calls, device)
        for name in QUANTIZERS:
            nothing = {"graph": None, "eager": None, "reason": missing.get(name)}
            yield {"columns": columns, "contender": name, "tokens": m} | found.get(name, nothing)


def shares(report):
    """Lines: of a layer, the share that what comes before the product has in both; – where the kernels have not been timed.

    Quantization is what the op takes beyond its product.  A norm or a gate is part of a quantization per token, which is timed by itself.
    """
    cells = {(c["columns"], c["rows"], c["tokens"], c["contender"]): c for c in report["cells"] if c["tokens"]}
    before = {(c["columns"], c["contender"], c["tokens"]): c for c in report["quantizers"]}
    tokens = sorted({m for _, _, m in before})

    def median(cell):
        return best_time(cell)["median"] if cell and best_time(cell) else None

    def share(columns, rows, name, m):
        product = median(cells.get((columns, rows, m, "w4a8 product")))
        if name:
            first = median(before[columns, name, m])
            return first and product and first / (first + product)
        whole = median(cells.get((columns, rows, m, "w4a8")))
        return whole and product and 1 - product / whole

    def shown(found):
        return "–" if found is None else f"{found:.0%}"

    yield f"{'share before the product':44}" + "".join(f"{m:8}" for m in tokens)
    for layer in report["layers"]:
        for name in ("", "norm, quantization", "gate, quantization"):
            what = f"{layer['rows']} x {layer['columns']}, {name or 'quantization'}"
            yield f"{what:44}" + "".join(f"{shown(share(layer['columns'], layer['rows'], name, m)):>8}" for m in tokens)


def summary(report):
    """Speedups over float16, a line for each layer and a column for each number of tokens; – where there is none."""
    cells = {(c["rows"], c["columns"], c["tokens"], c["contender"]): c for c in report["cells"]}
    tokens = sorted({c["tokens"] for c in report["cells"] if c["tokens"]})

    def shown(*at):
        found = speedup(*(cells.get((*at, name)) for name in ("float16", "w4a8")))
        return f"{found:.2f}" if found else "–"

    layers = [(layer["rows"], layer["columns"]) for layer in report["layers"]]
    rows = [[f"{r} x {c}", *(shown(r, c, m) for m in tokens)] for r, c in layers]
    lines = ["".join(f"{cell:>8}" if i else f"{cell:24}" for i, cell in enumerate(row)) for row in [["speedup, tokens", *tokens], *rows]]
    return "\n".join(lines)


def line(cell):
    time = best_time(cell)
    shown = f"{time['median']:9.1f} us  {cell['roofline']:6.1%} of the roofline" if time else f"{'':9}     {cell['reason']}"
    return f"{cell['rows']:6} x {cell['columns']:5}  {cell['tokens'] or 'any':>5} tokens  {cell['contender']:22} {shown}"


# ---------------------------------------------------------------------------
# Command line


def numbers(text):
    """The whole numbers of a list such as 1,16."""
    try:
        found = tuple(int(number) for number in text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers, separated by commas") from e
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return found


def start(device, kind):
    """A report without cells."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "note": None if device.type == "cuda" else CPU_NOTE,
        "finished": False,
        "about": about(device),
        "kernels": cuda.chosen_by(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
        "protocol": {
            "weights": "random; copies of more than four times the L2 cache in turn",
            "times": "microseconds per call: median, 20th and 80th percentile of rounds",
            "float16": "PyTorch's default settings, which let cuBLAS add up parts in float16; no bias",
            "config": "which kernel, and its splits; of cuBLASLt, which of the algorithms that it offers, and bytes of workspace",
            "rounds": f"contenders in turn; as a graph each for {SHORTEST} s or more",
            "clocks": "lowest, median and highest, read every 100 ms while a layer or model is timed",
        },
        "ceilings": ceilings(device),
        "cells": [],
    }


def main(args):
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    models = args.models.split(",") if args.models else list(shapes.TIMED if gpu else shapes.TINY)
    for name in models:
        shapes.model(name)
    if args.blocks is not None and args.blocks < 1:
        raise UsageError(f"--blocks {args.blocks}: must be at least 1")
    if args.output_path and not os.access(Path(args.output_path).resolve().parent, os.W_OK):
        raise OSError(f"--output_path {args.output_path}: cannot write into its folder; give another, or make it")
    if gpu:
        cuda.library(device)
    print(torch.cuda.get_device_name(device) if gpu else CPU_NOTE, flush=True)
    report = start(device, "blocks" if args.block else "layers")

    def save():
        if args.output_path:
            write_json(args.output_path, report)

    if args.block:
        from bench import blocks  # needs transformers

        blocks.bench_blocks(models, blocks.wanted(args.prefill, args.context, args.batch, device), args.blocks, device, report, save)
    else:
        bench_layers(models, args.tokens or (TOKENS if gpu else CPU_TOKENS), device, report, save)
        print(*shares(report), summary(report), sep="\n")
    report["finished"] = True
    save()
    return report


def parser():
    parser = argparse.ArgumentParser("python -m bench.linears", description=__doc__.split("\n\n")[1])
    parser.add_argument("--models", metavar="NAMES", help=f"separated by commas, of {', '.join(shapes.MODELS | shapes.TINY)}")
    parser.add_argument("--tokens", type=numbers, metavar="M,...", help=f"rows of the activations (default {','.join(map(str, TOKENS))})")
    parser.add_argument("--block", action="store_true", help="whole decoder blocks and models, in place of their linears")
    parser.add_argument("--prefill", type=numbers, metavar="T,...", help="with --block: prompts of so many tokens (default 512 to 8192)")
    parser.add_argument("--context", type=numbers, metavar="T,...", help="with --block: decode behind so many tokens (default 1024,2048)")
    parser.add_argument("--batch", type=numbers, metavar="B,...", help="with --block: sequences decoded together (default 1 to 64)")
    parser.add_argument("--blocks", type=int, metavar="N", help="with --block: at most so many in a model (default: all that fit)")
    parser.add_argument("--output_path", metavar="FILE", help="write results to this JSON")
    return parser


if __name__ == "__main__":
    p = parser()
    try:
        main(p.parse_args())
    except (build.BuildError, UsageError, OSError) as e:
        p.exit(2, f"{p.prog}: error: {e}\n")
    sys.exit()
