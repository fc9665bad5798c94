"""AWRQ: round W so that Q @ quant(x) matches W @ x.

At run time a layer sees xq = quant(x) instead of x.  The real-valued weight that best compensates for this is
W* = W + W M (H + lam I)^-1 with H = xq^T xq and M = (x - xq)^T xq; rounding W* with GPTQ's loop on H is AWRQ.
"""

from dataclasses import replace

import torch

import gptq
from kernels import act_codes
from quant import fake_quant_act


class Moments(gptq.Hessian):
    """H = sum of xq^T xq and M = sum of (t - xq)^T xq over all tokens seen, (C, C), each sequence quantized as at run time.

    The target t is the layer's own input x, unless another is given; then the layer also compensates for errors before it.
    """

    def __init__(self, columns, recipe, device):
        super().__init__(columns, recipe, device)
        self.M = torch.zeros_like(self.H)
        self.acts = recipe.acts

    def add(self, x, target=None):
        """x (B, T, C); target, of the same shape: the layer should give W @ target (default: x)."""
        target = x if target is None else target
        bits, per_token, _ = self.acts
        if x.is_cuda and bits <= 8 and not per_token and self.weights is None:
            self.add_codes(x, target)
        else:
            xq = fake_quant_act(x, *self.acts)
            for t, q in zip(self.weighted(target), self.weighted(xq), strict=True):
                gptq.add_product(self.H, q, q)
                gptq.add_product(self.M, t.float() - q.float(), q.float())  # the difference first: that of two products would cancel
            self.sequences += len(x)

    def add_codes(self, x, target):
        """The same, a sequence at a time, for tensor cores: codes less zero are whole numbers of at most 255, exact in float16.

        The difference of the target to them is rounded to float16, which changes M by a thousandth of itself at most.
        """
        self.sequences += len(x)
        codes, scale, zero = act_codes(x, *self.acts)
        for q, t, s in zip(codes.sub_(zero), target.float(), scale.flatten(), strict=True):
            half = q.half()
            gptq.add_product(self.H, half, half, s * s)
            gptq.add_product(self.M, (t / s - q).half(), half, s * s)

    def reduce(self, world, owner):
        super().reduce(world, owner)
        world.add(self.M, owner)

    def finish(self):
        super().finish()
        self.M = self.M.float()

    def finite(self):
        return super().finite() and bool(self.M.isfinite().all())

    def permute(self, order):
        super().permute(order)
        self.M = self.M[order]
        self.M = self.M[:, order]


class Drift(Moments):
    """Moments of inputs that are not quantized, for GPTQ: M = sum of (t - x)^T x is what went wrong before the layer."""

    def __init__(self, columns, recipe, device):
        super().__init__(columns, replace(recipe, act_bits=16), device)


def reformulate(W, M, U):
    """W* = W + W M H^-1: the real-valued weight that best undoes activation rounding.  W (R, C), M (C, C), U upper (C, C), U^T U = H^-1."""
    return W + torch.linalg.multi_dot((W, M, U.T, U))


def quantize(W, stats, recipe, name):
    """AWRQ on W (R, C) with stats, unfinished Moments, which it overwrites: q (R, C) uint8 and its Grid.  Raises as gptq.quantize does."""
    return gptq.quantize(W, stats, recipe, name, target=lambda W, U: reformulate(W, stats.M, U))
