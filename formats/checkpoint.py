"""Packed checkpoints: the blocks of a quantized model, in memory or on disk, written as they are finished and read one at a time.

A folder of ours holds config.json, the tokenizer, a shard for each decoder block, one for the rest, and an index.  Of a quantized linear
with R rows, C columns and G groups of columns a shard has

    NAME.codes  (R, bytes) uint8   row after row; 4 bits: two codes a byte, the even column in the low nibble; 3 bits: eight codes in three
                                   bytes, the first in the lowest bits; other widths: one code a byte
    NAME.scale  (R, G) float32     weight = scale * (code - zero)
    NAME.zero   (R, G) uint8
    NAME.bias, NAME.in_scale       where the linear has them

and of everything else its tensor, under its name in the model.  The index says which shard a tensor is in, and its sha256.
"""

import math
import os
import shutil
from copy import copy, deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GenerationConfig

from formats.card import Reader, size_line, tensor_bytes, write_card
from formats.codes import PARTS, packed_linear, packed_shapes, unpacked_linear, without_codes
from formats.names import tied_names
from formats.original import assign
from formats.shards import REMEDY, data_bytes, new_folder, read_index, read_json, read_shard, write_shard
from modelutils import Decoder, load_config, run_dtype, save_tokenizer, skeleton
from processes import ALONE
from quant import from_int, replace_linears, use_integers
from recipe import METHODS, Recipe, UsageError
from runtime import commit, versions, write_json
from smoothquant import fold_group

FORMAT = 1  # version of our folders; newer ones are refused
FILES = "awrq"  # what the names of our shards begin with; not "model", of which transformers would take what it knows and draw the rest
INDEX = f"{FILES}.safetensors.index.json"
GENERATION = "generation_config.json"
KIND = "transformers", ("awrq",)  # library and tags of its card


def readers(folder, script):
    """[formats.card.Reader] of a folder of ours."""
    return [
        Reader("AWRQ", f"python {script} --load {folder} --eval wikitext2", "in a checkout of the program that wrote it"),
        Reader("transformers", f'AutoModelForCausalLM.from_pretrained("{folder}")', "there too, after `import awrq_hf`"),
    ]


# ---------------------------------------------------------------------------
# What is packed


def computes_integers(recipe):
    """Whether the integer op supports the linears of this recipe."""
    return recipe.wbits <= 4 and recipe.act_bits <= 8


def check_packable(recipe):
    """Raises UsageError if there is nothing to pack."""
    if METHODS[recipe.method].weights is None:
        raise UsageError(f"--method {recipe.method} rounds no weights, so there is nothing to pack; choose one that does")


def stored(tensor, name, dtype, forced=False):
    """A tensor as it is stored: in `dtype` if that is narrower and changes no value, else as it is; forced: in `dtype`, rounded.

    The type of a scale takes part in the arithmetic and stays.  Raises FloatingPointError, naming the tensor, if it does not fit.
    """
    if not tensor.is_floating_point() or name.endswith("scale"):
        return tensor
    own = tensor.to(dtype)
    if not forced:
        return own if dtype.itemsize < tensor.dtype.itemsize and own.to(tensor.dtype).equal(tensor) else tensor
    if not own.isfinite().all():
        raise FloatingPointError(f"--rest_dtype {str(dtype).removeprefix('torch.')}: {name} has values beyond it; give another type")
    return own


# ---------------------------------------------------------------------------
# What is in a folder beside the blocks


def shard_name(i, blocks, files=FILES):
    """The file of block i; that of all other tensors, if i is the number of blocks."""
    return f"{files}-{i + 1:05}-of-{blocks + 1:05}.safetensors"


def rest_of(decoder, source):
    """The tensors outside the blocks, {name: tensor}, each once."""
    prefix = f"{decoder.family.blocks}."
    names = [name for name in decoder.skeleton.state_dict() if not name.startswith(prefix) and name not in source.tied]
    return {name: stored(t, name, decoder.stored_dtype) for name, t in source.rest(names).items()}


