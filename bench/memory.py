"""How much host memory does a run need?  Random models of few and of many equal blocks, both formats of weights, by the scripts.

    python -m bench.memory                             both scripts, both formats, 4 and 32 blocks; results/memory.json and .png
    python -m bench.memory --small                     tiny models, to see that it runs
    python -m bench.memory --checkout ../other         the scripts of another checkout

The peak is ru_maxrss of the whole process, mapped pages included.  The bound is what a run may need whatever the number of blocks: the
imports, embedding and head, the sequences and six blocks, all in the type that is computed with, float32 on a CPU.  The imports are the
peak of the same run on a model whose tensors are next to nothing, as much is imported only when it is used.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from families import FAMILIES
from modelutils import skeleton
from run.flags import Parser
from run.report import table
from runtime import commit, versions, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"llama": "main.py", "opt": "opt.py"}
SIZES = {  # (hidden, intermediate, heads, vocabulary)
    False: (1024, 2816, 16, 8192),
    True: (64, 160, 4, 1024),
}
FORMATS = ("safetensors", "bin")
# A process's ru_maxrss begins with what it was forked from: a small one in between keeps this one's memory out of it.
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], env=os.environ | {"OMP_NUM_THREADS": "2"})
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
SEQUENCES, TOKENS = 4, 256
SIX = 6  # blocks

# ---------------------------------------------------------------------------
# Models


def configuration(family, blocks, small):
    hidden, mlp, heads, vocabulary = SIZES[small]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    own = {"opt": {"ffn_dim": mlp, "word_embed_proj_dim": hidden}, "llama": {"intermediate_size": mlp, "tie_word_embeddings": False}}
    return AutoConfig.for_model(family, **sizes, **own[family], max_position_embeddings=512, dtype="float16")


def write_model(folder, config, form):
    """A random float16 model, written a block at a time; bytes of its weights.  Its tokenizer is the demo's."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo" / config.model_type / name, folder)
    empty, prefix = skeleton(config, torch.float16), f"{FAMILIES[config.model_type].blocks}."
    parts, generator = {}, torch.Generator().manual_seed(0)
    for name, t in empty.state_dict().items():
        if name not in empty.all_tied_weights_keys:
            parts.setdefault(name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else "rest", {})[name] = t.shape
    weight_map, size = {}, 0
    stem, ending = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[form]
    for k, shapes in enumerate(tqdm(parts.values(), desc=f"writing {folder.name}", unit="part", leave=False)):
        file = f"{stem}-{k + 1:05}-of-{len(parts):05}.{ending}"
        tensors = {n: (0.02 * torch.randn(shape, generator=generator) + ("norm.weight" in n)).half() for n, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"}) if form == "safetensors" else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
    write_json(folder / f"{stem}.{ending}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return size


def write_text(folder):
    """A corpus of a few sequences, from the demo's."""
    (folder / "few").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "few" / f"{split}.txt").write_text((ROOT / f"demo/data/world/{split}.txt").read_text()[:6000])


def bound(config, imports):
    """{what: bytes} that a run may need; six blocks, embedding, head and sequences in float32."""
    sizes = {"blocks": 0, "embedding and head": 0}
    prefix = f"{FAMILIES[config.model_type].blocks}.0."
    empty = skeleton(config, torch.float32)
    for name, t in empty.state_dict().items():
        if name in empty.all_tied_weights_keys:
            continue
        if name.startswith(prefix):
            sizes["blocks"] += SIX * t.nbytes
        elif not name.startswith(FAMILIES[config.model_type].blocks):
            sizes["embedding and head"] += t.nbytes
    return {"imports": imports, **sizes, "sequences": SEQUENCES * TOKENS * config.hidden_size * 4}


# ---------------------------------------------------------------------------
# Runs


def peak(command, cwd):
    """Largest resident memory of a command, in bytes.  Raises RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1]) * 1024


def measure(checkout, folder, family, blocks, form, small):
    """A row of the table: a run of a model that is made for it, with the packed blocks in a folder."""
    config, model = configuration(family, blocks, small), folder / f"{family}-{blocks}-{form}"
    size = write_model(model, config, form)
    flags = ["--method", "awrq", "--wbits", "4", "--calib_data", "few", "--nsamples", SEQUENCES, "--seqlen", TOKENS, "--eval", "few"]
    flags += ["--data_dir", folder / "data", "--walk_batch", "1", "--device", "cpu", "--save", folder / "packed"]
    most = peak([sys.executable, SCRIPTS[family], model, *map(str, flags)], checkout)
    for each in (model, folder / "packed"):
        shutil.rmtree(each)
    return {"family": family, "blocks": blocks, "format": form, "weights": size, "peak": most}


def plot(rows, before, path):
    """Peak against the size of the weights; the bound; and what another checkout needed, if that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    gib = 2**30
    for label, found, style in (("", rows, "o-"), (" before: the whole model in memory", before, "s--")):
        for family, form in dict.fromkeys((row["family"], row["format"]) for row in found):
            mine = sorted((r["weights"] / gib, r["peak"] / gib) for r in found if (r["family"], r["format"]) == (family, form))
            ax.plot(*zip(*mine, strict=True), style, label=f"{family}, {form}{label}")
    most = max(sum(row["bound"].values()) for row in rows) / gib
    ax.axhline(most, color="grey", lw=1, ls=":", label="imports + embedding + head + sequences + six blocks")
    ax.set(xlabel="weights (GiB, float16)", ylabel="peak host memory (GiB)", title="Quantizing and evaluating, awrq W4A8, on a CPU")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(args):
    rows, code = [], commit()  # read first: the checkout may change meanwhile
    with tempfile.TemporaryDirectory(prefix="awrq-memory-") as folder:
        write_text(Path(folder) / "data")
        imports = {family: measure(args.checkout, Path(folder), family, 1, "safetensors", True)["peak"] for family in SCRIPTS}
        cells = [(family, blocks, form) for family in SCRIPTS for form in args.formats for blocks in args.blocks]
        for cell in (bar := tqdm(cells, desc="memory", unit="run")):
            bar.set_postfix_str("{} of {} blocks, {}".format(*cell))
            row = measure(args.checkout, Path(folder), *cell, args.small)
            rows.append(row | {"bound": bound(configuration(*cell[:2], args.small), imports[cell[0]])})
    mib = 2**20
    header = ("model", "blocks", "weights", "size, MiB", "peak, MiB", "peak / size", "bound, MiB")
    print(
        table(
            header,
            [
                (r["family"], r["blocks"], r["format"], f"{r['weights'] / mib:.0f}", f"{r['peak'] / mib:.0f}")
                + (f"{r['peak'] / r['weights']:.2f}", f"{sum(r['bound'].values()) / mib:.0f}")
                for r in rows
            ],
        )
    )
    for family, r in {r["family"]: r for r in rows}.items():
        print(f"bound of {family}, MiB: " + ", ".join(f"{what} {size / mib:.0f}" for what, size in r["bound"].items()))
    hidden, mlp, heads, vocabulary = SIZES[args.small]
    protocol = {"command": "awrq W4A8 with --save, then perplexity", "calibration": f"{SEQUENCES} x {TOKENS} tokens", "dtype": "float32"}
    protocol |= {"weights": "random float16", "hidden": hidden, "intermediate": mlp, "heads": heads, "vocabulary": vocabulary}
    report = {"protocol": protocol, "peak": "ru_maxrss of the process", "rows": rows, "versions": versions(), "commit": code}
    before = json.loads(Path(args.before).read_text())["rows"] if args.before else []
    report["before"] = before
    if args.output_path:
        write_json(args.output_path, report)
        plot(rows, before, Path(args.output_path).with_suffix(".png"))


def parser():
    parser = Parser(prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32], metavar="N", help="blocks of the models (default 4 32)")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS, help="of the weights (default both)")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--checkout", default=ROOT, metavar="FOLDER", help="whose scripts run (default: this one's)")
    parser.add_argument("--before", metavar="FILE", help="JSON of another checkout, to draw beside")
    parser.add_argument("--output_path", default=ROOT / "results/memory.json", metavar="FILE", help="JSON, and a picture beside it")
    return parser


if __name__ == "__main__":
    parser().run(main)
