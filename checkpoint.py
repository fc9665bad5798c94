"""Packed checkpoints: a quantized model on disk, written and resumed block by block, loaded again, exported.

A folder of ours holds config.json, the tokenizer, one shard a decoder block and one for the rest.  Of a quantized linear of R rows, C columns
and G groups of columns a shard has

    NAME.codes  (R, bytes) uint8   row after row; 4 bits: two codes a byte, the even column in the low nibble; 3 bits: eight codes in three
                                   bytes, the first in the lowest bits; other widths: one code a byte
    NAME.scale  (R, G) float32     weight = scale * (code - zero)
    NAME.zero   (R, G) uint8
    NAME.bias, NAME.in_scale       where the linear has them

and of everything else its tensor, under its name in the model.  The index says which shard has a tensor, and its sha256.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from evalutils import commit, versions, write_json
from modelutils import FAMILIES, METHODS, Layer, decoder_blocks, load_tokenizer, replace_linears, run_dtype
from quant import Batch, Grid, IntLinear, Recipe, from_int

FORMAT = 1  # of our folders; a newer one is refused
PACKED = (3, 4)  # widths whose codes share bytes


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
    partial = f"{path}.partial"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written ({e})") from e
    with open(partial, "rb") as f:
        os.fsync(f.fileno())  # the name must not outlive a crash that the bytes do not
    os.replace(partial, path)
    return {name: sha256(tensor) for name, tensor in tensors.items()}


def read_shard(path, sums):
    """The tensors of a shard that `sums`, {name: sha256}, lists.  Raises OSError, naming a tensor, unless each is there and unchanged."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as f:
            there = set(f.keys())
            for name in sums:
                if name not in there:
                    raise OSError(f"{path}: the tensor {name} is missing; get the folder anew")
                tensors[name] = f.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as e:
        raise OSError(f"{path}: missing or damaged ({e}): the tensor {next(iter(sums))} cannot be read; get the folder anew") from e
    for name, tensor in tensors.items():
        if sha256(tensor) != sums[name]:
            raise OSError(f"{path}: the tensor {name} is damaged (its sha256 differs from the index); get the folder anew")
    return tensors


# ---------------------------------------------------------------------------
# Blocks


def outside_rest(model):
    """Prefixes of what is not in the last shard: the blocks, and weights tied to others."""
    return (f"{FAMILIES[model.config.model_type].blocks}.", *model.all_tied_weights_keys)


def other_tensors(block, codes):
    """What a finished block is besides codes and grids: {name in the block: tensor}, its norms as they are after folding."""
    tensors = {name: t for name, t in block.state_dict().items() if name.removesuffix(".weight") not in codes}
    return {name: t.clone() if name.endswith(".in_scale") else t for name, t in tensors.items()}  # one for linears that read the same input


def packed_linear(q, grid):
    """Codes (R, C) and grid of a linear as they lie on disk: {suffix: tensor}."""
    return {"codes": pack(q.cpu(), grid.bits), "scale": grid.scale, "zero": grid.zero.to(torch.uint8)}  # zero is whole, 0 to 2^bits - 1


