"""The CUDA implementation of the op: which kernel for which shape, and the call through ctypes."""

import ctypes
import functools
import json
from pathlib import Path

import torch

from kernels.build import BuildError, build, sources
from recipe import UsageError

TUNING = Path(__file__).parent / "tuning.json"
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # Type of quantize.cuh
CONFIGS = {  # in the order of Config of w4a8.cu: rows of the weight and tokens of one block
    "decode_fused": (32, 16),
    "decode": (32, 16),
    "128x16": (128, 16),
    "128x32": (128, 32),
    "128x64": (128, 64),
    "128x128": (128, 128),
    "256x128": (256, 128),
    "wgmma256x128": (256, 128),  # compute capability 9.0 only
}
CONFIG_NUMBERS = {name: number for number, name in enumerate(CONFIGS)}
MAX_SPLITS = 64
QUANTIZE, MULTIPLY, BOTH = 1, 2, 3  # Steps of w4a8.cu
COLUMNS_PER_SPLIT = 1024  # fewer are not worth the sum over splits
# Of a tile, in steps of 64 columns: what a block alone on a multiprocessor takes for one, and the sum over splits for each, and once more.
ALONE, GATHER = 1.3, 12
SLAB_BYTES = 16 << 20  # what splits leave for the sum over them: it shall stay in the L2 cache


class Call(ctypes.Structure):
    """Call of w4a8.cu."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ["x", "lengths", "norm", "weight", "scale", "zero", "colsum", "bias", "y", "workspace", "stream"]
        ),
        ("workspace_bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_int)
            for name in ["type", "B", "T", "K", "N", "groupsize", "levels", "per_token", "sym", "config", "splits", "steps", "producer"]
        ),
        ("eps", ctypes.c_float),
    ]


def bind(path):
    """The library at a path, its functions typed.  Raises BuildError if it cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise BuildError(f"{path} cannot be loaded ({e}): delete it") from e
    library.awrq_workspace.restype = ctypes.c_int64
    library.awrq_error.restype = ctypes.c_char_p
    if library.awrq_call_bytes() != ctypes.sizeof(Call):
        raise BuildError(f"{path}: made from other sources than these, delete it")
    return library


@functools.cache
def library(device):
    """The library for a GPU, built on first use and made ready there.  Raises BuildError if it cannot be built or does not run there."""
    path = build("{}{}".format(*torch.cuda.get_device_capability(device)))
    found = bind(path)
    with torch.cuda.device(device):
        code = found.awrq_ready()
    if code:
        error = found.awrq_error(code).decode()
        raise BuildError(
            f"{path} does not run on this GPU ({error}): update its driver or set CUDA_HOME to an older toolkit, or choose --kernel torch"
        )
    return found


# ---------------------------------------------------------------------------
# Which kernel


@functools.cache
def tables():
    """tuning.json: {GPU name or "default": table}."""
    return json.loads(TUNING.read_text())


def cell(rows, columns, groupsize):
    """The key of a layer's shape in a measured table."""
    return f"{rows}x{columns}" + (f"g{groupsize}" if groupsize < columns else "")


