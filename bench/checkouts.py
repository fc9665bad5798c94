"""Two checkouts, the same commands: are their numbers the same bit for bit, and how long does each take?

    python -m bench.checkouts ../other                 the demo models; every method
    python -m bench.checkouts ../other --rounds 5      more rounds for the times

Commands run in turn in both, so that what else the machine does falls on both alike.  Times are ratios of the least times of all rounds:
this checkout's over the other's.  Compared are all tensors that --save writes, perplexities, accuracies and the errors of all linears.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from tqdm import tqdm

from formats.shards import sha256
from run.flags import Parser, positive
from run.report import table

ROOT = Path(__file__).resolve().parents[1]
TEXT = "--data_dir demo/data --calib_data world --eval world --nsamples 64 --walk_batch 8 --device cpu"
OPT, LLAMA = f"opt.py demo/opt {TEXT}", f"main.py demo/llama {TEXT}"
CASES = {  # name: (command, whether it has codes to save)
    **{
        f"{name} {what}": (f"{command} {flags}", "act_only" not in flags and "full" not in flags)
        for name, command in (("opt", OPT), ("llama", LLAMA))
        for what, flags in {
            "full": "--method full",
            "rtn": "--method rtn --wbits 4",
            "smoothquant": "--method smoothquant --wbits 4",
            "act_only": "--method act_only --act_bits 6",
            "act_only + smoothing": "--method act_only --act_bits 6 --smooth",
            "gptq": "--method gptq --wbits 3",
            "gptq W4A8 + smoothing": "--method gptq --wbits 4 --act_quant --smooth",
            "awrq": "--method awrq --wbits 4",
            "awrq + smoothing": "--method awrq --wbits 4 --smooth",
            "awrq W3A6 groups of 24": "--method awrq --wbits 3 --act_bits 6 --groupsize 24",
            "awrq per token": "--method awrq --wbits 4 --act_pertoken --sym",
            "awrq, plus": "--method awrq --wbits 4 --preset plus",
        }.items()
    },
    "llama awrq, tasks": (f"{LLAMA} --method awrq --wbits 4 --tasks demo/tasks/world_deed.yaml --limit 20", True),
}
QUANTIZING = ("capture", "smoothing", "statistics", "solving", "propagation", "writing")


def run(checkout, command, saves, folder):
    """What a command gives in a checkout: {"hash": of every tensor saved, "numbers", "quantizing": seconds, "whole": seconds}."""
    report, saved = folder / "run.json", folder / "saved"
    flags = [*command.split(), "--output_path", str(report), *(["--save", str(saved)] if saves else [])]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *flags], cwd=checkout, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{checkout}: {command}: {done.stderr[-2000:]}")
    content = json.loads(report.read_text())
    numbers = {key: content["results"][key] for key in ("perplexity",)} | {"layers": content["layers"]}
    if content["results"]["tasks"]:
        numbers["tasks"] = content["results"]["tasks"]["results"]
    seconds = sum(content["seconds"].get(activity, 0) for activity in QUANTIZING)
    return {"hash": saved_hash(saved) if saves else None, "numbers": numbers, "quantizing": seconds, "whole": whole}


def saved_hash(folder):
    """One hash of the names and values of all tensors in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in sorted(f.keys()):
                digest.update(f"{name} {sha256(f.get_tensor(name))}".encode())
    return digest.hexdigest()


def compare(args, name):
    """A row of the table, and whether both are the same."""
    command, saves = CASES[name]
    rounds = []
    for _ in range(args.rounds):
        for checkout in (ROOT, args.other):
            with tempfile.TemporaryDirectory(prefix="awrq-checkouts-") as folder:
                rounds.append(run(checkout, command, saves, Path(folder)))
    first = rounds[0]
    same = all(found["hash"] == first["hash"] and found["numbers"] == first["numbers"] for found in rounds)
    ppl = first["numbers"]["perplexity"]["world"]["ppl"]
    ratios = []
    for what in ("quantizing", "whole"):
        ours, theirs = (min(found[what] for found in rounds[side::2]) for side in (0, 1))
        ratios.append(f"{ours / theirs:.2f}" if theirs else "")
    return (name, "yes" if same else "NO", (first["hash"] or "")[:12], f"{ppl:.6f}", *ratios), same


def main(args):
    names = [name for name in CASES if args.only in name]
    found = [compare(args, name) for name in tqdm(names, desc="checkouts", unit="command")]
    print(table(("command", "same", "tensors", "perplexity", "quantizing, ratio", "whole, ratio"), [row for row, _ in found]))
    return sys.exit(not all(same for _, same in found))


def parser():
    parser = Parser(prog="python -m bench.checkouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", metavar="CHECKOUT", help="folder of the other checkout")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help="times that each command runs in both (default 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="commands whose name has this")
    return parser


if __name__ == "__main__":
    parser().run(main)
