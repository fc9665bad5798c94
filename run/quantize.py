"""Quantizing: one decoder block from smoothing to codes, and the loop over blocks."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pkgutil import resolve_name

import torch

import quant
from modelutils import sequences_place
from quant import Batch, Grid, Means, from_int, replace_linears
from recipe import METHODS
from rotate import Rotated
from run.calibrate import FirstSequences, Stream, observe, repeated
from runtime import Clock
from smoothquant import AbsMax, fold_group, search_scale, smooth_scale

SEARCHED = 8  # sequences that a search for alpha looks at


@dataclass(frozen=True)
class Layer:
    """A quantized linear and its output_error."""

    block: int
    name: str
    error: float


@dataclass
class Made:
    """A finished block, {name: (codes (R, C) uint8, Grid)} of its linears, and the scale (C,) of each smoothed linear."""

    block: torch.nn.Module
    codes: dict
    scales: dict


def output_error(W, x, linear, shift=0):
    """sum |W x - Q xq - shift|^2 / sum |W x|^2 for x (T, C), W (R, C) and the quantized linear that replaces W; 0 if W x is all zero.

    shift (R,): what was added to the bias.
    """
    y = x.float() @ W.T
    xq = quant.fake_quant_act(x[None], *linear.acts)[0]
    lost, whole = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (y - shift - xq.float() @ linear.weight.float().T, y))
    return (lost / whole) ** 2 if whole else 0.0


# ---------------------------------------------------------------------------
# One block


class BlockQuantizer:
    """Quantizes decoder block i: smooth, collect statistics, round group by group."""

    def __init__(self, i, block, sequences, decoder, recipe, clock):
        """block: the unquantized one, on the device; changed in place."""
        self.i, self.block, self.sequences, self.recipe, self.clock = i, block, sequences, recipe, clock
        self.name, self.config, self.groups = f"block {i}", decoder.config, decoder.family.groups
        self.norms = decoder.family.residual.norms
        self.method = METHODS[recipe.method].fitted_to(recipe.target)
        self.linears = replace_linears(block, decoder.linears, Batch())
        self.layers, self.codes, self.scales = [], {}, {}

    def first(self, group):
        """The linear that reads what its whole group reads."""
        return self.linears[group.linears[0]]

    def width(self, group):
        return self.first(group).weight.shape[1]

    def smooth(self):
        """Smooth the groups.  All scales come from the original block, before any fold."""
        recipe, device = self.recipe, self.sequences.place.device
        batches, groups = None, self.groups
        if recipe.smooth_search:
            if recipe.rotate:  # inputs from the rotated stream have no outlier channels left: a search there would follow noise
                groups = [g for g in groups if g.producer not in self.norms]
            seen = {g: FirstSequences(SEARCHED) for g in groups}
            batches = min(len(self.sequences), -(-SEARCHED // len(self.sequences[0])))
        else:
            seen = {g: AbsMax(self.width(g), device) for g in groups}
        observe(self.block, self.sequences, self.name, {self.first(g): (seen[g],) for g in groups}, batches=batches)
        scales = {}
        for g in groups:
            weights = [self.linears[n].weight for n in g.linears]
            if recipe.smooth_search:
                scales[g] = search_scale(seen.pop(g).x, weights, recipe, g.rows(self.config))
            else:
                scales[g] = smooth_scale(seen[g].max, weights, recipe.alpha, recipe.min)
        for g, s in scales.items():
            if (s != 1).any():  # else the search found no useful scale, and nothing is divided at run time either
                fold_group(self.block, g, self.linears, self.config, s)
                self.scales |= dict.fromkeys(g.linears, s)

    def observed(self, step, stream):
        """Statistics of the groups of a step, where needed: {group: FirstSequences}, {group: statistics}, {group: Means}."""
        recipe, device = self.recipe, self.sequences.place.device
        biased = [g for g in step if recipe.bias_correction and any(self.linears[n].bias is not None for n in g.linears)]
        sample = {g: FirstSequences(1) for g in step}
        stats = {g: resolve_name(self.method.stats)(self.width(g), recipe, device) for g in step} if self.method.stats else {}
        means = {g: Means(self.width(g), recipe, device) for g in biased}
        observers = {self.first(g): [kind[g] for kind in (sample, stats, means) if g in kind] for g in step}
        observe(self.block, self.sequences, self.name, observers, stream, rest=len(step) == len(self.groups))
        return sample, stats, means

    def round_group(self, group, stats):
        """Round linears that read the same input as one matrix, their rows stacked: {name: (codes, Grid)}."""
        weights = [self.linears[n].weight for n in group.linears]
        rows = [len(W) for W in weights]
        name = f"{self.name} {'/'.join(group.linears)}"
        q, grid = resolve_name(self.method.weights)(torch.cat(weights), stats, self.recipe, name)
        grids = (Grid(*part, grid.bits, grid.groupsize) for part in zip(grid.scale.split(rows), grid.zero.split(rows), strict=True))
        return dict(zip(group.linears, zip(q.split(rows), grids, strict=True), strict=True))

    def finish_group(self, group, stats, means, sample):
        """Round the linears of a group; from now on they also quantize their inputs.

        stats, means: statistics of the group's inputs, or None where not needed; sample: one sequence of inputs, for the errors.
        """
        originals = {n: self.linears[n].weight.data for n in group.linears}
        if self.method.weights:
            with self.clock("solving"):
                self.codes |= self.round_group(group, stats)
        for n, W in originals.items():
            linear, shift = self.linears[n], 0
            if n in self.codes:
                linear.weight.data = from_int(*self.codes[n])
            if means and linear.bias is not None:
                shift = means.correction(W, linear.weight)
                linear.bias += shift
            linear.freeze(self.recipe.acts)
            self.layers.append(Layer(self.i, n, output_error(W, sample.x[0], linear, shift)))

    def finished_part(self, step):
        """The submodule (mostly attention) that this step finishes, if other groups come after it; else ""."""
        part, *later = (g.linears[0].rpartition(".")[0] for g in self.groups[self.groups.index(step[-1]) :])
        return part if later and part not in later else ""

    def run(self, stream=None):
        """Quantize the block and advance the sequences to its outputs.  Returns [Layer], Made."""
        if self.recipe.smooth:
            with self.clock("smoothing"):
                self.smooth()
        with ExitStack() as stack:
            if stream:
                stack.enter_context(stream.inside(self.block, {g.linears[0]: self.first(g) for g in self.groups}))
            for step in [(g,) for g in self.groups] if self.recipe.true_sequential else [self.groups]:
                with self.clock("statistics"):
                    sample, stats, means = self.observed(step, stream)
                for g in step:
                    self.finish_group(g, stats.pop(g, None), means.get(g), sample[g])
                if part := self.finished_part(step):
                    stack.enter_context(repeated(self.block, part, self.sequences))
            with self.clock("propagation"):
                self.sequences.propagate(self.block, self.name)
        return self.layers, Made(self.block, self.codes, self.scales)


# ---------------------------------------------------------------------------
# All blocks


@torch.no_grad()
def quantize_blocks(decoder, ids, recipe, store, place=None, walk_batch=1, clock=None):
    """Quantize the blocks of a Decoder, one at a time, first to last, into a store: yields [Layer] of each.

    ids (n, T): calibration sequences.  The inputs of a block come from the quantized blocks before it.  store: a formats.checkpoint.Store,
    which gets every block and returns those that it has.  place: where the sequences are kept, and the device that works (None: of
    calibration_place on a CPU).  Raises FloatingPointError, naming block and layer, where NaN or Inf turns up.
    """
    if recipe.rotate != isinstance(decoder.source, Rotated):
        raise ValueError("a recipe with rotate is of a decoder that rotate.rotated(decoder, recipe.seed) gave, and only that")
    place = place or calibration_place(decoder, ids, recipe, torch.device("cpu"))
    clock = clock or Clock(place.device)
    for i in range(store.finished):
        yield [Layer(**layer) for layer in store.layers[i]]
    if store.finished == len(decoder):
        return
    if METHODS[recipe.method].stats is None and not recipe.smooth and not recipe.bias_correction:
        ids = ids[:1]  # this method collects no statistics: one sequence is enough for the errors
    with clock("capture"):
        sequences = decoder.embed(ids.split(walk_batch), place)
    streams = [sequences, Stream(sequences, recipe.target_mix)] if recipe.target == "stream" else [sequences]
    if store.finished:
        store.restore_inputs(streams)
    for i, block in decoder.visits(place.device, f"quantizing ({recipe.method})", store.finished):
        layers, made = BlockQuantizer(i, block, sequences, decoder, recipe, clock).run(*streams[1:])
        with clock("writing"):
            store.put(i, made, [asdict(layer) for layer in layers], streams)
        del made, block  # free this block before the next one is read
        yield layers


def calibration_place(decoder, ids, recipe, device):
    """A Place with room for what is kept of the calibration sequences: hidden states, and with a Stream the inputs of its linears."""
    return sequences_place(decoder.config, decoder.dtype, ids.numel(), device, streams=8 if recipe.target == "stream" else 1)
