"""Guidance: how much the loss depends on what a linear gives for each token.

In a layer's statistics all tokens count alike, but an error at some of them costs the model more.  Kim et al., "GuidedQuant" (ICML 2025),
weigh tokens by the squared gradient of the loss at the layer's output, averaged over groups of outputs.  Here the average is over all
outputs of the linears that read one input, and its root is the weight: squares leave too few tokens that count (docs/LOG.md).
"""

from functools import partial

import torch
import torch.nn.functional as F

from modelutils import run_block, way_out
from processes import ALONE
from runtime import approximate, find_place, free_memory, release


def token_weights(decoder, ids, device, world=ALONE, first=0):
    """How much tokens count in the statistics of the blocks from `first` on: {i: {linear: (n, T) float32}}, by each group's first linear.

    decoder: the unquantized one; ids (n, T): the sequences of this process of a processes.World.  The mean over the sequences of all is 1.
    They are those of the block before it is smoothed.  Raises FloatingPointError, naming block and layer, for NaN or Inf.
    """
    names = [group.linears[0] for group in decoder.family.groups]
    found = {i: {name: [] for name in names} for i in range(first, len(decoder))}
    for part in ids.split(at_once(decoder, ids.shape[1])) if len(ids) else ():
        for i, weights in backward(decoder, part, device, first):
            for name in names:
                found[i][name].append(weights[name])
        release(device)
    whole = {i: {name: torch.cat(w) if w else torch.empty(ids.shape) for name, w in weights.items()} for i, weights in found.items()}
    sums = torch.tensor([[w.double().sum() for w in weights.values()] for weights in whole.values()], dtype=torch.float64)
    sums = sums.to(world.device or "cpu")
    world.add(sums)
    for weights, means in zip(whole.values(), (sums / world.total(ids.numel())).tolist(), strict=True):
        for name, mean in zip(names, means, strict=True):
            weights[name] = weights[name] / mean if mean else torch.ones_like(weights[name])
    return whole


def at_once(decoder, tokens):
    """How many sequences of so many tokens go through the model together: a quarter of the free memory holds what is kept of them.

    Each time the model is read twice.
    """
    return max(1, free_memory(torch.device("cpu")) // 4 // kept(decoder, tokens))


def kept(decoder, tokens):
    """Bytes of what enters each block, of the last one's output, and of a gradient."""
    return (len(decoder) + 2) * tokens * decoder.config.hidden_size * decoder.dtype.itemsize


@torch.no_grad()
def backward(decoder, ids, device, first=0):
    """The gradient of the loss of ids (n, T), from the last block back to `first`: yields i, {linear: root mean squares (n, T)}."""
    place = find_place(kept(decoder, ids.numel()), device)
    quick = partial(approximate, device, decoder.dtype)  # a weight's last digits do not matter
    sequences, inputs = decoder.embed(ids.split(1), place), []
    for i, block in decoder.visits(device, "reading the unquantized model"):
        inputs.append(list(sequences.x) if i >= first else [])
        with quick():
            sequences.propagate(block, f"block {i}")
    gradients = of_loss(decoder.head(device), sequences, ids, quick)
    sequences.x.clear()  # only its arguments are needed from here on
    for i, block in decoder.visits(device, "weighing tokens", first, backwards=True):
        outputs, weights = {}, []
        for name in decoder.linears:
            block.get_submodule(name).register_forward_hook(partial(keep, outputs, name))
        for k, x in enumerate(inputs.pop()):
            x = x.to(device).requires_grad_()
            with torch.enable_grad(), quick():
                out = run_block(block, x, sequences.arguments[f"block {i}", tuple(x.shape[:2])], f"block {i}")
            before, *found = torch.autograd.grad(out, (x, *outputs.values()), gradients[k].to(device))
            gradients[k] = place.put(before)
            found = dict(zip(outputs, found, strict=True))
            check(found, f"block {i}")
            weights.append({g.linears[0]: root_mean_square([found[name] for name in g.linears]) for g in decoder.family.groups})
        outputs.clear()
        yield i, {name: torch.cat([of[name] for of in weights]) for name in weights[0]}


def keep(outputs, name, module, args, out):
    """A hook: keeps what a module gives under its name."""
    outputs[name] = out


def of_loss(head, sequences, ids, quick):
    """The gradients (1, T, D) of the loss of each sequence, summed over its tokens, with respect to what the last block gives.

    quick(): the context in which logits are computed.
    """
    gradients = []
    for k in range(len(sequences)):
        h = sequences[k].requires_grad_()
        with torch.enable_grad():
            with quick():
                logits = head(h)
            loss = F.cross_entropy(logits[0, :-1].float(), ids[k, 1:].to(h.device), reduction="sum")
        gradients.append(sequences.place.put(torch.autograd.grad(loss, h)[0]))
    return gradients


def root_mean_square(gradients):
    """Of gradients (1, T, R) or (T, R), of some linears: over all their outputs, (1, T) float32 in host memory."""
    together = torch.cat([g.float() for g in gradients], -1)
    return together.square().mean(-1).sqrt().view(1, -1).cpu()


def check(gradients, block):
    """Raises FloatingPointError for NaN or Inf in one of {linear: gradient}."""
    for name, g in gradients.items():
        if not g.isfinite().all():
            raise FloatingPointError(f"{block}: NaN or Inf in the gradient of the loss at the output of {name}{way_out(g.dtype)}")
