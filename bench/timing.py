"""How everything here is timed: many copies against the caches, CUDA graphs, the ceilings of a machine, and what machine it is."""

import platform
import shutil
import statistics
import subprocess
import tempfile
from contextlib import contextmanager
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


def ready(calls, device, graph=True, least=20):
    """(run, calls in it): all calls, repeated to `least` of them on a GPU, as one CUDA graph or one by one; it has run once."""
    calls = calls * -(-(least if device.type == "cuda" else 1) // len(calls))

    def everything():
        for call in calls:
            call()

    run = captured(everything, device) if graph else everything
    run()
    return run, len(calls)


def rounds_in_turn(runs, device, graph=True, rounds=7, shortest=0.0):
    """Microseconds per call of runs that are ready, {name: {"median", "p20", "p80"} or the exception that ended it}.

    They take turns, round by round, so that what heats or slows the GPU meets them all; each has `rounds`, and on a GPU so many that they
    take `shortest` seconds.  graph: a round is one launch; else what the host does between calls counts.
    """
    times = {name: [] for name in runs}
    failed = {}

    def unfinished(name):
        enough = shortest if device.type == "cuda" else 0
        return name not in failed and (len(times[name]) < rounds or sum(times[name]) < enough)

    while left := [name for name in runs if unfinished(name)]:
        for name in left:
            try:
                times[name].append(seconds(runs[name][0], device, HEAD_START * graph))
            except Exception as e:  # whatever a kernel of others raises: the other times are still worth having
                failed[name] = e
    return {name: failed.get(name) or spread([t * 1e6 / runs[name][1] for t in times[name]]) for name in runs}


def spread(times):
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def timed(calls, device, graph=True, rounds=7, least=20):
    """Microseconds per call, {"median", "p20", "p80"}, over rounds of all calls: see ready."""
    found = rounds_in_turn({"": ready(calls, device, graph, least)}, device, graph, rounds)[""]
    if isinstance(found, Exception):
        raise found
    return found


def ceilings(device):
    """What the machine reaches, measured: {"bytes": a second, "float16", "bfloat16", "int8": operations a second}.

    Bytes: the better of copying and summing up.  Operations: PyTorch's products of square matrices of random numbers, the libraries' own.
    "int8" is the better of 8-bit whole numbers and 8-bit floats, which tensor cores multiply at one rate, but libraries do not.
    """
    gpu = device.type == "cuda"
    n, k = (1 << 28, 8192) if gpu else (1 << 20, 64)
    timer = partial(timed, device=device, graph=gpu, rounds=5, least=3)
    source = torch.randn(n, device=device).to(torch.float16)
    target = torch.empty_like(source)
    moved = {"copy": (2, lambda: target.copy_(source)), "sum": (1, lambda: source.view(torch.float32).sum())}
    found = {"bytes": max(times * source.nbytes / timer([call])["median"] * 1e6 for times, call in moved.values())}
    products = [(str(dtype).removeprefix("torch."), plain_product, dtype) for dtype in (torch.float16, torch.bfloat16)]
    products += [("int8", int8_product, torch.int8)] + [("int8", fp8_product, torch.float8_e4m3fn)] * has_fp8(device)
    for name, product, dtype in products:
        a, b = (random_matrix(k, k, dtype, device) for _ in range(2))
        found[name] = max(found.get(name, 0), 2 * k**3 / timer([product(a, b)])["median"] * 1e6)
    return found


def has_fp8(device):
    """Whether the device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def plain_product(x, weight):
    """A call: x (T, C) times weight (R, C) transposed.  The two below are the same of 8-bit numbers."""
    return partial(torch.matmul, x, weight.T)


def int8_product(x, weight):
    return partial(torch._int_mm, x, weight.T)


def fp8_product(x, weight):
    scale = torch.ones((), device=x.device)
    return partial(torch._scaled_mm, x, weight.T, scale_a=scale, scale_b=scale, out_dtype=torch.float16, use_fast_accum=True)


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


SHORTEST = 0.2  # seconds for which a cell runs as a graph, at least: clocks settle


def both_ways_in_turn(contenders, device, least=20):
    """{name: {"graph", "eager": times or None, "reason": why one is None, or None}} of contenders {name: (calls, whether a graph can)}.

    On a CPU there are no graphs.
    """
    found = {name: {"graph": None, "eager": None, "reason": None} for name in contenders}
    for way in ("eager", "graph") if device.type == "cuda" else ("eager",):
        graph, runs = way == "graph", {}
        for name, (calls, can) in contenders.items():
            try:
                if can or not graph:
                    runs[name] = ready(calls, device, graph, least)
            except Exception as e:  # see rounds_in_turn; a full memory, too
                found[name]["reason"] = f"{way}: {reason(e)}"
        for name, times in rounds_in_turn(runs, device, graph, shortest=SHORTEST * graph).items():
            failed = isinstance(times, Exception)
            found[name]["reason" if failed else way] = f"{way}: {reason(times)}" if failed else times
    return found


def both_ways(calls, device, least=20):
    """The same of one contender."""
    return both_ways_in_turn({"": (calls, True)}, device, least)[""]


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


def smi_command(device, fields):
    """The command that reads fields of a GPU, and sets none; None where there is none."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or not program:
        return None
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return [program, "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]


def smi_lines(text, fields):
    """[{field: text}] of what nvidia-smi printed; lines that are not whole are left out."""
    lines = ([value.strip() for value in line.split(",")] for line in text.strip().split("\n"))
    return [dict(zip(fields, values, strict=True)) for values in lines if len(values) == len(fields)]


def nvidia_smi(device, *fields):
    """{field: text} of a GPU, read and never set; {} where it cannot be read."""
    command = smi_command(device, fields)
    done = command and subprocess.run(command, capture_output=True, text=True)
    return (smi_lines(done.stdout, fields) or [{}])[0] if done and done.returncode == 0 else {}


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


CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@contextmanager
def watched(device):
    """Read a GPU every 100 ms while this lasts; behind it {field: [lowest, median, highest]}, with units in the field's name.

    {} on a CPU, and where nothing can be read.
    """
    found, command = {}, smi_command(device, CLOCKS)
    if command is None:
        yield found
        return
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*command, "--loop-ms=100"], stdout=output, stderr=subprocess.DEVNULL, text=True)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        output.seek(0)
        for field in CLOCKS:
            readings = [line[field].split() for line in smi_lines(output.read(), CLOCKS)]
            output.seek(0)
            values = sorted(float(value) for value, *_ in readings if value.replace(".", "", 1).isdigit())
            if values:
                unit = " ".join(readings[0][1:])
                found[f"{field} {unit}".strip()] = [values[0], statistics.median(values), values[-1]]
