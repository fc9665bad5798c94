"""Rotation: the same function, in a basis in which rounding loses less.

Ashkboos et al., "QuaRot" (NeurIPS 2024); Liu et al., "SpinQuant" (2024), whose R1 and R2 these are: an orthogonal Q on the residual stream,
and one on each head of values, are multiplied into the weights once.  What enters a linear then has no outlier channels, and nothing is
computed at run time.  RMSNorm takes any Q; LayerNorm subtracts the mean, so there Q keeps the ones: Q 1 = 1.
"""

import random
from copy import deepcopy

import torch

from families import FAMILIES
from modelutils import Decoder, skeleton
from recipe import UsageError

LARGEST = 64  # of the Hadamard factors: two products with 64 columns are faster than one with 4096
CHUNK = 2**20  # numbers that are rotated together


# ---------------------------------------------------------------------------
# Orthogonal matrices


def hadamard(n):
    """Of order n, a power of two, orthogonal: (n, n) float64.  Its first column is constant (Sylvester 1867)."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / n**0.5


def random_orthogonal(n, generator):
    """A random orthogonal matrix (n, n) float64 whose first column is constant."""
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A[:, 0] = 1
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal().sign()


def factors(n, generator):
    """Matrices whose Kronecker product is an orthogonal (n, n): Hadamard for the power of two in n, random for the odd rest."""
    power = n & -n
    found = [random_orthogonal(n // power, generator)] if power < n else []
    while power > 1:
        found.append(hadamard(min(power, LARGEST)))
        power //= len(found[-1])
    return found


def times_kronecker(x, matrices):
    """x (..., n) times the Kronecker product of matrices, which is never made."""
    shape = x.shape
    for M in matrices:  # each time the leading factor's axis goes to the end, until all are in order again
        x = x.reshape(-1, len(M), shape[-1] // len(M)).transpose(1, 2) @ M
    return x.reshape(shape)


class Rotation:
    """An orthogonal Q (n, n), made from a seed."""

    def __init__(self, n, seed, keeps_ones=False):
        """seed: a text; keeps_ones: whether Q 1 = 1."""
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        self.n, self.factors, self.keeps_ones = n, factors(n, generator), keeps_ones
        self.signs = 2 * torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) - 1
        self.signs[0] = 1  # of the ones, where they are kept

    def __call__(self, x, dtype, gain=None):
        """x Q, or x diag(gain) Q, for x (..., n) and gain (n,): in `dtype`, computed in float64 a few rows at a time."""
        parts = x.reshape(-1, self.n).split(max(1, CHUNK // self.n))
        return torch.cat([self._of_rows(part.double() if gain is None else part.double() * gain).to(dtype) for part in parts]).view(x.shape)

    def _of_rows(self, x):
        if self.keeps_ones:  # Q = H diag(s) H^T, where the first column of H is constant and s[0] = 1
            return times_kronecker(times_kronecker(x, self.factors) * self.signs, [M.T for M in self.factors])
        return times_kronecker(x * self.signs, self.factors)


# ---------------------------------------------------------------------------
# Decoders


def rotated(decoder, seed):
    """The same Decoder, rotated; its head is not tied to the embedding.  Raises UsageError if that would change its function."""
    config = deepcopy(decoder.config)
    config.tie_word_embeddings = False
    empty = skeleton(config, decoder.dtype)
    empty.generation_config = decoder.skeleton.generation_config
    return Decoder(empty, Rotated(decoder, seed), decoder.stored_dtype)


def check_stream(config, rotate=False, target="layer"):
    """Raises UsageError for --rotate and --target residual where the residual stream is not the plain sum that both rely on."""
    remedies = {"--rotate": "--no-rotate"} if rotate else {}
    if target == "residual":
        remedies["--target residual"] = "--target stream"
    if remedies and (reason := FAMILIES[config.model_type].residual.obstacle(config)):
        raise UsageError(f"{' '.join(remedies)}: {reason}; give {' '.join(remedies.values())}")


def untying(decoder):
    """Bytes that a rotated Decoder needs more because its head is no longer tied to the embedding; 0 if it was not."""
    head = decoder.skeleton.get_output_embeddings().weight
    return head.numel() * decoder.stored_dtype.itemsize if decoder.source.original.source.tied else 0


class Rotated:
    """The tensors of a Decoder, rotated: the source of another one (see formats.original.Original)."""

    def __init__(self, original, seed):
        """Raises UsageError if the function would change."""
        check_stream(original.config, rotate=True)
        self.original, self.config, self.residual, self.seed = original, original.config, original.family.residual, seed
        self.offset = original.family.norm_offset
        self.Q = Rotation(self.config.hidden_size, f"{seed} stream", self.residual.centered)
        self.tied = {}
        self.rest(self._end)  # what cannot be folded is found now

    @property
    def _end(self):
        """Names of the tensors of the final norm and the head."""
        modules = (self.residual.final_norm, self.residual.head)
        return {name for name in self.original.skeleton.state_dict() if name.rpartition(".")[0] in modules}

    @property
    def arithmetic(self):
        return f"{self.original.source.arithmetic}, rotated"

    def digest(self, i=None):
        return self.original.source.digest(i)

    def build(self, block, tensors, batch):
        return self.original.source.build(block, tensors, batch)

    def read(self, i):
        """Linears in the type that is computed with, as they are to be rounded; norms are 1, in any type."""
        tensors, dtype = dict(self.original.source.read(i)), self.original.dtype
        groups = {group.producer: group for group in self.original.family.groups}
        for norm in self.residual.norms:
            fold_norm(tensors, norm, groups[norm].linears, self.Q, dtype, self.offset)
        for name in self.residual.writers:
            tensors[f"{name}.weight"] = self.Q(tensors[f"{name}.weight"].T, dtype).T.contiguous()
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = self.Q(tensors[f"{name}.bias"], dtype)
        values, reader = self.residual.values
        Q = Rotation(tensors[f"{reader}.weight"].shape[1] // self.config.num_attention_heads, f"{self.seed} values {i}")
        rotate_values(tensors, values, reader, groups[values].rows(self.config), Q, dtype)
        return tensors

    def rest(self, names):
        """Embedding and positions, final norm and head, in the type that they are stored in, so that what is measured is what is saved."""
        own, residual, dtype, names = self.original.source, self.residual, self.original.stored_dtype, set(names)
        end, readers = self._end, (residual.head,)
        head = {name for name in end if name.rpartition(".")[0] == residual.head}
        if not head & names and f"{residual.final_norm}.bias" not in end:  # the norm multiplies by 1 then, whatever the head is
            end, readers = end - head, ()
        wanted = names | end if end & names else names
        found = own.rest({own.tied.get(name, name) for name in wanted})
        tensors = {name: found[own.tied.get(name, name)] for name in wanted}
        for name in tensors.keys() & {f"{module}.weight" for module in residual.embeddings}:
            tensors[name] = self.Q(tensors[name], dtype)
        if end & names:
            fold_norm(tensors, residual.final_norm, readers, self.Q, dtype, self.offset)
        return {name: tensors[name].to(dtype) for name in names}


def fold_norm(tensors, norm, readers, Q, dtype, offset=0):
    """Fold what a norm multiplies by and adds into the linears that read it, and rotate their inputs.

    tensors: {name: tensor}, changed in place; offset: the norm multiplies by its weight plus this.  Linears without a bias cannot take what
    is added: the norm goes on to add it, rotated.  Raises UsageError where the norm multiplies that by zero.
    """
    weight, shift = (tensors.get(f"{norm}.{part}") for part in ("weight", "bias"))
    gain, shift = None if weight is None else weight.double() + offset, None if shift is None else shift.double()
    biased = all(f"{name}.bias" in tensors for name in readers)
    for name in readers:
        W = tensors[f"{name}.weight"]
        if shift is not None and biased:
            tensors[f"{name}.bias"] = (tensors[f"{name}.bias"].double() + W.double() @ shift).to(dtype)
        tensors[f"{name}.weight"] = Q(W, dtype, gain)
    if gain is not None:
        tensors[f"{norm}.weight"] = torch.full_like(gain, 1 - offset, dtype=dtype)
    if shift is not None:
        if not biased and (gain == 0).any():
            raise UsageError(f"--rotate: {norm}.weight has a zero, so what the norm adds there would be lost; give --no-rotate")
        tensors[f"{norm}.bias"] = torch.zeros_like(shift, dtype=dtype) if biased else Q(shift / gain, dtype)


def rotate_values(tensors, values, reader, rows, Q, dtype):
    """Rotate each head of values, in the linear that makes it and in the one that reads it: attention mixes tokens, not channels.

    tensors: {name: tensor}, changed in place; values, reader: names of the linears; rows (C,): those of the former that are values, or
    None for all; Q: the Rotation of a head.
    """
    rows = slice(None) if rows is None else rows.unique()
    for name in (f"{values}.weight", f"{values}.bias"):
        if (t := tensors.get(name)) is not None:
            tensors[name] = t.to(dtype, copy=True)
            of_heads = t[rows].unflatten(0, (-1, Q.n)).movedim(1, -1)
            tensors[name][rows] = Q(of_heads, dtype).movedim(-1, 1).flatten(0, 1)
    W = tensors[f"{reader}.weight"]
    tensors[f"{reader}.weight"] = Q(W.unflatten(1, (-1, Q.n)), dtype).reshape(W.shape)
