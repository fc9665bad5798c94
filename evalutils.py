"""The numbers: perplexity, and the report that carries every number with its protocol."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from modelutils import FAMILIES, propagate, record_inputs, walk
from quant import IntLinear, QuantLinear

SCHEMA = 1
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "accelerate", "numpy", "safetensors")


NEW_EVAL = {"ptb": "ptb-new", "c4": "c4-new"}


def plan(args):
    """What the command line asks to evaluate: [corpus].  Raises ValueError if that is nothing, OSError if its JSON cannot be written."""
    names = dict.fromkeys(name for name in args.eval.split(",") if name)
    corpora = [NEW_EVAL.get(name, name) if args.new_eval else name for name in names]
    if not corpora:
        raise ValueError("nothing to evaluate: give --eval")
    check_writable(args.output_path)
    return corpora


def evaluate(args, recipe, model, texts, clock):
    """Every number of a model: {"perplexity": {corpus: see perplexity}, "tasks": {}}."""
    results = {"perplexity": {}, "tasks": {}}
    for name, tokens in texts.items():
        with clock("evaluation"):
            results["perplexity"][name] = perplexity(model, tokens, recipe.seqlen, args.device, args.walk_batch, name)
    if args.benchmark:
        with clock("benchmark"):
            results["benchmark"] = decode(model, next(iter(texts.values()))[: args.benchmark], args.device, args.check)
    return results


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


@torch.no_grad()
def decode(model, ids, device="cpu", check=False):
    """Feed ids (N,) to the model one by one, with a cache, as it decodes: {"ms_per_token": the median, "tokens": N}.

    check: also "ppl", exp of the mean negative log-likelihood of the tokens but the first; each token's activations then have scales of
    their own.  The whole model is on the device.  Raises ValueError if there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"--benchmark: {len(ids)} tokens of text, needs 2 or more; give another corpus")
    device = torch.device(device)
    model.to(device)
    ids, cache, milliseconds, losses = ids.to(device), None, [], []
    for i in tqdm(range(len(ids)), desc="decoding", unit="token", leave=False):
        start = time.perf_counter()
        out = model(ids[None, i : i + 1], past_key_values=cache, use_cache=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        milliseconds.append(1000 * (time.perf_counter() - start))
        cache = out.past_key_values
        if check and i + 1 < len(ids):
            losses.append(F.cross_entropy(out.logits[0].float(), ids[i + 1 : i + 2]).double())
    model.to("cpu")
    return {"ms_per_token": statistics.median(milliseconds), "tokens": len(ids)} | (
        {"ppl": torch.stack(losses).mean().exp().item()} if check else {}
    )


# ---------------------------------------------------------------------------
# Report


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


def commit():
    """The commit of this code, with "+changes" if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+changes" * bool(changed)


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


def report(args, recipe, model, protocol, results, layers, clock):
    """Everything about one run, ready for JSON."""
    return {
        "schema": SCHEMA,
        "model": args.model,
        "model_type": model.config.model_type,
        "recipe": asdict(recipe),
        "protocol": protocol
        | {"dtype": str(model.dtype).removeprefix("torch."), "walk_batch": args.walk_batch, "arithmetic": arithmetic(model)},
        "results": results,
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


def publish(args, report):
    """Print the tables of a report and how they came about, and write it to --output_path."""
    rows = [(name, f"{r['ppl']:.4f}", r["windows"], r["seqlen"]) for name, r in report["results"]["perplexity"].items()]
    if rows:
        print(table(("corpus", "perplexity", "windows", "tokens each"), rows))
    if decoded := report["results"].get("benchmark"):
        ppl = f", perplexity {decoded['ppl']:.4f}" if "ppl" in decoded else ""
        print(f"decoding: {decoded['ms_per_token']:.3f} ms per token, the median of {decoded['tokens']}{ppl}")
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
    options = [name.replace("_", "-") for name in ("smooth", "sym", "act_pertoken", "actorder", "true_sequential") if recipe[name]]
    lines = [
        f"{report['model']}: {recipe['method']}, W{recipe['wbits']}A{recipe['act_bits']}, group {recipe['groupsize']}, {protocol['dtype']}"
        + "".join(f", {option}" for option in options),
        calib,
        f"arithmetic: {protocol['arithmetic']}",
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
        "peak memory: " + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in peak.items() if value is not None),
    ]
    return "\n".join(line for line in lines if line)


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


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w") as f:
            json.dump(content, f, indent=1, allow_nan=False)
            f.write("\n")
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)
