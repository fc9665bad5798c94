"""What a quantized number is: the grid, rounding, fake-quantized activations and the linear layer that uses them."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import act_codes

# ---------------------------------------------------------------------------
# Weights


@dataclass
class Grid:
    """The grid of a weight (R, C): w ~ scale * (q - zero).  scale, zero (R, G) float32, one column per group of columns."""

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    groupsize: int  # columns per group, -1: all of them; the last group may be shorter

    def columns(self, p, C):
        """Spread p, which is `scale` or `zero`, from groups (R, G) to columns: (R, C), or (R, 1) if there is one group."""
        return p if p.shape[1] == 1 else p.repeat_interleave(self.groupsize, 1)[:, :C]


CLIPS = {  # what rounding to a clipped grid costs: error (R, G, g), importance (G, g) of the columns -> (R, G, g); None: nothing is clipped
    "none": None,
    "mse": lambda error, importance: error.abs().pow(2.4),  # GPTQ's exponent
    "hessian": lambda error, importance: error.square().mul_(importance),
}
SHARES = [1 - i / 50 for i in range(36)]  # of a range that may be left
CHUNK = 2**22  # weights looked at together


def find_grid(W, bits, groupsize=-1, sym=False, clip="none", importance=None):
    """Min-max grid of W (R, C) per row and group; 0 is always on it, so a row of zeros stays zero.

    clip: a key of CLIPS; each range then shrinks to the share, of SHARES, at which rounding W costs least.  importance (C,): how much an
    error in a column counts, for "hessian" (None: all alike).
    """
    W = W.float()
    g = W.shape[1] if groupsize == -1 else groupsize
    W = F.pad(W, (0, -W.shape[1] % g)).unflatten(1, (-1, g))  # (R, G, g): padding with 0 moves no range that includes 0
    lo, hi = W.amin(2).clamp(max=0), W.amax(2).clamp(min=0)
    if sym:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    scale = (hi - lo) / (2**bits - 1)
    scale[scale == 0] = 1
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-lo / scale)
    if CLIPS[clip]:
        importance = W.new_ones(1) if importance is None else F.pad(importance, (0, -len(importance) % g)).view(-1, g)
        rows = max(1, CHUNK // W[0].numel())
        parts = zip(*(t.split(rows) for t in (W, scale, zero)), strict=True)
        scale = torch.cat([shrink(*part, bits, partial(CLIPS[clip], importance=importance)) for part in parts])
    return Grid(scale, zero, bits, groupsize)


def shrink(W, scale, zero, bits, cost):
    """The scales (R, G), shares of the given, at which rounding W (R, G, g) costs least.  A share of a range has the zero of the whole."""
    best, least = scale, torch.full_like(scale, torch.inf)
    z = zero.unsqueeze(2)
    for share in SHARES:
        s = (share * scale).unsqueeze(2)
        error = torch.round(W / s).add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s).sub_(W)
        lost = cost(error).sum(2)
        best, least = torch.where(lost < least, share * scale, best), torch.minimum(least, lost)
    return best


def to_int(W, grid):
    """Round W (R, C) to the nearest point of its grid: (R, C) uint8."""
    scale, zero = (grid.columns(p, W.shape[1]) for p in (grid.scale, grid.zero))
    return torch.round(W.float() / scale).add_(zero).clamp_(0, 2**grid.bits - 1).to(torch.uint8)


def from_int(q, grid):
    """The weight that the codes q (R, C) uint8 stand for: (R, C) float32."""
    scale, zero = (grid.columns(p, q.shape[1]) for p in (grid.scale, grid.zero))
    return (q - zero).mul_(scale)


def rtn(W, stats, recipe, name):
    """Round to nearest, the baseline.  W (R, C) -> q (R, C) uint8, Grid.  Needs no statistics."""
    grid = find_grid(W, recipe.wbits, recipe.groupsize, recipe.sym, recipe.clip)
    return to_int(W, grid), grid


# ---------------------------------------------------------------------------
# Activations


def fake_quant_act(x, bits, per_token=False, sym=False):
    """Quantize and dequantize x (B, T, C), per sequence or per token, in the type of x: see kernels.act_codes."""
    if bits >= 16:
        return x
    q, scale, zero = act_codes(x, bits, per_token, sym)
    return q.sub_(zero).mul_(scale).to(x.dtype)


class Means:
    """The mean output error of a linear, from the means (C,) of its target and of its quantized input over all tokens seen."""

    def __init__(self, columns, recipe, device):
        self.target, self.seen = torch.zeros(2, columns, dtype=torch.float64, device=device)
        self.lost = None  # (R,), if the linear is to give more than the unrounded weight does; see run.calibrate.Stream
        self.tokens, self.acts = 0, recipe.acts

    def give_back(self, rows):
        """Be told what the stream has lost, (B, T, rows), in every `add`."""
        self.lost = torch.zeros(rows, dtype=torch.float64, device=self.seen.device)

    def add(self, x, target=None, lost=None):
        """x (B, T, C); target, of its shape: what the unrounded weight is applied to, if not x; lost (B, T, R): what comes on top."""

        def total(x):
            return x.flatten(0, -2).sum(0, dtype=torch.float64)

        self.target += total(x if target is None else target)
        self.seen += total(fake_quant_act(x, *self.acts))
        self.tokens += x.shape[:-1].numel()
        if lost is not None:
            self.lost += total(lost)

    def reduce(self, world, owner):
        """Add up what the processes of a processes.World have seen, at the owner."""
        self.tokens = world.total(self.tokens)
        for mean in (self.target, self.seen, self.lost):
            if mean is not None:
                world.add(mean, owner)

    def correction(self, W, Q):
        """What to add to the bias when W (R, C) becomes Q: W mean(target) + mean(lost) - Q mean(xq), (R,) float32."""
        lost = 0 if self.lost is None else self.lost
        return ((W.double() @ self.target + lost - Q.double() @ self.seen) / self.tokens).float()


class Batch:
    """The sequences that run through a model now: its blocks report how many, its linears read it, as OPT flattens x to (B * T, C).

    `with model.batch.padded(attention_mask.bool()): model(ids)` tells the quantized linears of a model what is padding.
    """

    size = 1
    real = None  # (B, T) bool: which tokens are no padding; None: all
    outer = None  # `real` around the call of a whole model

    def observe(self, block, args, kwargs):
        """Forward pre-hook of a decoder block, whose first input is (B, T, D)."""
        self.size = (args[0] if args else kwargs["hidden_states"]).shape[0]

    def attach(self, model):
        """Let every call of a whole model with a mask of tokens, attention_mask (B, T), say what is padding, as `padded` does."""
        model.register_forward_pre_hook(self._announced, with_kwargs=True)
        model.register_forward_hook(self._forgotten, always_call=True)

    def _announced(self, model, args, kwargs):
        self.outer, mask = self.real, kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            ids = args[0] if args else kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            mask = mask[:, -ids.shape[1] :].bool()  # with a cache, it has the tokens before too
            self.real = None if ids.shape[1] == 1 or mask.all() else mask

    def _forgotten(self, *_):
        self.real = self.outer

    @contextmanager
    def padded(self, real):
        """While it lasts, the batches that run have padding: real (B, T) bool says which tokens are none; None: all."""
        self.real = None if real is None or real.all() else real
        try:
            yield
        finally:
            self.real = None

    def split(self, x):
        """x as (B, T, C), its padding zero: as every range includes 0, a sequence is then quantized as it would be alone."""
        x = x.reshape(self.size, -1, x.shape[-1])
        if self.real is None or x.shape[1] == 1:  # a step of a generation: the token just made
            return x
        assert self.real.shape == x.shape[:2], f"{tuple(self.real.shape)} tokens announced, {tuple(x.shape)} met"
        return x.masked_fill(~self.real[..., None], 0)


class Scaled(nn.Module):
    """What linears with a `batch` and an `in_scale`, (C,) or None, have in common."""

    def smoothed(self, x):
        """The input as this layer's weight sees it before rounding: (B, T, C), divided by in_scale; zero where there is padding."""
        x = self.batch.split(x)
        return x if self.in_scale is None else (x / self.in_scale).to(x.dtype)

    def _apply(self, fn, recurse=True):
        """Of nn.Module, for `half`, `to` and the like.  Buffers keep their type, as scales are float32 in a model of any type."""

        def applied(t):
            made = fn(t)
            return made if isinstance(t, nn.Parameter) or made.dtype == t.dtype else t.to(made.device)

        return super()._apply(applied, recurse)


