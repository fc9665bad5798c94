"""What quantization does to the demo's tiny models.

python demo/run.py            `make demo`: W4A8, one calibration seed, perplexity of OPT and LLaMA; under a minute
python demo/run.py --full     `make demo-full`: W4A8, W3A8 and W4A6, three seeds; OPT's perplexity, LLaMA's accuracy on two tasks; minutes

Writes tables (JSON) and pictures to out/demo.  The models are toys with planted outlier channels: these are not the paper's tables.
"""

import argparse
import io
import logging
import math
import statistics
import sys
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from datautils import calibration, eval_tokens
from evaluation.perplexity import perplexity
from formats.checkpoint import Store
from modelutils import load_tokenizer, open_decoder
from recipe import METHODS, Recipe
from run.quantize import quantize_blocks
from run.report import accuracies, spread, table
from runtime import versions, write_json
from scripts.plot_losses import NOT_RUN, draw

ROOT = Path(__file__).resolve().parents[1]
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
QUICK_WINDOWS = 64  # of 154: enough to tell the methods apart
MODELS = {"OPT": ("opt", 0.1), "LLaMA": ("llama", 0.01)}  # name: (folder, --min of its script)
PLANTED = "a generated world, outlier channels planted (powers of two).  Not the paper's table."


def load(folder):
    """(decoder, tokenizer, tokens per window) of a model of the demo."""
    decoder = open_decoder(ROOT / "demo" / folder)
    return decoder, load_tokenizer(ROOT / "demo" / folder), decoder.config.max_position_embeddings


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


def quantized(decoder, ids, recipe):
    store = Store(decoder, recipe)
    for _ in quantize_blocks(decoder, ids, recipe, store, walk_batch=8):
        pass
    return store.decoder()


def run_cells(name, decoder, tokenizer, cells, measure):
    """({cell: [measure(quantized decoder) of each seed]}, the calibrations' protocols)"""
    first = next(iter(cells.values()))[0]
    ids = {seed: calibration("world", tokenizer, first.nsamples, first.seqlen, seed, ROOT / "demo/data") for seed in SEEDS}
    results = {cell: [] for cell in cells}
    with tqdm(total=sum(map(len, cells.values())), desc=f"demo, {name}", unit="run") as bar:
        for cell, seeds in cells.items():
            for recipe in seeds:
                results[cell].append(measure(quantized(decoder, ids[recipe.seed][0], recipe)))
                bar.update()
    return results, {seed: how for seed, (_, how) in ids.items()}


def write_results(path, full, cells, results, what, **protocol):
    """One JSON: every value of every cell with its recipe."""
    runs = [{"row": r, "column": c, "recipe": asdict(cells[r, c][k]), what: v} for (r, c), vs in results.items() for k, v in enumerate(vs)]
    write_json(path, {"full": full, "runs": runs, "protocol": protocol | {"dtype": "float32"}, "versions": versions()})


def quick(args, folder):
    """W4A8 and one seed: a row of perplexities as soon as it is computed, then JSON and picture of all."""
    print(f"DEMO: a tiny OPT and a tiny LLaMA that know {PLANTED}", flush=True)
    subjects, cells, found, protocol = {}, {}, {}, {}
    for model, (name, smallest) in MODELS.items():
        decoder, tokenizer, seqlen = load(name)
        text, evaluation = eval_tokens("world", tokenizer, seqlen, ROOT / "demo/data")
        ids, calibrated = calibration("world", tokenizer, args.nsamples, seqlen, SEEDS[0], ROOT / "demo/data")
        text = text[: QUICK_WINDOWS * seqlen]
        subjects[model] = decoder, ids, lambda d, text=text, seqlen=seqlen: perplexity(d, text, seqlen, walk_batch=8)["ppl"]
        protocol[model] = {"evaluation": evaluation | {"windows": QUICK_WINDOWS}, "calibration": calibrated}
        cells[model] = recipes(
            {label: row for label, row in ROWS.items() if "W4A8" in row[2]}, nsamples=args.nsamples, seqlen=seqlen, min=smallest
        )
    print(f"Perplexity on held-out stories, W4A8, seed {SEEDS[0]}; lower is better\n")
    width = max(map(len, (FULL, *ROWS)))
    print(f"| {'method':<{width}} | " + " | ".join(f"{model:>6}" for model in MODELS) + " |")
    print(f"|{'-' * (width + 2)}|" + "-------:|" * len(MODELS), flush=True)
    for label in (FULL, *ROWS):
        for model, (decoder, ids, measure) in subjects.items():
            cell = cells[model].get((label, "W4A8"))
            found[model, label] = measure(quantized(decoder, ids, cell[0]) if cell else decoder)
        print(f"| {label:<{width}} | " + " | ".join(f"{found[model, label]:6.3f}" for model in MODELS) + " |", flush=True)
    panels = {
        f"{model}, W4A8": {label: {"loss": [math.log(found[model, label] / found[model, FULL])]} for label in ROWS} for model in MODELS
    }
    draw(panels, list(ROWS), "Demo: tiny models with planted outlier channels", folder / "quick.png")
    runs = [
        {"model": m, "row": r, "recipe": asdict(cells[m][r, "W4A8"][0]) if r != FULL else None, "ppl": v} for (m, r), v in found.items()
    ]
    write_json(folder / "quick.json", {"runs": runs, "protocol": protocol | {"dtype": "float32"}, "versions": versions()})
    print(
        f"\nThe same as a picture: {folder}/quick.png\nThe rest, with W3A8, W4A6, three seeds and two tasks: make demo-full, some minutes"
    )


