"""The report of a run: every number with its protocol, ready for JSON, and the tables and lines that are printed of it."""

import json
import math
import statistics
from dataclasses import asdict, dataclass

from tqdm import tqdm

from recipe import METHODS, PRESETS, Recipe
from run.paired import paired
from runtime import Clock, hardware, peak_bytes, versions, write_json

SCHEMA = 1

# ---------------------------------------------------------------------------
# The JSON


def report(recipe, decoder, found, clock):
    """Everything about a run, ready for JSON.

    decoder: the one that was measured.  found: {"model", "protocol", "walk_batch", "processes", "commit", "results", "full", "layers",
    "tuning", "failed"}, where "commit" is that of the code when the run began, "full" are the results of the unquantized model, or None,
    "tuning" the divergence of every step, and "failed" {number: why it is not there}.
    """
    protocol = {
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "walk_batch": found["walk_batch"],
        "arithmetic": decoder.source.arithmetic,
    }
    return {
        "schema": SCHEMA,
        "model": found["model"],
        "model_type": decoder.config.model_type,
        "recipe": asdict(recipe),
        "protocol": found["protocol"] | protocol,
        "results": found["results"],
        "full": found["full"],
        "layers": [asdict(layer) for layer in found["layers"]],
        "tuning": found["tuning"],
        "failed": found["failed"],
        "seconds": {activity: round(seconds, 3) for activity, seconds in clock.seconds.items()},
        "peak_bytes": peak_bytes(clock.device),
        "versions": versions(),
        "commit": found["commit"],
        "hardware": hardware(clock.device) | {"processes": found.get("processes", 1)},
    }


@dataclass
class Record:
    """The growing report of a run: each number is printed as soon as it is known, and the JSON, if asked for, is rewritten."""

    recipe: Recipe
    found: dict  # see report
    clock: Clock
    path: str | None

    def __post_init__(self):
        self.found = {"results": {"perplexity": {}, "tasks": {}}, "full": None, "layers": [], "tuning": [], "failed": {}} | self.found

    def add(self, part, decoder, numbers):
        """Take in the numbers of a decoder.

        part: "results" or "full"; numbers: iterable of (kind, name, value), a key of IN_WORDS and what its function takes; the value of a
        number that cannot be had is the exception.
        """
        results = self.found[part] = {"perplexity": {}, "tasks": {}}
        model = "full" if part == "full" else recipe_name(asdict(self.recipe))
        for kind, name, value in numbers:
            if isinstance(value, Exception):
                self.found["failed"][f"{name}, {model}"] = " ".join(f"{type(value).__name__}: {value}".split())
            elif kind == "tasks":
                results["tasks"] = merged(results["tasks"], value)
            elif kind == "perplexity":
                results["perplexity"][name] = value
            else:
                results[kind] = value
            said = "failed" if isinstance(value, Exception) else IN_WORDS[kind](value)
            tqdm.write(f"{name}, {model}: {said}")
            self.write(decoder, complete=False)

    def write(self, decoder, complete=True):
        """The report so far, also written if there is a path.  complete: whether it has every number that was asked for."""
        about = report(self.recipe, decoder, self.found, self.clock) | {"complete": complete and not self.found["failed"]}
        if self.path:
            write_json(self.path, about)
        return about


def merged(old, new):
    """The results of zero_shot for some tasks, merged with those for others."""
    return old | {key: old[key] | value if isinstance(value, dict) and key in old else value for key, value in new.items()}


def metrics(row):
    """[(metric, value, standard error or None)] of a row of results."""
    found = []
    for key, value in row.items():
        metric, _, name = key.partition(",")
        if name and not metric.endswith("_stderr"):
            error = row.get(f"{metric}_stderr,{name}")
            found.append((metric_name(key), value, error if isinstance(error, float) else None))
    return found


def metric_name(key):
    """What lm-eval's "metric,filter" is called: the filter of the answers, if any, follows the name of the metric."""
    metric, _, name = key.partition(",")
    return metric if name == "none" else f"{metric} ({name})"


