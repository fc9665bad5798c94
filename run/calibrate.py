"""Calibration sequences through one block: what its linears read, in the quantized model and in the unquantized one beside it."""

from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import partial

import torch

from modelutils import Sequences

# ---------------------------------------------------------------------------
# What is seen


class FirstSequences:
    """The inputs of a linear for the first n calibration sequences (all, if there are fewer)."""

    def __init__(self, n):
        self.n, self.kept = n, []  # [(B, T, C)] of each batch

    def add(self, x, target=None, *_):
        """x (B, T, C)"""
        if (missing := self.n - sum(map(len, self.kept))) > 0:
            self.kept.append(x[:missing].clone())

    @property
    def x(self):
        """(n, T, C)"""
        return torch.cat(self.kept)[: self.n]

    def reduce(self, world, owner):
        """The first n of all processes of a processes.World, at the owner."""
        before = world.rank * len(self.kept[0]) if self.kept else 0  # sequences in the batches before the first one here
        self.kept = world.collect(self.kept if before < self.n else [], owner)


class Seen(Exception):
    """Raised inside a block when every observed linear has run, so that the rest of the block is skipped."""


def observe(block, sequences, name, observers, stream=None, rest=True, batches=None):
    """Run the block over its inputs.  observers: {QuantLinear: (objects with .add, ...)}, called with what that linear reads, (B, T, C).

    stream: a Stream inside the block; observers then get targets too.  rest: whether to go on after the last observed linear.
    batches: how many of the inputs (default all).
    """
    *_, last = observers

    def show(linear, args):
        x = linear.smoothed(args[0])
        seen = (x,) if stream is None else (x, *stream.target(linear, x))
        for observer in observers[linear]:
            observer.add(*seen)
        if linear is last and not rest:
            raise Seen

    with ExitStack() as hooks:
        for linear in observers:
            hooks.callback(linear.register_forward_pre_hook(show).remove)
        for k in range(len(sequences) if batches is None else batches):
            if stream is not None:
                stream.run(k, name, set(observers))
            with suppress(Seen):
                sequences.run(block, k, name)


@contextmanager
def repeated(block, part, sequences):
    """A context in which attention runs only once per batch; its output is kept and reused, without its weights.

    part: its name in the block.  It is already quantized, while the block runs over the same inputs again for its other parts.
    """
    module, kept = block.get_submodule(part), {}
    forward = module.forward

    def once(*args, **kwargs):
        k = sequences.now
        if k not in kept:
            out = forward(*args, **kwargs)
            kept[k] = [sequences.place.put(out[0]), *[None] * (len(out) - 1)]  # attention's weights would take (B, heads, T, T)
            return out
        out, *others = kept[k]
        return out.to(sequences.place.device), *others

    module.forward = once
    try:
        yield
    finally:
        del module.forward


# ---------------------------------------------------------------------------
# The unquantized model beside it


class Stream(Sequences):
    """The calibration sequences in the unquantized model, which runs block by block beside the quantized one.

    mix: its share in the targets.  The device holds one unquantized block, and what its linears read for one batch.

    residual: the families.Residual whose writers are to give back what the quantized stream has lost (None: they are not).
    """

    def __init__(self, sequences, mix, config, residual=None):
        super().__init__(sequences.place)
        self.x, self.arguments, self.mix = list(sequences.x), sequences.arguments, mix
        self.writers = residual.read_before(config) if residual else {}
        self.scale = getattr(config, "residual_multiplier", 1)  # Granite's, of what is added to the stream

    @contextmanager
    def inside(self, block, linears):
        """A context in which `target` works for these linears, {name: QuantLinear}.  Enter it before anything in the block is rounded."""
        self.block, self.done = deepcopy(block), 0
        self.reads = {linear: [] for linear in linears.values()}
        self.before = {linears[name]: [] for name in self.writers}  # the unquantized stream that each adds to, batch by batch
        self.here = {}  # the same of the quantized model, of the current batch
        with ExitStack() as hooks:
            for name, linear in linears.items():
                self.block.get_submodule(name).register_forward_pre_hook(partial(self.keep, linear))
                if norm := self.writers.get(name):
                    self.block.get_submodule(norm).register_forward_pre_hook(partial(self.keep_before, linear))
                    hooks.callback(block.get_submodule(norm).register_forward_pre_hook(partial(self.note, linear)).remove)
            try:
                yield
            finally:
                del self.block, self.reads, self.before, self.here

    def keep(self, linear, twin, args):
        read = twin.smoothed(args[0])
        self.reads[linear].append(read if linear in self.at_once else self.place.put(read))

    def keep_before(self, linear, norm, args):
        self.before[linear].append(args[0] if linear in self.at_once else self.place.put(args[0]))

    def note(self, linear, norm, args):
        self.here[linear] = args[0]

    def run(self, k, name, at_once):
        """Run batch k through the unquantized block, once.  at_once: the linears whose inputs are needed now; those of others are kept."""
        if k == self.done:
            self.at_once, self.done = at_once, k + 1
            self[k] = super().run(self.block, k, name)

    def target(self, linear, x):
        """What to fit a linear to that reads x (B, T, C) in the quantized model, float32: what it should be applied to, (B, T, C).

        Of a writer also what it should give besides, as the stream has lost it, (B, T, R).  Called once per batch, in order.
        """
        target = torch.lerp(x.float(), self.reads[linear].pop(0).to(x.device).float(), self.mix)
        if linear not in self.before:
            return (target,)
        before = self.before[linear].pop(0).to(x.device).float().view(*x.shape[:-1], -1)
        return target, (before - self.here[linear].view_as(before)) / self.scale