class QuantLinear(Scaled):
    """A linear layer with fake-quantized weight and activations: y = Wq @ quant(x / in_scale) + b.

    Made from an nn.Linear (or one like it), whose function it has until it is given fewer bits.  Weight and bias are float32 while the
    block is worked on, so that smoothing and rounding see no half precision; `freeze` gives them the model's type.
    """

    def __init__(self, linear, batch):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.weight = nn.Parameter(linear.weight.float(), requires_grad=False)  # (R, C)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float(), requires_grad=False)
        self.register_buffer("in_scale", None)  # (C,) where no preceding weight can absorb 1/s
        self.acts = (16,)  # see Recipe.acts
        self.batch = batch
        self.stored = None  # {part: tensor} that it was made of, if it comes from a store, in host memory: see formats.codes

    def freeze(self, acts):
        """Quantize activations from now on, and keep weight and bias in the model's type.  acts: see Recipe.acts."""
        self.acts = acts
        self.weight.data = self.weight.to(self.dtype)
        if self.bias is not None:
            self.bias.data = self.bias.to(self.dtype)

    def forward(self, x):
        xq = fake_quant_act(self.smoothed(x), *self.acts)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(xq, self.weight.to(x.dtype), bias).view(*x.shape[:-1], -1)

    def extra_repr(self):
        R, C = self.weight.shape
        return f"{C}, {R}, bias={self.bias is not None}, acts={self.acts}"