def task_in_words(found):
    """The metrics of what zero_shot returned of one task or group."""
    name = next(iter(found.get("groups") or found["results"]))
    return ", ".join(
        f"{metric} " + (f"{value:.4f}" if isinstance(value, float) else str(value)) + ("" if error is None else f" ± {error:.4f}")
        for metric, value, error in metrics(found["results"][name])
    )


def decoding_in_words(found):
    ppl = f", perplexity {found['ppl']:.4f}" if "ppl" in found else ""
    return f"{found['ms_per_token']:.3f} ms per token, the median of {found['tokens']}, {found['how']}{ppl}"


def prefill_in_words(found):
    return f"{found['ms']:.3f} ms for {found['tokens']} tokens, {found['tokens_per_second']:.0f} a second, {found['how']}"


IN_WORDS = {
    "perplexity": lambda found: f"perplexity {found['ppl']:.4f}",
    "tasks": task_in_words,
    "benchmark": decoding_in_words,
    "prefill": prefill_in_words,
}

# ---------------------------------------------------------------------------
# What is printed

DEFAULTS = asdict(Recipe())
CHANGES = 2  # settings in which a recipe may differ from the preset that it is named after
NAMED = ("method", "wbits", "act_bits", "smooth")  # these are at the start of a name
DATA = ("calib_data", "nsamples", "seqlen", "seed")  # these are in the protocol


def options(recipe):
    """The settings of a recipe (a dict) that are used and not the default, {name: value}, without those of NAMED and DATA."""
    return {name: v for name, v in recipe.items() if name not in (*NAMED, *DATA, *unused(recipe)) and v != DEFAULTS.get(name)}


def unused(recipe):
    """The settings of a recipe (a dict) that change nothing in it."""
    return ("alpha", "min", "smooth_search") * (not recipe["smooth"]) + ("act_pertoken", "act_sym") * (recipe["act_bits"] == 16)


def listed(options):
    words = {True: "{}", False: "no {}"}
    return "".join(", " + (words[value].format(name) if isinstance(value, bool) else f"{name} {value}") for name, value in options.items())


def recipe_name(recipe):
    """What a recipe (a dict) is called: method, bits, the nearest preset, and every other setting that is used and not the default."""
    method = recipe["method"]
    name = method if method == "full" else f"{method} W{recipe['wbits']}A{recipe['act_bits']}"
    preset, changed = nearest_preset(recipe)
    if recipe["smooth"] and False in METHODS[method].smooth and not preset:
        name += " + smoothing"
    others = {k: v for k, v in options(recipe).items() if k not in PRESETS.get(preset, ())}
    return name + f", {preset}" * bool(preset) + listed(changed | others)


def nearest_preset(recipe):
    """The preset that a recipe (a dict) differs least from, and how: (name, {setting: the recipe's value}).

    ("", {}) if more than CHANGES settings differ.
    """
    given = DEFAULTS | recipe
    changed = {
        name: {key: given[key] for key, value in own.items() if key not in unused(recipe) and given[key] != value}
        for name, own in PRESETS.items()
        if own
    }
    name = min(changed, key=lambda name: (len(changed[name]), -len(PRESETS[name].keys() - unused(recipe))))
    return (name, changed[name]) if len(changed[name]) <= CHANGES else ("", {})


def table(header, rows):
    """A Markdown table, aligned; the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def accuracies(found, metric="acc"):
    """{task: (value, standard error or None)} of what zero_shot returned, without groups; {} if that is {}."""
    if not found:
        return {}
    key, error = f"{metric},none", f"{metric}_stderr,none"
    rows = {name: row for name, row in found["results"].items() if key in row and name not in found.get("groups", {})}
    return {name: (row[key], row[error] if isinstance(row.get(error), float) else None) for name, row in rows.items()}


def average(values):
    """Mean of [(value, standard error or None)], with its own standard error."""
    n = len(values)
    errors = [error for _, error in values if error is not None]
    return sum(value for value, _ in values) / n, math.hypot(*errors) / n if len(errors) == n else None


def spread(values, digits=3):
    """Mean ± half the range of a number over seeds."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{half}"


