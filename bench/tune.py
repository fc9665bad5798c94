"""Measure which kernel is fastest for which layer and number of tokens on this GPU, and note it in tuning.json: python -m bench.tune

Every time is that of quantization and product together, in a CUDA graph, over so many copies of the weight that the L2 cache holds none.
"""

import argparse
import json
import os
from functools import partial

import torch

import kernels
from bench import shapes
from bench.timing import SHORTEST, enough_copies, random_matrix, ready, rounds_in_turn
from kernels import build, cuda
from recipe import UsageError

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens; above the last, as for the last
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
FINALISTS = 3  # candidates that are timed for longer


def random_weight(rows, columns, groupsize=-1, device="cpu", seed=0):
    """Random codes on a random grid: a kernels.Weight."""
    g = torch.Generator(device).manual_seed(seed)
    groups = 1 if groupsize == -1 else -(-columns // groupsize)
    q = torch.randint(16, (rows, columns), generator=g, dtype=torch.uint8, device=device)
    scale = torch.rand(rows, groups, generator=g, device=device) * 0.01 + 0.001
    zero = torch.randint(16, (rows, groups), generator=g, device=device)
    return kernels.prepare(q, scale, zero, groupsize, torch.randn(rows, generator=g, device=device))


def run(library, x, weight, config, parts):
    """y of one configuration, on the current stream."""
    stream = torch.cuda.current_stream().cuda_stream
    y = x.new_empty(*x.shape[:2], weight.rows)

    def empty(size):
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    return cuda.launch(library, x, y, weight, (8, False, False), None, config, parts, stream, empty, kernels.NOTHING)


def equal(y, wanted, weight):
    """Bit for bit where one scale goes for a whole row; else within the rounding of float32 sums, which may be fused and split."""
    if weight.groupsize == weight.columns:
        return torch.equal(y, wanted)
    y, wanted, eps = y.float(), wanted.float(), torch.finfo(wanted.dtype).eps
    return bool(((y - wanted).abs() <= 2 * eps * wanted.abs() + 4 * 2**-24 * wanted.abs().amax()).all())


def agreeing(library, x, weight, found):
    """Those of some (config, splits) that make what the first one makes of x; a line for each of the others."""
    found = list(found)
    wanted = run(library, x, weight, *found[0]) if found else None
    for candidate in found:
        if equal(run(library, x, weight, *candidate), wanted, weight):
            yield candidate
        else:
            print(f"{'{} / {}'.format(*candidate)} left out: WRONG for {tuple(x.shape)} x {weight.rows} rows; see bench.check", flush=True)


def candidates(library, tokens, rows, columns, groupsize):
    """All (config, splits) that the kernels take and that are not hopeless: neither half empty where a smaller one is not, nor tiny."""
    for config, (_, m) in cuda.CONFIGS.items():
        if (m < 2 * tokens or m == 16) and tokens <= 64 * m:
            for parts in SPLITS if tokens <= 1024 else SPLITS[:1]:
                if cuda.takes(library, config, parts, tokens, rows, columns, groupsize):
                    yield config, parts


def best(times_at):
    """The candidate that loses least over the token counts of a bucket.  times_at: [{candidate: time}], one for each count.

    Raises UsageError if there is none.
    """
    common = set.intersection(*(set(times) for times in times_at))
    if not common:
        raise UsageError("no kernel takes groups of this size: give another --groupsize")
    return min(sorted(common), key=lambda c: sum(times[c] / min(times.values()) for times in times_at))


def entry(edge, times_at):
    """[most tokens, config, splits] of a bucket; behind decode_fused, which takes no producer, also config and splits of the next best."""
    found, others = best(times_at), [{c: time for c, time in times.items() if c[0] != "decode_fused"} for times in times_at]
    return [edge, *found, *(best(others) if found[0] == "decode_fused" and set.intersection(*map(set, others)) else ())]


def packed_copies(rows, columns, device, groupsize=-1):
    """Enough copies of a random weight that none is in the L2 cache when its turn comes."""
    weight = random_weight(rows, columns, groupsize, device)
    return [weight._replace(packed=weight.packed.clone()) for _ in range(enough_copies(device, weight.packed.numel()))]


def times_of(library, x, weights, left_out=(), others=None):
    """{(config, splits): us} of all candidates for x (1, T, C) that agree.  weights: copies of one; left_out: configs.

    All take turns, and then the fastest once more, for SHORTEST seconds each: a GPU that is busy for longer may lower its clock.  others:
    {name: calls} to time beside them in the same turns.
    """
    weight, graph = weights[0], x.is_cuda
    found = [c for c in candidates(library, x.shape[1], weight.rows, weight.columns, weight.groupsize) if c[0] not in left_out]
    calls = {c: [partial(run, library, x, w, *c) for w in weights] for c in agreeing(library, x, weight, found)}
    runs = {name: ready(calls, x.device, graph) for name, calls in (calls | (others or {})).items()}
    times = medians(rounds_in_turn(runs, x.device, graph))
    again = {*sorted(calls, key=times.get)[:FINALISTS], *(others or {})}
    return times | medians(rounds_in_turn({name: runs[name] for name in again}, x.device, graph, shortest=SHORTEST))


def medians(found):
    """{name: us} of what rounds_in_turn gives.  Raises what a kernel raised."""
    for times in found.values():
        if isinstance(times, Exception):
            raise times
    return {name: times["median"] for name, times in found.items()}


def tune_layer(library, device, rows, columns, groupsize, left_out=()):
    """The entries of a layer: for each bucket what is best at both of its ends, so that no cliff follows an edge."""
    weights = packed_copies(rows, columns, device, groupsize)
    entries, below = [], 0
    for edge in EDGES:
        ends = (random_matrix(tokens, columns, torch.float16, device)[None] for tokens in sorted({below + 1, edge}))
        entries.append(entry(edge, [times_of(library, x, weights, left_out) for x in ends]))
        below = edge
    entries[-1][0] = 1 << 20
    return entries


def layers(names):
    """The (rows, columns) to tune: those of some models, "a,b", or of all; also q/k/v and gate/up as one."""
    if names is None:
        return shapes.LAYERS + shapes.FUSED
    return tuple(dict.fromkeys(s for name in names.split(",") for fused in (False, True) for s in shapes.linears(name, fused)))


def add_left_out(parser):
    parser.add_argument("--leave_out", nargs="+", default=[], choices=cuda.CONFIGS, metavar="KERNEL", help=f"of {', '.join(cuda.CONFIGS)}")


def kept(table):
    """What is kept of a GPU's table: nothing, if it is of other kernels."""
    return table if table and table.get("sources") == build.sources() else {"sources": build.sources(), "cells": {}}


def main(args):
    if not torch.cuda.is_available():
        raise UsageError("no GPU: PyTorch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    library, gpu = cuda.library(device), torch.cuda.get_device_name(device)
    table = kept(cuda.tables().get(gpu)) | {"torch": torch.__version__, "cuda": torch.version.cuda}
    for rows, columns in layers(args.models):
        for groupsize in args.groupsize:
            entries = tune_layer(library, device, rows, columns, groupsize, args.leave_out)
            table["cells"][cuda.cell(rows, columns, columns if groupsize == -1 else groupsize)] = entries
            print(f"{gpu}: {rows} x {columns}, groupsize {groupsize}: {entries}", flush=True)
            write({**json.loads(cuda.TUNING.read_text()), gpu: table})


def write(tables):
    """tuning.json, a cell a line; whole or not at all."""
    parts = []
    for name, table in tables.items():
        lists = {key: table[key] for key in ("cells", "rules") if key in table}
        head = {key: value for key, value in table.items() if key not in lists}
        fields = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, value in lists.items():
            items = [json.dumps(k) + ": " + json.dumps(v) for k, v in value.items()] if key == "cells" else [json.dumps(v) for v in value]
            brackets = "{}" if key == "cells" else "[]"
            fields.append(f"    {json.dumps(key)}: {brackets[0]}\n      " + ",\n      ".join(items) + f"\n    {brackets[1]}")
        parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n  }")
    partial_file = cuda.TUNING.with_suffix(".partial")
    partial_file.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(partial_file, cuda.TUNING)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.tune", description="Measure the fastest kernel of every layer shape on this GPU.")
    parser.add_argument(
        "--models", metavar="NAMES", help=f"only the layers of these models, separated by commas (default all): {', '.join(shapes.MODELS)}"
    )
    parser.add_argument(
        "--groupsize",
        type=int,
        nargs="+",
        default=[-1, 128],
        metavar="COLUMNS",
        help="columns per weight scale; -1 = whole row (default -1 128)",
    )
    add_left_out(parser)
    try:
        main(parser.parse_args())
    except (build.BuildError, UsageError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")
