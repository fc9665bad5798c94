"""Quantizing: one decoder block from smoothing to codes, and the loop over blocks."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pkgutil import resolve_name

import torch

from modelutils import sequences_place
from processes import ALONE
from quant import Batch, Grid, Means, fake_quant_act, from_int, replace_linears
from recipe import METHODS
from rotate import Rotated, check_stream
from run.calibrate import FirstSequences, Stream, observe, repeated
from run.guide import token_weights
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


def output_error(W, x, Q, acts, shift=0):
    """sum |W x - Q xq - shift|^2 / sum |W x|^2 for x (T, C), W (R, C) and the weight Q that replaces it; 0 if W x is all zero.

    acts: see Recipe.acts; shift (R,): what is added to the bias.
    """
    y = x.float() @ W.T
    xq = fake_quant_act(x[None], *acts)[0]
    lost, whole = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (y - shift - xq.float() @ Q.float().T, y))
    return (lost / whole) ** 2 if whole else 0.0


# ---------------------------------------------------------------------------
# One block


class BlockQuantizer:
    """Quantizes decoder block i: smooth, collect statistics, round group by group.

    Each process has the statistics of its own sequences.  They meet at the owner of a group, which finds its scales and codes and gives
    them to all.
    """

    def __init__(self, i, block, sequences, decoder, recipe, clock, world=ALONE):
        """block: the unquantized one, on the device; changed in place."""
        self.i, self.block, self.sequences, self.recipe, self.clock, self.world = i, block, sequences, recipe, clock, world
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

    def owners(self, groups):
        """{group: the process that works on it}, by what a solve takes: columns cubed, and rows times columns squared."""
        costs = {g: self.width(g) ** 2 * (self.width(g) + sum(len(self.linears[n].weight) for n in g.linears)) for g in groups}
        return self.world.owners(costs)

    def smooth(self):
        """Smooth the groups.  All scales come from the original block, before any fold."""
        recipe, world, device = self.recipe, self.world, self.sequences.place.device
        batches, groups = len(self.sequences), self.groups
        if recipe.smooth_search:
            if recipe.rotate:  # inputs from the rotated stream have no outlier channels left: a search there would follow noise
                groups = [g for g in groups if g.producer not in self.norms]
            seen = {g: FirstSequences(SEARCHED) for g in groups}
            if batches:
                batches = min(batches, len(world.own(range(-(-SEARCHED // len(self.sequences[0]))))))
        else:
            seen = {g: AbsMax(self.width(g), device) for g in groups}
        observe(self.block, self.sequences, self.name, {self.first(g): (seen[g],) for g in groups}, batches=batches)
        owners = self.owners(groups)
        for g in groups:
            seen[g].reduce(world, owners[g])
        found = {g: self.scale(g, seen.pop(g)) for g in groups if owners[g] == world.rank}
        for g in groups:
            s = world.broadcast({"scale": found.get(g)}, owners[g])["scale"]
            if (s != 1).any():  # else the search found no useful scale, and nothing is divided at run time either
                fold_group(self.block, g, self.linears, self.config, s)
                self.scales |= dict.fromkeys(g.linears, s)

    def scale(self, group, seen):
        """The smoothing scale (C,) of a group, of the FirstSequences or AbsMax of its inputs."""
        weights = [self.linears[n].weight for n in group.linears]
        if self.recipe.smooth_search:
            return search_scale(seen.x, weights, self.recipe, group.rows(self.config))
        return smooth_scale(seen.max, weights, self.recipe.alpha, self.recipe.min)

    def observed(self, step, stream, owners):
        """Statistics of the groups of a step, where needed: {group: FirstSequences}, {group: statistics}, {group: Means}.

        owners: {group: rank}; a process gets those of the groups that it owns.
        """
        recipe, device = self.recipe, self.sequences.place.device
        biased = [g for g in step if recipe.bias_correction and any(self.linears[n].bias is not None for n in g.linears)]
        sample = {g: FirstSequences(1) for g in step}
        stats = {g: resolve_name(self.method.stats)(self.width(g), recipe, device) for g in step} if self.method.stats else {}
        for g, seen in stats.items() if recipe.guided else ():
            seen.weights = self.sequences.weights[g.linears[0]]
        means = {g: Means(self.width(g), recipe, device) for g in biased}
        for g in step if stream else ():
            if g.linears[0] in stream.writers:
                for seen in (stats.get(g), means.get(g)):
                    if hasattr(seen, "give_back"):  # a method of your own need not have it
                        seen.give_back(len(self.first(g).weight))
        observers = {self.first(g): [kind[g] for kind in (sample, stats, means) if g in kind] for g in step}
        observe(self.block, self.sequences, self.name, observers, stream, rest=len(step) == len(self.groups))
        for kind in (sample, stats, means):
            for g, seen in list(kind.items()):
                seen.reduce(self.world, owners[g])
                if owners[g] != self.world.rank:
                    del kind[g]
        return sample, stats, means

    def round_group(self, group, stats):
        """Round linears that read the same input as one matrix, their rows stacked: {name: (codes, Grid)}."""
        weights = [self.linears[n].weight for n in group.linears]
        rows = [len(W) for W in weights]
        name = f"{self.name} {'/'.join(group.linears)}"
        q, grid = resolve_name(self.method.weights)(torch.cat(weights), stats, self.recipe, name)
        grids = (Grid(*part, grid.bits, grid.groupsize) for part in zip(grid.scale.split(rows), grid.zero.split(rows), strict=True))
        return dict(zip(group.linears, zip(q.split(rows), grids, strict=True), strict=True))

    def solve(self, group, stats, means, sample):
        """What becomes of the linears of a group: {NAME and .codes, .scale, .zero, .shift (of the bias) or .error: tensor}.

        stats, means: statistics of the group's inputs, or None where not needed; sample: one sequence of inputs, for the errors.
        """
        codes, found = self.round_group(group, stats) if self.method.weights else {}, {}
        for n in group.linears:
            linear, W, shift = self.linears[n], self.linears[n].weight, 0
            Q = from_int(*codes[n]) if codes else W
            if codes:
                q, grid = codes[n]
                found |= {f"{n}.codes": q, f"{n}.scale": grid.scale, f"{n}.zero": grid.zero}
            if means and linear.bias is not None:
                shift = found[f"{n}.shift"] = means.correction(W, Q)
            error = output_error(W, sample.x[0], Q.to(linear.dtype), self.recipe.acts, shift)
            found[f"{n}.error"] = torch.tensor(error, dtype=torch.float64, device=W.device)
        return found

    def install(self, group, found):
        """Put what `solve` found into the linears of a group; from now on they also quantize their inputs."""
        recipe = self.recipe
        for n in group.linears:
            linear, part = self.linears[n], {key.removeprefix(f"{n}."): t for key, t in found.items() if key.startswith(f"{n}.")}
            if "codes" in part:
                self.codes[n] = part["codes"], Grid(part["scale"], part["zero"], recipe.wbits, recipe.groupsize)
                linear.weight.data = from_int(*self.codes[n])
            if "shift" in part:
                linear.bias += part["shift"]
            linear.freeze(recipe.acts)
            self.layers.append(Layer(self.i, n, part["error"].item()))

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
                owners = self.owners(step)
                with self.clock("statistics"):
                    sample, stats, means = self.observed(step, stream, owners)
                with self.clock("solving" if self.method.weights else "statistics"):
                    found = {g: self.solve(g, stats.pop(g, None), means.get(g), sample[g]) for g in sample}
                    for g in step:
                        self.install(g, self.world.broadcast(found.pop(g, None), owners[g]))
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
    which gets every block and returns those that it has; the processes of its world share the sequences, walk_batch of them at a time.
    place: where the sequences are kept, and the device that works (None: of calibration_place on a CPU).  Raises FloatingPointError, naming
    block and layer, where NaN or Inf turns up.
    """
    if recipe.rotate != isinstance(decoder.source, Rotated):
        raise ValueError("a recipe with rotate is of a decoder that rotate.rotated(decoder, recipe.seed) gave, and only that")
    check_stream(decoder.config, target=recipe.target)
    world = store.world
    place = place or calibration_place(decoder, ids, recipe, torch.device("cpu"))
    clock = clock or Clock(place.device)
    for i in range(store.finished):
        yield [Layer(**layer) for layer in store.layers[i]]
    if store.finished == len(decoder):
        return
    if not recipe.collects:
        ids = ids[:1]  # one sequence is enough for the errors
    batches = world.own(ids.split(walk_batch))
    guidance = {}
    if recipe.guided and METHODS[recipe.method].stats:
        with clock("guidance"):
            guidance = token_weights(decoder, torch.cat([ids[:0], *batches]), place.device, world, store.finished)
    with clock("capture"):
        sequences = decoder.embed(batches, place)
    streams = [sequences, *beside(sequences, decoder, recipe)]
    if store.finished:
        store.restore_inputs(streams)
    for i, block in decoder.visits(place.device, f"quantizing ({recipe.method})", store.finished):
        sequences.weights = guidance.pop(i, None)
        layers, made = BlockQuantizer(i, block, sequences, decoder, recipe, clock, world).run(*streams[1:])
        with clock("writing"):
            store.put(i, made, [asdict(layer) for layer in layers], streams)
        del made, block  # free this block before the next one is read
        yield layers


def beside(sequences, decoder, recipe):
    """The Stream that runs beside the sequences, if the recipe has one."""
    if recipe.target == "layer":
        return []
    if recipe.target == "stream":
        return [Stream(sequences, recipe.target_mix, decoder.config)]
    return [Stream(sequences, 1, decoder.config, decoder.family.residual)]


def calibration_place(decoder, ids, recipe, device, world=ALONE):
    """A Place with room for what is kept of the calibration sequences: hidden states, and with a Stream the inputs of its linears."""
    tokens = ids.numel() // world.size
    return sequences_place(decoder.config, decoder.dtype, tokens, device, streams=kept_states(decoder, recipe))


def kept_states(decoder, recipe):
    """How many hidden states' worth of numbers is kept of each token at most, while a block is quantized."""
    block = decoder.empty_block(0)
    widths = [block.get_submodule(group.linears[0]).in_features for group in decoder.family.groups]
    if recipe.target == "layer":
        return 1 + recipe.true_sequential  # what attention gives: see run.calibrate.repeated
    read = sum(widths[1:]) / decoder.config.hidden_size  # by the linears of the unquantized block; the first are read at once
    return 2 + read + 2 * (recipe.target == "residual")  # both streams, and before each writer the unquantized one
