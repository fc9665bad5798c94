"""SmoothQuant: move the difficulty of activations into the weights.  Xiao et al., "SmoothQuant" (ICML 2023), equations 3 and 4."""

import torch

from families import FAMILIES
from kernels import act_codes
from quant import find_grid

ALPHAS = [i / 10 for i in range(11)]  # that a search tries
TINY = 1e-12


class AbsMax:
    """max |x| of every input channel over all tokens seen: (C,) float32."""

    def __init__(self, columns, device):
        self.max = torch.zeros(columns, device=device)

    def add(self, x):
        """x (B, T, C)"""
        self.max = torch.maximum(self.max, x.abs().flatten(0, -2).amax(0).float())

    def reduce(self, world, owner):
        """The largest of what the processes of a processes.World have seen, at the owner."""
        world.largest(self.max, owner)


def smooth_scale(act_max, weights, alpha, minimum):
    """s = max|x|^alpha / max|w|^(1 - alpha), at least `minimum`: (C,).  weights: all (R, C) that read this input together."""
    weight_max = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0).clamp(min=1e-5)  # a zero column must not give 0/0
    return (act_max**alpha / weight_max ** (1 - alpha)).clamp(min=minimum)


def tie(s, rows):
    """s (C,) made equal, to the largest of them, for columns that come from the same row.  rows: see fold."""
    return s if rows is None else s.new_zeros(int(rows.max()) + 1).scatter_reduce(0, rows.to(s.device), s, "amax")[rows.to(s.device)]


def search_scale(x, weights, recipe, rows=None):
    """The scale (C,) with the least expected rounding error: no smoothing, or s = rms(x)^alpha / rms(w)^(1 - alpha) for ALPHAS.

    x (B, T, C): some of the inputs; weights: all (R, C) that read them.  s has the geometric mean 1 and is at least recipe.min.  With steps
    d of the weight's grid and e of a token's, rounding errors that are uniform and independent make an output error of

        sum_rc d_rc^2 / 12  mean_t x_tc^2 / s_c^2   +   mean_t e_t^2 / 12  sum_rc (w_rc s_c)^2

    The error of a token is divided by its |x_t|^2, and tokens of zeros do not count.  Otherwise one massive token, whose error the next
    norm shrinks again, would decide for all others.
    """
    W, x = torch.cat([W.float() for W in weights]), x.float()
    size = x.square().sum(-1, keepdim=True)  # (B, T, 1)
    share = torch.where(size > 0, 1 / size.clamp(min=TINY), 0)
    energy = (x.square() * share).mean((0, 1)).clamp(min=TINY)  # (C,)
    rms_x, rms_w = energy.sqrt(), W.square().mean(0).clamp(min=TINY).sqrt()

    def expected(s):
        cost, scaled = 0, W * s
        if recipe.wbits < 16:
            grid = find_grid(scaled, recipe.wbits, recipe.groupsize, recipe.sym)
            cost = cost + (grid.columns(grid.scale, len(s)).square().sum(0) * energy / s.square()).sum()
        if recipe.act_bits < 16:
            _, step, _ = act_codes(x / s, *recipe.acts)
            cost = cost + (step.square() * share).mean() * scaled.square().sum()
        return float(cost)

    best = torch.ones_like(energy)
    least = expected(best)
    for alpha in ALPHAS:
        s = rms_x**alpha / rms_w ** (1 - alpha)
        s = tie((s / s.log().mean().exp()).clamp(min=recipe.min), rows)
        if (cost := expected(s)) < least:
            best, least = s, cost
    return best


def fold(s, linears, producer=None, rows=None, offset=0):
    """W <- W * s and x <- x / s, which changes no function.  s (C,); linears: the QuantLinears that read x.

    producer: the norm (weight (C,)) or linear (weight (C, K): its rows) that x comes from and depends on linearly, which takes 1/s; without
    one, the linears divide by `in_scale` at run time.  rows (C,): the row of the producer that each column of x comes from, where several
    come from the same; their scales are made equal, to the largest of them.  offset: the producer multiplies by its weight plus this.
    """
    folded = s
    if producer is not None and rows is not None:
        s = tie(s, rows)
        folded = s.new_ones(len(producer.weight)).scatter(0, rows.to(s.device), s)
    for linear in linears:
        linear.weight.mul_(s)
        linear.in_scale = s if producer is None else None
    for p, plus in ((producer.weight, offset), (getattr(producer, "bias", None), 0)) if producer is not None else ():
        if p is not None:
            p.copy_(((p.float() + plus).movedim(0, -1) / folded).movedim(-1, 0) - plus)


def fold_group(block, group, linears, config, s):
    """Fold a scale s (C,) into the linears, {name: QuantLinear}, of a families.Group, and into their producer if that is exact."""
    family = FAMILIES[config.model_type]
    producer = block.get_submodule(group.producer) if group.exact(config) else None
    offset = family.norm_offset if group.producer in family.residual.norms else 0
    fold(s, [linears[name] for name in group.linears], producer, group.rows(config), offset)
