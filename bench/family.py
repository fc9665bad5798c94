"""Check a row of the table of families against transformers, on a model of random weights.

    python -m bench.family FOLDER

FOLDER, or a name on the hub, has a config.json; weights are not read.  A model of it with a few blocks gets random weights, in norms and
biases too, and its logits are compared with those of our walk through its blocks: as it is, with each smoothing scale folded alone, with
all of them, and rotated.  Each must change nothing; what it changes is printed, relative to the largest logit.  So is how far the norms
and the MLP that integer kernels compute are from what they take them for.
"""

import argparse
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import FAMILIES
from modelutils import decoder_of, load_config
from quant import Batch, replace_linears
from recipe import UsageError
from rotate import rotated
from run.flags import Parser, positive
from run.report import table
from runtime import Place
from smoothquant import fold_group

CPU = torch.device("cpu")
TOKENS = 24  # more than a window of attention that a tiny model may have
TOLERANCE = 1e-4  # transformers computes norms in float32, whatever the model's type


def small(config, blocks):
    """A configuration with few blocks, at least one of each kind, a small vocabulary and MLP, and windows shorter than the check's text."""
    config, n = deepcopy(config), config.num_hidden_layers
    lists = {name: entries for name in ("layer_types", "no_rope_layers") if (entries := getattr(config, name, None))}
    kinds = [tuple(entries[i] for entries in lists.values()) for i in range(n)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept = sorted([*kept, *[i for i in range(n) if i not in kept][: max(0, blocks - len(kept))]])
    config.num_hidden_layers = len(kept)
    for name, entries in lists.items():
        setattr(config, name, [entries[i] for i in kept])
    for name, most in (("vocab_size", 512), ("intermediate_size", 256), ("ffn_dim", 256), ("sliding_window", 8)):
        if (size := getattr(config, name, None)) and size > most:
            setattr(config, name, most)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(token := getattr(config, name, None), int) and token >= config.vocab_size:
            setattr(config, name, 0)
    return config


@torch.no_grad()
def random_model(config, seed=0):
    """A model in float64 whose every fold matters: random norms and biases too."""
    config = deepcopy(config)
    config.dtype = torch.float64
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, trust_remote_code=False).eval()
    except Exception as e:  # torch and transformers raise whatever a wrong number leads to
        raise UsageError(f"no model can be made of this config.json ({type(e).__name__}: {' '.join(str(e).split())})") from e
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
        p.copy_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype) + (0.5 if p.dim() == 1 else 0))
    return model


@torch.no_grad()
def logits(decoder, ids, change=lambda block: None):
    """(B, T, V) by our walk; change(block) may change each block before it runs."""
    sequences = decoder.embed(ids.split(1), Place(CPU, "device"))
    for i, block in decoder.visits(CPU, "checking"):
        change(block)
        sequences.propagate(block, f"block {i}")
    return torch.cat(list(decoder.logits(sequences)))


def decoder_for(model):
    """The Decoder of a model.  Raises UsageError if the row does not say where its blocks are."""
    blocks = FAMILIES[model.config.model_type].blocks
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if blocks not in lists:
        raise UsageError(f"the row's blocks are {blocks}, which is no list of blocks; the model has {', '.join(lists)}")
    return decoder_of(model)


def check_names(decoder):
    """Raises UsageError if the row names what the model does not have.  Returns the linears of a block that no group has."""
    empty, family = decoder.empty_block(0), decoder.family
    modules, residual = dict(empty.named_modules()), family.residual
    model = dict(decoder.skeleton.named_modules())
    producers = [group.producer for group in family.groups if group.producer]
    for what, names, there in (
        ("groups", [*decoder.linears, *producers], modules),
        ("rms_norms", family.rms_norms, modules),
        ("mlp", [family.mlp] if family.mlp else [], modules),
        ("residual", [*residual.norms, *residual.writers, *residual.values], modules),
        ("residual", [*residual.embeddings, residual.final_norm, residual.head], model),
    ):
        for name in names:
            if name not in there:
                near = ", ".join(n for n in there if n.rpartition(".")[2] == name.rpartition(".")[2]) or ", ".join(
                    [n for n in there if n][:20]
                )
                raise UsageError(f"the row's {what} name {name}, which the model does not have; it has {near}")
    return [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in decoder.linears]


