"""How everything here is timed: many copies against the caches, CUDA graphs, the ceilings of a machine, and what machine it is."""

import platform
import shutil
import statistics
import subprocess
from functools import partial

import torch

from runtime import captured, commit, seconds

SCHEMA = 1  # of the reports
HEAD_START = 200_000  # cycles: a tenth of a millisecond


def enough_copies(device, size):
    """How many copies of `size` bytes are more than four times the L2 cache of a GPU; at most 1024.  1 on a CPU."""
    if device.type != "cuda":
        return 1
    return max(1, min(1024, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // size)))


def timed(calls, device, graph=True, rounds=7, least=20):
    """Microseconds per call, {"median", "p20", "p80"}, over rounds of all calls, repeated to `least` of them on a GPU.

    graph: each round is the replay of one CUDA graph; else calls are made one by one, and what the host does between them counts.
    """
    calls = calls * -(-(least if device.type == "cuda" else 1) // len(calls))

    def everything():
        for call in calls:
            call()

    run = captured(everything, device) if graph else everything
    run()
    times = [seconds(run, device, HEAD_START * graph) * 1e6 / len(calls) for _ in range(rounds)]
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def ceilings(device):
    """What the machine reaches, measured: {"bytes": a second, "float16", "bfloat16", "int8": operations a second}.

    Bytes: the better of copying and summing up.  Operations: PyTorch's products of square matrices of random numbers, the libraries' own.
    """
    gpu = device.type == "cuda"
    n, k = (1 << 28, 8192) if gpu else (1 << 20, 64)
    timer = partial(timed, device=device, graph=gpu, rounds=5, least=3)
    source = torch.randn(n, device=device).to(torch.float16)
    target = torch.empty_like(source)
    moved = {"copy": (2, lambda: target.copy_(source)), "sum": (1, lambda: source.view(torch.float32).sum())}
    found = {"bytes": max(times * source.nbytes / timer([call])["median"] * 1e6 for times, call in moved.values())}
    products = {str(dtype).removeprefix("torch."): (torch.matmul, dtype) for dtype in (torch.float16, torch.bfloat16)}
    for name, (product, dtype) in (products | {"int8": (torch._int_mm, torch.int8)}).items():
        a, b = (random_matrix(k, k, dtype, device) for _ in range(2))
        found[name] = 2 * k**3 / timer([partial(product, a, b.T)])["median"] * 1e6
    return found


def random_matrix(rows, columns, dtype, device):
    """(rows, columns): normal, or whole numbers of all of int8 but its smallest."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device=device)
    return torch.randn(rows, columns, device=device).to(dtype)


# ---------------------------------------------------------------------------
# Cells of a report


class Missing(Exception):
    """Why a contender cannot run here."""


def reason(error):
    """One line of an error's message."""
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, Missing) else f"{type(error).__name__}: {text}"


def both_ways(calls, device, graph=True, **rounds):
    """{"graph", "eager": timed or None, "reason": why one is None, or None}.  On a CPU there are no graphs."""
    found = {"graph": None, "eager": None, "reason": None}
    for way in ("eager", "graph") if graph and device.type == "cuda" else ("eager",):
        try:
            found[way] = timed(calls, device, graph=way == "graph", **rounds)
        except Exception as e:  # whatever a kernel of others or a full memory raises: the other times are still worth having
            found["reason"] = f"{way}: {reason(e)}"
    return found


def best_time(cell):
    """By graph where there is one: {"median", "p20", "p80"}, or None."""
    return cell["graph"] or cell["eager"]


def speedup(base, other):
    """How many times as fast as a cell another is: both by graph, else both called one by one; None if there are no such times."""
    for way in ("graph", "eager"):
        if base and other and base[way] and other[way]:
            return base[way]["median"] / other[way]["median"]
    return None


# ---------------------------------------------------------------------------
# What machine it is


def nvidia_smi(device, *fields):
    """{field: text} of a GPU, read and never set; {} where it cannot be read."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or not program:
        return {}
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    done = subprocess.run([program, "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def about(device):
    """Hardware, versions and commit, ready for JSON."""
    found = {
        "device": device.type,
        "gpu": None,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "nvidia_smi": nvidia_smi(device, "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"),
        }
    return found


def during(device):
    """Clocks, power and temperature as they are now, ready for JSON; {} on a CPU."""
    return nvidia_smi(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