def unpacked_linear(tensors, name, shape, recipe):
    """Take a linear of shape (R, C) out of {name: tensor}: its codes (R, C) and Grid.  Raises ValueError if they are not there or do not fit."""
    packed, scale, zero = (tensors.pop(f"{name}.{suffix}", None) for suffix in ("codes", "scale", "zero"))
    R, C = shape
    groups = 1 if recipe.groupsize == -1 else -(-C // recipe.groupsize)
    width = -(-C * recipe.wbits // 8) if recipe.wbits in PACKED else C
    for suffix, tensor, expected in (("codes", packed, (R, width)), ("scale", scale, (R, groups)), ("zero", zero, (R, groups))):
        if tensor is None or tensor.shape != expected:
            raise ValueError(
                f"{name}.{suffix} should be {expected}, is {tensor if tensor is None else tuple(tensor.shape)}; config.json is of another model"
            )
    return unpack(packed, recipe.wbits, C), Grid(scale, zero.float(), recipe.wbits, recipe.groupsize)


def assign(module, tensors, elsewhere=()):
    """Give a module, which may be on the meta device, its tensors, {name: tensor}, in its own types, but for names that begin with one of
    `elsewhere`.  Raises ValueError, naming a tensor, if they do not fit."""
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
        raise ValueError(f"--method {recipe.method} rounds no weights: there is nothing to pack")


def packed_linear(q, grid, recipe):
    return {"codes": pack(q.cpu(), recipe.wbits), "scale": grid.scale, "zero": grid.zero.to(torch.uint8)}  # whole, 0 to 2^bits - 1


def packed_config(model, recipe):
    return {"quant_method": "awrq", "format": FORMAT, "recipe": asdict(recipe), "versions": versions(), "commit": commit()}


def check_compressed_tensors(recipe, config):
    """Raises ValueError for what compressed-tensors cannot say."""
    check_packable(recipe, config)
    family = FAMILIES[config.model_type]
    block = decoder_blocks(empty_model(config))[0]
    columns = {name: block.get_submodule(name).in_features for group in family.groups for name in group.linears}
    ragged = [name for name, C in columns.items() if recipe.groupsize != -1 and C % recipe.groupsize]
    scaled = [name for group in family.groups for name in group.linears if recipe.smooth and not group.exact(config)]
    for wrong, why in (
        (recipe.wbits not in (4, 8), f"weights of {recipe.wbits} bits; give --wbits 4 or 8"),
        (recipe.act_bits not in (8, 16), f"activations of {recipe.act_bits} bits; give --act_bits 8"),
        (ragged, f"shorter last group of columns, as --groupsize {recipe.groupsize} leaves in {', '.join(ragged)}"),
        (scaled, f"division of inputs at run time, as smoothing needs for {', '.join(scaled)}; leave out --smooth"),
        (
            recipe.act_bits < 16 and recipe.act_pertoken and family.flat,
            f"scale per token for {', '.join(family.flat)}, which read all tokens of a batch as rows of one matrix; leave out --act_pertoken",
        ),
    ):
        if wrong:
            raise ValueError(f"--export compressed-tensors: the format has no {why}")


def compressed_tensors_linear(q, grid, recipe):
    """Words of 32 bits, the first code in the lowest; the format counts codes and zero points from -2^(bits - 1), but stores them from 0."""
    from compressed_tensors.compressors import pack_to_int32  # not above: it takes a second, and only an export needs it

    half = 2 ** (recipe.wbits - 1)
    tensors = {
        "weight_packed": pack_to_int32((q.cpu().int() - half).to(torch.int8), recipe.wbits),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(q.shape),
    }
    if not recipe.sym:
        zero = (grid.zero.cpu() - half).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero, recipe.wbits, packed_dim=0)
    return tensors


def compressed_tensors_config(model, recipe):
    def args(bits, symmetric, strategy, **more):
        return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}

    groups = {"strategy": "channel"} if recipe.groupsize == -1 else {"strategy": "group", "group_size": recipe.groupsize}
    acts = args(recipe.act_bits, False, "token" if recipe.act_pertoken else "tensor", dynamic=True)
    scheme = {
        "targets": ["Linear"],
        "format": "pack-quantized",  # weights and activations of integers would be taken for one code a byte
        "weights": args(recipe.wbits, recipe.sym, **groups),
        "input_activations": acts if recipe.act_bits < 16 else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],  # the others are ours by now
    }


@dataclass(frozen=True)
class Layout:
    """How a folder is laid out: what its files are called; check(recipe, config of the model), which raises ValueError for what it cannot
    say; linear(codes, Grid, recipe) -> {suffix: tensor}; config(model, recipe) -> its quantization_config."""

    files: str
    check: Callable
    linear: Callable
    config: Callable


LAYOUTS = {
    # Not called model-*, so that transformers alone finds no weights there, instead of loading what it knows and making up the rest.
    "awrq": Layout("awrq", check_packable, packed_linear, packed_config),
    "compressed-tensors": Layout("model", check_compressed_tensors, compressed_tensors_linear, compressed_tensors_config),
}

# ---------------------------------------------------------------------------
# Saving


