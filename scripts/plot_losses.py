"""What each recipe loses against the unquantized model: a Markdown table of perplexities and a picture, a panel per bit width.

python scripts/plot_losses.py results/real/smollm2 --out results/real/smollm2.png

The folder holds runs of one model, `--method full` among them.  Used are the texts on which all of its runs were evaluated.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe import UsageError
from run.flags import Parser
from run.report import DEFAULTS, recipe_name, spread
from run.report import table as markdown
from scripts.table import column, common_protocol, corpus_protocol, read, row_order

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
NOT_RUN = "not run"
SMALLEST = 1e-3  # nats; a logarithmic axis has to begin somewhere, and one seed of these models means no less


def bits(recipe):
    return f"W{recipe['wbits']}A{recipe['act_bits']}"


def perplexities(runs):
    """({corpus: ppl of the unquantized model}, [row], {bit width: {row: {corpus: [ppl of each seed]}}}).

    Rows are recipes without their bits; bit widths come in the order of many bits to few.

    Raises UsageError for runs of several models, of different protocols, without a text in common or without a run of --method full.
    """
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
    if len(full) == len(runs):
        raise UsageError("no run there but that of --method full")
    quantized = sorted((run for run in runs.values() if run not in full), key=row_of)
    widths = sorted({(-run["recipe"]["wbits"], -run["recipe"]["act_bits"]) for run in quantized})
    found = {f"W{-w}A{-a}": {} for w, a in widths}
    for run in quantized:
        cell = found[bits(run["recipe"])].setdefault(row_name(run), {corpus: [] for corpus in corpora})
        for corpus in corpora:
            cell[corpus].append(run["results"]["perplexity"][corpus]["ppl"])
    base = {corpus: full[0]["results"]["perplexity"][corpus]["ppl"] for corpus in corpora}
    return base, list(dict.fromkeys(map(row_name, quantized))), found


def row_name(run):
    recipe = run["recipe"]
    return recipe_name(recipe | {"min": DEFAULTS["min"]}).replace(f" {bits(recipe)}", "").replace("act_pertoken", "per token")


def row_of(run):
    """The order of rows: as in scripts/table.py, a tuned run after the same untuned."""
    place, method, _, _, smooth = row_order(run["recipe"])
    return place, method, smooth, recipe_name(run["recipe"] | {"tune_steps": 0, "wbits": 4, "act_bits": 8}), run["recipe"]["tune_steps"]


def perplexity_table(full, names, found):
    """Markdown: rows are recipes, columns are bit widths and texts; a cell without a run says so.

    Of several seeds, mean ± half the range (how many).
    """

    def shown(values):
        return spread(values, 2) + f" ({len(values)})" * (len(values) > 1)

    columns = [(width, corpus) for width in found for corpus in full]
    rows = [["unquantized", *(f"{full[corpus]:.2f}" for _, corpus in columns)]]
    for name in names:
        rows.append([name, *(shown(found[width][name][corpus]) if name in found[width] else NOT_RUN for width, corpus in columns)])
    return markdown(["perplexity", *(f"{width} {corpus}" for width, corpus in columns)], rows)


# ---------------------------------------------------------------------------
# The picture


def draw(panels, rows, title, file):
    """Losses over the unquantized model on one logarithmic axis, so that small ones can be told apart as well as large ones.

    panels: {title: {row: {series: [nats of each seed]}}}.  A row that a panel lacks is marked "not run".  Dots are means, lines reach
    from the best to the worst seed; what is below SMALLEST stands at the left edge, with its value.
    """
    series = list(dict.fromkeys(name for panel in panels.values() for row in panel.values() for name in row))
    shown = [max(value, SMALLEST) for panel in panels.values() for row in panel.values() for values in row.values() for value in values]
    left, right = min(shown) * 0.7, max(shown) * 3.5
    size = (2.5 + 3.2 * len(panels), 1.4 + 0.4 * len(rows))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False, constrained_layout=True)
    for ax, (panel, found) in zip(axes[0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            for k, name in enumerate(series):
                if name in found.get(row, {}):
                    draw_loss(ax, y + 0.55 * ((k + 0.5) / len(series) - 0.5), found[row][name], COLOURS[k % len(COLOURS)])
            if row not in found:
                ax.text(left, y, f" {NOT_RUN}", va="center", fontsize=7, color="grey", style="italic")
        ax.set(title=panel, xscale="log", xlim=(left, right))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    if len(series) > 1:
        handles = [plt.Line2D([], [], marker="o", ls="", color=colour, label=name) for name, colour in zip(series, COLOURS, strict=False)]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(series), fontsize=8)
    figure.supxlabel("loss over the unquantized model, nats, logarithmic; left is better", fontsize=9)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_loss(ax, y, values, colour):
    """One dot with its value, and a line over the seeds."""
    mean, shown = statistics.mean(values), [max(value, SMALLEST) for value in values]
    at = max(mean, SMALLEST)
    ax.plot([min(shown), max(shown)], [y, y], color=colour, linewidth=1.5)
    ax.plot(at, y, marker="o" if mean >= SMALLEST else "<", color=colour, markersize=5)
    ax.annotate(
        f"{mean:.4f}" if abs(mean) < 0.01 else f"{mean:.3f}", (max(shown), y), (5, 0), textcoords="offset points", va="center", fontsize=7
    )


def main(args):
    runs = read(args.folders)
    full, rows, found = perplexities(runs)
    panels = {
        width: {row: {name: [math.log(ppl / full[name]) for ppl in seeds] for name, seeds in cell.items()} for row, cell in cells.items()}
        for width, cells in found.items()
    }
    draw(panels, rows, column(next(iter(runs.values()))), args.out)
    print(perplexity_table(full, rows, found))
    print(args.out)


def parser():
    parser = Parser("python scripts/plot_losses.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with the JSONs of opt.py or main.py")
    parser.add_argument("--out", default="losses.png", metavar="FILE", help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