def check_reads(model, decoder, ids):
    """Raises UsageError unless the groups stand in the order of execution and the linears of each read the same input."""
    block, read = model.get_submodule(decoder.family.blocks)[0], {}
    with ExitStack() as hooks:
        for name in decoder.linears:
            keep = partial(lambda name, _module, args: read.setdefault(name, args[0]), name)
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(keep).remove)
        with torch.no_grad():
            model(ids)
    order = list(read)
    if unread := [name for name in decoder.linears if name not in read]:
        raise UsageError(f"the row's groups name {', '.join(unread)}, which a block does not run")
    starts = [min(order.index(name) for name in group.linears) for group in decoder.family.groups]
    if starts != sorted(starts):
        raise UsageError(f"the row's groups are not in the order of execution, which is {', '.join(order)}")
    for first, *others in (group.linears for group in decoder.family.groups):
        for name in others:
            if not torch.equal(read[name], read[first]):
                raise UsageError(f"the row has {name} in the group of {first}, which reads another input")


@torch.no_grad()
def deferred_difference(block, family, columns):
    """How far the rms_norms and the mlp of a row are from what quant.DeferredNorm and GatedMLP compute, relative; inf for other modules."""
    x, found = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64), [0.0]
    try:
        for norm in map(block.get_submodule, family.rms_norms):
            wanted = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            found.append((norm(x) - wanted).abs().max() / wanted.abs().max())
        if family.mlp:
            mlp = block.get_submodule(family.mlp)
            wanted = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
            found.append((mlp(x) - wanted).abs().max() / wanted.abs().max())
    except AttributeError:
        return float("inf")
    return float(max(found))


def smoothed(decoder, groups, seed=0):
    """A function that folds random scales of some groups into a block."""

    def change(block):
        linears = replace_linears(block, decoder.linears, Batch())
        g = torch.Generator().manual_seed(seed)
        for group in groups:
            columns = linears[group.linears[0]].weight.shape[1]
            fold_group(block, group, linears, decoder.config, torch.rand(columns, generator=g, dtype=torch.float64) + 0.5)

    return change


def checks(model):
    """Yields (what was changed, the largest difference of logits, relative to the largest logit, or why it was not tried).

    model: of random_model.  Raises UsageError if the row names what the model does not have, or has a linear read another's input.
    """
    decoder = decoder_for(model)
    check_names(decoder)
    ids = torch.randint(3, decoder.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    check_reads(model, decoder, ids)
    with torch.no_grad():
        wanted = model(ids).logits

    def difference(found):
        return float((found - wanted).abs().max() / wanted.abs().max())

    def tried(what, decoder, change=lambda block: None):
        try:
            return what, difference(logits(decoder(), ids, change))
        except UsageError as e:  # a model that has another function when it is rotated
            return what, str(e)
        except (RuntimeError, KeyError, AttributeError) as e:
            raise UsageError(f"{what}: the row does not fit the model ({' '.join(str(e).split())})") from e

    yield tried("nothing", lambda: decoder)
    for group in decoder.family.groups:
        place = group.producer if group.exact(decoder.config) else "the run"
        yield tried(f"{' '.join(group.linears)} smoothed, {place} takes the scale", lambda: decoder, smoothed(decoder, [group]))
    yield tried("all smoothed", lambda: decoder, smoothed(decoder, decoder.family.groups))
    yield tried("rotated", lambda: rotated(decoder, 0))
    block = model.get_submodule(decoder.family.blocks)[0]
    yield "norms and gates in the quantizer", deferred_difference(block, decoder.family, decoder.config.hidden_size)


def main(args):
    config = small(load_config(args.model), args.blocks)
    model = random_model(config)
    print(f"{args.model}: {config.model_type}, {config.num_hidden_layers} blocks of random weights, float64")
    found = list(checks(model))
    rows = [(what, f"{value:.1e}" if isinstance(value, float) else value) for what, value in found]
    print(table(("changed", "largest difference"), rows))
    print(f"linears of a block that stay unquantized: {', '.join(check_names(decoder_for(model))) or 'none'}")
    if wrong := [what for what, value in found if isinstance(value, float) and not value < TOLERANCE]:
        raise UsageError(f"the row of {config.model_type} is wrong: {'; '.join(wrong)}: should change nothing")


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER", help=f"with a config.json of one of {', '.join(FAMILIES)}")
    parser.add_argument("--blocks", type=positive, default=2, metavar="N", help="at least so many blocks (default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