def write_index(folder, files, sums):
    """Write the index of a folder.  sums: {file: {name: sha256}}."""
    index = {
        "metadata": {"total_size": sum(data_bytes(folder / file) for file in sums)},
        "weight_map": {name: file for file, names in sums.items() for name in names},
        "sha256": {name: found for names in sums.values() for name, found in names.items()},
    }
    write_json(folder / f"{files}.safetensors.index.json", index)


def write_about(folder, decoder, tokenizer, quantization_config):
    """Write tokenizer and configurations.  Raises UsageError if they cannot be written."""
    config = deepcopy(decoder.config)
    config.dtype, config.quantization_config = decoder.stored_dtype, quantization_config
    try:
        if tokenizer is not None:  # a whole model knows of none
            save_tokenizer(tokenizer, folder)
        config.save_pretrained(folder)
        decoder.skeleton.generation_config.to_json_file(folder / GENERATION)  # as it is: save_pretrained refuses some of the hub's
    except Exception as e:  # transformers raises whatever its backends do
        raise UsageError(f"{folder}: the tokenizer or a configuration cannot be written ({e})") from e


def link_or_copy(source, target):
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# ---------------------------------------------------------------------------
# The store


def frozen(linear, packed, in_scale, recipe):
    """A QuantLinear with the dequantized weight, as it computes, and with what it was made of.

    packed: {part: tensor}, as they are stored; in_scale: (C,) or None.
    """
    linear.in_scale, linear.stored = in_scale, packed
    linear.freeze(recipe.acts)
    return linear


