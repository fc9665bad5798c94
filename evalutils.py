"""The numbers: perplexity, accuracies of tasks, and the report that carries every number with its protocol."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels.timing import commit, write_json
from modelutils import FAMILIES, METHODS, PRESETS, placed, propagate, record_inputs, walk
from quant import IntLinear, QuantLinear, Recipe
from speed import decode, prefill

SCHEMA = 1
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "accelerate", "numpy", "safetensors")
NEW_EVAL = {"ptb": "ptb-new", "c4": "c4-new"}

# ---------------------------------------------------------------------------
# All numbers of a run


def plan(args, config, tokenizer):
    """What the command line asks to evaluate, as far as it can be had: [corpus], [lm-eval's Task or Group], found before any long work.

    Raises ValueError or OSError if that is nothing, if a task or its data is not there, if results cannot be written.
    """
    names, patterns = ([name for name in (listed or "").split(",") if name] for listed in (args.eval, args.tasks))
    corpora = [NEW_EVAL.get(name, name) if args.new_eval else name for name in dict.fromkeys(names)]
    if not corpora and not patterns:
        raise ValueError("nothing to evaluate: give --tasks or --eval")
    if args.compare_full and args.method == "full" and not args.load:
        raise ValueError("--compare_full: --method full has nothing to compare")
    check_writable(args.output_path)
    if not patterns:
        return corpora, []
    from zeroshot import check_tasks, load_tasks  # where they are needed: lm-eval takes seconds to import

    tasks = load_tasks(patterns, args.data_dir, args.num_fewshot, args.skip_missing)
    check_tasks(tasks, args.num_fewshot, config, tokenizer)
    return corpora, tasks


def evaluate(args, recipe, model, tokenizer, texts, tasks, clock):
    """Every number of a model: {"perplexity": {corpus: see perplexity}, "tasks": see zero_shot, or {}}."""
    results = {"perplexity": {}, "tasks": {}}
    for name, tokens in texts.items():
        with clock("evaluation"):
            results["perplexity"][name] = perplexity(model, tokens, recipe.seqlen, args.device, args.walk_batch, name)
    if tasks:
        with clock("tasks"):
            results["tasks"] = zero_shot(model, tokenizer, tasks, args.device, args.batch_size, args.num_fewshot, args.limit)
    if args.benchmark:
        with clock("benchmark"):
            results["benchmark"] = decode(model, next(iter(texts.values()))[: args.benchmark], args.device, args.check)
    if args.benchmark_prefill:
        with clock("benchmark"):
            results["prefill"] = prefill(model, next(iter(texts.values()))[: args.benchmark_prefill], args.device)
    return results


# ---------------------------------------------------------------------------
# Perplexity


@torch.no_grad()
def perplexity(model, ids, seqlen, device="cpu", walk_batch=1, desc="evaluating"):
    """Perplexity of a model on ids (N,), cut into windows of seqlen tokens; the tail that fills none is dropped.

    exp of the mean over windows of the mean negative log-likelihood of a window's tokens but the first, in float32 from the logits on.
    The model's blocks pass over the device one by one.  Raises FloatingPointError if it is not finite.
    """
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen).split(walk_batch)
    x, kwargs = record_inputs(model, windows, device)
    for i, block in walk(model, device, desc):
        propagate(block, x, kwargs, f"block {i}")
    modules = dict(model.named_modules())
    after = [modules[name].to(device) for name in FAMILIES[model.config.model_type].after if modules.get(name) is not None]
    losses = []
    for h, window in zip(tqdm(x, desc=f"{desc}: logits", unit="batch", leave=False), windows, strict=True):
        for module in after:
            h = module(h)
        loss = F.cross_entropy(h[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten().to(device), reduction="none")
        losses.append(loss.view(len(window), -1).mean(1).double())
    for module in after:
        module.to("cpu")
    value = torch.cat(losses).mean().exp().item()
    if not math.isfinite(value):
        raise FloatingPointError(f"{desc}: the perplexity is {value}")
    return {"ppl": value, "windows": sum(map(len, windows)), "seqlen": seqlen, "tokens": sum(w.numel() for w in windows)}


# ---------------------------------------------------------------------------
# Tasks


def zero_shot(model, tokenizer, tasks, device="cpu", batch_size=1, num_fewshot=None, limit=None):
    """What lm-eval finds on tasks (see load_tasks), with its versions and settings, ready for JSON.

    batch_size: a number or "auto"; results do not depend on it.  num_fewshot: examples before each item, None: as the task says.  limit:
    items per task, or a share of them if below 1.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from zeroshot import QuantizedLM, task_manager

    with placed(model, device):
        found = simple_evaluate(
            QuantizedLM(model, tokenizer, batch_size),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
            task_manager=task_manager(False),
        )
    return json.loads(json.dumps(found, default=handle_non_serializable), parse_constant=lambda constant: None)


# ---------------------------------------------------------------------------
# Report

DEFAULTS = asdict(Recipe())
NAMED = ("method", "wbits", "act_bits", "smooth")  # have their own place in a name
DATA = ("calib_data", "nsamples", "seqlen", "seed")  # are told by the protocol


def options(recipe):
    """The settings of a recipe (a dict) that are used and not the default, {name: value}, without those of NAMED and DATA."""
    unused = () if recipe["smooth"] else ("alpha", "min")
    return {name: v for name, v in recipe.items() if name not in NAMED + DATA + unused and v != DEFAULTS.get(name)}


def listed(options):
    return "".join(f", {name}" if value is True else f", {name} {value}" for name, value in options.items())


def recipe_name(recipe):
    """What a recipe (a dict) is called: method, bits, preset, and every other setting that is used and not the default."""
    method = recipe["method"]
    name = method if method == "full" else f"{method} W{recipe['wbits']}A{recipe['act_bits']}"
    presets = {preset: settings for preset, settings in PRESETS.items() if settings and settings.items() <= recipe.items()}
    covered = [name for settings in presets.values() for name in settings]
    if recipe["smooth"] and False in METHODS[method].smooth and "smooth" not in covered:
        name += " + smoothing"
    return name + "".join(f", {preset}" for preset in presets) + listed({k: v for k, v in options(recipe).items() if k not in covered})


def table(header, rows):
    """A Markdown table, aligned; the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def versions():
    """Of Python and every package that can change a number; None for one that is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware(device):
    """Names of what the numbers were computed on."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "gpu": gpu, "machine": platform.machine(), "threads": torch.get_num_threads()}


def peak_bytes(device):
    """Largest memory so far, in bytes: of this process on the host, and of PyTorch's tensors on the GPU."""
    device = torch.device(device)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def report(args, recipe, model, protocol, tasks, results, full, layers, clock):
    """Everything about one run, ready for JSON.  results, full: of the quantized model, and of the unquantized one if asked for."""
    protocol = protocol | {"tasks": {}}
    if tasks:
        from zeroshot import leaves, task_protocol

        protocol["tasks"] = {task.config.task: task_protocol(task) for task in leaves(tasks)}
    return {
        "schema": SCHEMA,
        "model": args.model,
        "model_type": model.config.model_type,
        "recipe": asdict(recipe),
        "protocol": protocol
        | {"dtype": str(model.dtype).removeprefix("torch."), "walk_batch": args.walk_batch, "arithmetic": arithmetic(model)},
        "results": results,
        "full": full,
        "layers": [asdict(layer) for layer in layers],
        "seconds": {activity: round(seconds, 3) for activity, seconds in clock.seconds.items()},
        "peak_bytes": peak_bytes(args.device),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(args.device),
    }


def arithmetic(model):
    """How its quantized linears are computed, in words."""
    kinds = Counter(
        f"integers ({m.kernel or 'default'} kernel)" if isinstance(m, IntLinear) else "floating point, on dequantized numbers"
        for m in model.modules()
        if isinstance(m, IntLinear | QuantLinear)
    )
    return "; ".join(f"{n} linears in {kind}" for kind, n in kinds.items()) or "as the model came"


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


def task_table(runs):
    """Markdown: every metric of every task, and the average accuracy.  runs: {label: what zero_shot returned}, of the same tasks."""
    rows = []

    def add(*first, value, error):
        rows.append((*first, f"{value:.4f}" if isinstance(value, float) else value, "" if error is None else f"{error:.4f}"))

    first = next(iter(runs.values()))
    for task, row in first["results"].items():
        for key in row:
            metric, _, name = key.partition(",")  # name: of the filter that its answers went through
            if name and not metric.endswith("_stderr"):
                for label, found in runs.items():
                    error = found["results"][task].get(f"{metric}_stderr,{name}")
                    value = found["results"][task][key]
                    shown = metric if name == "none" else f"{metric} ({name})"
                    add(task, first["n-shot"].get(task, ""), shown, label, value=value, error=error if isinstance(error, float) else None)
    for label, found in runs.items():
        if values := list(accuracies(found).values()):
            value, error = average(values)
            add("average", "", "acc", label, value=value, error=error)
    return table(("task", "shots", "metric", "model", "value", "stderr"), rows)


def publish(args, report):
    """Print the tables of a report and how they came about, and write it to --output_path."""
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
    if report["results"]["tasks"]:
        found = {label: run["tasks"] for label, run in runs.items()}
        print(task_table(found) if args.table_results else json.dumps({label: run["results"] for label, run in found.items()}, indent=1))
    for label, decoded in ((label, run["benchmark"]) for label, run in runs.items() if "benchmark" in run):
        ppl = f", perplexity {decoded['ppl']:.4f}" if "ppl" in decoded else ""
        print(f"decoding, {label}: {decoded['ms_per_token']:.3f} ms per token, the median of {decoded['tokens']}, {decoded['how']}{ppl}")
    for label, read in ((label, run["prefill"]) for label, run in runs.items() if "prefill" in run):
        print(
            f"reading a prompt of {read['tokens']} tokens, {label}: {read['ms']:.3f} ms, "
            f"{read['tokens_per_second']:.0f} tokens per second, {read['how']}"
        )
    print(describe(report))
    if args.output_path:
        write_json(args.output_path, report)


def describe(report):
    """What to read under a table of results: how the numbers came about, and what they cost.  A few lines of text."""
    recipe, protocol, seconds, peak = (report[key] for key in ("recipe", "protocol", "seconds", "peak_bytes"))
    used = protocol["calibration"]
    calib = (
        f"calibrated on {used['nsamples']} x {used['seqlen']} tokens of {used['corpus']} {used['split']}, seed {used['seed']}"
        if used
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


def check_writable(path):
    """Raises OSError unless a file can be written at path (its folder is made if need be), or path is None."""
    if path is None:
        return
    if os.path.isdir(path):
        raise IsADirectoryError(f"--output_path {path}: is a folder; give the name of a file in it")
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OSError(f"--output_path {path}: cannot write into {folder} ({e.strerror}); give another folder") from e
