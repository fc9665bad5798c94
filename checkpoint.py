"""Packed checkpoints: a quantized model on disk, written and resumed block by block, loaded again, exported.

A folder of ours holds config.json, the tokenizer, a shard for each decoder block, one for the rest, and an index.  Of a quantized linear
with R rows, C columns and G groups of columns a shard has

    NAME.codes  (R, bytes) uint8   row after row; 4 bits: two codes a byte, the even column in the low nibble; 3 bits: eight codes in three
                                   bytes, the first in the lowest bits; other widths: one code a byte
    NAME.scale  (R, G) float32     weight = scale * (code - zero)
    NAME.zero   (R, G) uint8
    NAME.bias, NAME.in_scale       where the linear has them

and of everything else its tensor, under its name in the model.  The index says which shard a tensor is in, and its sha256.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

import kernels
import modelutils
from evalutils import commit, versions, write_json
from modelutils import (
    FAMILIES,
    METHODS,
    Layer,
    decoder_blocks,
    default_walk_batch,
    load_config,
    load_model,
    load_tokenizer,
    replace_linears,
    run_dtype,
)
from quant import Batch, Grid, IntLinear, Recipe, from_int

FORMAT = 1  # of our folders; a newer one is refused
PACKED = (3, 4)  # widths whose codes share bytes
GENERATION = "generation_config.json"

# ---------------------------------------------------------------------------
# Codes


def pack(q, bits):
    """Codes (R, C) uint8 as they lie on disk: (R, ceil(C * bits / 8)) uint8 for 3 and 4 bits, as they are for others."""
    if bits not in PACKED:
        return q
    C = q.shape[1]
    words = F.pad(q, (0, -C % 8)).unflatten(1, (-1, 8)).int() << bits * torch.arange(8, dtype=torch.int32)  # eight codes make one word
    return words.sum(2, dtype=torch.int32).unsqueeze(2).view(torch.uint8)[..., :bits].flatten(1)[:, : -(-C * bits // 8)].contiguous()


def unpack(packed, bits, C):
    """The codes (R, C) uint8 that `pack` was given."""
    if bits not in PACKED:
        return packed
    packed = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    words = F.pad(packed, (0, 4 - bits)).view(torch.int32)
    return (words >> bits * torch.arange(8, dtype=torch.int32) & 2**bits - 1).to(torch.uint8).flatten(1)[:, :C].contiguous()


# ---------------------------------------------------------------------------
# Shards


def sha256(tensor):
    """Of a tensor's type, shape and bytes: hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_shard(path, tensors):
    """Write {name: tensor} to a safetensors file, whole or not at all: {name: sha256}.  Raises OSError, for example if the disk is full."""
    partial = Path(f"{path}.partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with open(partial, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        save_file(tensors, partial, metadata={"format": "pt"})
        with open(partial, "rb") as f:
            os.fchmod(f.fileno(), mode)  # save_file lets nobody else read it
            os.fsync(f.fileno())  # a crash must not leave the name without the bytes
        os.replace(partial, path)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({e})") from e
    return {name: sha256(tensor) for name, tensor in tensors.items()}


def read_shard(path, sums):
    """The tensors of a shard that `sums`, {name: sha256}, lists.  Raises OSError, naming a tensor, unless each is there and unchanged."""
    remedy = "take the file from a copy, or make it anew"
    tensors = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in sums:
                if name not in f.keys():  # noqa: SIM118  not a dict
                    raise OSError(f"{path}: the tensor {name} is missing; {remedy}")
                tensors[name] = f.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as e:
        raise OSError(f"{path}: missing or damaged, so that the tensor {next(iter(sums))} cannot be read ({e}); {remedy}") from e
    for name, tensor in tensors.items():
        if sha256(tensor) != sums[name]:
            raise OSError(f"{path}: the tensor {name} is damaged, its sha256 is not the one written down; {remedy}")
    return tensors


def read_json(path, keys):
    """An object that has these keys.  Raises OSError if it is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text())
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OSError(f"{path}: missing or damaged ({type(e).__name__}: {e}); take it from a copy, or make the folder anew") from e


def claim(owner, folder, name):
    """Keep a folder for an object as long as it lives; a process that is killed lets go of it.  Raises OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    owner.let_go = weakref.finalize(owner, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        owner.let_go()
        raise OSError(f"{name}: another run is writing there now; wait for its end, or give another folder") from e
    except OSError:
        pass  # a file system without locks


def sweep(folder, pattern):
    """Remove what a killed run has left half-written."""
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------
# Blocks


def blocks_prefix(model):
    """What the names of the tensors of all blocks begin with."""
    return f"{FAMILIES[model.config.model_type].blocks}."


def other_tensors(block, codes):
    """What a finished block is besides codes and grids: {name in the block: tensor}, its norms as they are after folding."""
    tensors = {name: t for name, t in block.state_dict().items() if name.removesuffix(".weight") not in codes}
    return {name: t.clone() if name.endswith(".in_scale") else t for name, t in tensors.items()}  # linears that read one input share it


def packed_linear(q, grid, recipe):
    """Codes (R, C) and grid of a linear as they lie on disk: {suffix: tensor}."""
    return {"codes": pack(q.cpu(), recipe.wbits), "scale": grid.scale, "zero": grid.zero.to(torch.uint8)}  # whole numbers, 0 to 2^bits - 1


def unpacked_linear(tensors, name, shape, recipe):
    """Take a linear of shape (R, C) out of {name: tensor}: its codes (R, C) and Grid.  Raises ValueError if that is not what is there."""
    R, C = shape
    G = 1 if recipe.groupsize == -1 else -(-C // recipe.groupsize)
    found = []
    for suffix, expected in (
        ("codes", (R, -(-C * recipe.wbits // 8) if recipe.wbits in PACKED else C)),
        ("scale", (R, G)),
        ("zero", (R, G)),
    ):
        found.append(tensors.pop(f"{name}.{suffix}", torch.empty(0)))
        if found[-1].shape != expected:
            raise ValueError(f"{name}.{suffix}: {tuple(found[-1].shape)}, should be {expected}; config.json is of another model")
    packed, scale, zero = found
    return unpack(packed, recipe.wbits, C), Grid(scale, zero.float(), recipe.wbits, recipe.groupsize)


def assign(module, tensors, elsewhere=()):
    """Give a module, which may be on the meta device, its tensors, {name: tensor}, in its own types.

    elsewhere: what names begin with that it gets from somewhere else.  Raises ValueError, naming a tensor, if they do not fit.
    """
    own = {name: t for name, t in module.state_dict().items() if not name.startswith(tuple(elsewhere))}
    for name in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{name}: only the {'model' if name in own else 'checkpoint'} has it; config.json is of another model")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)}, should be {tuple(own[name].shape)}; config.json is of another model")
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()}, assign=True, strict=False)


def restore_block(block, tensors, groups, batch, recipe):
    """Make a decoder block what that was which `tensors`, {name in the block: tensor}, were written from: {name: (codes, Grid)}.

    Raises ValueError, naming a tensor, if they do not fit.
    """
    linears, codes = replace_linears(block, groups, batch), {}
    in_scales = {name: tensors.pop(f"{name}.in_scale", None) for name in linears}
    for name, linear in linears.items():
        codes[name] = unpacked_linear(tensors, name, linear.weight.shape, recipe)
        tensors[f"{name}.weight"] = from_int(*codes[name])
    assign(block, tensors)
    for name, linear in linears.items():
        linear.in_scale = in_scales[name]
        linear.settle(recipe.act_bits, recipe.act_pertoken)
    return codes


# ---------------------------------------------------------------------------
# Layouts of a folder


def check_packable(recipe, config):
    """Raises ValueError if there is nothing to pack."""
    if METHODS[recipe.method].weights is None:
        raise ValueError(f"--method {recipe.method} rounds no weights, so there is nothing to pack; choose one that does")


def packed_config(model, recipe):
    return {"quant_method": "awrq", "format": FORMAT, "recipe": asdict(recipe), "versions": versions(), "commit": commit()}


def check_compressed_tensors(recipe, config):
    """Raises ValueError for what compressed-tensors cannot say."""
    check_packable(recipe, config)
    family = FAMILIES[config.model_type]
    block = decoder_blocks(empty_model(config))[0]
    ragged, divided, tokens = [], [], recipe.act_bits < 16 and recipe.act_pertoken and family.flat
    for group in family.groups:
        ragged += [name for name in group.linears if recipe.groupsize != -1 and block.get_submodule(name).in_features % recipe.groupsize]
        divided += [name for name in group.linears if recipe.smooth and not group.exact(config)]
    for wrong, lack in (
        (ragged, f"shorter last group, which --groupsize {recipe.groupsize} leaves in {', '.join(ragged)}; give another"),
        (divided, f"input that is divided at run time, as smoothing needs it for {', '.join(divided)}; give --no-smooth"),
        (tokens, f"scale per token for {', '.join(family.flat)} here; leave out --act_pertoken"),
    ):
        if wrong:
            raise ValueError(f"--export compressed-tensors: the format has no {lack}")


def compressed_tensors_linear(q, grid, recipe):
    """As the format packs: in words of 32 bits, the first code in the lowest; it counts codes and zeros from -half, and packs from 0."""
    from compressed_tensors.compressors import pack_to_int32  # here, as its import takes a second and only an export needs it

    half = 2 ** (recipe.wbits - 1)
    q, zero = ((t.cpu().int() - half).to(torch.int8) for t in (q, grid.zero))
    tensors = {"weight_packed": pack_to_int32(q, recipe.wbits), "weight_scale": grid.scale, "weight_shape": torch.tensor(q.shape)}
    return tensors if recipe.sym else tensors | {"weight_zero_point": pack_to_int32(zero, recipe.wbits, packed_dim=0)}


def compressed_tensors_config(model, recipe):
    quantized = tuple(f".{name}" for group in FAMILIES[model.config.model_type].groups for name in group.linears)
    weights = {"num_bits": recipe.wbits, "type": "int", "symmetric": recipe.sym}
    weights |= {"strategy": "channel"} if recipe.groupsize == -1 else {"strategy": "group", "group_size": recipe.groupsize}
    acts = {"num_bits": recipe.act_bits, "type": "int", "symmetric": False, "dynamic": True}
    acts |= {"strategy": "token" if recipe.act_pertoken else "tensor"}
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": acts if recipe.act_bits < 16 else None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.endswith(quantized)],
    }


@dataclass(frozen=True)
class Layout:
    """How a folder is laid out."""

    files: str  # what the names of its shards begin with
    check: Callable  # (recipe, config of the model): raises ValueError for what it cannot say
    linear: Callable  # (codes, Grid, recipe) -> {suffix: tensor}
    config: Callable  # (model, recipe) -> its quantization_config


LAYOUTS = {
    # Not "model", so that transformers by itself finds no weights there, instead of taking what it knows and drawing the rest at random.
    "awrq": Layout("awrq", check_packable, packed_linear, packed_config),
    "compressed-tensors": Layout("model", check_compressed_tensors, compressed_tensors_linear, compressed_tensors_config),
}
EXPORTS = tuple(LAYOUTS.keys() - {"awrq"})

# ---------------------------------------------------------------------------
# Saving


class Writer:
    """A folder that appears under its name when all of it has been written, and not at all if something fails.

    with Writer(folder, model, tokenizer, recipe) as writer:
        for layers, codes in quantize_blocks(model, ids, recipe):
            writer.add(layers[0].block, codes)
    print(writer.size())
    """

    def __init__(self, folder, model, tokenizer, recipe, layout="awrq", about=None, dtype=None):
        """layout: of LAYOUTS.  about: further entries of the quantization_config.  dtype: what config.json says (default: the model's).

        A tensor that is not quantized is stored in `dtype` if that changes no value, and as it is otherwise.
        """
        self.folder = Path(folder)
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")
        self.model, self.tokenizer, self.recipe, self.layout = model, tokenizer, recipe, LAYOUTS[layout]
        self.about, self.dtype = about or {}, dtype or model.dtype
        self.layout.check(recipe, model.config)
        self.index = {"metadata": {"total_size": 0}, "weight_map": {}, "sha256": {}}
        self.packed = self.fp16 = 0  # bytes of the quantized linears

    def __enter__(self):
        self.partial.mkdir(parents=True, exist_ok=True)
        claim(self, self.partial, self.folder)
        sweep(self.partial, "*")
        try:
            self.tokenizer.save_pretrained(self.partial)
            config = deepcopy(self.model.config)
            config.dtype = self.dtype
            config.quantization_config = self.layout.config(self.model, self.recipe) | self.about
            config.save_pretrained(self.partial)
            self.model.generation_config.to_json_file(self.partial / GENERATION)  # as it is: save_pretrained refuses some of the hub's
        except Exception as e:  # transformers raises whatever its backends do
            self.abandon()
            raise OSError(f"{self.folder}: the tokenizer or a configuration cannot be written ({e})") from e
        return self

    def add(self, i, codes):
        """Write block i, {name: (codes (R, C), Grid)} of its linears and everything else as it is now."""
        tensors = other_tensors(decoder_blocks(self.model)[i], codes)
        for name, (q, grid) in codes.items():
            tensors |= {f"{name}.{suffix}": t for suffix, t in self.layout.linear(q, grid, self.recipe).items()}
            self.packed += sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
            self.fp16 += 2 * (q.numel() + len(q) * (f"{name}.bias" in tensors))
        self.write(i, {f"{blocks_prefix(self.model)}{i}.{name}": t for name, t in tensors.items()})

    def write(self, i, tensors):
        tensors = {name: self.own_type(name, t) for name, t in tensors.items()}
        file = f"{self.layout.files}-{i + 1:05}-of-{len(decoder_blocks(self.model)) + 1:05}.safetensors"
        self.index["sha256"] |= write_shard(self.partial / file, tensors)
        self.index["weight_map"] |= dict.fromkeys(tensors, file)
        self.index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())

    def own_type(self, name, tensor):
        if not tensor.is_floating_point() or name.endswith("scale"):  # the type of a scale takes part in the arithmetic
            return tensor
        own = tensor.to(self.dtype)
        return own if own.to(tensor.dtype).equal(tensor) else tensor

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            return self.abandon()
        try:
            self.finish()
            os.rename(self.partial, self.folder)
        except BaseException:
            self.abandon()
            raise
        return self.let_go()

    def abandon(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        self.let_go()

    def finish(self):
        elsewhere = (blocks_prefix(self.model), *self.model.all_tied_weights_keys)
        rest = {name: t for name, t in self.model.state_dict().items() if not name.startswith(elsewhere)}
        self.write(len(decoder_blocks(self.model)), rest)
        write_json(self.partial / f"{self.layout.files}.safetensors.index.json", self.index)

    def size(self):
        """A line about the quantized linears, all their tensors, against FP16."""
        return (
            f"{self.folder}: the quantized linears take {self.packed / 2**20:.2f} MiB,"
            f" {self.packed / self.fp16:.3f} of the {self.fp16 / 2**20:.2f} MiB in FP16"
        )


def export(source, folder, layout="compressed-tensors"):
    """Write a checkpoint of ours once more, in another layout: the Writer."""
    config, about = load_packed_config(source)
    model = empty_model(config, torch.float32)  # so that nothing is rounded on the way
    model.generation_config = GenerationConfig.from_dict(read_json(Path(source, GENERATION), ()))
    with Writer(folder, model, load_tokenizer(source), about["recipe"], layout, dtype=config.dtype) as writer:
        for i, codes in restore(source, model, about["recipe"]):
            writer.add(i, codes)
            decoder_blocks(model)[i].to("meta")
    return writer


# ---------------------------------------------------------------------------
# Loading


def empty_model(config, dtype=None):
    """The model of a configuration without weights: they are on the meta device."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_packed_config(folder, script=None):
    """(configuration of the model, our quantization_config with a Recipe under "recipe") of a folder that a Writer wrote.

    Raises OSError if there is none, ValueError if it is not one that this version takes, or another script's (None: any).
    """
    if not Path(folder, "config.json").is_file():
        raise OSError(f"--load {folder}: no checkpoint there: there is no config.json")
    config = load_config(folder, script)
    about = getattr(config, "quantization_config", {})
    if about.get("quant_method") != "awrq":
        method = about.get("quant_method", "nothing of a quantization")
        raise ValueError(f"--load {folder}: was not written by --save; its config.json says {method}")
    if about.get("format") not in range(1, FORMAT + 1):
        raise ValueError(f"--load {folder}: has format {about.get('format')}, this version reads up to {FORMAT}; update the code")
    try:
        recipe = Recipe(**about["recipe"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"--load {folder}: its config.json is damaged, or of another version of the code ({e})") from e
    del config.quantization_config
    return config, about | {"recipe": recipe}


def restore(folder, model, recipe):
    """Fill an empty model from a checkpoint of ours, the rest first: yields the number and {name: (codes, Grid)} of block after block.

    Raises OSError, naming a tensor, for what is missing or damaged, ValueError for what does not fit the model.
    """
    index = read_json(Path(folder, f"{LAYOUTS['awrq'].files}.safetensors.index.json"), ("weight_map", "sha256"))
    shards = {file: {} for file in sorted(set(index["weight_map"].values()))}
    for name, file in index["weight_map"].items():
        shards[file][name] = index["sha256"][name]
    blocks, prefix, batch = decoder_blocks(model), blocks_prefix(model), Batch()
    if len(shards) != len(blocks) + 1:
        raise ValueError(f"{folder}: has {len(shards) - 1} blocks, its config.json {len(blocks)}; that is of another model")
    *shards, (rest, sums) = shards.items()
    assign(model, read_shard(Path(folder, rest), sums), (prefix, *model.all_tied_weights_keys))
    model.tie_weights()
    for i, (file, sums) in enumerate(tqdm(shards, desc="loading", unit="block", leave=False)):
        tensors = {name.removeprefix(f"{prefix}{i}."): t for name, t in read_shard(Path(folder, file), sums).items()}
        yield i, restore_block(blocks[i], tensors, FAMILIES[model.config.model_type].groups, batch, recipe)


def computes_integers(recipe):
    """Whether the integer op takes its linears."""
    return recipe.wbits <= 4 and recipe.act_bits <= 8


@torch.no_grad()
def load(folder, dtype="auto", device="cpu", kernel=None):
    """The model of a checkpoint of ours in host memory and evaluation mode, ready to evaluate or to generate.

    dtype, device: as in load_model.  Linears that the integer op takes call it, with `kernel` as in kernels.w4a8_linear; others are
    dequantized.  Raises what load_packed_config and restore raise.
    """
    config, about = load_packed_config(folder)
    dtype = run_dtype(dtype, device)
    model = empty_model(config, config.dtype if dtype == "auto" else getattr(torch, dtype))
    for i, codes in restore(folder, model, about["recipe"]):
        block = decoder_blocks(model)[i]
        for name, (q, grid) in codes.items() if computes_integers(about["recipe"]) else ():
            block.set_submodule(name, IntLinear(block.get_submodule(name), q, grid, kernel))
    model.generation_config = GenerationConfig.from_dict(read_json(Path(folder, GENERATION), ()))
    return model.eval()


# ---------------------------------------------------------------------------
# Resuming


def differences(there, here, path=""):
    """Where two nested dicts differ: "KEY is VALUE there, VALUE here" of each leaf."""
    for key in there | here:
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key} is {a!s:.24} there, {b!s:.24} here"


def some(items, n=3):
    """The first n of a list of texts, and how many more there are."""
    return "; ".join([*items[:n], *([f"{len(items) - n} more"] if len(items) > n else [])])


def describe_model(config):
    """What makes two configurations those of one model, as JSON has it."""
    about_files = ("dtype", "_name_or_path", "architectures", "transformers_version", "quantization_config")
    return json.loads(json.dumps({key: value for key, value in config.to_dict().items() if key not in about_files}))


def weights_sha256(model):
    """Of all weights and their names: hexadecimal."""
    digest = hashlib.sha256()
    for name, t in tqdm(model.state_dict().items(), desc="identifying the model", unit="tensor", leave=False):
        digest.update(f"{name} {sha256(t)}\n".encode())
    return digest.hexdigest()


class Store:
    """Finished blocks in a folder, from which a run that was killed goes on.  quantize_blocks asks it and fills it.

    run.json says which run it is: everything that the codes depend on.  Of block i there are block-i.safetensors, as in a checkpoint, and
    block-i.json with output errors and checksums, written last: without it the block is not finished.  inputs-i.safetensors is what enters
    block i, the first unfinished one.
    """

    def __init__(self, folder, model, ids, recipe, device="cpu", walk_batch=1):
        """As quantize_blocks will be called.  Raises ValueError, naming what differs, if the folder is of another run."""
        check_packable(recipe, model.config)
        self.folder, self.recipe, self.blocks = Path(folder), recipe, len(decoder_blocks(model))
        run = {
            "format": FORMAT,
            "recipe": asdict(recipe),
            "model": {"model_type": model.config.model_type} | describe_model(model.config) | {"weights": weights_sha256(model)},
            "calibration": sha256(ids),
            "dtype": str(model.dtype),
            "walk_batch": walk_batch,
            "device": torch.device(device).type,
            "torch": torch.__version__,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self, self.folder, f"--checkpoint_dir {folder}")
        path = self.folder / "run.json"
        if not path.exists():
            if any(not file.name.endswith(".partial") for file in self.folder.iterdir()):
                raise ValueError(f"--checkpoint_dir {folder}: has other files in it; give it a folder of its own")
            write_json(path, run)
        other = list(differences(read_json(path, ()), run))
        if other:
            raise ValueError(f"--checkpoint_dir {folder}: is of another run: {some(other)}; give another folder")
        sweep(self.folder, "*.partial")
        self.finished = next((i for i in range(self.blocks) if not self.path("block", i, "json").exists()), self.blocks)
        self.drop_inputs(self.finished)  # a run can be killed between its last write and this

    def path(self, kind, i, ending="safetensors"):
        return self.folder / f"{kind}-{i:05}.{ending}"

    def keep(self, i, block, layers, codes, x):
        """Block i is finished.  layers, codes: as quantize_blocks yields them; x: what enters the next block, a list of (B, T, D)."""
        entry = {"layers": [asdict(layer) for layer in layers]}
        if i + 1 < self.blocks:
            entry["inputs"] = write_shard(self.path("inputs", i + 1), {f"{k:05}": h for k, h in enumerate(x)})
        tensors = other_tensors(block, codes)
        for name, (q, grid) in codes.items():
            tensors |= {f"{name}.{suffix}": t for suffix, t in packed_linear(q, grid, self.recipe).items()}
        entry["tensors"] = write_shard(self.path("block", i), tensors)
        write_json(self.path("block", i, "json"), entry)
        self.drop_inputs(i + 1)

    def drop_inputs(self, needed):
        """Remove what entered other blocks than the one that is still needed."""
        for inputs in self.folder.glob("inputs-*.safetensors"):
            if inputs != self.path("inputs", needed):
                inputs.unlink()

    def restore(self, i, block, groups, batch, x):
        """Make block i what it was when it was finished, and after the last such one x what entered the next: layers, codes."""
        entry = read_json(self.path("block", i, "json"), ("layers", "tensors"))
        codes = restore_block(block, read_shard(self.path("block", i), entry["tensors"]), groups, batch, self.recipe)
        if i + 1 == self.finished < self.blocks:
            inputs = read_shard(self.path("inputs", i + 1), entry["inputs"]).values()
            x[:] = [h.to(old.device) for h, old in zip(inputs, x, strict=True)]
        return [Layer(**layer) for layer in entry["layers"]], codes


# ---------------------------------------------------------------------------
# Steps of the scripts


def prepare(args, script):
    """modelutils.prepare, or with --load the same of that folder: configuration, recipe, tokenizer; and what it was calibrated on.

    The last is None for a model that is still to be quantized.  Raises ValueError for flags that do not go together.
    """
    for flag, needs, there in (
        ("check", "--benchmark", args.benchmark),
        ("kernel", "--load", args.load),
        ("benchmark", "--eval, whose first corpus it decodes", args.eval),
        ("benchmark_prefill", "--eval, whose first corpus it reads", args.eval),
    ):
        if flag in args.changed and not there:
            raise ValueError(f"--{flag} needs {needs}")
    if args.export and args.export[0] not in EXPORTS:
        raise ValueError(f"--export {args.export[0]}: no such format; choose from {', '.join(EXPORTS)}")
    config, recipe, tokenizer, calibration = prepare_packed(args, script) if args.load else (*modelutils.prepare(args, script), None)
    for flag, tokens, least in (("benchmark", args.benchmark, 2), ("benchmark_prefill", args.benchmark_prefill, 1)):
        if tokens and not least <= tokens <= config.max_position_embeddings:
            raise ValueError(f"--{flag} {tokens}: must be {least} to {config.max_position_embeddings} tokens, the model's context")
    for flag, folder, layout in targets(args):
        check_target(flag, folder)
        LAYOUTS[layout].check(recipe, config)
    if args.checkpoint_dir:
        check_packable(recipe, config)
    return config, recipe, tokenizer, calibration


def prepare_packed(args, script):
    fixed = {f.name for f in fields(Recipe)} - {"seqlen"} | {"preset", "act_quant", "save", "checkpoint_dir"}
    for flag in args.changed:
        if flag in fixed:
            flag = flag.replace("true_", "true-")
            raise ValueError(f"--{flag} does not go with --load, which takes a model as it was quantized; leave it out")
    config, about = load_packed_config(args.load, script)
    if args.model:
        other = list(differences(describe_model(config), describe_model(load_config(args.model, script))))
        if other:
            raise ValueError(f"--load {args.load}: is not a checkpoint of {args.model}: {some(other)}")
    args.model = args.model or about.get("model", args.load)
    if args.compare_full and not is_original(args.model, script):
        raise ValueError(f"--compare_full: {args.model} is not the unquantized model; with --load give that as MODEL")
    recipe = replace(about["recipe"], seqlen=args.seqlen or about["recipe"].seqlen)
    if recipe.seqlen > config.max_position_embeddings:
        raise ValueError(f"--seqlen {recipe.seqlen}: the model's context is {config.max_position_embeddings} tokens")
    args.walk_batch = args.walk_batch or default_walk_batch(config, recipe.seqlen, args.device)
    return config, recipe, load_tokenizer(args.load), about.get("calibration", {})


def is_original(name, script):
    """Whether a model is there that is not quantized."""
    try:
        return not getattr(load_config(name, script), "quantization_config", None)
    except OSError:
        return False


def targets(args):
    """The folders that a command line asks to write: [(flag, folder, layout)]."""
    export, folder = args.export or (None, None)
    return [target for target in (("--save", args.save, "awrq"), ("--export", folder, export)) if target[1] is not None]


def check_target(flag, folder):
    """Raises OSError unless a folder can be made under this name."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{flag} {folder}: is there already; give another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as e:
        raise OSError(f"{flag} {folder}: cannot write into {folder.parent} ({e.strerror}); give another folder") from e


def open_model(args, recipe):
    """The model of a command line, still to be quantized; with --load ready to run, and written anew if --export says so."""
    if not args.load:
        return load_model(args.model, args.dtype, args.device)
    kernel = None
    if computes_integers(recipe):
        kernel, line = kernels.select(args.kernel, args.device)
        print(line)
    if args.export:
        print(export(args.load, args.export[1], args.export[0]).size())
    return load(args.load, args.dtype, args.device, kernel)


def open_full(args, model):
    """The unquantized model of a command line: the one that is still to be quantized, or with --load the original."""
    return load_model(args.model, args.dtype, args.device) if args.load else model


def quantize(args, model, tokenizer, ids, recipe, calibration, clock):
    """modelutils.quantize, which goes on from --checkpoint_dir and writes what --save and --export ask for: [Layer]; none with --load."""
    if args.load:
        return []
    store = Store(args.checkpoint_dir, model, ids, recipe, args.device, args.walk_batch) if args.checkpoint_dir else None
    about = {"model": args.model, "calibration": calibration}
    dtype = load_config(args.model).dtype if args.dtype == "auto" else None
    writers = [Writer(folder, model, tokenizer, recipe, layout, about, dtype) for _, folder, layout in targets(args)]
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        layers = modelutils.quantize(model, ids, recipe, args.device, args.walk_batch, clock, store, writers)
    for writer in writers:
        print(writer.size())
    return layers
