"""Results to Markdown tables: rows are methods with their settings, cells are "ours (published)".

python scripts/table.py out/opt        (any number of folders; every *.json in them is a result of opt.py or main.py)

Perplexities: one table per corpus, columns are models.  Tasks: one per model and metric, in percent, columns are tasks; where full has the
same items, "average - full" is the difference with its paired standard error.

Runs that differ in their seed alone share a cell: mean ± half the range (how many).

python scripts/table.py --ablation out/ablation [--compact FILE]        (or such a FILE in place of the folder)

Of scripts/ablation.sh: one table per model and text, rows are options, columns are bits, cells are mean ± half the range over seeds (their
number), with what --preset plus gains; and one per model of what each option costs in time.  --compact writes the numbers and recipes of
all runs to one JSON.

Published values and their sources are in published.json.  Runs of different protocols are never put into one table: that is an error.
"""

import argparse
import json
import re
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe import METHODS, UsageError
from run.flags import Parser
from run.paired import paired
from run.report import DEFAULTS, SCHEMA, accuracies, average, recipe_name, spread, table
from runtime import write_json

PUBLISHED = Path(__file__).with_name("published.json")
METRICS = ("acc", "acc_norm")
LESS = "average - full"
AROUND = ("chat_template", "system_instruction", "fewshot_as_multiturn")  # of a prompt, where there is anything


def read(folders):
    """{file: run} of all results.  Raises OSError if there are none, UsageError for a file that is none."""
    runs = {}
    for folder in folders:
        files = sorted(Path(folder).rglob("*.json"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.json there; scripts/opt.sh and scripts/llama.sh make them")
        for file in files:
            try:
                runs[file] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise UsageError(f"{file}: not JSON ({e}); remove it and run it again") from e
            schema = runs[file].get("schema") if isinstance(runs[file], dict) else None
            if schema != SCHEMA:
                raise UsageError(
                    f"{file}: its schema is {schema}, this script reads {SCHEMA}; results of opt.py and main.py only, of this version"
                )
            if not runs[file].get("complete", True):
                missing = "; ".join(f"{number}: {reason}" for number, reason in runs[file]["failed"].items())
                warnings.warn(f"{file}: is unfinished{f' ({missing})' if missing else ''}; what is there is in the table", stacklevel=2)
    return runs


def row_order(recipe):
    """Methods in the order of METHODS, others last; many bits before few, plain before smoothed."""
    known = list(METHODS)
    place = known.index(recipe["method"]) if recipe["method"] in known else len(known)
    return place, recipe["method"], -recipe["wbits"], -recipe["act_bits"], recipe["smooth"]


def column(run):
    return Path(run["model"]).name


def corpus_protocol(run, corpus):
    """What must be the same in all runs of a corpus' table, as far as a run has it: {what: value}."""
    evaluation = {"windows": "all"} | run["protocol"]["evaluation"][corpus]
    evaluation[f"n_tokens of {column(run)}"] = evaluation.pop("n_tokens")  # other models may have other tokenizers
    return shared_protocol(run) | {f"evaluation {key}": value for key, value in evaluation.items()}


def tasks_protocol(run, metric):
    """What must be the same in all runs of a model's table of tasks, as far as a run has it: {what: value}."""
    found = run["results"]["tasks"]
    used = shared_protocol(run) | {"limit": found["config"]["limit"], "lm_eval": found["lm_eval_version"]}
    for task in accuracies(found, metric):
        how = (
            dict.fromkeys(AROUND)
            | run["protocol"]["tasks"][task]
            | {"version": found["versions"].get(task), "shots": found["n-shot"].get(task)}
        )
        used |= {f"{task} {key}": value for key, value in how.items()}
    return used


def shared_protocol(run):
    calibration = dict(run["protocol"]["calibration"] or {})
    if steps := run["recipe"].get("tune_steps"):  # other numbers of steps are other rows; results of earlier versions have no such windows
        calibration[f"tune_samples of {steps} steps"] = calibration.pop("tune_samples", "those of the codes")
    return {"dtype": run["protocol"]["dtype"]} | {f"calibration {key}": value for key, value in calibration.items() if key != "seed"}


def common_protocol(runs, what, protocol_of):
    """The protocol_of(run, what) of all runs.  Raises UsageError, naming file and difference, if there is more than one."""
    seen = {}
    for file, run in runs.items():
        for key, value in protocol_of(run, what).items():
            other, first = seen.setdefault(key, (value, file))
            if value != other:
                raise UsageError(f"{file}: {what} {key} is {value}, but {other} in {first}; such runs do not go into one table")
    return {key: value for key, (value, _) in seen.items()}


def published(model_types, corpus, seqlen):
    """(models, [(recipe, source, {model: value, as printed})], how they were evaluated), of the families, for windows of seqlen tokens."""
    models, rows, notes = [], [], []
    for model_type, family in json.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=str).items():
        if model_type in model_types and corpus in family.get("perplexity", {}) and family["seqlen"] == seqlen:
            models += family["models"]
            notes.append(family["perplexity"][corpus]["evaluation"])
            for row in family["perplexity"][corpus]["rows"]:
                values = {model: value for model, value in zip(family["models"], row["ppl"], strict=True) if value is not None}
                rows.append((DEFAULTS | row["recipe"], row["source"], values))
    return models, rows, notes


def published_tasks(model, metric):
    """([(recipe, source, {task: value, as printed})], how they were evaluated) of a model, by its folder's name, which may end in -hf."""
    rows, notes = [], []
    for family in json.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=str).values():
        for found in family.get("tasks", []):
            mine = [row for row in found["rows"] if row["model"].lower() == model.lower().removesuffix("-hf") and metric in row]
            rows += [(DEFAULTS | row["recipe"], row["source"], row[metric]) for row in mine]
            notes += [found["evaluation"]] * bool(mine)
    return rows, notes


