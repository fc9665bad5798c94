"""How everything here is timed: many copies against the caches, CUDA graphs, the ceilings of a machine, and what machine it is."""

import functools
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

HEAD_START = 200_000  # cycles: a tenth of a millisecond


def enough_copies(device, size):
    """How many copies of `size` bytes are more than four times the L2 cache of a GPU; at most 1024.  1 on a CPU."""
    if device.type != "cuda":
        return 1
    return max(1, min(1024, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // size)))


@functools.cache
def side_stream(device):
    """One for all warm-ups on a device: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def captured(call, device):
    """A function that does again what call() did when it was captured, as one CUDA graph, and returns what that returned, renewed.

    call runs twice before it is captured, as kernels are loaded on first use.
    """
    stream = side_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):  # a capture that fails leaves another one current
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

    def replay():
        graph.replay()
        return result

    replay.call = call  # as long as the graph can run, what it reads must live
    return replay


def seconds(call, device, head_start=0):
    """How long call() takes: by the GPU's own clock where there is one.

    head_start: so many of its cycles the GPU waits first, in which the host can launch: for calls that are one launch, as a graph is.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        if head_start:
            torch.cuda._sleep(head_start)
        start.record()
        call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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


def release(device):
    """Give back the memory that no tensor uses: a model has cycles, which only the collector finds, and PyTorch keeps what it had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------
# What machine it is


def commit():
    """The commit of this code, with "+changes" if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+changes" * bool(changed)


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


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    partial_file = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial_file, "w") as f:
            json.dump(content, f, indent=1, allow_nan=False)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())  # a crash must not leave the name without the bytes
        os.replace(partial_file, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial_file)
