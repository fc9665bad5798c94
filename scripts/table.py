"""Results to Markdown tables: rows are methods with their settings, cells are "ours (published)".

python scripts/table.py out/opt        (any number of folders; every *.json in them is a result of opt.py or main.py)

Perplexities: one table per corpus, columns are models.  Tasks: one per model and metric, in percent, columns are tasks.

Published values and their sources are in published.json.  Runs of different protocols are never put into one table: that is an error.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evalutils import DEFAULTS, SCHEMA, accuracies, average, recipe_name, table
from modelutils import METHODS, Parser

PUBLISHED = Path(__file__).with_name("published.json")
METRICS = ("acc", "acc_norm")


def read(folders):
    """{file: run} of all results.  Raises OSError if there are none, ValueError for a file that is none."""
    runs = {}
    for folder in folders:
        files = sorted(Path(folder).rglob("*.json"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.json there; scripts/opt.sh and scripts/llama.sh make them")
        for file in files:
            try:
                runs[file] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise ValueError(f"{file}: not JSON ({e}); remove it and run it again") from e
            schema = runs[file].get("schema") if isinstance(runs[file], dict) else None
            if schema != SCHEMA:
                raise ValueError(
                    f"{file}: its schema is {schema}, this script reads {SCHEMA}; results of opt.py and main.py only, of this version"
                )
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
    evaluation = dict(run["protocol"]["evaluation"][corpus])
    evaluation[f"n_tokens of {column(run)}"] = evaluation.pop("n_tokens")  # other models may have other tokenizers
    return shared_protocol(run) | {f"evaluation {key}": value for key, value in evaluation.items()}


def tasks_protocol(run, metric):
    """What must be the same in all runs of a model's table of tasks, as far as a run has it: {what: value}."""
    found = run["results"]["tasks"]
    used = shared_protocol(run) | {"limit": found["config"]["limit"], "lm_eval": found["lm_eval_version"]}
    for task in accuracies(found, metric):
        how = run["protocol"]["tasks"][task] | {"version": found["versions"].get(task), "shots": found["n-shot"].get(task)}
        used |= {f"{task} {key}": value for key, value in how.items()}
    return used


def shared_protocol(run):
    calibration = run["protocol"]["calibration"] or {}
    return {"dtype": run["protocol"]["dtype"]} | {f"calibration {key}": value for key, value in calibration.items()}


def common_protocol(runs, what, protocol_of):
    """The protocol_of(run, what) of all runs.  Raises ValueError, naming file and difference, if there is more than one."""
    seen = {}
    for file, run in runs.items():
        for key, value in protocol_of(run, what).items():
            other, first = seen.setdefault(key, (value, file))
            if value != other:
                raise ValueError(f"{file}: {what} {key} is {value}, but {other} in {first}; such runs do not go into one table")
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


def gather(runs, numbers_of, rows):
    """({(row, column): text} of our runs, of the published rows, {row: recipe}, {row: source}).

    numbers_of(run): {column: text}; rows: [(recipe, source, {column: text})].  Raises ValueError if two runs have the same place.
    """
    ours, theirs, recipes, sources, files = {}, {}, {}, {}, {}
    for recipe, source, values in rows:
        name = recipe_name(recipe)
        recipes[name], sources[name] = recipe, source
        theirs |= {(name, column): value for column, value in values.items()}
    for file, run in runs.items():
        name = recipe_name(run["recipe"])
        recipes[name] = run["recipe"]
        for at, value in numbers_of(run).items():
            if (name, at) in files:
                raise ValueError(f"{file}: {name} of {column(run)} again, after {files[name, at]}; keep one of them")
            ours[name, at], files[name, at] = value, file
    return ours, theirs, recipes, sources


def lines_of(used, notes):
    return [f"{key}: {value}" for key, value in used.items()] + [f"published values: {note}" for note in notes]


def perplexity_table(runs, corpus):
    """The table of one corpus, and the protocol of our runs under it.  runs: those that have the corpus."""
    used = common_protocol(runs, corpus, corpus_protocol)
    models, rows, notes = published({run["model_type"] for run in runs.values()}, corpus, used["evaluation seqlen"])

    def numbers(run):
        ppl = run["results"]["perplexity"][corpus]["ppl"]
        return {column(run): f"{ppl:.2f}" if ppl < 1e4 else f"{ppl:.1e}"}

    ours, *others = gather(runs, numbers, rows)
    models += sorted({model for _, model in ours} - set(models))
    return grid(corpus, models, ours, *others, lines_of(used, notes))


def tasks_table(runs, model, metric):
    """The table of one model's tasks, in percent, with our standard errors.  runs: those of the model that have the metric."""
    used = common_protocol(runs, metric, tasks_protocol)
    rows, notes = published_tasks(model, metric)
    tasks = list(dict.fromkeys(task for run in runs.values() for task in accuracies(run["results"]["tasks"], metric)))

    def percent(value, error):
        return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")

    def numbers(run):
        found = accuracies(run["results"]["tasks"], metric)
        whole = {"average": percent(*average(list(found.values())))} if list(found) == tasks else {}
        return {task: percent(*value) for task, value in found.items()} | whole

    return grid(f"{model}, {metric}", [*tasks, "average"], *gather(runs, numbers, rows), lines_of(used, notes))


def main(args):
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
    return parser


if __name__ == "__main__":
    parser().run(main)
