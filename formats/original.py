"""The source of an unquantized decoder: the tensors of its checkpoint, read block by block."""

import hashlib

import torch

from formats.names import check_complete, check_unused, model_names, tied_names
from formats.shards import sha256
from recipe import UsageError


def assign(module, tensors):
    """Give a module on the meta device its tensors, {name: tensor}, in its own types.

    Raises UsageError, naming a tensor, if they do not fit.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise UsageError(f"{name}: only the {'model' if name in own else 'checkpoint'} has it; config.json is of another model")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UsageError(f"{name}: {tuple(tensor.shape)}, should be {tuple(own[name].shape)}; config.json is of another model")
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in tensors.items()}, assign=True)


class Original:
    """The tensors of an unquantized checkpoint, as the source of a Decoder's.

    A source has read(i) -> {name in the block: tensor}, what is stored of block i; build(block, tensors, batch) -> the block, made of
    an empty one and what read gave; rest(names) -> {name: tensor}, for tensors outside the blocks; and `tied`, {name: the name of the
    tensor that it shares}.  What read gives is the caller's, and build leaves it as it is.
    """

    arithmetic = "as the model came"

    def __init__(self, skeleton, shards, prefix, name):
        """shards: see formats.shards; prefix: what the names of the tensors of all blocks begin with; name: the model's.

        Raises UsageError, naming a tensor, if one is missing, of another shape than the skeleton's, or without a place in a block.
        """
        self.shards, self.prefix, self.name = shards, prefix, name
        self.names, unused = model_names(skeleton, shards.shapes)
        check_unused(unused, prefix, skeleton.config.num_hidden_layers, name)
        self.tied = self._find_tied(skeleton)
        check_complete(skeleton, self.names, shards.shapes, self.tied, name)

    def _find_tied(self, skeleton):
        """Tied tensors: those that the class ties, unless the checkpoint has two different ones."""
        both = {t: s for t, s in skeleton.all_tied_weights_keys.items() if t in self.names and s in self.names}
        equal = {t: s for t, s in both.items() if torch.equal(*self.shards.read([self.names[t], self.names[s]]).values())}
        return tied_names(skeleton, self.names) | equal

    def _read(self, names):
        found = self.shards.read([self.names[name] for name in names])
        tensors = {name: found[self.names[name]] for name in names}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(f"{self.name}: NaN or Inf in the weight {name}")
        return tensors

    def _names(self, i=None):
        """Names of the tensors of block i; None: of those outside the blocks."""
        prefix = f"{self.prefix}{i}."
        return [n for n in self.names if (n.startswith(prefix) if i is not None else not n.startswith(self.prefix))]

    def digest(self, i=None):
        """sha256, hexadecimal, of the tensors of block i, or of those outside the blocks: names and values as the checkpoint has them."""
        found = self.shards.read([self.names[name] for name in self._names(i)])
        lines = (f"{name} {sha256(found[self.names[name]])}\n" for name in sorted(self._names(i)))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, i):
        prefix = f"{self.prefix}{i}."
        return {name.removeprefix(prefix): t for name, t in self._read(self._names(i)).items()}

    def build(self, block, tensors, batch):
        assign(block, tensors)
        return block

    def rest(self, names):
        return self._read(names)
