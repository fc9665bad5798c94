"""What do several processes gain?  Measured here, by a script of ours; calculated for GPUs that are not here.

    python -m bench.processes main.py models/smollm2 --data_dir DIR --calib_data c4-joined --nsamples 16 --seqlen 512 \
        --eval wikitext2 --eval_windows 16 --method awrq --wbits 4          1 and 2 processes of one thread each, in turn
    python -m bench.processes --rounds 3 --counts 1,2,4 opt.py ...          more rounds, other numbers of processes
    python -m bench.processes --calculate llama-65b                         seconds a block on A100s, from counts of bytes and operations

Times are the least of all rounds, of the process that writes: quantizing is all that its report has between loading and evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from bench import shapes
from recipe import UsageError
from run.flags import Parser, positive
from run.report import table

ROOT = Path(__file__).resolve().parents[1]
QUANTIZING = ("capture", "smoothing", "statistics", "solving", "propagation", "writing", "tuning")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

# ---------------------------------------------------------------------------
# Measured


def timed(script, flags, processes):
    """{"quantizing", "evaluation": seconds} of a run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run.json")
        starter = [*TORCHRUN, str(processes)] if processes > 1 else []
        command = [sys.executable, *starter, str(ROOT / script), *flags, "--output_path", str(output)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{script} with {processes} processes failed: {done.stderr[-2000:]}")
        seconds = json.loads(output.read_text())["seconds"]
    return {"quantizing": sum(seconds.get(name, 0) for name in QUANTIZING), "evaluation": seconds.get("evaluation", 0)}


def measure(script, flags, counts, rounds):
    """{processes: {what: least seconds}}, the numbers of processes in turn in every round."""
    least = {}
    for count in tqdm([count for _ in range(rounds) for count in counts], unit="run", leave=False):
        found = timed(script, flags, count)
        least[count] = {what: min(value, least.get(count, found)[what]) for what, value in found.items()}
    return least


def show_measured(least):
    first = next(iter(least))
    rows = [
        (what, count, f"{of[what]:.1f}", f"{least[first][what] / of[what]:.2f}")
        for what in ("quantizing", "evaluation")
        for count, of in least.items()
        if of[what]
    ]
    print(table(("what", "processes", "seconds", "times as fast"), rows))


# ---------------------------------------------------------------------------
# Calculated

A100 = {  # a second, of one; shares of the peak that large products and copies reach
    "half": 0.55 * 312e12,  # operations of tensor cores
    "float": 0.6 * 19.5e12,
    "memory": 0.8 * 1.55e12,  # bytes
    "link": 0.7 * 300e9,  # NVLink, one way
    "host": 20e9,  # from host memory to one GPU, by PCIe 4
    "disk": 3e9,  # of the machine
}


def calculated(shape, processes, sequences=128, tokens=2048, passes=2, rate=A100):
    """{activity: seconds a block} for AWRQ without options: every group's statistics in one pass, and one pass to its outputs."""
    groups = shapes.block_linears(shape, fused=True)
    parameters = sum(rows * columns for rows, columns in groups)
    share = -(-sequences // processes)
    squares = sum(columns**2 for _, columns in groups)
    solves = sorted((solve_operations(rows, columns) for rows, columns in groups), reverse=True)
    loads = [0] * processes
    for operations in solves:
        loads[loads.index(min(loads))] += operations
    return {
        "reads": 2 * parameters * (1 / rate["disk"] + 1 / rate["host"]),  # each process, the disk once
        # H, of which half is computed, and M: in float16 products, added up in float64
        "statistics": share * squares * (3 * tokens / rate["half"] + 1.5 * 2 * 8 / rate["memory"]),
        "reduction": sent(shape) / rate["link"] if processes > 1 else 0,
        "solve": max(loads) / rate["float"],
        "propagation": passes * share * tokens * 2 * parameters / rate["half"],
    }


def solve_operations(rows, columns):
    """A factor and its inverse, two thirds of columns^3; W M H^-1 by U: three products; the loop, one."""
    return 2 / 3 * columns**3 + (3 * 2 + 1) * rows * columns**2


def sent(shape):
    """Bytes of the statistics of a block that a process sends: H and M of every group, (C, C) float64."""
    return sum(2 * 8 * columns**2 for _, columns in shapes.block_linears(shape, fused=True))


def show_calculated(shape, counts):
    name = shapes.model(shape)
    of = {count: calculated(shape, count) for count in counts}
    print(f"A calculation, not a measurement: {shape}, AWRQ, 128 x 2048 tokens, seconds a block on A100s of one machine")
    rows = [(activity, *(f"{of[count][activity]:.2f}" for count in counts)) for activity in of[counts[0]]]
    rows.append(("a block", *(f"{sum(of[count].values()):.2f}" for count in counts)))
    rows.append((f"{name.blocks} blocks, minutes", *(f"{name.blocks * sum(of[count].values()) / 60:.1f}" for count in counts)))
    print(table(("", *(f"{count} GPU{'s' * (count > 1)}" for count in counts)), rows))
    print(f"sent by each process: {sent(shape) / 1e9:.1f} GB a block")


def main(args):
    counts = [positive(count) for count in args.counts.split(",")]
    if args.calculate:
        show_calculated(args.calculate, counts)
    elif not args.command:
        raise UsageError("give a script and its flags, or --calculate NAME")
    else:
        show_measured(measure(args.command[0], args.command[1:], counts, args.rounds))


def parser():
    parser = Parser("python -m bench.processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2", metavar="N,N", help="numbers of processes (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help="runs of each (default %(default)s)")
    parser.add_argument("--calculate", metavar="NAME", help=f"a model, of {', '.join(shapes.MODELS)}")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT FLAGS", help="main.py or opt.py, and what it is given")
    return parser


if __name__ == "__main__":
    parser().run(main)
