"""Our codes as a GGUF file of llama.cpp: a copy of the original model's, with our weights in the place of its own.

Q4_0 and Q4_1 have a scale for every 32 columns, Q4_1 a minimum too: scale * code + minimum.  So any code of up to 4 bits fits as it is; the
scale of a row, or of a group of columns, stands in each of its blocks, rounded to float16.  Tokenizer and metadata are the original's.
"""

import itertools
import logging
import math
from pathlib import Path

import gguf
import numpy as np
import torch

from families import FAMILIES
from formats.card import Reader
from modelutils import skeleton
from recipe import UsageError

FILE = "model.gguf"
BLOCK = 32  # columns
HEAD = "output.weight"  # a file has none where the head is tied to the embedding
ARCHITECTURES = {  # by config.model_type: llama.cpp's name, and the linears whose rows it has in another order
    "llama": ("llama", ("self_attn.q_proj", "self_attn.k_proj")),
    "mistral": ("llama", ("self_attn.q_proj", "self_attn.k_proj")),
    "qwen2": ("qwen2", ()),
    "qwen3": ("qwen3", ()),
}
SETTINGS = {  # metadata after the architecture's name: what the configuration says of it
    "block_count": lambda config: config.num_hidden_layers,
    "embedding_length": lambda config: config.hidden_size,
    "feed_forward_length": lambda config: config.intermediate_size,
    "attention.head_count": lambda config: config.num_attention_heads,
    "attention.head_count_kv": lambda config: config.num_key_value_heads,
    "attention.layer_norm_rms_epsilon": lambda config: config.rms_norm_eps,
    "rope.freq_base": lambda config: config.rope_parameters["rope_theta"],
}

# ---------------------------------------------------------------------------
# What can be written


def readers(recipe, config, folder):
    """[formats.card.Reader] of an export in a folder."""
    note = "our weights; activations are rounded to 8 bits per 32 columns there"
    return [Reader("llama.cpp", f"llama-cli -m {folder}/{FILE}", note)]


def check(recipe, config, like=None, tokenizer=None):
    """Raises UsageError for what Q4_0 and Q4_1 cannot hold, and unless `like` is a GGUF file of the original model."""
    if config.model_type not in ARCHITECTURES:
        raise UsageError(f"--export gguf: llama.cpp has no {config.model_type} models; it takes {', '.join(ARCHITECTURES)}")
    family, g = FAMILIES[config.model_type], recipe.groupsize
    block = skeleton(config, torch.float32).get_submodule(family.blocks)[0]
    columns = {name: block.get_submodule(name).in_features for group in family.groups for name in group.linears}
    odd = [f"{name} has {C}" for name, C in columns.items() if C % BLOCK]
    for wrong, why in (
        (recipe.wbits > 4, f"--wbits {recipe.wbits}: its blocks hold codes of up to 4 bits; give 2, 3 or 4"),
        (odd, f"{', '.join(odd)} columns, and its blocks have {BLOCK}"),
        (g != -1 and g % BLOCK, f"--groupsize {g}: its blocks have {BLOCK} columns; give a multiple of that, or -1"),
    ):
        if wrong:
            raise UsageError(f"--export gguf: {why}")
    check_original(open_original(like), config, tokenizer, like)


