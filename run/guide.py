"""Guidance: how much the loss depends on what a linear gives for each token.

In a layer's statistics all tokens count alike, but an error at some of them costs the model more.  Kim et al., "GuidedQuant" (ICML 2025),
weigh tokens by the squared gradient of the loss at the layer's output, averaged over groups of outputs.  Here the average is over all
outputs of the linears that read one input, and its root is the weight: squares leave too few tokens that count (docs/LOG.md).
"""

from functools import partial

import torch
import torch.nn.functional as F

from modelutils import run_block
from processes import ALONE
from runtime import approximate, find_place, free_memory


def token_weights(decoder, ids, device, world=ALONE):
    """How much tokens count in the statistics of each block: [{linear: (n, T) float32}], by the first linear of each group.

    decoder: the unquantized one; ids (n, T): the sequences of this process of a processes.World.  The mean over the sequences of all is 1.
    Raises FloatingPointError, naming block and layer, for NaN or Inf.
    """
    names = [group.linears[0] for group in decoder.family.groups]
    found = [{name: [] for name in names} for _ in range(len(decoder))]
    for part in ids.split(at_once(decoder, ids.shape[1])) if len(ids) else ():
        for i, weights in backward(decoder, part, device):
            for name in names:
                found[i][name].append(weights[name])
    whole = [{name: torch.cat(w) if w else torch.empty(ids.shape) for name, w in weights.items()} for weights in found]
    sums = torch.tensor([[weights[name].double().sum() for name in names] for weights in whole], dtype=torch.float64, device=world.device)
    world.add(sums)
    for weights, means in zip(whole, (sums / world.total(ids.numel())).tolist(), strict=True):
        for name, mean in zip(names, means, strict=True):
            weights[name] = weights[name] / mean if mean else torch.ones_like(weights[name])
    return whole


def at_once(decoder, tokens):
    """How many sequences of so many tokens go through the model together: half of the free memory holds what enters each block for them.

    Each time the model is read twice.
    """
    size = (len(decoder) + 1) * tokens * decoder.config.hidden_size * decoder.dtype.itemsize
    return max(1, free_memory(torch.device("cpu")) // 2 // size)


@torch.no_grad()
def backward(decoder, ids, device):
    """The gradient of the loss of ids (n, T), block by block from the last to the first: yields i, {linear: root mean squares (n, T)}."""
    size = (len(decoder) + 1) * ids.numel() * decoder.config.hidden_size * decoder.dtype.itemsize
    place, quick = find_place(size, device), partial(approximate, device, decoder.dtype)  # a weight's last digits do not matter
    sequences, inputs = decoder.embed(ids.split(1), place), []
    for i, block in decoder.visits(device, "reading the unquantized model"):
        inputs.append(list(sequences.x))
        with quick():
            sequences.propagate(block, f"block {i}")
    gradients = of_loss(decoder.head(device), sequences, ids, quick)
    for i, block in decoder.visits(device, "weighing tokens", backwards=True):
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
            raise FloatingPointError(f"{block}: NaN or Inf in the gradient of the loss at the output of {name}")
