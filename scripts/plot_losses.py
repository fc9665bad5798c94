"""What each recipe loses, as a picture: nats over the unquantized model, on every text that all runs have.

python scripts/plot_losses.py results/real/smollm2 --out smollm2.png       one model, its run of --method full among them
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe import UsageError
from run.flags import Parser
from run.report import DEFAULTS, recipe_name
from scripts.table import column, common_protocol, corpus_protocol, read, row_order

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def losses(runs):
    """{name of a recipe: {corpus: nats over the unquantized model}}, few bits last.  Raises UsageError for what does not go together."""
    models = {column(run) for run in runs.values()}
    if len(models) > 1:
        raise UsageError(f"results of {' and '.join(sorted(models))}: give the folder of one model")
    evaluated = [run["results"]["perplexity"] for run in runs.values()]
    corpora = [name for name in evaluated[0] if all(name in other for other in evaluated)]
    if not corpora:
        raise UsageError("no text that all of these runs were evaluated on")
    for corpus in corpora:
        common_protocol(runs, corpus, corpus_protocol)
    full = [run for run in runs.values() if run["recipe"]["method"] == "full"]
    if not full:
        raise UsageError("no run of --method full there, to which the others are compared")
    base = {corpus: full[0]["results"]["perplexity"][corpus]["ppl"] for corpus in corpora}
    found = {}
    for run in sorted((run for run in runs.values() if run not in full), key=by_bits):
        name = recipe_name(run["recipe"] | {"min": DEFAULTS["min"]})
        found[name] = {corpus: math.log(run["results"]["perplexity"][corpus]["ppl"] / base[corpus]) for corpus in corpora}
    if not found:
        raise UsageError("no run there but that of --method full")
    return found


def by_bits(run):
    """The order of the bars: few bits last, then as in a table, tuned after untuned."""
    place, method, wbits, act_bits, smooth = row_order(run["recipe"])
    return wbits, act_bits, place, method, smooth, recipe_name(run["recipe"] | {"tune_steps": 0}), run["recipe"]["tune_steps"]


def draw(found, title, file):
    corpora = list(next(iter(found.values())))
    height = 0.8 / len(corpora)
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.42 * len(found)), constrained_layout=True)
    for k, corpus in enumerate(corpora):
        places = [i + k * height for i in range(len(found))]
        bars = axes.barh(places, [lost[corpus] for lost in found.values()], height, label=corpus, color=COLOURS[k % len(COLOURS)])
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(found))], found)
    axes.invert_yaxis()
    axes.set(xlabel="loss over the unquantized model, nats", title=title)
    axes.margins(x=0.1)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(args):
    runs = read(args.folders)
    found = losses(runs)
    draw(found, column(next(iter(runs.values()))), args.out)
    for name, lost in found.items():
        print(f"{name}: " + ", ".join(f"{corpus} {value:.3f}" for corpus, value in lost.items()))
    print(args.out)


def parser():
    parser = Parser("python scripts/plot_losses.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with the JSONs of opt.py or main.py")
    parser.add_argument("--out", default="losses.png", metavar="FILE", help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