def open_original(path):
    """A gguf.GGUFReader.  Raises UsageError for a file that is not there, not a GGUF file, damaged, or only a part of a model."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        with open(path, "rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise UsageError(f"--gguf_like {path}: cannot be read ({e.strerror}); give the original model's GGUF file") from e
    if magic != b"GGUF":
        raise UsageError(f"--gguf_like {path}: is no GGUF file; give the original model's")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:  # whatever damaged bytes make of its reader
        raise UsageError(f"--gguf_like {path}: is damaged ({type(e).__name__}: {e}); take it from a copy") from e
    if (parts := reader.get_field("split.count")) and parts.contents() > 1:
        raise UsageError(f"--gguf_like {path}: is one of {parts.contents()} parts; merge them with llama-gguf-split --merge")
    return reader


def check_original(reader, config, tokenizer, path):
    """Raises UsageError unless a GGUF file is of the model of a configuration: architecture, settings, tensors and tokens."""
    architecture, _ = ARCHITECTURES[config.model_type]

    def refuse(reason):
        raise UsageError(f"--gguf_like {path}: is of another model: {reason}; give the original's")

    if (found := field(reader, "general.architecture")) != architecture:
        refuse(f"its architecture is {found}, that of this {config.model_type} is {architecture}")
    for key, setting in SETTINGS.items():
        found, own = field(reader, f"{architecture}.{key}"), setting(config)
        each = found if isinstance(found, list) else [found]  # of each block, where they differ
        if found is not None and not all(math.isclose(value, own, rel_tol=1e-5) for value in each):
            refuse(f"{architecture}.{key} is {found} there, {own} here")
    ours = tensor_names(config)
    there = {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}
    for name, (own, shape) in ours.items():
        if name not in there and name != HEAD:
            refuse(f"it has no {name}")
        if name in there and there[name] != shape:
            refuse(f"{name} is {there[name]} there, {own} is {shape} here")
    for name in there:
        if name.startswith("blk.") and name not in ours:
            refuse(f"it has {name}, which this one has not")
    tokens = field(reader, "tokenizer.ggml.tokens") or []
    for i, token in enumerate(tokens[: len(tokenizer)] if tokenizer else ()):
        own = tokenizer.convert_ids_to_tokens(i)  # None: a number that no token has, for which llama.cpp makes one up
        if own is not None and spaced(token) != spaced(own):
            refuse(f"token {i} is {token!r} there, {own!r} here")


def spaced(token):
    """A token with spaces for SentencePiece's marks of them, as llama.cpp's converter writes the tokens that were added."""
    return token.replace("\u2581", " ")


def field(reader, key):
    """A value of the metadata; None: there is none."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def tensor_names(config):
    """{name of a tensor in llama.cpp: (its name in transformers, its shape)} of all that a model has; its head, even if it is tied."""
    architecture, _ = ARCHITECTURES[config.model_type]
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    state = skeleton(config, torch.float32).state_dict()
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): (name, tuple(t.shape)) for name, t in state.items()}


def sizes(folder, config):
    """{name in transformers: bytes} of the file in a folder."""
    names = tensor_names(config)
    return {names.get(t.name, (t.name,))[0]: int(t.n_bytes) for t in gguf.GGUFReader(Path(folder, FILE)).tensors}


# ---------------------------------------------------------------------------
# What is written


