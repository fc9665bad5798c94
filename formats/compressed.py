"""Our codes in the format compressed-tensors, pack-quantized, which vLLM serves and transformers loads."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from families import FAMILIES
from formats.card import Reader
from formats.checkpoint import rest_of, shard_name, write_about, write_index
from formats.codes import dense, without_codes
from formats.shards import write_shard
from modelutils import skeleton
from recipe import UsageError

VLLM = "vLLM 0.33"  # of which the source was read: see scripts/check_vllm.py
EVEN = (2, 4, 8)  # widths that every version of compressed-tensors packs alike

# ---------------------------------------------------------------------------
# Who reads it


def first_block(config):
    """The first decoder block of a configuration, on the meta device."""
    return skeleton(config, torch.float32).get_submodule(FAMILIES[config.model_type].blocks)[0]


def vllm_obstacle(recipe, config):
    """Why vLLM does not compute an export with its activations in 8 bits, and what to give instead; "" if it does."""
    family, block = FAMILIES[config.model_type], first_block(config)
    fused = [group.linears for group in family.groups if len(group.linears) > 1]
    rows = [block.get_submodule(name).out_features for linears in fused for name in linears]
    for obstacle in (
        recipe.act_bits != 8 and f"activations have {recipe.act_bits} bits: --act_bits 8",
        not recipe.act_pertoken and "it has one activation scale per token: --act_pertoken",
        not recipe.act_sym and "its activations are symmetric: --act_sym",
        recipe.groupsize != -1 and "with groups of weights it computes in 16 bits: --groupsize -1",
        recipe.wbits == 8 and not recipe.sym and "8-bit weights are symmetric there: --sym",
        not recipe.sym
        and any(n * recipe.wbits % 32 for n in rows)
        and "it fuses linears, and zero points of these fill no whole words: --sym",
    ):
        if obstacle:
            return obstacle
    return ""


def versions_for_transformers(recipe, config):
    """Which versions of compressed-tensors let transformers load an export and compute what we do; "" if none does.

    Tried with transformers 5.23 and compressed-tensors 0.17.1, 0.18.0 and 0.20.0: the older packs 3, 5, 6 and 7 bits with gaps, the newer
    expect zero points unpacked.  transformers flattens what OPT's fc1 and fc2 read, so that a scale per token becomes one for all.
    """
    if recipe.act_bits < 16 and recipe.act_pertoken and FAMILIES[config.model_type].flat:
        return ""
    if recipe.sym:
        return "0.17.1 or newer" if recipe.wbits in EVEN else "0.18 or newer"
    return "0.17.1" if recipe.wbits in EVEN else ""


def readers(recipe, config, folder):
    """[Reader] of an export in a folder."""
    found = []
    if recipe.act_bits == 16:
        found.append(Reader(VLLM, f"vllm serve {folder}"))
    elif obstacle := vllm_obstacle(recipe, config):
        found.append(Reader(VLLM, "", f"does not run W{recipe.wbits}A{recipe.act_bits} of this export: {obstacle}"))
    else:
        warning = f"warning: without --linear-backend humming vLLM silently runs W{recipe.wbits}A16, activations unquantized"
        found.append(Reader(VLLM, f"vllm serve {folder} --linear-backend humming", warning))
    if versions := versions_for_transformers(recipe, config):
        note = f"with compressed-tensors {versions}"
        found.append(Reader("transformers", f'AutoModelForCausalLM.from_pretrained("{folder}")', note))
    else:
        note = "with no compressed-tensors computes what this export says: give it what --save writes, and import awrq_hf"
        found.append(Reader("transformers", "", note))
    return found


def check(recipe, config, like=None, tokenizer=None):
    """Raises UsageError for what compressed-tensors cannot say."""
    family, block = FAMILIES[config.model_type], first_block(config)
    ragged, divided = [], []
    for group in family.groups:
        ragged += [name for name in group.linears if recipe.groupsize != -1 and block.get_submodule(name).in_features % recipe.groupsize]
        divided += [name for name in group.linears if recipe.smooth and not group.exact(config)]
    tokens = recipe.act_bits < 16 and recipe.act_pertoken and family.flat and vllm_obstacle(recipe, config)
    for wrong, lack in (
        (ragged, f"shorter last group, which --groupsize {recipe.groupsize} leaves in {', '.join(ragged)}; give another"),
        (divided, f"input that is divided at run time, as smoothing needs it for {', '.join(divided)}; give --no-smooth"),
        (
            tokens,
            f"reader with a scale per token for {', '.join(family.flat)}: transformers makes it one for all tokens, and for vLLM {tokens};"
            " or leave out --act_pertoken",
        ),
    ):
        if wrong:
            raise UsageError(f"--export compressed-tensors: the format has no {lack}")


# ---------------------------------------------------------------------------
# What is written


def words(q, bits):
    """Codes (R, C) uint8 in words of 32 bits, dense, the first in the lowest bits: (R, ceil(C * bits / 32)) int32.

    So compressed-tensors packs from 0.18 on, and vLLM reads; older ones left gaps in the words of 3, 5, 6 and 7 bits.
    """
    packed = dense(q, bits)
    return F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def packed_linear(q, grid, recipe):
    """weight_packed (R, words) int32, weight_scale (R, G) float32, weight_shape (2,); if asymmetric, weight_zero_point (words, G)."""
    q, zero = q.cpu(), grid.zero.cpu().to(torch.uint8)
    tensors = {"weight_packed": words(q, recipe.wbits), "weight_scale": grid.scale, "weight_shape": torch.tensor(q.shape)}
    return tensors if recipe.sym else tensors | {"weight_zero_point": words(zero.T, recipe.wbits).T}


def quantization_config(model, recipe):
    """The entry of config.json.  model: the skeleton."""
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


def write(store, folder, tokenizer, like=None):
    """Write the blocks of a formats.checkpoint.Store into a folder."""
    decoder, recipe, sums, blocks = store.original, store.recipe, {}, len(store.original)
    for i in range(blocks):
        codes = store.codes(i)
        tensors = without_codes(store.read(i), codes)
        for linear, (q, grid) in codes.items():
            tensors |= {f"{linear}.{suffix}": t for suffix, t in packed_linear(q, grid, recipe).items()}
        file = shard_name(i, blocks, "model")
        sums[file] = write_shard(Path(folder, file), {f"{store.prefix}{i}.{key}": t for key, t in tensors.items()})
    file = shard_name(blocks, blocks, "model")
    sums[file] = write_shard(Path(folder, file), rest_of(decoder, store))
    write_index(folder, "model", sums)
    write_about(folder, decoder, tokenizer, quantization_config(decoder.skeleton, recipe))
