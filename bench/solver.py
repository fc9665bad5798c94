"""How fast is the solver?  On one layer, against the loop over columns; on the demo OPT, against bare forward passes.  CPU, seconds.

python -m bench.solver
python -m bench.solver --size 1024 --repeat 3 --model facebook/opt-125m
"""

import argparse
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

import gptq
from formats.checkpoint import Store
from modelutils import default_walk_batch, open_decoder
from quant import find_grid
from recipe import Recipe
from run.quantize import quantize_blocks
from runtime import Place
from tests import reference

DEMO = Path(__file__).parents[1] / "demo" / "opt"
PASSES = 3  # of a block over its inputs: smoothing, statistics, propagation


def seconds(function):
    """What it returns, and how long it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def fastest(repeat, **functions):
    """Run all functions in turn, `repeat` times: the last result of each, and its least time."""
    results, times = {}, defaultdict(list)
    for _ in range(repeat):
        for name, function in functions.items():
            results[name], took = seconds(function)
            times[name].append(took)
    return results, {name: min(took) for name, took in times.items()}


def share_of_products(function):
    """Self time of matrix products, as a share of the self time of all PyTorch operations, and of the time on the clock."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _, clock = seconds(function)
    spent = {event.key: event.self_cpu_time_total * 1e-6 for event in profiler.key_averages()}
    products = sum(spent.get(f"aten::{name}", 0) for name in ("mm", "addmm", "addmm_"))
    return products / sum(spent.values()), products / clock


def bench_layer(size, bits, repeat):
    """One linear of size x size: the recursion of gptq.solve against one rank-1 update per column, of all columns or of the rest."""
    W, X = reference.layer(size, size, sequences=2, tokens=size // 2, outliers=size // 100)
    X = X.flatten(0, 1)
    H, grid = X.T @ X, find_grid(W, bits)
    gptq.solve(W[:64, :64], torch.eye(64), find_grid(W[:64, :64], bits))  # the first call of everything is slow
    U, factor = fastest(repeat, factor=lambda: gptq.inverse_factor(H, 0.01))
    U = U["factor"]
    loop = partial(reference.column_loop, W, U, grid.scale, grid.zero, bits)
    codes, times = fastest(repeat, solver=lambda: gptq.solve(W, U, grid), full=lambda: loop(full_width=True), rest=loop)
    of_operations, of_clock = share_of_products(lambda: gptq.solve(W, U, grid))
    products = f"{of_operations:.0%} of it in matrix products ({of_clock:.0%} with Python and the profiler)"
    print(f"one layer of {size} x {size}, {bits} bits, statistics given, {torch.get_num_threads()} threads, best of {repeat}")
    print(f"  inverse_factor   {factor['factor']:8.2f} s")
    print(f"  solve            {times['solver']:8.2f} s, {products}")
    for name, updated in (("full", "all columns"), ("rest", "the columns after it")):
        same = (codes["solver"] == codes[name]).double().mean().item()
        ratio = times[name] / times["solver"]
        print(f"  column loop      {times[name]:8.2f} s, {ratio:.1f} times as long, {same:.3%} equal codes: each column updates {updated}")


@torch.no_grad()
def bare_passes(decoder, ids, walk_batch, device, passes=PASSES):
    """The forward passes that quantizing a Decoder needs, through its own unquantized blocks, and nothing else."""
    sequences = decoder.embed(ids.split(walk_batch), Place(device, "device"))
    for i, block in decoder.visits(device, "bare"):
        for _ in range(passes - 1):
            for k in range(len(sequences)):
                sequences.run(block, k, f"block {i}")
        sequences.propagate(block, f"block {i}")


def bench_model(name, windows, repeat):
    """awrq with smoothing on a whole model against the same passes bare; both read every block from disk once."""
    decoder, device = open_decoder(name), torch.device("cpu")
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True, seqlen=min(2048, decoder.config.max_position_embeddings))
    ids = torch.randint(decoder.config.vocab_size, (windows, recipe.seqlen), generator=torch.Generator().manual_seed(0))
    batch = default_walk_batch(decoder.config, recipe.seqlen, device)
    bare_passes(decoder, ids[:batch], batch, device)  # the first call of everything is slow
    _, times = fastest(
        repeat,
        bare=lambda: bare_passes(decoder, ids, batch, device),
        whole=lambda: list(quantize_blocks(decoder, ids, recipe, Store(decoder, recipe), walk_batch=batch)),
    )
    print(f"{name}: {len(decoder)} blocks, awrq W4A8 with smoothing, {windows} windows of {recipe.seqlen} random tokens")
    print(f"  quantizing       {times['whole']:8.2f} s")
    print(f"  bare passes      {times['bare']:8.2f} s: the first block's inputs, then {PASSES} passes through every block")
    print(f"  ratio            {times['whole'] / times['bare']:8.2f}")


def main(args):
    warnings.simplefilter("ignore")
    disable_progress_bar()
    bench_layer(args.size, args.wbits, args.repeat)
    if args.model != str(DEMO) or DEMO.exists():
        bench_model(args.model, args.windows, args.repeat)
    else:
        print(f"{args.model}: not there, left out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.solver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, metavar="COLUMNS", help="rows and columns of the layer (default %(default)s)")
    parser.add_argument("--wbits", type=int, default=4, metavar="BITS", help="weight bits of the layer (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, metavar="TIMES", help="the fastest of so many counts (default %(default)s)")
    parser.add_argument("--model", default=str(DEMO), help="an OPT (default: the demo's)")
    parser.add_argument("--windows", type=int, default=64, metavar="N", help="calibration windows of the model (default %(default)s)")
    main(parser.parse_args())
