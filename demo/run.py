"""What quantization does to the demo's tiny OPT: perplexity of all six methods, over three calibration seeds.

python demo/run.py            (or `make demo`; about two minutes on a laptop's CPU)

Writes out/demo/opt.json and out/demo/opt.png.  This is a demonstration on a toy model with planted outlier channels, not the paper's table.
"""

import argparse
import copy
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datautils import calibration, eval_tokens  # noqa: E402
from evalutils import perplexity, table, versions, write_json  # noqa: E402
from modelutils import METHODS, load_model, load_tokenizer, quantize_blocks  # noqa: E402
from quant import Recipe  # noqa: E402

SEEDS = (0, 1, 2)
COLUMNS = {"W4A8": (4, 8), "W3A8": (3, 8), "W4A6": (4, 6)}
ROWS = {  # label: (method, smoothing, columns that it is run for)
    "rtn": ("rtn", False, COLUMNS),
    "smoothquant": ("smoothquant", True, COLUMNS),
    "awrq": ("awrq", False, COLUMNS),
    "awrq + smoothing": ("awrq", True, COLUMNS),
    "act_only (16-bit weights)": ("act_only", False, ("W4A8", "W4A6")),
    "act_only + smoothing (16-bit weights)": ("act_only", True, ("W4A8", "W4A6")),
    "gptq (16-bit activations)": ("gptq", False, ("W4A8", "W3A8")),
    "gptq + smoothing (16-bit activations)": ("gptq", True, ("W4A8", "W3A8")),
}
COLOURS = plt.get_cmap("tab20").colors


def recipes(nsamples, seqlen):
    """{(row, column): [Recipe of each seed that matters]}"""
    base = Recipe(calib_data="world", nsamples=nsamples, seqlen=seqlen)
    cells = {}
    for label, (method, smooth, columns) in ROWS.items():
        for column in columns:
            wbits, act_bits = COLUMNS[column]
            recipe = replace(
                base,
                method=method,
                smooth=smooth,
                wbits=wbits if METHODS[method].weights else 16,
                act_bits=act_bits if METHODS[method].acts[0] else 16,
            )
            seeds = SEEDS if smooth or METHODS[method].stats else SEEDS[:1]  # the others learn nothing from the calibration text
            cells[label, column] = [replace(recipe, seed=seed) for seed in seeds]
    return cells


def show(values):
    """mean, and the spread over seeds (largest minus smallest)"""
    return f"{statistics.mean(values):.3f}" + (f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else "")


def plot(path, full, results):
    """A panel per bit width: what each method adds to the full model's perplexity; whiskers from the best to the worst seed."""
    fig, axes = plt.subplots(1, len(COLUMNS), figsize=(12, 3.8), sharey=True, constrained_layout=True)
    for ax, column in zip(axes, COLUMNS, strict=True):
        for y, label in enumerate(ROWS):
            values = [ppl - full for ppl in results.get((label, column), ())]
            if values:
                mean = statistics.mean(values)
                ax.barh(y, mean, color=COLOURS[y], xerr=[[mean - min(values)], [max(values) - mean]], capsize=3)
                ax.text(max(values), y, f"  {mean:.3f}", va="center")
        ax.margins(x=0.3)
        ax.set_title(column)
    axes[0].set_yticks(range(len(ROWS)), ROWS)
    axes[0].invert_yaxis()
    fig.supxlabel(f"added perplexity on held-out stories (full model: {full:.3f}); each panel has its own scale")
    fig.suptitle("Demo: a tiny OPT with planted outlier channels (lower is better)")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(args):
    start = time.perf_counter()
    model, tokenizer = load_model(ROOT / "demo/opt"), load_tokenizer(ROOT / "demo/opt")
    seqlen = model.config.max_position_embeddings
    text, evaluation = eval_tokens("world", tokenizer, seqlen, ROOT / "demo/data")
    ids = {seed: calibration("world", tokenizer, args.nsamples, seqlen, seed, ROOT / "demo/data") for seed in SEEDS}
    full = perplexity(model, text, seqlen, walk_batch=8)["ppl"]
    cells, results = recipes(args.nsamples, seqlen), {}
    with tqdm(total=sum(map(len, cells.values())), desc="demo", unit="run") as bar:
        for cell, seeds in cells.items():
            results[cell] = []
            for recipe in seeds:
                quantized = copy.deepcopy(model)
                for _ in quantize_blocks(quantized, ids[recipe.seed][0], recipe, walk_batch=8):
                    pass
                results[cell].append(perplexity(quantized, text, seqlen, walk_batch=8)["ppl"])
                bar.update()

    print("\nDEMO: a tiny OPT trained on a generated world, outlier channels planted (powers of two). Not the paper's table.")
    print(f"Perplexity on {evaluation['corpus']} {evaluation['split']}, mean ± half the range over {len(SEEDS)} calibration seeds\n")
    rows = [[label, *(show(results[label, c]) if (label, c) in results else "" for c in COLUMNS)] for label in ROWS]
    print(table(["method", *COLUMNS], [["full (16-bit weights and activations)", *[f"{full:.3f}"] * len(COLUMNS)], *rows]))
    rivals = [label for label, (method, _, _) in ROWS.items() if METHODS[method].weights and METHODS[method].acts[0]]
    for column in COLUMNS:
        best = min(rivals, key=lambda label: statistics.mean(results[label, column]))  # noqa: B023
        print(f"closest to full at {column}, of the methods that quantize weights and activations: {best}")

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder / "opt.png", full, results)
    runs = [{"row": r, "column": c, "recipe": asdict(cells[r, c][k]), "ppl": v} for (r, c), vs in results.items() for k, v in enumerate(vs)]
    protocol = {"model": "demo/opt", "evaluation": evaluation, "calibration": {s: how for s, (_, how) in ids.items()}, "dtype": "float32"}
    write_json(folder / "opt.json", {"full": full, "runs": runs, "protocol": protocol, "versions": versions()})
    print(f"wrote {folder / 'opt.json'} and {folder / 'opt.png'} in {time.perf_counter() - start:.0f} s")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--out", default=str(ROOT / "out/demo"), help="folder for the JSON and the picture (default out/demo)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
