"""Compile the CUDA kernels with nvcc, once: python -m kernels.build [--arch 80,90]

The library lands in the user's cache under a hash of sources, flags and nvcc's version.  It needs neither PyTorch's headers nor its ABI.
cuda.py builds on first use; an import builds nothing.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCES = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cu", ".cuh"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
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
        raise BuildError(f"--arch {arch}: must be {OLDEST} or more, a compute capability without its point, such as 80 or 90")
    nvcc = find_nvcc()
    flags = (*FLAGS, f"-arch=sm_{arch}")
    version = _run([nvcc, "--version"]).stdout
    key = hashlib.sha256("\0".join((version, *flags, *(s.read_text() for s in SOURCES))).encode()).hexdigest()[:16]
    folder = cache_folder() / key
    library = folder / f"libawrq_sm{arch}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():  # while this process waited
            print(f"kernels: compiling for sm_{arch}, once", file=sys.stderr, flush=True)
            partial = library.with_suffix(".partial")
            done = _run([nvcc, *flags, "-o", str(partial), *(str(s) for s in SOURCES if s.suffix == ".cu")])
            (folder / "build.log").write_text(done.stderr)
            if done.returncode:
                raise BuildError(f"nvcc failed for sm_{arch}: {_reason(done.stderr)} (all it said: {folder / 'build.log'})")
            os.replace(partial, library)
    return library


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