class Store:
    """The blocks of a quantized model as they are stored: the source of a Decoder (see modelutils.Original).

    For a method that rounds weights it holds codes, grids and all other tensors of a block; for other methods the smoothing scales, which
    are applied again to the original block.  Tensors outside the blocks are the original's, or those of a published folder.
    """

    def __init__(self, original, recipe, folder=None, world=ALONE, writes=None):
        """original: the unquantized Decoder.  folder: where the blocks are kept; None: in memory.

        world: the processes.World that works on it.  writes: whether this process writes into the folder, which others read as well
        (None: the first does).
        """
        self.original, self.recipe, self.folder = original, recipe, folder and Path(folder)
        self.world, self.writes = world, world.first if writes is None else writes
        self.temporary = None  # a tempfile.TemporaryDirectory that is the folder
        self.prefix, self.packs = f"{original.family.blocks}.", METHODS[recipe.method].weights is not None
        self.blocks = {}  # of each finished block {name: tensor} in memory, {name: sha256} in a folder
        self.layers = {}  # of each what is told of it, for JSON
        self.tuned = {}  # {name in the model: tensor} that takes the place of what was put: see run/tune.py
        self.checked = set()  # blocks whose checksums were right when they were first read
        self.about = {}  # of a published one: see finish
        self.kernel = None  # of kernels.w4a8_linear, for linears that compute in integers; None: they compute on dequantized numbers

    @property
    def finished(self):
        """The number of finished blocks, counted from the first."""
        return len(self.blocks)

    @property
    def tied(self):
        return self.original.source.tied

    def as_stored(self, tensor, name):
        """A tensor that is not quantized, as it is stored."""
        return stored(tensor, name, self.original.stored_dtype, forced=self.packs and self.recipe.rest_dtype != "auto")

    # ---- Writing ----

    def put(self, i, made, layers, streams):
        """Keep block i, which is finished.  made: a run.quantize.Made; layers: a list for JSON; streams: Sequences after it, which
        only a ResumableStore keeps.
        """
        if self.folder is None:
            self.blocks[i] = self._tensors(made)
        else:
            sums = None
            if self.writes:
                sums = write_shard(self.shard(i), {f"{self.prefix}{i}.{name}": t for name, t in self._tensors(made).items()})
            before = self.world.gather(sums)[: self.world.rank + 1]  # now every writer has written
            sums = next(part for part in reversed(before) if part is not None)  # of the one that writes for this process
            self.blocks[i] = {name.removeprefix(f"{self.prefix}{i}."): found for name, found in sums.items()}
        self.layers[i] = layers

    def _tensors(self, made):
        """What is stored of a finished block: {name: tensor}, in host memory."""
        block, codes = made.block, made.codes
        if self.packs:
            tensors = {name: t for name, t in block.state_dict().items() if name.removesuffix(".weight") not in codes}
            for name, (q, grid) in codes.items():
                tensors |= packed_linear(name, q, grid, self.recipe.wbits)
        else:
            tensors = {f"{name}.smooth_scale": s for name, s in made.scales.items()}
        # A copy of each, as linears that read one input share their in_scale, and nothing of the block must stay alive.
        return {name: self.as_stored(t.cpu(), name).clone() for name, t in tensors.items()}

    def agree(self):
        """Go on with the folder and the finished blocks that the first process has."""
        self.folder, self.blocks, self.layers = self.world.share((self.folder, self.blocks, self.layers))

    def keep_tuning(self, state):
        """Save the state of tuning, {name: tensor}; only a ResumableStore does."""

    def tuning(self):
        """The state that keep_tuning saved last, or {}."""
        return {}

    def shard(self, i):
        """The file of block i."""
        return self.folder / shard_name(i, len(self.original))

    # ---- Reading: the source of a Decoder ----

    def read(self, i):
        prefix = f"{self.prefix}{i}."
        if self.folder is None:
            tensors = dict(self.blocks[i])
        else:
            sums = {f"{prefix}{name}": found for name, found in self.blocks[i].items()}
            found = read_shard(self.shard(i), sums, check=i not in self.checked)
            self.checked.add(i)
            tensors = {name.removeprefix(prefix): t for name, t in found.items()}
        tuned = {name: t for name, t in self.tuned.items() if name.startswith(prefix)}
        tensors |= {name.removeprefix(prefix): self.as_stored(t, name) for name, t in tuned.items()}
        return tensors if self.packs else self.original.source.read(i) | tensors

    def build(self, block, tensors, batch):
        return (self._unpacked if self.packs else self._smoothed)(block, dict(tensors), batch)

    def _unpacked(self, block, tensors, batch):
        """Restore a block from its codes.  Raises UsageError, naming a tensor, if they do not fit."""
        recipe = self.recipe
        linears = replace_linears(block, self.original.linears, batch)
        codes = {name: unpacked_linear(tensors, name, linear.weight.shape, recipe) for name, linear in linears.items()}
        in_scales = {name: tensors.pop(f"{name}.in_scale", None) for name in linears}
        assign(block, without_codes(tensors, linears) | {f"{name}.weight": from_int(*pair) for name, pair in codes.items()})
        for name, linear in linears.items():
            frozen(linear, {part: tensors[f"{name}.{part}"] for part in PARTS}, in_scales[name], recipe)
        if self.kernel and computes_integers(recipe):
            use_integers(block, self.original.family, self.original.config, codes, self.kernel)
        return block

    def _smoothed(self, block, tensors, batch):
        """Smooth the original block again, and quantize its activations."""
        tensors = {name: t.clone() for name, t in tensors.items()}  # folding changes them
        scales = {name: tensors.pop(f"{name}.smooth_scale", None) for name in self.original.linears}
        assign(block, tensors)
        linears = replace_linears(block, self.original.linears, batch)
        for group in self.original.family.groups:
            if (s := scales[group.linears[0]]) is not None:
                fold_group(block, group, linears, self.original.config, s)
        for linear in linears.values():
            linear.freeze(self.recipe.acts)
        return block

    def rest(self, names):
        found = self.original.source.rest(names) | {name: self.tuned[name] for name in self.tuned.keys() & set(names)}
        return {name: self.as_stored(t, name) for name, t in found.items()}

    def codes(self, i):
        """{name: (codes (R, C) uint8, Grid)} of block i."""
        tensors, empty = self.read(i), self.original.empty_block(i)
        return {name: unpacked_linear(tensors, name, empty.get_submodule(name).weight.shape, self.recipe) for name in self.original.linears}

    @property
    def arithmetic(self):
        """A description of how the quantized linears are computed."""
        integers = self.kernel and computes_integers(self.recipe)
        how = f"integers ({self.kernel} kernel)" if integers else "floating point, on dequantized numbers"
        return f"{len(self.original) * len(self.original.linears)} linears in {how}"

    def decoder(self):
        """The quantized Decoder."""
        return Decoder(self.original.skeleton, self, self.original.stored_dtype)

    def dequantized(self):
        """The same blocks, whose linears compute on dequantized numbers."""
        other = copy(self)
        other.kernel = None
        return other

    # ---- Publishing ----

    def save(self, folder, tokenizer, about=None):
        """Write a folder for open_checkpoint.  It appears under its name when it is complete.  about: see finish."""
        with new_folder(folder) as partial:
            self.finish(partial, tokenizer, about)

    def finish(self, folder, tokenizer, about=None):
        """Complete a folder that may already contain the blocks.

        about: {"model", "calibration", "commit"}, for its config.json; "commit": of the code when its work began (default: now).
        """
        blocks, sums = len(self.original), {}
        for i in range(blocks):
            names = {name: f"{self.prefix}{i}.{name}" for name in self.blocks[i]}
            file = shard_name(i, blocks)
            if self.folder is None or self.tuned:
                sums[file] = write_shard(folder / file, {names[name]: t for name, t in self.read(i).items()})
                if self.folder == folder:
                    self.blocks[i] = {name: sums[file][names[name]] for name in names}
            else:
                sums[file] = {names[name]: found for name, found in self.blocks[i].items()}
                if self.folder != folder:
                    link_or_copy(self.folder / file, folder / file)
        file = shard_name(blocks, blocks)
        sums[file] = write_shard(folder / file, rest_of(self.original, self))
        write_index(folder, FILES, sums)
        entry = {"quant_method": "awrq", "format": FORMAT, "recipe": asdict(self.recipe), "versions": versions(), "commit": commit()}
        write_about(folder, self.original, tokenizer, entry | (about or {}))
        size = size_line(tensor_bytes(folder), self.original.family)
        write_card(folder, about or {}, self.recipe, KIND, readers("FOLDER", self.original.family.script), size)

    def size(self):
        """One line: the size of the quantized linears, with all their tensors, against FP16."""
        packed = fp16 = 0
        for i in range(self.finished):
            tensors = self.read(i)
            for name in self.original.linears:
                packed += sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
                linear = self.original.skeleton.get_submodule(f"{self.prefix}{i}.{name}")
                fp16 += 2 * sum(p.numel() for p in linear.parameters())
        return f"the quantized linears take {packed / 2**20:.2f} MiB, {packed / fp16:.3f} of the {fp16 / 2**20:.2f} MiB in FP16"