def task_table(runs, base="full"):
    """Markdown: every metric of every task, the average accuracy, and the differences of each model from `base`, paired.

    runs: {label: what zero_shot returned}, of the same tasks; base: the label of the unquantized model, if it is there.
    """
    rows = []

    def add(*first, value, error, sign=""):
        rows.append((*first, f"{value:{sign}.4f}" if isinstance(value, float) else value, "" if error is None else f"{error:.4f}"))

    for task in dict.fromkeys(task for found in runs.values() for task in found["results"]):  # one that failed is not in all
        for label, found in runs.items():
            for metric, value, error in metrics(found["results"].get(task, {})):
                add(task, found["n-shot"].get(task, ""), metric, label, value=value, error=error)
    values = {label: accuracies(found) for label, found in runs.items()}
    if len(set(map(frozenset, values.values()))) == 1:  # where a task failed for one model only, averages would not compare
        for label in (label for label in runs if values[label]):
            value, error = average(list(values[label].values()))
            add("average", "", "acc", label, value=value, error=error)
    for label in (label for label in runs if base in runs and label != base):
        for task, key, value, error in differences(runs[label], runs[base]):
            add(task, runs[label]["n-shot"].get(task, ""), metric_name(key), f"{label} - {base}", value=value, error=error, sign="+")
    return table(("task", "shots", "metric", "model", "value", "stderr"), rows)


def differences(found, base):
    """[(task, "metric,filter", difference, its paired standard error or None)] of two models, the average accuracy last.

    found, base: what zero_shot returned of each; a metric of which they do not have the same items is left out.
    """
    tasks, others = accuracies(found), accuracies(base)
    places = [(task, key, [task]) for task, items in found.get("items", {}).items() for key in items]
    places += [("average", "acc,none", tasks)] if tasks.keys() == others.keys() else []
    return [(task, key, *pair) for task, key, tasks in places if (pair := paired(found, base, tasks, key))]


def show(report, table_results=False):
    """Print the tables of a report, and its settings and cost.  table_results: tasks as a Markdown table, not as JSON."""
    name = recipe_name(report["recipe"])
    runs = ({"full": report["full"]} if report["full"] else {}) | {name: report["results"]}
    rows = [
        (corpus, label, f"{r['ppl']:.4f}", r["windows"], r["seqlen"])
        for corpus in report["results"]["perplexity"]
        for label, run in runs.items()
        for r in (run["perplexity"][corpus],)
    ]
    if rows:
        print(table(("corpus", "model", "perplexity", "windows", "tokens each"), rows))
    if found := {label: run["tasks"] for label, run in runs.items() if run["tasks"]}:
        print(task_table(found) if table_results else json.dumps({label: run["results"] for label, run in found.items()}, indent=1))
    print(describe(report))


def describe(report):
    """A few lines under a table of results: settings, calibration, seconds and memory."""
    recipe, protocol, seconds, peak = (report[key] for key in ("recipe", "protocol", "seconds", "peak_bytes"))
    used = protocol["calibration"]
    calib = (
        f"calibrated on {used['nsamples']} x {used['seqlen']} tokens of {used['corpus']} {used['split']}, seed {used['seed']}"
        + (f", tuned on {used['tune_samples']} more" if "tune_samples" in used else "")
        if used and Recipe(**recipe).calibrated
        else ""
    )
    lines = [
        f"{report['model']}: {recipe['method']}, W{recipe['wbits']}A{recipe['act_bits']}, group {recipe['groupsize']}, {protocol['dtype']}"
        + ", smooth" * recipe["smooth"]
        + listed({name: value for name, value in options(recipe).items() if name != "groupsize"}),
        calib,
        f"arithmetic: {protocol['arithmetic']}",
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
        task_speed([run["tasks"] for run in (report["full"], report["results"]) if run and run["tasks"]], seconds.get("tasks")),
        "peak memory: " + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in peak.items() if value is not None),
    ]
    return "\n".join(line for line in lines if line)


def task_speed(found, seconds):
    """How fast tasks were evaluated, in words; "" without tasks.  found: what zero_shot returned, of each model."""
    if not found:
        return ""
    items = sum(n["effective"] for run in found for n in run["n-samples"].values())
    return f"tasks: {items} items in batches of {found[0]['config']['batch_size']}, {items / seconds:.2f} a second"
