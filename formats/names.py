"""The names of tensors: how those of a checkpoint map to those of the model, by transformers' own rules."""

import warnings

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from recipe import UsageError

LEFTOVERS = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")  # buffers that old versions of transformers saved; nothing learned


def model_names(skeleton, names):
    """{name in the model: name in the checkpoint}, and the same for tensors that the model does not have.

    A checkpoint of the bare model (real OPT ones say decoder.layers, ours model.decoder.layers) and old spellings are understood.  Raises
    UsageError, naming a tensor, if transformers would merge or split some, as of a mixture of experts.
    """
    state, mapping = skeleton.state_dict(), get_model_conversion_mapping(skeleton)
    renamings, converters = ([m for m in mapping if isinstance(m, kind)] for kind in (WeightRenaming, WeightConverter))
    found, unused = {}, {}
    for name in names:
        own, converted = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, state)
        if converted:
            raise UsageError(f"{name}: transformers merges or splits such tensors when it loads them, which is not supported")
        (found if own in state else unused)[own] = name
    return found, unused


def check_unused(unused, prefix, blocks, label):
    """Raises UsageError if a block has tensors that the model has no place for, as its numbers would be another model's; warns of others.

    unused: as model_names gives them; prefix: what the names of the tensors of all blocks begin with; blocks: how many there are.
    """
    inside, further, outside = [], [], []
    for own, name in unused.items():
        if own.endswith(LEFTOVERS):
            continue
        number = own.removeprefix(prefix).partition(".")[0] if own.startswith(prefix) else None
        where = outside if number is None else further if number.isdigit() and int(number) >= blocks else inside
        where.append(name)
    if inside:
        raise UsageError(
            f"{label}: the model of config.json has no place for the weight {min(inside)} ({len(inside)} such in its blocks), and without"
            " it is another model; let config.json say what is there, as attention_bias does, or save the model without quantization"
        )
    for names, what in ((further, f"of blocks beyond config.json's {blocks}"), (outside, "outside its blocks")):
        if names:
            warnings.warn(f"{label}: no place for {len(names)} weights {what}, as {min(names)}: they are left out", stacklevel=2)


def tied_names(skeleton, names):
    """{name: the name whose tensor it shares} of tensors that the class ties and of which only one is there; names: those that are."""
    tied = {}
    for target, source in skeleton.all_tied_weights_keys.items():
        if target not in names:
            tied[target] = source
        elif source not in names:
            tied[source] = target
    return tied


def check_complete(skeleton, names, shapes, tied, label):
    """Raises UsageError, naming a tensor, unless the checkpoint has all that the model needs, in its shapes.

    names: as model_names gives them; shapes: {name in the checkpoint: shape}; tied: {name: the name whose tensor it shares}.
    """
    state = skeleton.state_dict()
    missing = [name for name in state if tied.get(name, name) not in names]
    other = [name for name in names if name in state and tuple(state[name].shape) != shapes[names[name]]]
    for wrong, what in ((missing, "missing"), (other, "of another shape than config.json says")):
        if wrong:
            raise UsageError(f"{label}: the weight {min(wrong)} is {what} ({len(wrong)} such); save the model again")
