"""Perplexity of a decoder, with one block on the device at a time."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from modelutils import sequences_place
from processes import ALONE


@torch.no_grad()
def perplexity(decoder, ids, seqlen, device=None, walk_batch=1, desc="evaluating", world=ALONE):
    """Perplexity of a Decoder on ids (N,), cut into windows of seqlen tokens; a shorter last window is dropped.

    exp of the mean over windows of the mean negative log-likelihood of a window's tokens but the first, in float32 from the logits on.
    world: the processes.World that shares the windows.  Returns {"ppl", "windows", "seqlen", "tokens"}.  Raises FloatingPointError if it is
    not finite.
    """
    device = device or torch.device("cpu")
    ids = ids[: len(ids) // seqlen * seqlen]
    windows = ids.view(-1, seqlen)
    batches = world.own(windows.split(walk_batch))
    sequences = decoder.embed(batches, sequences_place(decoder.config, decoder.dtype, sum(b.numel() for b in batches), device))
    for i, block in decoder.visits(device, desc):
        sequences.propagate(block, f"block {i}")
    losses = torch.zeros(len(windows), dtype=torch.float64, device=device)
    own = world.own(losses.split(walk_batch))  # views: what goes into them is in `losses`
    logits = tqdm(decoder.logits(sequences), desc=f"{desc}: logits", unit="batch", leave=False, total=len(batches))
    for found, batch, kept in zip(logits, batches, own, strict=True):
        loss = F.cross_entropy(found[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten().to(device), reduction="none")
        kept.copy_(loss.view(len(batch), -1).mean(1))
    world.add(losses)
    value = losses.mean().exp().item()
    if not math.isfinite(value):
        raise FloatingPointError(f"{desc}: the perplexity is {value}")
    return {"ppl": value, "windows": len(windows), "seqlen": seqlen, "tokens": len(ids)}