def opt(args, folder):
    """The perplexity of the tiny OPT: table, picture, JSON."""
    decoder, tokenizer, seqlen = load("opt")
    text, evaluation = eval_tokens("world", tokenizer, seqlen, ROOT / "demo/data")

    def measure(decoder):
        return perplexity(decoder, text, seqlen, walk_batch=8)["ppl"]

    full, cells = measure(decoder), recipes(ROWS, nsamples=args.nsamples, seqlen=seqlen)
    results, calibrations = run_cells("OPT", decoder, tokenizer, cells, measure)
    print(f"\nDEMO: a tiny OPT that knows {PLANTED}")
    print(f"Perplexity on {evaluation['corpus']} {evaluation['split']}, mean ± half the range over {len(SEEDS)} calibration seeds\n")
    rows = [[label, *(spread(results[label, c]) if (label, c) in results else NOT_RUN for c in COLUMNS)] for label in ROWS]
    print(table(["method", *COLUMNS], [[FULL, *[f"{full:.3f}"] * len(COLUMNS)], *rows]))
    rivals = [label for label, (method, _, _) in ROWS.items() if METHODS[method].weights and METHODS[method].acts[0]]
    for column in COLUMNS:
        best = min(rivals, key=lambda label: statistics.mean(results[label, column]))  # noqa: B023
        print(f"closest to full at {column}, of the methods that quantize weights and activations: {best}")
    panels = {
        c: {row: {"loss": [math.log(ppl / full) for ppl in v]} for (row, column), v in results.items() if column == c} for c in COLUMNS
    }
    draw(panels, list(ROWS), f"Demo: a tiny OPT with planted outlier channels (full model: perplexity {full:.3f})", folder / "opt.png")
    write_results(folder / "opt.json", full, cells, results, "ppl", model="demo/opt", evaluation=evaluation, calibration=calibrations)


def llama(args, folder):
    """The accuracies of the tiny LLaMA: table, JSON."""
    from evaluation.zeroshot import load_tasks, task_protocol, zero_shot  # only here: lm-eval takes seconds to import

    decoder, tokenizer, seqlen = load("llama")
    tasks = load_tasks([str(ROOT / f"demo/tasks/{task}.yaml") for task in TASKS])

    def measure(decoder):
        with redirect_stderr(io.StringIO()):  # its bars, some for every run, would bury the table
            found = accuracies(zero_shot(decoder.materialize(torch.device("cpu")), tokenizer, tasks, batch_size=32, limit=N_ITEMS))
        return {task: 100 * found[task][0] for task in TASKS}

    full = measure(decoder)
    cells = recipes(LLAMA_ROWS, nsamples=args.nsamples, seqlen=seqlen, min=MODELS["LLaMA"][1])
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
    torch.set_num_threads(1)  # matrices of this size take longer on several
    start, folder = time.perf_counter(), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for part in (opt, llama) if args.full else (quick,):
        part(args, folder)
    print(f"{time.perf_counter() - start:.0f} seconds; every number with its recipe is in the JSON of {folder}.")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all bit widths, seeds and tasks")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--out", default=str(ROOT / "out/demo"), help="folder for the JSONs and the picture (default out/demo)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
