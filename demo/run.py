"""What quantization does to the demo's tiny models, over three calibration seeds: OPT's perplexity, LLaMA's accuracy on two tasks.

python demo/run.py            (or `make demo`; under three minutes on two CPU cores)

Writes out/demo/{opt,llama}.json and out/demo/opt.png.  This is a demonstration on toy models with planted outlier channels, not the
paper's tables.
"""

import argparse
import io
import logging
import statistics
import sys
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import torch  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from tqdm import tqdm  # noqa: E402

from datautils import calibration, eval_tokens  # noqa: E402
from evaluation.perplexity import perplexity  # noqa: E402
from evaluation.zeroshot import load_tasks, task_protocol, zero_shot  # noqa: E402
from formats.checkpoint import Store  # noqa: E402
from modelutils import load_tokenizer, open_decoder  # noqa: E402
from recipe import METHODS, Recipe  # noqa: E402
from run.quantize import quantize_blocks  # noqa: E402
from run.report import accuracies, spread, table  # noqa: E402
from runtime import versions, write_json  # noqa: E402

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
LLAMA_COLUMNS = ("W4A8", "W4A6")
LLAMA_ROWS = {label: (method, smooth, LLAMA_COLUMNS) for label, (method, smooth, columns) in ROWS.items() if columns is COLUMNS}
TASKS = ("world_deed", "world_why")
N_ITEMS = 60  # of each task: the first ones
FULL = "full (16-bit weights and activations)"
COLOURS = plt.get_cmap("tab20").colors


def recipes(rows, **settings):
    """{(row, column): [Recipe of each seed that matters]}"""
    base = Recipe(calib_data="world", **settings)
    cells = {}
    for label, (method, smooth, columns) in rows.items():
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


def run_cells(name, decoder, tokenizer, cells, measure):
    """({cell: [measure(quantized decoder) of each seed]}, the calibrations' protocols)"""
    first = next(iter(cells.values()))[0]
    ids = {seed: calibration("world", tokenizer, first.nsamples, first.seqlen, seed, ROOT / "demo/data") for seed in SEEDS}
    results = {cell: [] for cell in cells}
    with tqdm(total=sum(map(len, cells.values())), desc=f"demo, {name}", unit="run") as bar:
        for cell, seeds in cells.items():
            for recipe in seeds:
                store = Store(decoder, recipe)
                for _ in quantize_blocks(decoder, ids[recipe.seed][0], recipe, store, walk_batch=8):
                    pass
                results[cell].append(measure(store.decoder()))
                bar.update()
    return results, {seed: how for seed, (_, how) in ids.items()}


def write_results(path, full, cells, results, what, **protocol):
    """One JSON: every value of every cell with its recipe."""
    runs = [{"row": r, "column": c, "recipe": asdict(cells[r, c][k]), what: v} for (r, c), vs in results.items() for k, v in enumerate(vs)]
    write_json(path, {"full": full, "runs": runs, "protocol": protocol | {"dtype": "float32"}, "versions": versions()})


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


def opt(args, folder):
    """The perplexity of the tiny OPT: table, picture, JSON."""
    decoder, tokenizer = open_decoder(ROOT / "demo/opt"), load_tokenizer(ROOT / "demo/opt")
    seqlen = decoder.config.max_position_embeddings
    text, evaluation = eval_tokens("world", tokenizer, seqlen, ROOT / "demo/data")

    def measure(decoder):
        return perplexity(decoder, text, seqlen, walk_batch=8)["ppl"]

    full, cells = measure(decoder), recipes(ROWS, nsamples=args.nsamples, seqlen=seqlen)
    results, calibrations = run_cells("OPT", decoder, tokenizer, cells, measure)
    print("\nDEMO: a tiny OPT trained on a generated world, outlier channels planted (powers of two). Not the paper's table.")
    print(f"Perplexity on {evaluation['corpus']} {evaluation['split']}, mean ± half the range over {len(SEEDS)} calibration seeds\n")
    rows = [[label, *(spread(results[label, c]) if (label, c) in results else "" for c in COLUMNS)] for label in ROWS]
    print(table(["method", *COLUMNS], [[FULL, *[f"{full:.3f}"] * len(COLUMNS)], *rows]))
    rivals = [label for label, (method, _, _) in ROWS.items() if METHODS[method].weights and METHODS[method].acts[0]]
    for column in COLUMNS:
        best = min(rivals, key=lambda label: statistics.mean(results[label, column]))  # noqa: B023
        print(f"closest to full at {column}, of the methods that quantize weights and activations: {best}")
    plot(folder / "opt.png", full, results)
    write_results(folder / "opt.json", full, cells, results, "ppl", model="demo/opt", evaluation=evaluation, calibration=calibrations)


def llama(args, folder):
    """The accuracies of the tiny LLaMA: table, JSON."""
    decoder, tokenizer = open_decoder(ROOT / "demo/llama"), load_tokenizer(ROOT / "demo/llama")
    tasks = load_tasks([str(ROOT / f"demo/tasks/{task}.yaml") for task in TASKS])

    def measure(decoder):
        with redirect_stderr(io.StringIO()):  # its bars, some for every run, would bury the table
            found = accuracies(zero_shot(decoder.materialize(torch.device("cpu")), tokenizer, tasks, batch_size=32, limit=N_ITEMS))
        return {task: 100 * found[task][0] for task in TASKS}

    full = measure(decoder)
    cells = recipes(LLAMA_ROWS, nsamples=args.nsamples, seqlen=decoder.config.max_position_embeddings, min=0.01)
    results, calibrations = run_cells("LLaMA", decoder, tokenizer, cells, measure)
    print("\nDEMO: a tiny LLaMA that knows the same world. Not the paper's table.")
    print(f"Accuracy in percent on the first {N_ITEMS} items of each task, mean ± half the range over {len(SEEDS)} calibration seeds")
    print("(chance is 25 for world_deed and 50 for world_why; the standard error of one value is up to 6.5)\n")
    header = ["method", *(f"{task} {column}" for column in LLAMA_COLUMNS for task in TASKS)]
    places = [(column, task) for column in LLAMA_COLUMNS for task in TASKS]
    rows = [[label, *(spread([v[task] for v in results[label, column]], 1) for column, task in places)] for label in LLAMA_ROWS]
    print(table(header, [[FULL, *(f"{full[task]:.1f}" for _, task in places)], *rows]))
    protocol = {"model": "demo/llama", "evaluation": {task.config.task: task_protocol(task) for task in tasks}, "limit": N_ITEMS}
    write_results(folder / "llama.json", full, cells, results, "accuracy", **protocol, calibration=calibrations)


def main(args):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    start, folder = time.perf_counter(), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    opt(args, folder)
    llama(args, folder)
    print(f"wrote {folder}/opt.json, opt.png and llama.json in {time.perf_counter() - start:.0f} s")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--out", default=str(ROOT / "out/demo"), help="folder for the JSONs and the picture (default out/demo)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
