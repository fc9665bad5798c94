"""What nvcc made of the kernels, and a replay of their main loops on one multiprocessor, so that a change can be judged without a GPU.

A line of SASS carries control codes: how long the scheduler stalls after an instruction, which of six scoreboards it sets until its
operands are read or its result is there, and which it waits for.  `replay` issues a loop by them, with all warps of the blocks that fit, on
four schedulers, each with its tensor core, and one pipe to shared memory.  Global memory is taken to be always in time: it gives a bound.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from recipe import UsageError

REGISTERS, SHARED_BYTES, THREADS = 65536, 164 * 1024, 2048  # of a multiprocessor of sm_80, the smallest of those modelled
BLOCK_OVERHEAD = 1024  # bytes of shared memory that each block loses
KINDS = {  # what an instruction keeps busy, by its name's first part
    "tensor": {"IMMA"},
    "wgmma": {"IGMMA"},
    "barrier": {"BAR"},
    "memory": {"LDS", "LDSM", "LDGSTS", "STS"},
    "fma": {"IMAD", "FFMA", "FADD", "FMUL", "HADD2"},
    "alu": {"LOP3", "IADD3", "LEA", "ISETP", "SHF", "SEL", "MOV", "VIADD", "PRMT"},
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
# Assumed, in cycles: from an instruction's turn at shared memory to its result, between two of a kind on a scheduler, and behind a barrier.
LATENCY = {"LDS": 24, "LDSM": 28, "LDGSTS": 30, "STS": 24}
INTERVAL = {"alu": 2, "fma": 2, "memory": 2}
TENSOR_INTERVAL = {80: 8, 90: 6}  # of IMMA.16832, as ptxas itself spaces them
# Of IGMMA.64x128x32, a warp's quarter: its tensor core, by the data sheet's rate, and shared memory, which it reads 4 KB of for four warps.
WGMMA_INTERVAL, WGMMA_SHARED = 64, 8
WAVEFRONT = 4  # cycles of the pipe to shared memory for 512 bytes
READ, ARRIVAL, BARRIER = 12, 4, 12
OTHER_BLOCK = 137  # cycles by which blocks are apart at first
NONE = 7  # no scoreboard


@dataclass
class Instruction:
    text: str
    stall: int
    written: int  # scoreboard that is set until the result is there, or NONE
    read: int  # ... until the operands are read
    waits: int  # bits of the scoreboards that are awaited

    @property
    def name(self):
        return re.sub(r"^@!?U?P[T\d]\s+", "", self.text).split()[0].split(".")[0].rstrip(",")

    @property
    def pending(self):
        """How many groups of wgmma may be running on behind a wait for them; None if it is none."""
        found = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", self.text)
        return found and int(found[1])

    @property
    def kind(self):
        return "other" if self.text.startswith("@!PT") else KIND.get(self.name, "other")


@dataclass
class Kernel:
    """A kernel's code.  parameters: the numbers of its template, such as (128, 64, 32, 64, 4, 0) of a tile."""

    name: str
    parameters: tuple
    registers: int
    code: list
    labels: dict  # {label: index of the instruction that follows it}

    def loops(self, name):
        """Innermost loops that contain an instruction: lists of instructions."""
        found = []
        for at, instruction in enumerate(self.code):
            target = re.search(r"\bBRA\S*\s+(?:.*?)`\((\.L_x_\d+)\)", instruction.text)
            if target and self.labels.get(target[1], at + 1) <= at:
                span = self.labels[target[1]], at
                if any(i.name == name for i in self.code[span[0] : at + 1]):
                    found.append(span)
        inner = [a for a in found if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in found)]
        return [self.code[begin : end + 1] for begin, end in inner]


