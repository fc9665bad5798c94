"""SmoothQuant: move the difficulty of activations into the weights.  Xiao et al., "SmoothQuant" (ICML 2023), equations 3 and 4."""

import torch

from quant import fake_quant_act, from_int, rtn

STEPS = (0, -0.15, 0.15, -0.3, 0.3)  # what a search adds to alpha
WORTH = 0.85  # of the output error without smoothing: what smoothing must get below to be worth it


class AbsMax:
    """max |x| of every input channel over all tokens seen: (C,) float32."""

    def __init__(self, columns, device):
        self.max = torch.zeros(columns, device=device)

    def add(self, x):
        """x (B, T, C)"""
        self.max = torch.maximum(self.max, x.abs().flatten(0, -2).amax(0).float())


def smooth_scale(act_max, weights, alpha, minimum):
    """s = max|x|^alpha / max|w|^(1 - alpha), at least `minimum`: (C,).  weights: all (R, C) that read this input together."""
    weight_max = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0).clamp(min=1e-5)  # a zero column must not give 0/0
    return (act_max**alpha / weight_max ** (1 - alpha)).clamp(min=minimum)


def tie(s, rows):
    """s (C,) made equal, to the largest of them, for columns that come from the same row.  rows: see fold."""
    return s if rows is None else s.new_zeros(len(s)).scatter_reduce(0, rows.to(s.device), s, "amax")[rows.to(s.device)]


def search_scale(x, weights, recipe, rows=None):
    """The smooth_scale, of those with alphas around recipe.alpha, with the least output error |W x - Q xq| of all weights together: (C,).

    x (B, T, C): some of the inputs.  Activations and weights, all (R, C), are rounded to nearest.  That is but a guess at what the solver
    makes of them, so a scale must gain as much as WORTH says on no smoothing at all; else all are 1.
    """
    W, act_max = torch.cat([W.float() for W in weights]), x.abs().flatten(0, -2).amax(0).float()
    y = x.float() @ W.T

    def lost(s):
        xq = fake_quant_act((x / s).to(x.dtype), *recipe.acts).float()
        Q = W * s if recipe.wbits == 16 else from_int(*rtn(W * s, None, recipe, "search"))
        return torch.linalg.vector_norm(y - xq @ Q.T, dtype=torch.float64).item()

    best = torch.ones_like(act_max)
    least = WORTH * lost(best)
    for alpha in dict.fromkeys(min(max(recipe.alpha + step, 0), 1) for step in STEPS):
        s = tie(smooth_scale(act_max, weights, alpha, recipe.min), rows)
        if (error := lost(s)) < least:
            best, least = s, error
    return best


def fold(s, linears, producer=None, rows=None):
    """W <- W * s and x <- x / s, which changes no function.  s (C,); linears: the QuantLinears that read x.

    producer: the norm (weight (C,)) or linear (weight (C, K): its rows) that x comes from and depends on linearly, which takes 1/s; without
    one, the linears divide by `in_scale` at run time.  rows (C,): the row of the producer that each column of x comes from, where several
    come from the same; their scales are made equal, to the largest of them.
    """
    folded = s
    if producer is not None and rows is not None:
        s = tie(s, rows)
        folded = s.new_ones(len(producer.weight)).scatter(0, rows.to(s.device), s)
    for linear in linears:
        linear.weight.mul_(s)
        linear.in_scale = s if producer is None else None
    for p in (producer.weight, getattr(producer, "bias", None)) if producer is not None else ():
        if p is not None:
            p.copy_((p.float().movedim(0, -1) / folded).movedim(-1, 0))


def fold_group(block, group, linears, config, s):
    """Fold a scale s (C,) into the linears, {name: QuantLinear}, of a modelutils.Group, and into their producer if that is exact."""
    producer = block.get_submodule(group.producer) if group.exact(config) else None
    fold(s, [linears[name] for name in group.linears], producer, group.rows(config))
