"""AWRQ: round W so that Q @ quant(x) matches W @ x.

At run time a layer sees xq = quant(x) instead of x.  The real-valued weight that best compensates for this is
W* = W + W M (H + lam I)^-1 with H = xq^T xq and M = (x - xq)^T xq; rounding W* with GPTQ's loop on H is AWRQ.

Beyond the paper, with another --target, W* also makes up for errors of the layers before.  In M, x is then, in part or wholly, what
the layer reads in the unquantized model (QEP: Arai and Ichikawa, 2025); and layers that add to the residual stream give back what
that has lost (LoaQ: Lin and Wan, 2025).
"""

from dataclasses import replace

import torch

import gptq
from kernels import act_codes
from quant import fake_quant_act

FIT_DAMP = 1  # as percdamp, of a weight that is fitted to the unquantized model's stream


class Moments(gptq.Hessian):
    """H = sum of xq^T xq and M = sum of (t - xq)^T xq over all tokens seen, (C, C), each sequence quantized as at run time.

    The target t is the layer's own input x, unless another is given; then the layer also compensates for errors before it.
    R = sum of lost^T xq, (R, C), of a layer that is to give back what the residual stream has lost before it; else None.
    """

    def __init__(self, columns, recipe, device):
        super().__init__(columns, recipe, device)
        self.M, self.R = torch.zeros_like(self.H), None
        self.acts = recipe.acts

    def give_back(self, rows):
        """Be told what the stream has lost, (B, T, rows), in every `add`."""
        self.R = torch.zeros(rows, len(self.H), dtype=torch.float64, device=self.H.device)

    def add(self, x, target=None, lost=None):
        """x (B, T, C); target, of the same shape: the layer should give W @ target (default: x), plus lost (B, T, R), if there is an R."""
        bits, per_token, _ = self.acts
        if x.is_cuda and bits <= 8 and not per_token and target is None and self.weights is None:
            self.add_codes(x)
            return
        target = x if target is None else target
        xq = fake_quant_act(x, *self.acts)
        parts = (target, xq) if lost is None else (target, xq, lost)
        for t, q, *e in zip(*map(self.weighted, parts), strict=True):
            gptq.add_product(self.H, q, q)
            gptq.add_product(self.M, t.float() - q.float(), q.float())  # the difference first: that of two products would cancel
            if e:
                gptq.add_product(self.R, *e, q)
        self.sequences += len(x)

    def add_codes(self, x):
        """The same for its own input, a sequence at a time, for tensor cores: codes less zero are whole numbers of at most 255.

        They are exact in float16.  What rounding took is rounded to it, which changes M by a thousandth of itself at most.
        """
        self.sequences += len(x)
        codes, scale, zero = act_codes(x, *self.acts)
        for q, t, s in zip(codes.sub_(zero), x.float(), scale.flatten(), strict=True):
            half = q.half()
            gptq.add_product(self.H, half, half, s * s)
            gptq.add_product(self.M, (t / s - q).half(), half, s * s)

    def reduce(self, world, owner):
        super().reduce(world, owner)
        world.add(self.M, owner)
        if self.R is not None:
            world.add(self.R, owner)

    def finish(self):
        super().finish()
        self.M = self.M.float()
        self.R = None if self.R is None else self.R.float()

    def finite(self):
        return super().finite() and all(bool(s.isfinite().all()) for s in (self.M, self.R) if s is not None)

    def permute(self, order):
        super().permute(order)
        self.M = self.M[order]
        self.M = self.M[:, order]
        self.R = None if self.R is None else self.R[:, order]


class Drift(Moments):
    """Moments of inputs that are not quantized, for GPTQ: M = sum of (t - x)^T x is what went wrong before the layer."""

    def __init__(self, columns, recipe, device):
        super().__init__(columns, replace(recipe, act_bits=16), device)


def reformulate(W, M, U, R=None):
    """W* = W + W M H^-1: the real-valued weight that best undoes activation rounding.  W (R, C), M (C, C), U upper (C, C), U^T U = H^-1.

    R (R, C): then + R H^-1, what the layer gives besides.
    """
    star = W + torch.linalg.multi_dot((W, M, U.T, U))
    return star if R is None else star + torch.linalg.multi_dot((R, U.T, U))


def quantize(W, stats, recipe, name):
    """AWRQ on W (R, C) with stats, unfinished Moments, which it overwrites: q (R, C) uint8 and its Grid.  Raises as gptq.quantize does."""

    def target(W, U):
        if recipe.target == "residual":  # what went wrong before depends on a layer's inputs little, and mostly on the sequences at hand
            U = gptq.inverse_factor(stats.H, FIT_DAMP, name)
        return reformulate(W, stats.M, U, stats.R)

    return gptq.quantize(W, stats, recipe, name, target)
