"""Results of `python -m bench.linears` to two pictures and a Markdown table, slow cells included.

python scripts/plot.py LAYERS.json BLOCKS.json --out FOLDER     speedup_tokens.png, speedup_models.png, speedup.md; one JSON is enough
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.timing import SCHEMA, best_time, speedup
from recipe import UsageError
from run.flags import Parser
from run.report import table

BASE, OURS = "float16", "w4a8"
COLOURS = dict(zip((OURS, "w4a8 product", "bfloat16", "int8 product"), ("#0072b2", "#56b4e9", "#999999", "#d55e00"), strict=True))
OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#8c510a", "#542788", "#f0e442", "#000000", "#a6761d")  # of others, then with dashes again
CASES = (("decode", 1, 1024), ("decode", 16, 1024), ("prefill", 1, 512), ("prefill", 1, 2048))  # phase, batch, tokens: what is drawn
CASE_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00")
PANEL = (3.1, 2.5)  # inches
DPI = 150

# ---------------------------------------------------------------------------
# Reading


def read(files):
    """{"layers" or "blocks": report}.  Raises OSError or UsageError, which name the file."""
    reports = {}
    for file in files:
        try:
            report = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as e:
            raise UsageError(f"{file}: not JSON ({e})") from e
        kind = report.get("kind") if isinstance(report, dict) else None
        if kind not in ("layers", "blocks") or report.get("schema") != SCHEMA:
            raise UsageError(f"{file}: no result of this version's `python -m bench.linears`; give what its --output_path wrote")
        if kind in reports:
            raise UsageError(f"{file}: a second result of {kind}; give one of each kind")
        if not report["cells"]:
            raise UsageError(f"{file}: has no cells; measure again")
        reports[kind] = report
    return reports


def where(report):
    """What it was measured on, in a line."""
    about = report["about"]
    smi = about.get("nvidia_smi") or {}
    power = f", power limit {smi['power.limit']}" if smi else ""
    finished = "" if report["finished"] else "; the run was cut off"
    return f"{about['gpu'] or 'CPU'}{power}, torch {about['versions']['torch']}, commit {(about['commit'] or 'unknown')[:12]}{finished}"


def microseconds(cell):
    """The median, by CUDA graph where there is one; None without a time."""
    time = cell and best_time(cell)
    return time["median"] if time else None


# ---------------------------------------------------------------------------
# Pictures


def titled(figure, report, title):
    """A note says that these are no measurements of a GPU: then all of the title is red."""
    width = int(11 * figure.get_figwidth())  # letters
    lines = [line for text in (title, where(report), report["note"] or "") for line in textwrap.wrap(text, width)]
    figure.suptitle("\n".join(lines), fontsize=11, color="#c00000" if report["note"] else "black")


def draw_tokens(report, path):
    """Speedup over float16 against the number of tokens, a panel for each shape, with the roofline."""
    layers, cells = report["layers"], {(c["rows"], c["columns"], c["contender"], c["tokens"]): c for c in report["cells"]}
    tokens = sorted({c["tokens"] for c in report["cells"] if c["tokens"]})
    ticks = [m for m in tokens if m in (1, 4, 16, 64, 256, 1024, 4096)] if len(tokens) > 7 else tokens
    others = [name for name in report["contenders"] if name not in COLOURS and name != BASE]
    others = [name for name in others if any(c["contender"] == name and best_time(c) for c in report["cells"])]
    styles = {name: (colour, "-") for name, colour in COLOURS.items()}
    styles |= dict(zip(others, [(colour, style) for style in ("-", ":", "-.") for colour in OTHERS], strict=False))
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PANEL[0] * columns + 0.5, PANEL[1] * rows + 1.4), squeeze=False, layout="constrained", sharex=True
    )
    for axis, layer in zip(axes.flat, layers, strict=False):
        shape = layer["rows"], layer["columns"]
        for name, (colour, style) in styles.items():
            ratios = [speedup(*(cells.get((*shape, which, m)) for which in (BASE, name))) for m in tokens]
            points = [(m, r) for m, r in zip(tokens, ratios, strict=True) if r is not None]
            if points:
                how = {"color": colour, "linestyle": style, "linewidth": 2 if name == OURS else 1}
                axis.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, **how)
        ideal = [(cells.get((*shape, BASE, m)), cells.get((*shape, OURS, m))) for m in tokens]
        roof = [
            (m, a["ideal_us"] / b["ideal_us"])
            for m, (a, b) in zip(tokens, ideal, strict=True)
            if a and b and a["ideal_us"] and b["ideal_us"]
        ]
        if roof:
            axis.plot(*zip(*roof, strict=True), color="black", linestyle="--", linewidth=1, label="roofline, w4a8")
        axis.axhline(1, color="#666666", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
        axis.set_ylim(bottom=0)
        models = layer["models"][:2] + [f"and {len(layer['models']) - 2} more"] * (len(layer["models"]) > 2)
        axis.set_title(f"{shape[0]} x {shape[1]}\n{', '.join(models)}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    figure.supylabel("speedup over float16", fontsize=10)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    titled(figure, report, "Speedup of linear layers over FP16")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def cases(report):
    """What is drawn of the models: of CASES what was measured, else whatever was, four at most."""
    found = list(dict.fromkeys((c["phase"], c["batch"], c["tokens"]) for c in report["cells"]))
    return [case for case in CASES if case in found] or found[:4]


def model_speedup(report, name, case, part="whole"):
    """(FP16 over W4A8 or None, the reason for that) of a model."""
    cells = {c["contender"]: c for c in report["cells"] if (c["model"], c["phase"], c["batch"], c["tokens"]) == (name, *case)}
    found = speedup(*(cells.get(which, {}).get(part) for which in (BASE, OURS)))
    reasons = [f"{which}: {cells[which]['reason']}" for which in (BASE, OURS) if which in cells and cells[which]["reason"]]
    return found, "; ".join(reasons) or "not measured"


def draw_models(report, path):
    """Bars: the speedup of whole models, for a few cases."""
    names, drawn = [model["name"] for model in report["models"]], cases(report)
    figure, axis = plt.subplots(figsize=(max(6, 1.7 * len(names) + 1), 4.4), layout="constrained")
    width = 0.8 / len(drawn)
    for i, (case, colour) in enumerate(zip(drawn, CASE_COLOURS, strict=False)):
        phase, batch, tokens = case
        label = f"prefill {tokens} tokens" if phase == "prefill" else f"decode, batch {batch}, context {tokens}"
        for j, name in enumerate(names):
            found, reason = model_speedup(report, name, case)
            at = j + (i - (len(drawn) - 1) / 2) * width
            axis.bar(at, found or 0, width * 0.95, color=colour, zorder=2, label=label if j == 0 else None)
            text = f"{found:.2f}" if found else reason
            axis.text(at, (found or 0) + 0.03, text, ha="center", va="bottom", fontsize=7, rotation=0 if found else 90, zorder=3)
    axis.axhline(1, color="black", linewidth=0.8, zorder=1)
    axis.margins(x=0.01, y=0.1)
    axis.set_xticks(range(len(names)), [f"{m['name']}\n{m['blocks']} of {m['of']} blocks" for m in report["models"]], fontsize=8)
    axis.set_ylabel("speedup over FP16")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    titled(figure, report, "Speedup of whole models over FP16")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


# ---------------------------------------------------------------------------
# Tables


def times(value, digits=1):
    return "–" if value is None else f"{value:.{digits}f}"


def gain(value):
    """A speedup; a loss in bold."""
    return "–" if value is None else f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x**"


def layer_table(report):
    """Every shape and number of tokens: FP16 and W4A8 in microseconds, by graph and called one by one; the others' speedups."""
    cells = {(c["rows"], c["columns"], c["tokens"], c["contender"]): c for c in report["cells"]}
    others = [name for name in report["contenders"] if name not in (BASE, OURS)]
    timed = [name for name in others if any(c["contender"] == name and best_time(c) for c in report["cells"])]
    rows, slower = [], 0
    for at in dict.fromkeys(key[:3] for key in cells if key[2]):
        base, ours = (cells.get((*at, name)) for name in (BASE, OURS))
        found = speedup(base, ours)
        eager = speedup(*(cell and cell | {"graph": None} for cell in (base, ours)))
        slower += found is not None and found < 1
        share = ours and ours["roofline"]
        more = [gain(speedup(base, cells.get((*at, name)))) for name in timed]
        shown = times(microseconds(base)), times(microseconds(ours)), gain(found), gain(eager), "–" if share is None else f"{share:.0%}"
        rows.append((f"{at[0]} x {at[1]}", at[2], *shown, *more))
    header = ("rows x columns", "tokens", "float16 us", "w4a8 us", "speedup", "called one by one", "of the roofline", *timed)
    reasons = {c["contender"]: c["reason"] for c in report["cells"] if c["contender"] in others and c["contender"] not in timed}
    notes = [
        f"Slower than FP16 in {slower} of {len(rows)} cells, in bold.",
        "w4a8 is quantization, product and bias; float16 the product alone.",
    ]
    notes += [f"Not measured: {name}: {reason}." for name, reason in reasons.items()]
    ceiling = report["ceilings"]
    operations = ", ".join(f"{name} {ceiling[name] * 1e-12:.3g} TOPS" for name in ("float16", "bfloat16", "int8"))
    notes.append(f"Ceilings of the roofline, measured in the same run: {ceiling['bytes'] * 1e-9:.0f} GB/s, {operations}.")
    return section(report, "Linear layers", table(header, rows), notes)


