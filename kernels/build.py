"""Compile the CUDA kernels with nvcc, once: python -m kernels.build [--arch 80,90]

The library lands in the user's cache under hashes of sources and flags, and of nvcc's version; without nvcc, the newest one of the same
sources and flags is taken.  It needs neither PyTorch's headers nor its ABI.
cuda.py builds on first use; an import builds nothing.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCES = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cu", ".cuh"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
TARGETS = {"90": ("-DWGMMA", "-gencode=arch=compute_90a,code=sm_90a")}  # what only 9.0 has, not what came after it: hopper.cuh
OLDEST = 80  # the u8 mma.m16n8k32, cp.async and min.NaN need compute capability 8.0


class BuildError(ValueError):
    """The kernels cannot be built here; says why and what to do."""


def find_nvcc():
    """Path of nvcc: of $CUDA_HOME, of the PATH or of /usr/local/cuda.  Raises BuildError where there is none."""
    home = os.environ.get("CUDA_HOME")
    for nvcc in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and os.access(nvcc, os.X_OK):
            return nvcc
    raise BuildError("no nvcc in $CUDA_HOME/bin, the PATH or /usr/local/cuda/bin: install the CUDA toolkit, or choose --kernel torch")


def cache_folder():
    """Where libraries are kept: $XDG_CACHE_HOME/awrq, else ~/.cache/awrq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awrq"


def build(arch):
    """The library for one architecture, such as 80, compiled if it is not in the cache yet: its path.  Raises BuildError.

    Beside it lies nvcc's report of registers and spills, build.log.  Processes that want the same library wait for the one that compiles.
    """
    if not str(arch).isdigit() or int(arch) < OLDEST:
        raise BuildError(f"compute capability {arch}: must be {OLDEST} or more, without its point, such as 80 (A100) or 90 (H100)")
    flags = (*FLAGS, *TARGETS.get(str(arch), (f"-arch=sm_{arch}",)))
    key = _hash(platform.machine(), *flags, sources())  # machines of several kinds may share a home
    name = f"libawrq_sm{arch}.so"
    try:
        nvcc = find_nvcc()
    except BuildError:
        if made := sorted(cache_folder().glob(f"{key}-*/{name}"), key=lambda library: library.stat().st_mtime):
            return made[-1]
        raise
    folder = cache_folder() / f"{key}-{_hash(_run([nvcc, '--version']).stdout)}"
    library = folder / name
    if library.exists():
        return library
    try:
        _compile(nvcc, flags, library)
    except OSError as e:
        raise BuildError(f"{folder}: cannot be written ({e.strerror}); set XDG_CACHE_HOME to a folder that can") from e
    return library


def sources():
    """A hash of the kernels' sources."""
    return _hash(*(s.read_text() for s in SOURCES))


def _hash(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(nvcc, flags, library):
    """Write a library, unless another process has done so while this one waited."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        print(f"kernels: compiling {library.name}, once", file=sys.stderr, flush=True)
        partial, log = library.with_suffix(".partial"), library.parent / "build.log"
        done = _run([nvcc, *flags, "-o", str(partial), *(str(s) for s in SOURCES if s.suffix == ".cu")])
        log.write_text(done.stderr)
        if done.returncode:
            raise BuildError(f"{nvcc} failed for {flags[-1]}: {_reason(done.stderr)} (all it said: {log})")
        os.replace(partial, library)


def _run(command):
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise BuildError(f"{command[0]}: {e.strerror}; install the CUDA toolkit, or choose --kernel torch") from e


def _reason(stderr):
    """The line of nvcc's output that says what is wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error" in line or "fatal" in line), lines[-1])


def main(args):
    for arch in args.arch.split(","):
        start = time.perf_counter()
        library = build(arch)
        print(f"sm_{arch}: {library} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m kernels.build", description="Compile the CUDA kernels into the user's cache.")
    parser.add_argument(
        "--arch", default="80,90", help="compute capabilities without their point, separated by commas (default %(default)s)"
    )
    try:
        main(parser.parse_args())
    except (BuildError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")