# ---------------------------------------------------------------------------
# Published folders


class Published(Store):
    """The store of a folder that --save wrote."""

    def __init__(self, original, recipe, folder):
        """original: a Decoder of the skeleton alone.  Raises UsageError for an index that is not of this model."""
        super().__init__(original, recipe, folder)
        index = read_index(self.folder / INDEX, ("weight_map", "sha256"))
        shards = {file: {} for file in sorted(set(index["weight_map"].values()))}
        for name, file in index["weight_map"].items():
            shards[file][name] = index["sha256"][name]
        blocks = len(original)
        if len(shards) != blocks + 1:
            raise UsageError(f"{folder}: has {len(shards) - 1} blocks, its config.json {blocks}; that is of another model")
        for file in shards:
            if not (self.folder / file).is_file():
                raise UsageError(f"{self.folder / file}: missing, so that the tensor {next(iter(shards[file]))} cannot be read; {REMEDY}")
        *shards, self.others = shards.values()
        self.blocks = {i: {name.removeprefix(f"{self.prefix}{i}."): found for name, found in sums.items()} for i, sums in enumerate(shards)}

    @property
    def tied(self):
        return tied_names(self.original.skeleton, self.others)

    def rest(self, names):
        for name in sorted(set(names) - self.others.keys()):
            raise UsageError(f"{name}: only the model has it; config.json is of another model")
        return read_shard(self.folder / shard_name(len(self.original), len(self.original)), {name: self.others[name] for name in names})


