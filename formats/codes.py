"""Codes as bytes: how a quantized linear lies on disk, and the order of bits that other formats share."""

import torch
import torch.nn.functional as F

from quant import Grid
from recipe import UsageError

PACKED = (3, 4)  # widths whose codes share bytes in our folders
CHUNK = 2**19  # bytes that are packed or unpacked together
PARTS = ("codes", "scale", "zero")  # of a linear, besides its bias and in_scale


def dense(q, bits):
    """Codes (R, C) uint8 without a gap, the first in the lowest bits of a row: (R, ceil(C * bits / 8)) uint8."""
    bytes_ = -(-q.shape[1] * bits // 8)
    word = torch.int32 if bits <= 4 else torch.int64  # of eight codes

    def packed(q):
        words = F.pad(q, (0, -q.shape[1] % 8)).unflatten(1, (-1, 8)).to(word) << bits * torch.arange(8, dtype=word)
        return words.sum(2, dtype=word).unsqueeze(2).view(torch.uint8)[..., :bits].flatten(1)[:, :bytes_]

    return by_rows(packed, q)


def pack(q, bits):
    """Codes (R, C) uint8 as they lie on disk: (R, ceil(C * bits / 8)) uint8 for 3 and 4 bits, as they are for others."""
    return dense(q, bits) if bits in PACKED else q


def unpack(packed, bits, C):
    """The codes (R, C) uint8 that `pack` was given."""
    if bits not in PACKED:
        return packed

    def codes(packed):
        packed = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
        words = F.pad(packed, (0, 4 - bits)).view(torch.int32)
        return (words >> bits * torch.arange(8, dtype=torch.int32) & 2**bits - 1).to(torch.uint8).flatten(1)[:, :C]

    return by_rows(codes, packed)


def by_rows(function, t):
    """function(t) of t (R, N), a few rows at a time: its words take many times the memory of the codes."""
    return torch.cat([function(rows) for rows in t.split(max(1, CHUNK // t.shape[1]))])


def packed_linear(name, q, grid, bits):
    """Codes (R, C) and Grid of a linear as they are stored: {name: tensor}."""
    zero = grid.zero.to(torch.uint8)  # whole numbers, 0 to 2^bits - 1
    return {f"{name}.codes": pack(q.cpu(), bits), f"{name}.scale": grid.scale.cpu(), f"{name}.zero": zero.cpu()}


def packed_shapes(shape, recipe):
    """{part: (shape, type)} of a linear of shape (R, C) as it is stored."""
    R, C = shape
    G = 1 if recipe.groupsize == -1 else -(-C // recipe.groupsize)
    codes = (R, -(-C * recipe.wbits // 8) if recipe.wbits in PACKED else C)
    return {"codes": (codes, torch.uint8), "scale": ((R, G), torch.float32), "zero": ((R, G), torch.uint8)}


def unpacked_linear(tensors, name, shape, recipe):
    """The codes (R, C) and the Grid of a linear of shape (R, C) in {name: tensor}.  Raises UsageError if that is not what is there."""
    found = []
    for suffix, (expected, _) in packed_shapes(shape, recipe).items():
        found.append(tensors.get(f"{name}.{suffix}", torch.empty(0)))
        if found[-1].shape != expected:
            raise UsageError(f"{name}.{suffix}: {tuple(found[-1].shape)}, should be {expected}; config.json is of another model")
    packed, scale, zero = found
    return unpack(packed, recipe.wbits, shape[1]), Grid(scale, zero.float(), recipe.wbits, recipe.groupsize)


def without_codes(tensors, linears):
    """What {name: tensor} has besides the codes and grids of these linears."""
    packed = {f"{name}.{part}" for name in linears for part in PARTS}
    return {name: t for name, t in tensors.items() if name not in packed}