def replace_linears(block, names, batch):
    """Put a QuantLinear in place of each of these linears of a block, which reports to `batch`: {name: QuantLinear}."""
    linears = {name: QuantLinear(block.get_submodule(name), batch) for name in names}
    for name, linear in linears.items():
        block.set_submodule(name, linear)
    block.register_forward_pre_hook(batch.observe, with_kwargs=True)
    return linears


def producer_of(linear):
    """The kernels.Producer of an IntLinear, or one like it."""
    norm = () if linear.norm is None else (linear.norm.weight, linear.norm.eps)
    return kernels.Producer(*norm, gated=linear.gated)


class IntLinear(Scaled):
    """Quantized linears that read the same input as one, in integers: y = Wq @ quant(x / in_scale) + b, as kernels.w4a8_linear does it.

    Made from frozen QuantLinears and, of each, the codes q (R, C) uint8 and the Grid of its weight, of at most 4 bits; y has all rows.
    With a `norm`, a DeferredNorm, x is what the norm reads; where it is `gated`, x is gate and up, side by side.  Neither with in_scale.
    y has the type of x, or the one that the norm makes of it.
    """

    def __init__(self, linears, codes, kernel=None):
        super().__init__()
        q, scale, zero = (torch.cat(parts) for parts in zip(*((q, grid.scale, grid.zero) for q, grid in codes), strict=True))
        biases = [
            torch.zeros(len(q), device=q.device) if m.bias is None else m.bias.float() for m, (q, _) in zip(linears, codes, strict=True)
        ]
        for name, value in kernels.prepare(q, scale, zero, codes[0][1].groupsize, torch.cat(biases))._asdict().items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.register_buffer("in_scale", linears[0].in_scale)
        self.acts, self.batch, self.kernel = linears[0].acts, linears[0].batch, kernel
        self.biased = [m.bias is not None for m in linears]
        self.norm, self.gated = None, False

    def forward(self, x):
        weight = kernels.Weight(*(getattr(self, name) for name in kernels.Weight._fields))
        made, producer = self.smoothed(x), producer_of(self)
        if producer.norm is not None and producer.norm.dtype != x.dtype:  # what the norm makes then has the wider type, which no pass knows
            made, producer = producer(made), kernels.NOTHING
        y = kernels.w4a8_linear(made.contiguous(), weight, *self.acts, kernel=self.kernel, producer=producer)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self):
        return f"{self.columns}, {self.rows}, groupsize={self.groupsize}, acts={self.acts}"


