"""The machine that a run is on: its device, memory, seconds, versions and commit, and how its results become a file."""

import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from recipe import UsageError

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "accelerate", "numpy", "safetensors")

# ---------------------------------------------------------------------------
# Device and memory


def find_device(name=None):
    """torch.device of a name; None: a GPU if there is one.  Raises UsageError unless it is there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().split("\n")[0].rstrip(".")
        raise UsageError(f"--device {name}: PyTorch finds no such device here ({reason}); use cpu") from e


def release(device):
    """Give back the memory that no tensor uses: a model has cycles, which only the collector finds, and PyTorch keeps what it had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def total_memory(device):
    """Bytes of a GPU, or of the host."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else psutil.virtual_memory().total


def free_memory(device):
    """Bytes that can still be had on a GPU, or on the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_bytes(device):
    """Largest memory so far, in bytes: of this process on the host, and of PyTorch's tensors on the GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


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
    """Names of what the numbers were computed on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "gpu": gpu, "machine": platform.machine(), "threads": torch.get_num_threads()}


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
