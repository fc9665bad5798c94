"""The CUDA kernels on a CPU: g++ compiles their own code with the instructions of tests/emulator/ in the place of theirs."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from kernels import NOTHING, build, cuda

ROOT = Path(__file__).parent.parent
FLAGS = ("-DWGMMA", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
# Of what the sanitizer sees, a load off its alignment, an index past an array and a sum past 2^31 matter here; it stops the process.
UNDEFINED = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


def compile_kernels(folder):
    """The kernels' library, compiled into a folder."""
    for source in build.SOURCES:
        shutil.copy(source, folder)
    for instructions in ("ptx.cuh", "wgmma.cuh"):
        shutil.copy(ROOT / "tests" / "emulator" / instructions, folder)
    done = subprocess.run(
        ["g++", "-x", "c++", *FLAGS, *UNDEFINED, "-o", "libawrq.so", "w4a8.cu"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    library = cuda.bind(folder / "libawrq.so")
    assert library.awrq_ready() == 0
    library.emulator_memory.restype, library.emulator_memory.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
    return library


def guarded(library, tensor, align=16):
    """A copy at whose end (but for `align`) begins memory that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_uint8 * (size + 1)).from_address(library.emulator_memory(size, align))  # one more, as PyTorch takes no empty buffer
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def all_guarded(library, fields):
    """A NamedTuple whose tensors are guarded."""
    return fields._make(guarded(library, v) if isinstance(v, torch.Tensor) else v for v in fields)


def emulate(
    library, x, weight, config, parts, bits=8, per_token=False, sym=False, lengths=None, reverse=False, eager=False, producer=NOTHING
):
    """y of one configuration.  All it reads ends at a guard; the workspace and y start as garbage."""
    weight, producer = all_guarded(library, weight), all_guarded(library, producer)
    y = guarded(library, torch.full((*x.shape[:2], weight.rows), float("nan"), dtype=x.dtype))
    lengths = None if lengths is None else guarded(library, lengths.int(), 4)
    library.emulator_settings(reverse, eager)

    def empty(size):
        return guarded(library, torch.full((size,), 255, dtype=torch.uint8), 256)

    how = (weight, (bits, per_token, sym), lengths, config, parts, None, empty)
    return cuda.launch(library, guarded(library, x), y, *how, producer)
