"""The fastest of cuBLASLt's algorithms for a product in float16, found by timing: through ctypes, on the library that PyTorch uses.

cuBLAS takes the algorithm that its heuristic puts first, while our kernels are tuned for every shape.  cublasLtMatmulAlgoGetHeuristic gives
many, in the order that it thinks best; here each is timed.  Functions, structures and numbers are those of NVIDIA's cublasLt.h.

    python -m bench.cublaslt    every algorithm of a few small products against PyTorch, on the GPU; exit status 1 if one differs

This is tried in a process of its own before the benchmark uses it: whatever goes wrong in there costs a column, and nothing else.
"""

import argparse
import ctypes
import functools
import subprocess
import sys
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import partial
from pathlib import Path

import torch

from bench.timing import Missing, ready, rounds_in_turn

ROOT = Path(__file__).resolve().parents[1]
HALF, FLOAT = 2, 0  # cudaDataType_t: CUDA_R_16F, CUDA_R_32F
COMPUTE_FLOAT = 68  # cublasComputeType_t: CUBLAS_COMPUTE_32F, as cuBLAS adds up for PyTorch
TRANSPOSE_A, TRANSPOSED = 3, 1  # CUBLASLT_MATMUL_DESC_TRANSA; CUBLAS_OP_T
MAX_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper
MOST = 32  # algorithms asked for
ONE, ZERO = c_float(1), c_float(0)  # alpha and beta
TRIAL = ((1, 256, 512), (17, 384, 512), (300, 512, 1024))  # tokens, rows, columns
TRIAL_SECONDS = 120


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t, whose contents are the library's own."""

    _fields_ = [("data", c_uint64 * 8)]


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4)]


FUNCTIONS = {  # their arguments; all return a cublasStatus_t, 0 for success
    "cublasLtCreate": (POINTER(c_void_p),),
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, POINTER(Found), POINTER(c_int)),
    "cublasLtMatmul": (*[c_void_p] * 12, POINTER(Algorithm), c_void_p, c_size_t, c_void_p),
}


class Library:
    """libcublasLt with a handle.  Raises Missing where it is not there, or is another."""

    def __init__(self, path):
        try:
            self.functions = {name: getattr(ctypes.CDLL(path), name) for name in FUNCTIONS}
        except (OSError, AttributeError) as e:
            raise Missing(f"{path} cannot be used: {e}") from e
        for name, types in FUNCTIONS.items():
            self.functions[name].argtypes, self.functions[name].restype = types, c_int
        self.handle = self.made("cublasLtCreate")

    def call(self, name, *arguments):
        if status := self.functions[name](*arguments):
            raise Missing(f"{name}: cublasStatus_t {status}")

    def made(self, name, *arguments):
        """What a function makes, which lives as long as the process."""
        it = c_void_p()
        self.call(name, byref(it), *arguments)
        return it


