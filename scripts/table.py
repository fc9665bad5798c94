"""Results to Markdown tables: one per corpus, rows are methods with their settings, columns are models, cells are "ours (published)".

python scripts/table.py out/opt        (any number of folders; every *.json in them is a result of opt.py)

Published values and their sources are in published.json.  Runs of different protocols are never put into one table: that is an error.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evalutils import SCHEMA, table
from modelutils import METHODS, Parser
from quant import Recipe

PUBLISHED = Path(__file__).with_name("published.json")
DEFAULTS = asdict(Recipe())
NAMED = ("method", "wbits", "act_bits", "smooth")  # have their own place in a row's name
DATA = ("calib_data", "nsamples", "seqlen", "seed")  # the same in a whole table


def read(folders):
    """{file: run} of all results.  Raises OSError if there are none, ValueError for a file that is none."""
    runs = {}
    for folder in folders:
        files = sorted(Path(folder).rglob("*.json"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.json there; scripts/opt.sh makes them")
        for file in files:
            try:
                runs[file] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise ValueError(f"{file}: not JSON ({e}); remove it and run it again") from e
            schema = runs[file].get("schema") if isinstance(runs[file], dict) else None
            if schema != SCHEMA:
                raise ValueError(f"{file}: its schema is {schema}, this script reads {SCHEMA}; results of opt.py only, of this version")
    return runs


def row_name(recipe):
    """What a run is called, whatever the model: method, bits and every setting that is not the default."""
    method = recipe["method"]
    name = method if method == "full" else f"{method} W{recipe['wbits']}A{recipe['act_bits']}"
    if recipe["smooth"] and False in METHODS[method].smooth:
        name += " + smoothing"
    for setting, value in recipe.items():
        used = recipe["smooth"] or setting not in ("alpha", "min")
        if used and setting not in NAMED + DATA and value != DEFAULTS.get(setting):
            name += f", {setting}" if value is True else f", {setting} {value}"
    return name


def row_order(recipe):
    """Methods in the order of METHODS, others last; many bits before few, plain before smoothed."""
    known = list(METHODS)
    place = known.index(recipe["method"]) if recipe["method"] in known else len(known)
    return place, recipe["method"], -recipe["wbits"], -recipe["act_bits"], recipe["smooth"]


def column(run):
    return Path(run["model"]).name


def protocol(run, corpus):
    """What must be the same in all runs of a table, as far as a run has it: {what: value}."""
    calibration, evaluation = run["protocol"]["calibration"] or {}, dict(run["protocol"]["evaluation"][corpus])
    evaluation[f"n_tokens of {column(run)}"] = evaluation.pop("n_tokens")  # other models may have other tokenizers
    parts = {"calibration": calibration, "evaluation": evaluation}
    return {"dtype": run["protocol"]["dtype"]} | {f"{part} {key}": value for part in parts for key, value in parts[part].items()}


def common_protocol(runs, corpus):
    """The protocol of all runs.  Raises ValueError, naming file and difference, if there is more than one."""
    seen = {}
    for file, run in runs.items():
        for what, value in protocol(run, corpus).items():
            other, first = seen.setdefault(what, (value, file))
            if value != other:
                raise ValueError(f"{file}: {corpus} {what} is {value}, but {other} in {first}; such runs do not go into one table")
    return {what: value for what, (value, _) in seen.items()}


def published(model_types, corpus, seqlen):
    """(models, [(recipe, source, {model: value, as printed})], how they were evaluated), of the families, for windows of seqlen tokens."""
    models, rows, notes = [], [], []
    for model_type, family in json.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=str).items():
        if model_type in model_types and corpus in family and family["seqlen"] == seqlen:
            models += family["models"]
            notes.append(family[corpus]["evaluation"])
            for row in family[corpus]["rows"]:
                values = {model: value for model, value in zip(family["models"], row["ppl"], strict=True) if value is not None}
                rows.append((DEFAULTS | row["recipe"], row["source"], values))
    return models, rows, notes


def perplexity_table(runs, corpus):
    """Markdown: the table of one corpus, and the protocol of our runs under it.  runs: those that have the corpus."""
    used = common_protocol(runs, corpus)
    columns, others, notes = published({run["model_type"] for run in runs.values()}, corpus, used["evaluation seqlen"])
    recipes, sources, theirs, ours, files = {}, {}, {}, {}, {}
    for recipe, source, values in others:
        name = row_name(recipe)
        recipes[name], sources[name], theirs[name] = recipe, source, values
    for file, run in runs.items():
        name, model = row_name(run["recipe"]), column(run)
        if (name, model) in files:
            raise ValueError(f"{file}: {name} of {model} again, after {files[name, model]}; keep one of them")
        recipes[name], files[name, model] = run["recipe"], file
        ours[name, model] = run["results"]["perplexity"][corpus]["ppl"]
    columns += sorted({model for _, model in ours} - set(columns))

    def cell(name, model):
        mine, printed = ours.get((name, model)), theirs.get(name, {}).get(model)
        parts = [f"{mine:.2f}" if mine < 1e4 else f"{mine:.1e}"] if mine is not None else []
        return " ".join(parts + [f"({printed})"] * (printed is not None)) or "–"

    names = sorted(recipes, key=lambda name: (row_order(recipes[name]), name))
    rows = [[name, *(cell(name, model) for model in columns), sources.get(name, "")] for name in names]
    lines = [f"### {corpus}", "", table(["ours (published)", *columns, "published in"], rows), ""]
    lines += [f"- {what}: {value}" for what, value in used.items()] + [f"- published values: {note}" for note in notes]
    return "\n".join(lines)


def main(args):
    runs = read(args.folders)
    corpora = list(dict.fromkeys(corpus for run in runs.values() for corpus in run["results"]["perplexity"]))
    print(
        "\n\n".join(
            perplexity_table({f: run for f, run in runs.items() if corpus in run["results"]["perplexity"]}, corpus) for corpus in corpora
        )
    )


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="OUTDIR", nargs="+", help="folder with results, for example out/opt")
    return parser


if __name__ == "__main__":
    parser().run(main)