def tool(name):
    """Path of one of NVIDIA's tools: of the Python packages, of the PATH or of the toolkit.  Raises UsageError where there is none."""
    folders = [str(folder) for folder in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")]
    path = os.pathsep.join((*folders, os.environ["PATH"], "/usr/local/cuda/bin"))
    found = shutil.which(name, path=path)
    if not found:
        raise UsageError(f"no {name} on the PATH: pip install nvidia-cuda-{name}")
    return found


def kernels(library, folder):
    """The Kernels of a compiled library; folder: an empty one for its parts."""
    library = Path(library).resolve()
    subprocess.run([tool("cuobjdump"), "--extract-elf", "all", library], cwd=folder, check=True, capture_output=True)
    cubin = max(Path(folder).glob("*.cubin"), key=lambda path: path.stat().st_size)  # another is there, which is empty
    usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    sass = subprocess.run(
        [tool("nvdisasm"), "--print-code", "--print-instruction-encoding", cubin], check=True, capture_output=True, text=True
    )
    return [parse(text, registers) for text in re.split(r"^\.text\.", sass.stdout, flags=re.M)[1:]]


def parse(text, registers):
    """A Kernel from nvdisasm's text of it."""
    name = re.match(r"(\w+):", text)[1]
    code, labels = [], {}
    pattern = r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    for label, instruction, high in re.findall(pattern, text, flags=re.M):
        if label:
            labels[label] = len(code)
        else:
            control = int(high, 16) >> 41
            code.append(Instruction(instruction, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63))
    return Kernel(name, tuple(int(n) for n in re.findall(r"L[ib](\d+)E", name)), registers[name], code, labels)


def blocks_that_fit(registers, threads, shared_bytes):
    """How many blocks of a kernel a multiprocessor holds at once."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(REGISTERS // (per_warp * threads // 32), THREADS // threads, SHARED_BYTES // (shared_bytes + BLOCK_OVERHEAD))


# ---------------------------------------------------------------------------
# Replay


@dataclass
class Warp:
    block: int
    next: int  # cycle from which it may issue
    scoreboards: list  # cycles at which what sets them ends
    at: int = 0
    rounds: int = 0
    waits: bool = False  # at the barrier
    groups: list = field(default_factory=list)  # cycles at which groups of wgmma end

    def ready(self, cycle, waits):
        if self.waits or self.next > cycle:
            return False
        return not waits or not any(waits >> b & 1 and ends > cycle for b, ends in enumerate(self.scoreboards))


@dataclass
class Replay:
    cycles: float  # of one round of the loop by all warps
    tensor: float  # share of the tensor cores' rate


def replay(loop, warps, blocks, arch, rounds=30):
    """Replay a loop by `blocks` blocks of `warps` warps on one multiprocessor of an architecture, 80 or 90."""
    program = [(i.kind, i.name, max(1, i.stall), i.written, i.read, i.waits) for i in loop]
    group_ends, pending = ["gsb0" in i.text and i.kind == "wgmma" for i in loop], [i.pending for i in loop]
    interval = INTERVAL | {"tensor": TENSOR_INTERVAL[arch]}
    all_warps = [Warp(w // warps, w // warps * OTHER_BLOCK, [0] * (NONE + 1)) for w in range(warps * blocks)]
    queues = [[w for i, w in enumerate(all_warps) if i % warps % 4 == s] for s in range(4)]
    free = [dict.fromkeys((*interval, "barrier", "other"), 0) for _ in range(4)]
    arrived = [[] for _ in range(blocks)]
    wgmma_free = [0] * 4
    cycle = shared_free = 0
    marks, left = [], len(all_warps)
    while left:
        for scheduler, (queue, pipes) in enumerate(zip(queues, free, strict=True)):
            turn = next(
                (k for k, w in enumerate(queue) if w.ready(cycle, program[w.at][5]) and pipes.get(program[w.at][0], 0) <= cycle),
                None,
            )
            if turn is None:
                continue
            queue[:] = queue[turn:] + queue[:turn]  # this one goes on as long as it can
            warp = queue[0]
            kind, name, stall, written, read, _ = program[warp.at]
            if kind in interval:
                pipes[kind] = cycle + interval[kind]
            if kind == "memory":
                start = max(shared_free, cycle + ARRIVAL)
                shared_free = start + WAVEFRONT
                warp.scoreboards[written] = max(warp.scoreboards[written], start + LATENCY[name])
                warp.scoreboards[read] = max(warp.scoreboards[read], cycle + READ)
            if kind == "wgmma":  # goes on by itself
                shared_free = max(shared_free, cycle) + WGMMA_SHARED
                wgmma_free[scheduler] = max(wgmma_free[scheduler], cycle) + WGMMA_INTERVAL
                if group_ends[warp.at]:
                    warp.groups.append(wgmma_free[scheduler])
            warp.next = cycle + stall
            if pending[warp.at] is not None:
                done = warp.groups[: len(warp.groups) - pending[warp.at]]
                warp.next = max(warp.next, *done, 0)
                del warp.groups[: len(done)]
            warp.at += 1
            if kind == "barrier":
                waiting = arrived[warp.block]
                waiting.append(warp)
                warp.waits = True
                if len(waiting) == warps:
                    for other in waiting:
                        other.waits, other.next = False, max(other.next, cycle + BARRIER)
                    waiting.clear()
            if warp.at == len(program):
                warp.at, warp.rounds = 0, warp.rounds + 1
                if warp is all_warps[0]:
                    marks.append(cycle)
                if warp.rounds == rounds:
                    queue.remove(warp)
                    left -= 1
        cycle += 1
    cycles = (marks[-5] - marks[5]) / (len(marks) - 10)
    busy = sum({"tensor": TENSOR_INTERVAL[arch], "wgmma": WGMMA_INTERVAL}.get(kind, 0) for kind, *_ in program)
    return Replay(cycles, len(all_warps) / 4 * busy / cycles)
