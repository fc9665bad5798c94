"""How long does quantizing take?  Random weights in the shapes of a model, a few of its blocks; the whole model by extrapolation.

python -m bench.quantizing --shape llama-13b --blocks 2                        what the paper's setting costs on this GPU
python -m bench.quantizing --shape tiny-llama --nsamples 4 --seqlen 32         on a CPU, to see that it runs
"""

import argparse
import time
import warnings
from dataclasses import asdict
from functools import partial

import torch
from transformers import AutoModelForCausalLM

import gptq
from bench import shapes
from bench.blocks import configuration
from bench.solver import bare_passes
from bench.timing import about
from formats.checkpoint import Store
from modelutils import decoder_of, default_walk_batch
from quant import find_grid
from recipe import METHODS, Recipe
from run.flags import Parser, positive
from run.quantize import quantize_blocks
from runtime import Clock, Place, find_device, write_json
from tests import reference

SCHEMA = 1
VOCABULARY = 1024  # tokens: embeddings are not what is timed
ACTIVITIES = ("smoothing", "statistics", "solving", "propagation")
CPU_NOTE = "no GPU: these times are a CPU's, which say nothing about a GPU's"


def random_decoder(shape, blocks, seqlen, where):
    """A Decoder of a few random blocks in host memory: float16 for a GPU, float32 for a CPU."""
    config = configuration(shape, seqlen)
    config.num_hidden_layers, config.vocab_size = blocks, VOCABULARY
    torch.manual_seed(0)
    return decoder_of(AutoModelForCausalLM.from_config(config, dtype=torch.float16 if where.type == "cuda" else torch.float32))


def clocked(where, call):
    """What call() returns, and the seconds it took."""
    start = time.perf_counter()
    result = call()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return result, time.perf_counter() - start


def solver(size, bits, where):
    """One square layer, statistics given: seconds of the solver and of the published loop, which updates all columns after each."""
    W, X = (t.to(where) for t in reference.layer(size, size, sequences=2, tokens=size // 2, outliers=max(1, size // 100)))
    H, grid = X.flatten(0, 1).T @ X.flatten(0, 1), find_grid(W, bits)
    U = gptq.inverse_factor(H, 0.01)
    gptq.solve(W, U, grid)  # kernels are compiled on first use
    q, solve = clocked(where, partial(gptq.solve, W, U, grid))
    other, loop = clocked(where, partial(reference.column_loop, W, U, grid.scale, grid.zero, bits, full_width=True))
    same = (q == other).double().mean().item()
    return {"rows": size, "columns": size, "solve": solve, "published_loop": loop, "ratio": loop / solve, "equal_codes": same}


def main(args):
    model_shape, device = shapes.model(args.shape), find_device(args.device)
    machine = about(device)  # with the commit, read first: the checkout may change meanwhile
    blocks = min(args.blocks, model_shape.blocks)
    recipe = Recipe(args.method, wbits=args.wbits, act_bits=8, smooth=args.smooth, nsamples=args.nsamples, seqlen=args.seqlen)
    decoder = random_decoder(args.shape, blocks, recipe.seqlen, device)
    ids = torch.randint(VOCABULARY, (recipe.nsamples, recipe.seqlen), generator=torch.Generator().manual_seed(0))
    batch = args.walk_batch or default_walk_batch(decoder.config, recipe.seqlen, device)
    passes = 2 + recipe.smooth
    bare_passes(decoder, ids[:batch], batch, device, passes)  # the first call of everything is slow
    _, bare = clocked(device, partial(bare_passes, decoder, ids, batch, device, passes))
    first = random_decoder(args.shape, 1, recipe.seqlen, device)
    list(
        quantize_blocks(first, ids[:batch], recipe, Store(first, recipe), Place(device, "device"), batch)
    )  # the same: kernels are compiled
    del first
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    _, whole = clocked(
        device, lambda: list(quantize_blocks(decoder, ids, recipe, Store(decoder, recipe), Place(device, "device"), batch, clock))
    )
    capture, by_block = clock.seconds["capture"], {name: clock.seconds[name] / blocks for name in ACTIVITIES if name in clock.seconds}
    by_block["the rest"] = (whole - capture) / blocks - sum(by_block.values())
    report = {
        "schema": SCHEMA,
        "kind": "quantize",
        "note": None if device.type == "cuda" else CPU_NOTE,
        "about": machine,
        "shape": args.shape,
        "blocks": blocks,
        "of": model_shape.blocks,
        "recipe": asdict(recipe),
        "walk_batch": batch,
        "seconds": {"capture": capture, "block": by_block, "model": capture + model_shape.blocks * (whole - capture) / blocks},
        "bare_passes": {"passes": passes, "seconds": bare, "ratio": whole / bare},
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "solver": solver(model_shape.hidden, recipe.wbits, device) if args.solver else None,
    }
    show(report)
    if args.output_path:
        write_json(args.output_path, report)


def show(report):
    seconds, bare, found = report["seconds"], report["bare_passes"], report["solver"]
    if report["note"]:
        print(report["note"])
    print(
        f"{report['shape']}, {report['blocks']} of {report['of']} blocks, {report['recipe']['method']} W{report['recipe']['wbits']}A8, "
        f"{report['recipe']['nsamples']} x {report['recipe']['seqlen']} tokens, {report['about']['gpu'] or 'CPU'}"
    )
    print(f"  capture        {seconds['capture']:9.2f} s")
    for name, value in seconds["block"].items():
        print(f"  {name:14} {value:9.2f} s a block")
    print(f"  whole model    {seconds['model'] / 60:9.2f} min, extrapolated")
    print(f"  bare passes    {bare['ratio']:9.2f} times as long as {bare['passes']} forward passes through every block and nothing else")
    if found:
        print(
            f"  solver         {found['ratio']:9.1f} times as fast as the published loop on {found['rows']} x {found['columns']}: "
            f"{found['solve']:.3f} s, {found['published_loop']:.3f} s, {found['equal_codes']:.2%} equal codes"
        )


def parser():
    parser = Parser("python -m bench.quantizing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-13b", metavar="NAME", help=f"of {', '.join(shapes.MODELS | shapes.TINY)}")
    parser.add_argument("--blocks", type=positive, default=2, metavar="N", help="blocks that are quantized (default %(default)s)")
    parser.add_argument("--method", choices=[name for name, m in METHODS.items() if m.stats], default="awrq", help="(default %(default)s)")
    parser.add_argument("--wbits", type=int, default=4, metavar="BITS", help="weight bits (default %(default)s)")
    parser.add_argument("--smooth", action="store_true", help="smooth first, which takes one pass more")
    parser.add_argument("--nsamples", type=positive, default=128, metavar="N", help="calibration sequences (default %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=2048, metavar="TOKENS", help="tokens of each (default %(default)s)")
    parser.add_argument("--walk_batch", type=positive, metavar="N", help="sequences run together (default: from the memory)")
    parser.add_argument("--no-solver", dest="solver", action="store_false", help="leave out the comparison with the published loop")
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:N or cpu (default: a GPU if there is one)")
    parser.add_argument("--output_path", metavar="FILE", help="write results to this JSON")
    return parser


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser().run(main)
