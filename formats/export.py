"""Our codes in other formats: one row of FORMATS each, and a model card."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from families import FAMILIES
from formats.checkpoint import check_packable, rest_of, shard_name, without_codes, write_about, write_index
from formats.shards import new_folder, write_shard
from modelutils import skeleton
from recipe import UsageError


def check_compressed_tensors(recipe, config):
    """Raises UsageError for what compressed-tensors cannot represent."""
    family = FAMILIES[config.model_type]
    block = skeleton(config, torch.float32).get_submodule(family.blocks)[0]
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
            raise UsageError(f"--export compressed-tensors: the format has no {lack}")


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
    acts = {"num_bits": recipe.act_bits, "type": "int", "symmetric": recipe.act_sym, "dynamic": True}
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
class Format:
    """How another format represents our tensors."""

    check: Callable  # (recipe, config of the model): raises UsageError for what it cannot say
    linear: Callable  # (codes, Grid, recipe) -> {suffix: tensor}
    config: Callable  # (skeleton, recipe) -> its quantization_config
    files: str = "model"  # what the names of its shards begin with


FORMATS = {  # by the name that --export takes: recipe.EXPORTS
    "compressed-tensors": Format(check_compressed_tensors, compressed_tensors_linear, compressed_tensors_config),
}


def check_export(name, recipe, config):
    """Raises UsageError for what a format cannot represent."""
    check_packable(recipe)
    FORMATS[name].check(recipe, config)


def export(store, folder, name, tokenizer):
    """Write the blocks of a formats.checkpoint.Store in another format, into a new folder, which appears when complete."""
    form, decoder, recipe = FORMATS[name], store.original, store.recipe
    form.check(recipe, decoder.config)
    sums, blocks = {}, len(decoder)
    with new_folder(folder) as partial:
        for i in range(blocks):
            codes = store.codes(i)
            tensors = without_codes(store.read(i), codes)
            for linear, (q, grid) in codes.items():
                tensors |= {f"{linear}.{suffix}": t for suffix, t in form.linear(q, grid, recipe).items()}
            file = shard_name(i, blocks, form.files)
            sums[file] = write_shard(partial / file, {f"{store.prefix}{i}.{key}": t for key, t in tensors.items()})
        file = shard_name(blocks, blocks, form.files)
        sums[file] = write_shard(partial / file, rest_of(decoder, store))
        write_index(partial, form.files, sums)
        write_about(partial, decoder, tokenizer, form.config(decoder.skeleton, recipe))