def check_target(folder, flag):
    """Raises OSError unless a folder can be made under this name, or it is None."""
    if folder is None:
        return
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{flag} {folder}: is there already; give another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as e:
        raise OSError(f"{flag} {folder}: cannot write into {folder.parent} ({e.strerror}); give another folder") from e


class Writer:
    """A folder that appears under its name when all of it has been written.

    with Writer(folder, model, tokenizer, recipe) as writer:
        for layers, codes in quantize_blocks(model, ids, recipe):
            writer.add(layers[0].block, codes)
    print(writer.size())
    """

    def __init__(self, folder, model, tokenizer, recipe, layout="awrq", about=None, dtype=None):
        """layout: of LAYOUTS.  about: further entries of the quantization_config.  dtype: what config.json names (default: the model's type);
        tensors that are not quantized are stored in it where that changes no value, otherwise as they are."""
        self.folder, self.partial = Path(folder), Path(f"{folder}.{os.getpid()}.partial")
        self.model, self.tokenizer, self.recipe, self.layout = model, tokenizer, recipe, LAYOUTS[layout]
        self.about, self.dtype = about or {}, dtype or model.dtype
        self.layout.check(recipe, model.config)
        self.shards = []  # (file, {tensor: sha256})
        self.bytes = {"packed": 0, "FP16": 0, "total": 0}

    def __enter__(self):
        self.partial.mkdir(parents=True)
        try:
            self.tokenizer.save_pretrained(self.partial)
        except Exception as e:  # its backend raises no OSError of its own
            self.__exit__(type(e), e, None)
            raise OSError(f"{self.folder}: the tokenizer cannot be written ({e})") from e
        return self

    def add(self, i, codes):
        """Write block i as it is now: codes {name: (codes (R, C), Grid)} of its linears, and the rest."""
        block = decoder_blocks(self.model)[i]
        tensors = {name: self.own_type(name, t) for name, t in other_tensors(block, codes).items()}
        for name, (q, grid) in codes.items():
            tensors |= {f"{name}.{suffix}": t for suffix, t in self.layout.linear(q, grid, self.recipe).items()}
            self.bytes["packed"] += sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
            self.bytes["FP16"] += 2 * (q.numel() + len(q) * (f"{name}.bias" in tensors))
        self.write(i, {f"{FAMILIES[self.model.config.model_type].blocks}.{i}.{name}": t for name, t in tensors.items()})

    def own_type(self, name, tensor):
        if not tensor.is_floating_point() or name.endswith(".in_scale"):  # x is divided by in_scale in its type
            return tensor
        narrow = tensor.to(self.dtype)
        return narrow if narrow.to(tensor.dtype).equal(tensor) else tensor

    def write(self, i, tensors):
        file = f"{self.layout.files}-{i + 1:05}-of-{len(decoder_blocks(self.model)) + 1:05}.safetensors"
        self.shards.append((file, write_shard(self.partial / file, tensors)))
        self.bytes["total"] += sum(t.nbytes for t in tensors.values())

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.finish()
                os.rename(self.partial, self.folder)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self):
        blocks = len(decoder_blocks(self.model))
        assert len(self.shards) == blocks, f"{len(self.shards)} of {blocks} blocks were added"
        rest = {name: t for name, t in self.model.state_dict().items() if not name.startswith(outside_rest(self.model))}
        self.write(blocks, {name: self.own_type(name, t) for name, t in rest.items()})
        index = {
            "metadata": {"total_size": self.bytes["total"]},
            "weight_map": {name: file for file, sums in self.shards for name in sums},
            "sha256": {name: s for _, sums in self.shards for name, s in sums.items()},
        }
        write_json(self.partial / f"{self.layout.files}.safetensors.index.json", index)
        config = deepcopy(self.model.config)
        config.dtype = self.dtype
        config.quantization_config = self.layout.config(self.model, self.recipe) | self.about
        config.save_pretrained(self.partial)
        self.model.generation_config.save_pretrained(self.partial)

    def size(self):
        """A line about the size of the quantized linears, all their tensors, against FP16."""
        packed, fp16 = self.bytes["packed"], self.bytes["FP16"]
        return f"{self.folder}: the quantized linears take {packed / 2**20:.2f} MiB, {packed / fp16:.3f} of FP16's {fp16 / 2**20:.2f} MiB"