def load_packed_config(folder, script=None):
    """(configuration of the model, our quantization_config with a Recipe under "recipe") of a folder that --save wrote.

    Raises UsageError if there is none, if it is not one that this version takes, or another script's (None: any).
    """
    if not Path(folder, "config.json").is_file():
        raise UsageError(f"--load {folder}: no checkpoint there: there is no config.json")
    config = load_config(folder, script)
    about = getattr(config, "quantization_config", {})
    if about.get("quant_method") != "awrq":
        method = about.get("quant_method", "nothing of a quantization")
        raise UsageError(f"--load {folder}: was not written by --save; its config.json says {method}")
    if about.get("format") not in range(1, FORMAT + 1):
        raise UsageError(f"--load {folder}: has format {about.get('format')}, this version reads up to {FORMAT}; update the code")
    try:
        recipe = Recipe(**about["recipe"])
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"--load {folder}: its config.json is damaged, or of another version of the code ({e})") from e
    del config.quantization_config
    return config, about | {"recipe": recipe}


def origin(about):
    """What a quantization_config of ours says of where the model comes from: {"model", "calibration"}, as far as it does."""
    return {key: about[key] for key in ("model", "calibration") if key in about}


def open_checkpoint(folder, dtype="auto", device="cpu", kernel=None, arithmetic="auto"):
    """The quantized Decoder of a folder that --save wrote, whose blocks are read when they are visited.

    dtype, device: as of open_decoder.  arithmetic: "dequantized", or "integers" (which "auto" means here): linears that the integer op
    takes call it, with `kernel` as in kernels.w4a8_linear (None: "cuda" on a GPU, else "torch"); others are dequantized.  Raises UsageError
    for what is missing, damaged, or does not fit config.json.
    """
    config, about = load_packed_config(folder)
    device = torch.device(device)
    empty = skeleton(config, run_dtype(config, dtype, device))
    empty.generation_config = GenerationConfig.from_dict(read_json(Path(folder, GENERATION), ()))
    store = Published(Decoder(empty, None, config.dtype), about["recipe"], folder)
    store.about = origin(about)
    if arithmetic != "dequantized":
        store.kernel = kernel or ("cuda" if device.type == "cuda" else "torch")
    return store.decoder()


def check_saved(folder):
    """Read back what --save wrote: index, headers, first and last block, and all tensors outside.  Raises UsageError."""
    decoder = open_checkpoint(folder, "float32")
    for i in {0, len(decoder) - 1}:
        decoder.block(i)
    own = (name for name in decoder.skeleton.state_dict() if not name.startswith(decoder.source.prefix))
    decoder.source.rest({decoder.source.tied.get(name, name) for name in own})


def packed_bytes(decoder, recipe):
    """Estimated bytes of a Decoder saved with a recipe."""
    linears, size = tuple(f".{name}.weight" for name in decoder.linears), 0
    for name, tensor in decoder.skeleton.state_dict().items():
        rounded = recipe.wbits < 16 and name.endswith(linears)
        parts = packed_shapes(tensor.shape, recipe).values() if rounded else [(tensor.shape, decoder.stored_dtype)]
        size += sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
    return size
