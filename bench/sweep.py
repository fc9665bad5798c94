"""Time every kernel and split on this GPU: python -m bench.sweep [--models NAMES] [--tokens M,...] [--seconds S] --output_path FILE

What tune.py takes the best of, kept whole, so that the default rules (kernels/tuning.json) and the model (predict.py) can be judged by it.
FILE is renewed after every layer and number of tokens; what comes first in --tokens is measured first, of all layers.
"""

import argparse
import sys
import time

import torch

from bench.contenders import OURS
from bench.linears import TOKENS, numbers
from bench.timing import SHORTEST, about, random_matrix
from bench.tune import FINALISTS, add_left_out, layers, packed_copies, times_of
from kernels import build, cuda
from recipe import UsageError
from runtime import write_json

PROTOCOL = {
    "times": "microseconds of quantization and product, median of 7 rounds of one CUDA graph over copies of the weight of more than four "
    f"times the L2 cache, all kernels in turn; of float16, PyTorch's product, and of the fastest {FINALISTS} once more, in turn, for "
    f"{SHORTEST} s each",
    "candidates": "bench.tune's; those that do not make what the first one makes are left out",
    "kernels": "config/splits; dispatched: what would run",
}


def label(config, parts):
    return f"{config}/{parts}"


def cell(library, device, tokens, rows, columns, left_out=()):
    """For JSON: the time of every kernel, and of float16, for a layer and a number of tokens."""
    x = random_matrix(tokens, columns, torch.float16, device)[None]
    float16 = {"float16": OURS["float16"].make(rows, columns, device)(tokens)}
    times = times_of(library, x, packed_copies(rows, columns, device), left_out, float16)
    base, found = times.pop("float16"), {label(*c): time for c, time in times.items()}
    chosen = label(*cuda.dispatch(device, tokens, rows, columns, columns))
    return {"rows": rows, "columns": columns, "tokens": tokens, "float16": base, "times": found, "dispatched": chosen}


def line(cell):
    fastest = sorted(cell["times"].items(), key=lambda item: item[1])[:4]
    shown = "".join(f"  {name:16} {time:7.1f}" for name, time in fastest)
    return f"{cell['rows']:6} x {cell['columns']:5}  {cell['tokens']:5} tokens  float16 {cell['float16']:7.1f} us {shown}"


def fill(report, todo, library, device, seconds, left_out, save):
    """Append the cells of todo [(tokens, rows, columns)], and save each; none is begun after so many seconds."""
    end = time.monotonic() + seconds
    for shape in todo:
        if time.monotonic() >= end:
            print(f"stopped after {seconds} s: {len(report['cells'])} of {len(todo)} cells", flush=True)
            return
        report["cells"].append(cell(library, device, *shape, left_out))
        print(line(report["cells"][-1]), flush=True)
        save()
    report["finished"] = True
    save()


def main(args):
    todo = [(tokens, *shape) for tokens in args.tokens for shape in layers(args.models)]
    if not torch.cuda.is_available():
        raise UsageError("no GPU: PyTorch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    library, report = cuda.library(device), {"finished": False, "about": about(device), "protocol": PROTOCOL, "cells": []}

    def save():
        write_json(args.output_path, report)

    save()  # before long work, as it may not be possible
    fill(report, todo, library, device, args.seconds, args.leave_out, save)


def parser():
    parser = argparse.ArgumentParser("python -m bench.sweep", description="Time every kernel and split on this GPU.")
    parser.add_argument("--models", metavar="NAMES", help="as in bench.tune (default all)")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, metavar="M,...", help="in the order of measuring (default 1 to 4096)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many (default: no limit)")
    add_left_out(parser)
    parser.add_argument("--output_path", required=True, metavar="FILE", help="write the times to this JSON")
    return parser


if __name__ == "__main__":
    p = parser()
    try:
        main(p.parse_args())
    except (build.BuildError, UsageError, OSError) as e:
        p.exit(2, f"{p.prog}: error: {e}\n")
    sys.exit()