def row_order(rows, heads):
    """Which row of a query or key linear stands where in llama.cpp: (rows,).  It has the two halves of a rotary pair beside each other."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def packed_blocks(q, grid, sym):
    """Codes (R, C) and their Grid as Q4_0 (sym: the zero point is in the middle) or Q4_1: (R, bytes) uint8.

    A block: scale, in Q4_1 the minimum too, float16; then byte j has in its low nibble column j, in its high nibble column j + 16.
    Raises UsageError for a scale beyond float16.
    """
    R, C = q.shape
    q, scale, zero = (t.cpu() for t in (q, grid.scale, grid.zero))
    parts = [scale]
    if sym:
        q = q + (8 - grid.columns(zero, C)).to(torch.uint8)
    else:
        parts.append(-scale * zero)
    starts = [grid.columns(p, C)[:, :: BLOCK if p.shape[1] > 1 else 1].expand(R, C // BLOCK).half() for p in parts]
    if not all(p.isfinite().all() for p in starts):
        raise UsageError("--export gguf: a scale of these weights is beyond float16, which is all that its blocks can hold")
    low, high = q.view(R, C // BLOCK, 2, BLOCK // 2).unbind(2)
    heads = [p.contiguous().view(torch.uint8).view(R, C // BLOCK, 2) for p in starts]
    return torch.cat([*heads, low | high << 4], 2).flatten(1)


class Source:
    """The tensors of a Store as llama.cpp has them."""

    def __init__(self, store):
        self.store, self.recipe, self.config = store, store.recipe, store.original.config
        self.family, self.prefix = store.original.family, store.prefix
        self.type = gguf.GGMLQuantizationType.Q4_0 if self.recipe.sym else gguf.GGMLQuantizationType.Q4_1

    def ordered(self, linear, tensor):
        """A tensor of a linear of a block, its rows in llama.cpp's order."""
        if linear not in ARCHITECTURES[self.config.model_type][1]:
            return tensor
        heads = self.config.num_attention_heads if linear.endswith("q_proj") else self.config.num_key_value_heads
        return tensor[row_order(len(tensor), heads)]

    def block(self, i):
        """{name in the block: (numpy array, its type)} of block i: codes, norms and biases."""
        found = {}
        for linear, (q, grid) in self.store.codes(i).items():
            found[f"{linear}.weight"] = self.ordered(linear, packed_blocks(q, grid, self.recipe.sym)).numpy(), self.type
        for name, tensor in self.store.read(i).items():
            if name.endswith((".weight", ".bias")):
                tensor = self.ordered(name.rpartition(".")[0], tensor.float()).contiguous()
                found[name] = tensor.numpy(), gguf.GGMLQuantizationType.F32
        return found

    def rest(self, has_head):
        """The same of what is outside the blocks, as far as it is not the original's: the last norm; rotated, embedding and head too.

        has_head: whether the original's file has a head; where it has none, llama.cpp takes the embedding, so one of its own is written.
        """
        residual = self.family.residual
        found = {f"{residual.final_norm}.weight": (np.float32, gguf.GGMLQuantizationType.F32)}
        embeddings, head = [f"{name}.weight" for name in residual.embeddings], f"{residual.head}.weight"
        matrices = [*embeddings, head] if self.recipe.rotate else []
        if not (matrices or has_head or head in self.store.tied):
            matrices = [head]
        found |= dict.fromkeys(matrices, (np.float16, gguf.GGMLQuantizationType.F16))
        tensors = self.store.rest(list(found))
        made = {name: (tensors[name].float().numpy().astype(kind), type_) for name, (kind, type_) in found.items()}
        for name, (array, _) in made.items():
            if not np.isfinite(array).all():
                raise UsageError(f"--export gguf: {name} has values beyond float16, which is what it is written in")
        return made


def write(store, folder, tokenizer, like):
    """Write a Store's model into a folder, as FILE.  like: the original's GGUF file."""
    reader, source = open_original(like), Source(store)
    names = {own: name for name, (own, _) in tensor_names(source.config).items()}
    writer = gguf.GGUFWriter(Path(folder, FILE), field(reader, "general.architecture"))
    copy_metadata(reader, writer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if source.recipe.sym else gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    has_head = any(t.name == HEAD for t in reader.tensors)
    rest, first, blocks = source.rest(has_head), source.block(0), range(len(store.original))
    replaced = {names[own] for own in rest}
    kept = [t for t in reader.tensors if not t.name.startswith("blk.") and t.name not in replaced]
    for t in kept:
        writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    every = rest | {f"{store.prefix}{i}.{name}": made for i in blocks for name, made in first.items()}  # blocks are alike
    for own, (array, kind) in every.items():
        writer.add_tensor_info(names[own], array.shape, array.dtype, array.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in kept:
        writer.write_tensor_data(t.data)
    for part in itertools.chain((rest,), map(source.block, blocks)):
        for array, _ in part.values():
            writer.write_tensor_data(array)
    writer.close()


def copy_metadata(reader, writer):
    """Copy all metadata of a GGUF file but what the writer says itself."""
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key in own:
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(entry.contents())
            continue
        value, kind = entry.contents(), entry.types[0]
        if kind != gguf.GGUFValueType.ARRAY or value:
            writer.add_key_value(key, value, kind, entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
