"""The sizes of the models that are tuned, checked and timed, and of the linears in their blocks."""

from typing import NamedTuple

from recipe import UsageError


class Model(NamedTuple):
    """Of the sizes of its class in transformers."""

    family: str  # model_type
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    blocks: int
    vocab: int


MODELS = {
    "llama-7b": Model("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Model("llama", 5120, 13824, 40, 40, 40, 32000),  # also LLaMA-2-13B
    "llama-30b": Model("llama", 6656, 17920, 52, 52, 60, 32000),
    "llama-65b": Model("llama", 8192, 22016, 64, 64, 80, 32000),
    "llama-2-70b": Model("llama", 8192, 28672, 64, 8, 80, 32000),
    "llama-3-8b": Model("llama", 4096, 14336, 32, 8, 32, 128256),
    "opt-125m": Model("opt", 768, 3072, 12, 12, 12, 50272),
    "opt-1.3b": Model("opt", 2048, 8192, 32, 32, 24, 50272),
    "opt-2.7b": Model("opt", 2560, 10240, 32, 32, 32, 50272),
    "opt-6.7b": Model("opt", 4096, 16384, 32, 32, 32, 50272),
    "opt-13b": Model("opt", 5120, 20480, 40, 40, 40, 50272),
    "opt-30b": Model("opt", 7168, 28672, 56, 56, 48, 50272),
    "opt-66b": Model("opt", 9216, 36864, 72, 72, 64, 50272),
}
TINY = {  # for a machine without a GPU, where only that everything runs is of interest
    "tiny-llama": Model("llama", 64, 160, 4, 2, 2, 128),
    "tiny-opt": Model("opt", 64, 256, 4, 4, 2, 128),
}
TIMED = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-70b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b")


def model(name):
    """The Model of a name.  Raises UsageError for an unknown one."""
    known = MODELS | TINY
    if name not in known:
        raise UsageError(f"{name}: no such model; choose from {', '.join(known)}")
    return known[name]


def block_linears(name, fused=False):
    """Rows and columns of every linear of a block, [(R, C)], in the order of execution.  fused: q/k/v as one, and gate/up."""
    m = model(name)
    kv = m.hidden // m.heads * m.kv_heads
    read_by_one = ([m.hidden, kv, kv], [m.mlp] * (2 if m.family == "llama" else 1))
    qkv, gates = ([(sum(rows), m.hidden)] if fused else [(r, m.hidden) for r in rows] for rows in read_by_one)
    return [*qkv, (m.hidden, m.hidden), *gates, (m.hidden, m.mlp)]


def linears(name, fused=False):
    """The same, each shape once."""
    return tuple(dict.fromkeys(block_linears(name, fused)))


LAYERS = tuple(dict.fromkeys(shape for name in MODELS for shape in linears(name)))
FUSED = tuple(shape for shape in dict.fromkeys(s for name in TIMED for s in linears(name, fused=True)) if shape not in LAYERS)