# ---------------------------------------------------------------------------
# Loading


def empty_model(config, dtype=None):
    """The model of a configuration without weights: they are on the meta device."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_packed_config(folder):
    """(configuration of the model, our quantization_config, which has `recipe`) of a checkpoint of ours.

    Raises OSError if there is none, ValueError if it is not one that this version reads.
    """
    if not Path(folder, "config.json").is_file():
        raise OSError(f"--load {folder}: no checkpoint there: there is no config.json")
    config = AutoConfig.from_pretrained(folder)
    about = getattr(config, "quantization_config", {})
    if about.get("quant_method") != "awrq":
        raise ValueError(f"--load {folder}: not a checkpoint that --save wrote, but {about.get('quant_method', 'an unquantized model')}")
    if not 0 < about.get("format", 0) <= FORMAT:
        raise ValueError(f"--load {folder}: has format {about.get('format')}, this version reads up to {FORMAT}; update the code")
    del config.quantization_config
    return config, about | {"recipe": Recipe(**about["recipe"])}


def read_index(folder):
    """{file: {tensor: sha256}} in the order of the blocks, the rest last.  Raises OSError if it is missing or damaged."""
    path = Path(folder, f"{LAYOUTS['awrq'].files}.safetensors.index.json")
    try:
        index = json.loads(path.read_text())
        shards = {file: {} for file in sorted(set(index["weight_map"].values()))}
        for name, file in index["weight_map"].items():
            shards[file][name] = index["sha256"][name]
    except (OSError, ValueError, KeyError) as e:
        raise OSError(f"{path}: missing or damaged ({e}); get the folder anew") from e
    return shards


def restore(folder, model, recipe):
    """Fill an empty model from a checkpoint of ours, the rest first: yields {name: (codes, Grid)} of block after block.

    Raises OSError, naming a tensor, for what is missing or damaged, ValueError for what does not fit the model.
    """
    *shards, (rest, sums) = read_index(folder).items()
    blocks, family, batch = decoder_blocks(model), FAMILIES[model.config.model_type], Batch()
    if len(shards) != len(blocks):
        raise ValueError(f"{folder}: {len(shards)} blocks, {len(blocks)} in its config.json, which is of another model")
    assign(model, read_shard(Path(folder, rest), sums), outside_rest(model))
    model.tie_weights()
    for i, (file, sums) in enumerate(tqdm(shards, desc="loading", unit="block", leave=False)):
        tensors = {name.removeprefix(f"{family.blocks}.{i}."): t for name, t in read_shard(Path(folder, file), sums).items()}
        yield i, restore_block(blocks[i], tensors, family.groups, batch, recipe)


def load(folder, dtype="auto", device="cpu", kernel=None):
    """The model of a checkpoint of ours, in host memory and evaluation mode: ready to evaluate or to generate.

    dtype: as in load_model.  Weights of up to 4 bits with activations of up to 8 become IntLinears, whose `kernel` is as in
    kernels.w4a8_linear; others are dequantized.  Raises what load_packed_config and restore raise.
    """
    config, about = load_packed_config(folder)
    recipe = about["recipe"]
    dtype = run_dtype(dtype, device)
    model = empty_model(config, config.dtype if dtype == "auto" else getattr(torch, dtype))
    for i, codes in restore(folder, model, recipe):
        block = decoder_blocks(model)[i]
        for name, (q, grid) in codes.items() if recipe.wbits <= 4 and recipe.act_bits <= 8 else ():
            block.set_submodule(name, IntLinear(block.get_submodule(name), q, grid, kernel))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def export(source, folder, layout="compressed-tensors"):
    """Write a checkpoint of ours once more, in another layout."""
    config, about = load_packed_config(source)
    model = empty_model(config, torch.float32)  # so that nothing is rounded on the way
    model.generation_config = GenerationConfig.from_pretrained(source)
    with Writer(folder, model, load_tokenizer(source), about["recipe"], layout, dtype=config.dtype) as writer:
        for i, codes in restore(source, model, about["recipe"]):
            writer.add(i, codes)
            decoder_blocks(model)[i].to("meta")
    return writer


# ---------------------------------------------------------------------------
# Resuming


def differences(there, here, path=""):
    """Where two nested dicts differ: "KEY: VALUE there, VALUE here" of each leaf."""
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key} is {a} there, {b} here"


def read_json(path):
    """Raises OSError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise OSError(f"{path}: missing or damaged ({e}); delete the folder to begin anew") from e