def grid(title, columns, ours, theirs, recipes, sources, notes):
    """Markdown: a table with its notes under it.  ours, theirs: {(row, column): text}; recipes, sources: {row: ...}."""

    def cell(*at):
        return " ".join(([ours[at]] if at in ours else []) + ([f"({theirs[at]})"] if at in theirs else [])) or "–"

    names = sorted(recipes, key=lambda name: (row_order(recipes[name]), name))
    rows = [[name, *(cell(name, column) for column in columns), sources.get(name, "")] for name in names]
    return "\n".join(
        [f"### {title}", "", table(["ours (published)", *columns, "published in"], rows), ""] + [f"- {note}" for note in notes]
    )


def gather(runs, numbers_of, rows, shown):
    """({(row, column): text} of our runs, of the published rows, {row: recipe}, {row: source}).

    numbers_of(run): {column: value}; rows: [(recipe, source, {column: text})]; shown([value of each seed], column): text.

    Raises UsageError if two runs have the same place and seed.
    """
    ours, theirs, recipes, sources, files = {}, {}, {}, {}, {}
    for recipe, source, values in rows:
        name = recipe_name(recipe)
        recipes[name], sources[name] = recipe, source
        theirs |= {(name, column): value for column, value in values.items()}
    for file, run in runs.items():
        name, seed = recipe_name(run["recipe"]), run["recipe"]["seed"]
        recipes[name] = run["recipe"]
        for at, value in numbers_of(run).items():
            if (name, at, seed) in files:
                raise UsageError(f"{file}: {name} of {column(run)} again, after {files[name, at, seed]}; keep one of them")
            files[name, at, seed] = file
            ours.setdefault((name, at), []).append(value)
    return {place: shown(values, place[1]) for place, values in ours.items()}, theirs, recipes, sources


def lines_of(runs, used, notes):
    seeds = sorted({run["recipe"]["seed"] for run in runs.values()})
    used = used | {"seeds": ", ".join(map(str, seeds))}
    used = {key: value for key, value in used.items() if value is not None or not key.endswith(AROUND)}
    return [f"{key}: {value}" for key, value in used.items()] + [f"published values: {note}" for note in notes]


def perplexity_table(runs, corpus):
    """The table of one corpus, and the protocol of our runs under it.  runs: those that have the corpus."""
    used = common_protocol(runs, corpus, corpus_protocol)
    models, rows, notes = published({run["model_type"] for run in runs.values()}, corpus, used["evaluation seqlen"])
    if rows and (part := used["evaluation windows"]) != "all":
        raise UsageError(f"{next(iter(runs))}: only windows {part} of {corpus}, published values are of all; run it without --eval_windows")

    def numbers(run):
        return {column(run): run["results"]["perplexity"][corpus]["ppl"]}

    def shown(values, model):
        text = spread(values, 2) if max(values) < 1e4 else f"{statistics.mean(values):.1e}"
        return text + f" ({len(values)})" * (len(values) > 1)

    ours, *others = gather(runs, numbers, rows, shown)
    models += sorted({model for _, model in ours} - set(models))
    return grid(corpus, models, ours, *others, lines_of(runs, used, notes))


