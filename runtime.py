"""The machine of a run: device, memory, seconds, versions, commit; and writing JSON."""

import ctypes
import functools
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch

from recipe import UsageError

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, MAPPED = -3, 4 << 20  # of glibc's mallopt
GROUP_FILES = {  # by the kind of a control group, versions 2 and 1: its limit, its use, and what of that are files that may be dropped
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "accelerate", "numpy", "safetensors")

# ---------------------------------------------------------------------------
# Device and memory


def find_device(name=None):
    """torch.device of a name; None: a GPU if there is one.  Raises UsageError unless it is there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().split("\n")[0].rstrip(".")
        raise UsageError(f"--device {name}: PyTorch finds no such device here ({reason}); use cpu") from e


def release(device):
    """Free unused memory: models have reference cycles, which only the garbage collector finds, and PyTorch caches freed memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def map_large_tensors():
    """Let the C library map tensors of MAPPED bytes and more, as it does at first: what is mapped goes back as soon as it is freed.

    Left to itself, glibc maps less and less, and keeps what lies between pieces in use: a third more memory for blocks of 50 MB.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, MAPPED)


def trim():
    """Give back the rest of what was freed on the host."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def total_memory(device):
    """Bytes of a GPU, or of the host."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory().total


def free_memory(device):
    """Bytes that are free on a GPU, or on the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available


def host_memory():
    """The host's memory, `total` and `available` in bytes: where torchrun started several processes there, the share of each."""
    import psutil  # which checking and timing the kernels do without

    memory, processes = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    total, available = map(min, zip((memory.total, memory.available), *group_memory(), strict=True))
    return SimpleNamespace(total=total // processes, available=available // processes)


def group_memory(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """[(limit, what is left of it)] in bytes of the control groups of this process, by which containers and batch systems limit memory.

    root, own: where Linux has the groups, and the names of this process's.
    """
    found = []
    with suppress(OSError):
        for _, kind, name in (line.split(":", 2) for line in Path(own).read_text().splitlines()):
            leaf = Path(root, kind, name.lstrip("/"))
            for group in (leaf, *leaf.parents) if kind in GROUP_FILES else ():  # the limit can be that of any, or of a container's root
                found += room_in(group, *GROUP_FILES[kind])
    return found


def room_in(group, limit, used, cache):
    """[(limit, what is left of it)] of the folder of a control group, [] if it has no limit; the others: see GROUP_FILES."""
    with suppress(OSError, ValueError):  # no folder of a group, or "max"
        most, taken = (int((group / file).read_text()) for file in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [(most, max(0, most - taken + int(stat.get(cache, 0))))]
    return []


def peak_bytes(device):
    """Largest memory so far, in bytes: of this process on the host, and of PyTorch's tensors on the GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def approximate(device, dtype):
    """A context for what need not be exact: float32 products are bfloat16's there, if the device has instructions for them.

    Other types stay what they are.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32 and multiplies_bfloat16(device))


def multiplies_bfloat16(device):
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return found.get("avx512_bf16", False) or found.get("amx_bf16", False)


class Place:
    """Where tensors are kept while they are not in use: on the device, in host memory, or in a folder that is removed after the run.

    put(tensor) -> something whose .to(device) is the tensor again, on that device.
    """

    def __init__(self, device, home):
        """home: "device", "host", or a folder, in which a temporary one is made."""
        self.device, self.home, self.folder = device, home, None
        if home not in ("device", "host"):
            self.folder = tempfile.TemporaryDirectory(prefix="awrq-", dir=home)

    def put(self, tensor):
        if self.folder:
            return OnDisk(Path(self.folder.name), tensor)
        return tensor.to(self.device if self.home == "device" else "cpu")

    def __str__(self):
        return {"device": f"on {self.device}", "host": "in host memory"}.get(self.home, f"in a temporary folder of {self.home}")


class OnDisk:
    """A tensor in a file; the file is removed with the last reference."""

    def __init__(self, folder, tensor):
        descriptor, self.path = tempfile.mkstemp(dir=folder, suffix=".pt")
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as f:
            torch.save(tensor.cpu(), f)

    def to(self, device):
        return torch.load(self.path, weights_only=True).to(device)


def find_place(size, device, scratch=None):
    """A Place for `size` bytes: on the device if they take at most half of what is free there, else in host memory, else in a folder.

    scratch: the folder (default: that of temporary files).  Raises UsageError if it has no room either.
    """
    for home, where in (("device", device), ("host", torch.device("cpu"))):
        if size <= free_memory(where) / 2:
            return Place(device, home)
    scratch = scratch or tempfile.gettempdir()
    free = shutil.disk_usage(scratch).free
    if size > free:
        raise UsageError(
            f"no room for the sequences: they take {size / 2**30:.1f} GiB, more than half of the free memory, and {scratch} has"
            f" {free / 2**30:.1f} GiB left; let TMPDIR name a folder with more, or give fewer or shorter sequences"
        )
    return Place(device, scratch)


# ---------------------------------------------------------------------------
# Seconds


class Clock:
    """Seconds by activity: `with clock("solving"): ...` adds to clock.seconds["solving"], after the device has finished."""

    def __init__(self, device):
        self.device, self.seconds = torch.device(device), defaultdict(float)

    @contextmanager
    def __call__(self, activity):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[activity] += time.perf_counter() - start


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


# ---------------------------------------------------------------------------
# Where a number is from


def commit():
    """The commit of this code, with "+changes" if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+changes" * bool(changed)


def versions():
    """Of Python and every package that can change a number; None for one that is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware(device):
    """The names of the hardware, how many threads each process has, and whether what need not be exact is multiplied in bfloat16."""
    gpu, quick = torch.cuda.get_device_name(device) if device.type == "cuda" else None, multiplies_bfloat16(device)
    return {"device": device.type, "gpu": gpu, "machine": platform.machine(), "threads": torch.get_num_threads(), "bfloat16": quick}


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def replace_text(path, text):
    """Write a text file whole or not at all."""
    partial_file = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial_file, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())  # after a crash, a file of this name must have its contents
        os.replace(partial_file, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial_file)


# ---------------------------------------------------------------------------
# What an error says


def first_lines(error):
    """The first line of an error's message, and those that it announces with a colon; the error's type if it has no message."""
    return " ".join(re.match(r"(.*:\n)*.*", str(error).strip())[0].split()).rstrip(".") or type(error).__name__