def describe_model(config):
    """What makes two configurations those of one model."""
    return {k: v for k, v in config.to_dict().items() if k not in ("dtype", "_name_or_path", "architectures", "transformers_version")}


def weights_sha256(model):
    """Of all weights with their names: hexadecimal."""
    digest = hashlib.sha256()
    for name, t in tqdm(model.state_dict().items(), desc="identifying the model", unit="tensor", leave=False):
        digest.update(f"{name} {sha256(t)}\n".encode())
    return digest.hexdigest()


class Store:
    """Finished blocks in a folder, from which a run that was killed goes on; quantize_blocks asks it and fills it.

    run.json says which run it is: everything that codes depend on.  Of block i there are block-i.safetensors, as in a checkpoint, and
    block-i.json with its output errors and checksums, written last: without it the block is not finished.  inputs-i.safetensors is what
    enters block i, the first unfinished one.
    """

    def __init__(self, folder, model, ids, recipe, device, walk_batch):
        """ids (n, T): the calibration.  Raises ValueError, naming what differs, if the folder is of another run, OSError if it is damaged."""
        check_packable(recipe, model.config)
        self.folder, self.recipe, self.blocks = Path(folder), recipe, len(decoder_blocks(model))
        run = {
            "format": FORMAT,
            "recipe": asdict(recipe),
            "model": describe_model(model.config) | {"weights": weights_sha256(model)},
            "calibration": sha256(ids),
            "dtype": str(model.dtype),
            "walk_batch": walk_batch,
            "device": torch.device(device).type,
            "torch": torch.__version__,
        }
        run = json.loads(json.dumps(run))  # as it will be read: tuples are lists
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        if not path.exists():
            if any(not file.name.endswith(".partial") for file in self.folder.iterdir()):
                raise ValueError(f"--checkpoint_dir {folder}: has other files in it; give a folder of its own")
            write_json(path, run)
        other = list(differences(read_json(path), run))
        if other:
            raise ValueError(f"--checkpoint_dir {folder}: is of another run: {'; '.join(other)}; give another folder")
        done = [i for i in range(self.blocks) if self.path("block", i, "json").exists()]
        self.finished = next((i for i in range(self.blocks) if i not in done), self.blocks)

    def path(self, kind, i, ending="safetensors"):
        return self.folder / f"{kind}-{i:05}.{ending}"

    def keep(self, i, block, layers, codes, x):
        """Block i is finished.  x: what enters the next, a list of (B, T, D)."""
        tensors = other_tensors(block, codes)
        for name, (q, grid) in codes.items():
            tensors |= {f"{name}.{suffix}": t for suffix, t in packed_linear(q, grid, self.recipe).items()}
        entry = {"errors": [asdict(layer) for layer in layers]}
        if i + 1 < self.blocks:
            entry["inputs"] = write_shard(self.path("inputs", i + 1), {f"{k:05}": h for k, h in enumerate(x)})
        entry["tensors"] = write_shard(self.path("block", i), tensors)
        write_json(self.path("block", i, "json"), entry)
        for old in self.folder.glob("inputs-*.safetensors"):
            if old != self.path("inputs", i + 1):
                old.unlink()

    def restore(self, i, block, groups, batch, x):
        """Make a block what it was when it was finished, and x what entered the one after the last finished: its [Layer], {name: codes}."""
        entry = read_json(self.path("block", i, "json"))
        codes = restore_block(block, read_shard(self.path("block", i), entry["tensors"]), groups, batch, self.recipe)
        if i + 1 == self.finished < self.blocks:
            x[:] = [h.to(x[0].device) for h in read_shard(self.path("inputs", i + 1), entry["inputs"]).values()]
        return [Layer(**error) for error in entry["errors"]], codes