def tasks_table(runs, model, metric):
    """The table of one model's tasks, in percent, with our standard errors.  runs: those of the model that have the metric."""
    used = common_protocol(runs, metric, tasks_protocol)
    rows, notes = published_tasks(model, metric)
    tasks = list(dict.fromkeys(task for run in runs.values() for task in accuracies(run["results"]["tasks"], metric)))
    special = {key: value for key, value in used.items() if value is not None and (key == "limit" or key.endswith(AROUND))}
    if rows and special:
        file, (key, value) = next(iter(runs)), next(iter(special.items()))
        raise UsageError(f"{file}: {key} is {value}, published values are of whole tasks and bare prompts; run it without")

    def percent(values, column):
        sign = "+" if column == LESS and statistics.mean(value for value, _ in values) > 0 else ""
        if len(values) > 1:
            return f"{sign}{spread([100 * value for value, _ in values], 2)} ({len(values)})"
        value, error = values[0]
        return f"{sign}{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")

    full = next((run["results"]["tasks"] for run in runs.values() if run["recipe"]["method"] == "full"), {})

    def numbers(run):
        results = run["results"]["tasks"]
        found = accuracies(results, metric)
        if list(found) != tasks or not run.get("complete", True):
            return found
        pair = paired(results, full, tasks, f"{metric},none") if results is not full else None
        return found | {"average": average(list(found.values()))} | ({LESS: pair} if pair else {})

    ours, *others = gather(runs, numbers, rows, percent)
    notes = lines_of(runs, used, notes)
    columns = [*tasks, "average"]
    if any(column == LESS for _, column in ours):
        columns.append(LESS)
        notes.append(f"{LESS}: of the same items, ± the paired standard error")
    return grid(f"{model}, {metric}", columns, ours, *others, notes)


# ---------------------------------------------------------------------------
# The ablation

QUANTIZING = ("guidance", "capture", "smoothing", "statistics", "solving", "propagation", "tuning")


def compact(run):
    """What the ablation needs of a result."""
    return {
        "model": column(run),
        "recipe": {key: value for key, value in run["recipe"].items() if value != DEFAULTS.get(key)},
        "ppl": {corpus: round(found["ppl"], 5) for corpus, found in run["results"]["perplexity"].items()},
        "acc": round(average(list(found.values()))[0], 5)
        if run.get("complete", True) and (found := accuracies(run["results"]["tasks"]))
        else None,
        "seconds": round(sum(run["seconds"].get(activity, 0) for activity in QUANTIZING), 2),
        "device_bytes": run["peak_bytes"]["device"],
        "protocol": {corpus: f"{found['windows']} x {found['seqlen']}" for corpus, found in run["results"]["perplexity"].items()}
        | {"calibration": (run["protocol"]["calibration"] or {}).get("source")},
        "commit": run["commit"],
    }


def read_compact(places):
    """Compact results of folders and of files that --compact wrote."""
    files = [place for place in places if Path(place).is_file()]
    runs = [run for file in files for run in json.loads(Path(file).read_text(encoding="utf-8"))["runs"]]
    return runs + [compact(run) for run in read([place for place in places if place not in files]).values()]


def without_bits(recipe):
    """What a recipe is called in the ablation."""
    return recipe_name(recipe | {"wbits": 8, "act_bits": 8, "min": DEFAULTS["min"]}).replace(" W8A8", "")  # --min is the script's


def counted(values):
    """Mean ± half the range (how many)."""
    return f"{spread(values, 3)} ({len(values)})"


def cells(runs, model, number):
    """{row: {bits: {seed: value}}} of a model; number(run) -> value or None."""
    found = {}
    for run in runs:
        recipe, value = DEFAULTS | run["recipe"], number(run)
        if run["model"] == model and value is not None:
            bits = f"W{recipe['wbits']}A{recipe['act_bits']}"
            found.setdefault(without_bits(recipe), {}).setdefault(bits, {})[recipe["seed"]] = value
    return found


def ablation_table(title, found):
    columns = sorted({bits for row in found.values() for bits in row}, key=lambda bits: [-int(n) for n in re.findall(r"\d+", bits)])
    rows = [[name, *(counted(list(row[b].values())) if b in row else "–" for b in columns)] for name, row in found.items()]
    return "\n".join([f"### {title}", "", table(["", *columns], rows)])