class Product:
    """y (M, N) = x (M, K) @ weight (N, K).T in float16, added up in float32, without a bias.

    cuBLASLt has columns one after the other: to it a row is a column, so x is (K, M), the weight (K, N) and to be transposed, y (N, M).
    """

    def __init__(self, library, tokens, rows, columns):
        self.library, made = library, library.made
        self.operation = made("cublasLtMatmulDescCreate", COMPUTE_FLOAT, FLOAT)
        self.set("cublasLtMatmulDescSetAttribute", self.operation, TRANSPOSE_A, c_int32(TRANSPOSED))
        sizes = (columns, rows), (columns, tokens), (rows, tokens)
        self.weight, self.x, self.y = (made("cublasLtMatrixLayoutCreate", HALF, size, count, size) for size, count in sizes)

    def set(self, name, it, attribute, value):
        self.library.call(name, it, attribute, byref(value), ctypes.sizeof(value))

    def algorithms(self):
        """[Found] that the library says it can run, what its heuristic thinks best first."""
        preference = self.library.made("cublasLtMatmulPreferenceCreate")
        self.set("cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, c_uint64(WORKSPACE))
        found, count = (Found * MOST)(), c_int()
        where = self.library.handle, self.operation, self.weight, self.x, self.y, self.y, preference
        self.library.call("cublasLtMatmulAlgoGetHeuristic", *where, MOST, found, byref(count))
        return [one for one in found[: count.value] if one.state == 0]

    def run(self, algorithm, x, weight, y, workspace):
        """Write y, on the current stream.  workspace: WORKSPACE bytes of uint8."""
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        pointers = weight.data_ptr(), self.weight, x.data_ptr(), self.x, byref(ZERO), y.data_ptr(), self.y, y.data_ptr(), self.y
        memory = workspace.data_ptr(), workspace.nbytes
        self.library.call("cublasLtMatmul", self.library.handle, self.operation, byref(ONE), *pointers, byref(algorithm), *memory, stream)


class Calls(list):
    """Calls of a product, one for each copy of its weight.  chosen: how they were, ["algorithm 3 of 17", bytes of workspace]."""

    chosen = None


def best(product, x, weights, y, workspace):
    """The Calls of the algorithm that takes least time.  Raises Missing if none runs."""
    found, device, runs = product.algorithms(), x.device, {}
    graph = device.type == "cuda"

    def calls(i):
        return Calls(partial(product.run, found[i].algorithm, x, weight, y, workspace) for weight in weights)

    for i in range(len(found)):
        try:
            runs[i] = ready(calls(i), device, graph, least=5)
        except Exception:  # of one algorithm: the others are still there
            continue
    times = rounds_in_turn(runs, device, graph, rounds=5)
    medians = {i: time["median"] for i, time in times.items() if not isinstance(time, Exception)}
    if not medians:
        raise Missing(f"none of cuBLASLt's {len(found)} algorithms runs")
    fastest = min(medians, key=medians.get)
    chosen = calls(fastest)
    chosen.chosen = [f"algorithm {fastest + 1} of {len(found)}", found[fastest].workspace]
    return chosen


# ---------------------------------------------------------------------------
# The library of this process, once it has been tried in another


def loaded():
    """The Library that PyTorch has loaded: its name is enough to find it."""
    return Library(f"libcublasLt.so.{(torch.version.cuda or '?').partition('.')[0]}")


@functools.cache
def obstacle():
    """Why the trial did not end well, in one line; None if it did."""
    command = [sys.executable, "-m", "bench.cublaslt"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"a trial of libcublasLt did not end in {TRIAL_SECONDS} s"
    lines = [*filter(None, done.stderr.splitlines()), f"exit status {done.returncode}"]
    return f"a trial of libcublasLt: {lines[-2] if len(lines) > 1 else lines[0]}" if done.returncode else None


@functools.cache
def library(device):
    """The Library for a GPU.  Raises Missing."""
    if device.type != "cuda":
        raise Missing("needs an NVIDIA GPU")
    if why := obstacle():
        raise Missing(why)
    with torch.cuda.device(device):
        return loaded()


def differing(library, device):
    """Yields (what, whether it differs from PyTorch), for every algorithm of the trial's products."""
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    for tokens, rows, columns in TRIAL:
        x, weight = (torch.randn(n, columns, device=device).half() for n in (tokens, rows))
        wanted, product = x.float() @ weight.float().T, Product(library, tokens, rows, columns)
        for i, found in enumerate(product.algorithms()):
            y = torch.full((tokens, rows), float("nan"), dtype=torch.float16, device=device)
            product.run(found.algorithm, x, weight, y, workspace)
            yield f"{tokens}x{rows}x{columns}, algorithm {i + 1}", not torch.allclose(y.float(), wanted, rtol=0.01, atol=0.2)


def main(device=None):
    """Exit status: 0 if all algorithms compute what PyTorch does, else 1, and a line that says why."""
    if device is None and not torch.cuda.is_available():
        return "no NVIDIA GPU"
    device = device or torch.device("cuda", torch.cuda.current_device())
    try:
        results = list(differing(loaded(), device))
    except Missing as e:
        return str(e)
    wrong = [what for what, differs in results if differs]
    print(f"{len(results)} algorithms of cuBLASLt, {len(wrong)} wrong")
    return f"WRONG: {'; '.join(wrong)}" if wrong else None if results else "no algorithm found"


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.cublaslt", description=__doc__.partition("\n")[0]).parse_args()
    sys.exit(main())