def attentions(report):
    """Which of transformers' attentions the models ran."""
    return ", ".join(sorted({f"transformers' {model['attention']}" for model in report["models"] if "attention" in model})) or "unknown"


def block_table(report):
    """Every case of every model: FP16 and W4A8 in milliseconds, tokens a second, memory."""
    rows, slower = [], 0
    blocks = {model["name"]: f"{model['blocks']} of {model['of']}" for model in report["models"]}
    for at in dict.fromkeys((c["model"], c["phase"], c["batch"], c["tokens"]) for c in report["cells"]):
        pair = {c["contender"]: c for c in report["cells"] if (c["model"], c["phase"], c["batch"], c["tokens"]) == at}
        whole, block = ([pair.get(name, {}).get(part) for name in (BASE, OURS)] for part in ("whole", "block"))
        found = speedup(*whole)
        slower += found is not None and found < 1
        shown = [times(t and t / 1000, 3) for t in map(microseconds, (*whole, *block))]
        rate = [times(pair.get(name, {}).get("tokens_per_second"), 0) for name in (BASE, OURS)]
        memory = [pair.get(name, {}).get("peak_bytes") for name in (BASE, OURS)]
        memory = [times(m and m / 2**30) for m in memory]
        why = "; ".join(f"{name}: {c['reason']}" for name, c in pair.items() if c["reason"])
        rows.append(
            (at[0], blocks.get(at[0], ""), *at[1:], *shown[:2], gain(found), *shown[2:], gain(speedup(*block)), *rate, *memory, why)
        )
    header = ("model", "blocks", "phase", "batch", "tokens", "FP16 ms", "W4A8 ms", "speedup", "a block: FP16 ms", "W4A8 ms", "speedup")
    header += ("FP16 tokens/s", "W4A8 tokens/s", "FP16 GiB", "W4A8 GiB", "remarks")
    notes = [
        f"Slower than FP16 in {slower} of {len(rows)} cells, in bold.",
        f"Both sides: the same attention ({attentions(report)}), q/k/v as one product, gate/up too.",
        "Tokens/s are those of the blocks that were run: of a model that has more, they are not its own.",
    ]
    return section(report, "Blocks and models", table(header, rows), notes)


def section(report, title, text, notes):
    warning = [f"**{report['note']}**", ""] if report["note"] else []
    return "\n".join([f"## {title}", "", where(report), "", *warning, text, "", *(f"- {note}" for note in notes), ""])


# ---------------------------------------------------------------------------

KINDS = {"layers": (draw_tokens, "speedup_tokens.png", layer_table), "blocks": (draw_models, "speedup_models.png", block_table)}


def main(args):
    reports = read(args.files)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = []
    for kind, (draw, name, table_of) in KINDS.items():
        if kind in reports:
            draw(reports[kind], out / name)
            print(out / name)
            texts.append(table_of(reports[kind]))
    (out / "speedup.md").write_text("\n".join(texts), encoding="utf-8")
    print(out / "speedup.md")


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="JSON of python -m bench.linears, with --block or without; one of each at most"
    )
    parser.add_argument("--out", metavar="FOLDER", default="out/speedup", help="where to (default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