def time_table(model, found, base="awrq"):
    """Markdown of cells of seconds: how many times as long as `base` each row takes, over the bits and seeds that both have; or None."""
    seconds = {name: {(bits, seed): s for bits, row in of.items() for seed, s in row.items()} for name, of in found.items()}
    first, rows = seconds.pop(base, {}), []
    for name, of in seconds.items():
        if ratios := [s / first[cell] for cell, s in of.items() if cell in first]:
            rows.append([name, f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f} to {max(ratios):.1f}", len(ratios)])
    title = f"### {model}, time to quantize, guidance and tuning included: times as long as {base}, by the clock"
    return "\n".join([title, "", table(["", "median", "from, to", "pairs"], rows)]) if rows else None


def gains(found, full, rows):
    """Lines: of the gap between the first row and the full model, the share that each other row closes, on the seeds that both have."""
    base, *others = rows
    for name in others:
        for bits in found.get(name, {}):
            seeds = found[name][bits].keys() & found.get(base, {}).get(bits, {}).keys()
            if seeds:
                before, after = (statistics.mean(found[row][bits][seed] for seed in seeds) for row in (base, name))
                yield f"- {bits}: {name} closes {100 * (before - after) / (before - full):.0f} % of {before - full:.3f} that {base} loses"


def ablation(places, file=None):
    """Markdown of all runs of scripts/ablation.sh; file: written with what it was made from."""
    runs = read_compact(places)
    runs.sort(key=lambda run: (run["model"], len(run["recipe"]), json.dumps(run["recipe"], sort_keys=True)))
    parts = []
    for model in dict.fromkeys(run["model"] for run in runs):
        corpora = dict.fromkeys(corpus for run in runs if run["model"] == model for corpus in run["ppl"])
        for corpus in corpora:
            found = cells(runs, model, lambda run, corpus=corpus: run["ppl"].get(corpus))
            full = next(iter(found.pop("full", {}).values()), {})
            parts.append(ablation_table(f"{model}, perplexity, {corpus}", found))
            if full:
                value = statistics.mean(full.values())
                parts.append("\n".join([f"- the full model: {value:.3f}", *gains(found, value, ("awrq", "awrq, plus"))]))
        accuracy = cells(runs, model, lambda run: run["acc"])
        if accuracy:
            parts.append(ablation_table(f"{model}, mean accuracy of its tasks", accuracy))
        if times := time_table(model, cells(runs, model, lambda run: run["seconds"] or None)):
            parts.append(times)
        parts += costs(runs, model)
    if file:
        write_json(file, {"runs": runs})
    return "\n\n".join(parts)


def pairs(found):
    """[(of plus, of paper)] of the runs that differ in nothing else, which the script runs one soon after the other."""
    paper, plus = (found.get(name, {}) for name in ("awrq", "awrq, plus"))
    return [(plus[bits][seed], paper[bits][seed]) for bits in paper.keys() & plus.keys() for seed in paper[bits].keys() & plus[bits].keys()]


def costs(runs, model):
    """A line about the memory that plus takes beside paper, if the device is a GPU."""
    if memory := pairs(cells(runs, model, lambda run: run["device_bytes"])):
        more = max(ours - published for ours, published in memory) / 2**20
        yield f"- the GPU's peak memory is at most {more:.0f} MiB larger with plus, of {len(memory)} pairs of runs"


def main(args):
    if args.ablation:
        print(ablation(args.folders, args.compact))
        return
    runs = read(args.folders)
    corpora = dict.fromkeys(corpus for run in runs.values() for corpus in run["results"]["perplexity"])
    models = dict.fromkeys(column(run) for run in runs.values() if run["results"]["tasks"])
    tables = [
        perplexity_table({file: run for file, run in runs.items() if corpus in run["results"]["perplexity"]}, corpus) for corpus in corpora
    ]
    for model in models:
        for metric in METRICS:
            mine = {f: run for f, run in runs.items() if column(run) == model and accuracies(run["results"]["tasks"], metric)}
            tables += [tasks_table(mine, model, metric)] if mine else []
    print("\n\n".join(tables))


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="OUTDIR", nargs="+", help="folder with results, for example out/opt or out/llama")
    parser.add_argument("--ablation", action="store_true", help="the folder is of scripts/ablation.sh: its tables")
    parser.add_argument("--compact", metavar="FILE", help="with --ablation: write all numbers to this JSON")
    return parser


if __name__ == "__main__":
    parser().run(main)