def most_splits(columns, groupsize):
    """How many blocks may share the columns of a tile: no group is divided, and none has too little."""
    units = -(-columns // (groupsize if groupsize < columns else 64))
    return max(1, min(columns // COLUMNS_PER_SPLIT, units, MAX_SPLITS))


def splits(config, tokens, rows, columns, groupsize, blocks):
    """How many blocks should share the columns of a tile, so that there are about `blocks` of them."""
    if config == "decode_fused":
        return 1
    n, m = CONFIGS[config]
    return max(1, min(blocks // (-(-rows // n) * -(-tokens // m)), most_splits(columns, groupsize)))


def fitting(costs, processors, tokens, rows, columns, groupsize):
    """(config, splits) with which the busiest multiprocessor has least to do.  costs: {config: of an element of its tiles, relative}."""

    def tiles(config):
        n, m = CONFIGS[config]
        return -(-rows // n) * -(-tokens // m), n * m

    def work(choice):
        config, parts = choice
        count, size = tiles(config)
        blocks = -(-count * parts // processors)
        steps = max(blocks, ALONE) * -(-columns // (64 * parts)) + (GATHER * (parts + 1) if parts > 1 else 0)
        return costs[config] * size * steps

    def choices(config):
        count, size = tiles(config)
        most = min(most_splits(columns, groupsize), SLAB_BYTES // (count * size * 4))
        return ((config, parts) for parts in range(1, max(1, most) + 1))

    return min((choice for config in costs for choice in choices(config)), key=work)


def choose(library, gpu, processors, tokens, rows, columns, groupsize, produced=False):
    """(config, splits) for a shape on a GPU with so many multiprocessors: as measured, else by the default rules.

    produced: whether x has a producer, for which decode_fused, in which every block quantizes all of x, would compute it again and again.
    For this case a measured entry with decode_fused also names the best of the other kernels.
    """
    measured = tables().get(gpu, {}).get("cells", {}).get(cell(rows, columns, groupsize), ())
    for most, *found in measured:
        if tokens <= most:
            config, parts = found[-2:] if produced else found[:2]
            if produced and config == "decode_fused":
                break
            return config, parts
    shape = tokens, rows, columns, groupsize
    for rule in tables()["default"]["rules"]:
        if produced and rule.get("config") == "decode_fused":
            continue
        if tokens <= rule.get("tokens", tokens) and tokens * columns <= rule.get("elements", tokens * columns):
            if "tiles" in rule:
                if not all(takes(library, config, 1, *shape) for config in rule["tiles"]):
                    continue  # wgmma needs compute capability 9.0, and whole rows
                config, parts = fitting(rule["tiles"], processors, *shape)
            else:
                config = rule["config"]
                parts = splits(config, *shape, rule["blocks_per_processor"] * processors)
            if takes(library, config, parts, *shape):
                return config, parts
    raise UsageError(f"no kernel takes {tokens} tokens of {columns} columns with groupsize {groupsize}")


def chosen_by(gpu):
    """Where the kernels of a GPU are chosen: {"table": its name or "default", "measured": the cells whose times are of these sources}.

    All other shapes go by the default rules, or by times of older kernels.
    """
    table = tables().get(gpu, {})
    return {"table": gpu if table else "default", "measured": sorted(table["cells"]) if table.get("sources") == sources() else []}


def takes(library, config, parts, tokens, rows, columns, groupsize):
    """Whether the kernels accept a configuration for a shape."""
    call = Call(B=1, T=tokens, K=columns, N=rows, groupsize=groupsize, levels=255, config=CONFIG_NUMBERS[config], splits=parts, steps=BOTH)
    return library.awrq_workspace(ctypes.byref(call)) >= 0


@functools.lru_cache(maxsize=4096)
def dispatch(device, tokens, rows, columns, groupsize, produced=False):
    properties = torch.cuda.get_device_properties(device)
    return choose(library(device), properties.name, properties.multi_processor_count, tokens, rows, columns, groupsize, produced)


# ---------------------------------------------------------------------------
# The call


def producer_number(producer):
    """Producer of produce.cuh."""
    return 2 if producer.gated else 1 if producer.norm is not None else 0


def launch(library, x, y, weight, acts, lengths, config, parts, stream, empty, producer, steps=BOTH):
    """y (B, T, R) from x (B, T, C) by one configuration; from x (B, T, 2 C) with a gated producer.

    acts: (act_bits, per_token, sym); stream: its address; empty(bytes): memory for the way, of any contents; steps: MULTIPLY takes the
    codes of x that a QUANTIZE, the same call otherwise, left in that memory.  Raises ValueError for what the kernels refuse, RuntimeError
    for an error of CUDA.
    """
    call = Call(
        *(None if t is None else t.data_ptr() for t in (x, lengths, producer.norm, *weight[:5], y)), None, stream, 0,
        TYPES[x.dtype], x.shape[0], x.shape[1], weight.columns, weight.rows, weight.groupsize, 2 ** acts[0] - 1, *acts[1:],
        CONFIG_NUMBERS[config], parts, steps, producer_number(producer), producer.eps,
    )  # fmt: skip
    call.workspace_bytes = library.awrq_workspace(ctypes.byref(call))
    code = call.workspace_bytes
    if code >= 0:
        workspace = empty(call.workspace_bytes)
        call.workspace = workspace.data_ptr()
        code = library.awrq_linear(ctypes.byref(call))
    if code:
        error = library.awrq_error(code).decode()
        where = f"w4a8_linear: x {tuple(x.shape)}, weight ({weight.rows}, {weight.columns}), groupsize {weight.groupsize}, {config}"
        raise ValueError(f"{where}: {error}") if code < 0 else RuntimeError(f"{where}: CUDA: {error}")
    return y


def groups_fault(groupsize):
    """Why the kernels do not take groups of so many columns (-1: whole rows), or None."""
    if groupsize == -1 or (groupsize % 64 == 0 and groupsize <= 1024):
        return None
    return f"groupsize {groupsize}: the CUDA kernels take multiples of 64 up to 1024, or whole rows"


def linear(x, weight, act_bits, per_token, sym, lengths, producer):
    """The op on a GPU, on its current stream, for checked arguments."""
    if weight.groupsize < weight.columns and (fault := groups_fault(weight.groupsize)):
        raise UsageError(f"w4a8_linear: {fault}; use kernel torch")
    config, parts = dispatch(
        x.device, x.shape[0] * x.shape[1], weight.rows, weight.columns, weight.groupsize, producer_number(producer) > 0
    )
    with torch.cuda.device(x.device):
        return launch(
            library(x.device),
            x,
            x.new_empty(*x.shape[:2], weight.rows),
            weight,
            (act_bits, per_token, sym),
            None if lengths is None else lengths.int(),
            config,
            parts,
            torch.cuda.current_stream().cuda_stream,
            lambda n: torch.empty(n, dtype=torch.uint8, device=x.device),
            producer,
        )