class Together(nn.Module):
    """Linears that read the same input, made one: the first of them that meets an input has all computed, each takes its rows of that."""

    def __init__(self, whole, rows):
        """whole: the one linear; rows: how many of its rows are those of each."""
        super().__init__()
        self.whole, self.rows = whole, rows
        self.x, self.left = None, {}  # the last input, while not all have their part of {index: y}

    def take(self, index, x):
        if x is not self.x or index not in self.left:
            self.x, self.left = x, dict(enumerate(self.whole(x).split(self.rows, -1)))
        y = self.left.pop(index)
        if not self.left:
            self.x = None
        return y


class Part(nn.Module):
    """One of the linears of a Together, at its place in a block."""

    def __init__(self, index, together):
        super().__init__()
        self.index, self.together = index, together
        self.start, self.rows = sum(together.rows[:index]), together.rows[index]

    def forward(self, x):
        return self.together.take(self.index, x)


def put_together(block, names, whole, rows):
    """Put one linear in the place of some of a block that read the same input and have so many rows."""
    together = Together(whole, rows)
    for i, name in enumerate(names):
        block.set_submodule(name, Part(i, together) if len(names) > 1 else whole)


# ---------------------------------------------------------------------------
# A block that computes in integers


class DeferredNorm(nn.Module):
    """An RMSNorm that passes its input on: the linears that read it normalize in the pass that quantizes.  Padding, zero, stays zero."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return x

    def extra_repr(self):
        return f"{len(self.weight)}, eps={self.eps}"


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), whose product is made in the pass that quantizes it for down_proj."""

    def __init__(self, mlp):
        """mlp: with gate_proj and up_proj as one, see put_together, and an IntLinear down_proj without in_scale."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.down_proj.gated = True

    def forward(self, x):
        return self.down_proj(self.gate_proj.together.whole(x))


def use_integers(block, family, config, codes, kernel):
    """Put IntLinears in the place of the frozen QuantLinears of a block, those that read the same input as one.

    family: of families.FAMILIES.  codes: {name: (q (R, C) uint8, Grid)} of the linears; kernel: of kernels.w4a8_linear.  Norms and gates
    that the family has in front of them become part of their quantization.
    """
    for group in family.groups:
        linears = [block.get_submodule(name) for name in group.linears]
        pairs = [codes[name] for name in group.linears]
        whole = IntLinear(linears, pairs, kernel)
        put_together(block, group.linears, whole, [len(q) for q, _ in pairs])
    defer_producers(block, family, config)


def defer_producers(block, family, config):
    """Let the IntLinears of a block, put together, compute the norm or the gate in front of them, where they have no in_scale."""
    for group in family.groups:
        first = block.get_submodule(group.linears[0])
        whole = first.together.whole if isinstance(first, Part) else first
        if group.producer in family.rms_norms and whole.in_scale is None:
            norm = DeferredNorm(block.get_submodule(group.producer))
            block.set_submodule(group.producer, norm)
            vars(whole)["norm"] = norm  # not registered once more: its weight has the one name that the family's has
    if family.mlp and config.hidden_act in ("silu", "swish") and block.get_submodule(family.mlp).down_proj.in_scale is None:
        block.set_submodule(family.mlp, GatedMLP(block.get_submodule(family.mlp)))
