"""Perplexity of a decoder, with one block on the device at a time."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from modelutils import sequences_place


@torch.no_grad()
def perplexity(decoder, ids, seqlen, device=None, walk_batch=1, desc="evaluating"):
    """Perplexity of a Decoder on ids (N,), cut into windows of seqlen tokens; a shorter last window is dropped.

    exp of the mean over windows of the mean negative log-likelihood of a window's tokens but the first, in float32 from the logits on.
    Returns {"ppl", "windows", "seqlen", "tokens"}.  Raises FloatingPointError if it is not finite.
    """
    device = device or torch.device("cpu")
    ids = ids[: len(ids) // seqlen * seqlen]
    windows = ids.view(-1, seqlen).split(walk_batch)
    sequences = decoder.embed(windows, sequences_place(decoder.config, decoder.dtype, len(ids), device))
    for i, block in decoder.visits(device, desc):
        sequences.propagate(block, f"block {i}")
    losses = []
    logits = tqdm(decoder.logits(sequences), desc=f"{desc}: logits", unit="batch", leave=False, total=len(windows))
    for found, window in zip(logits, windows, strict=True):
        loss = F.cross_entropy(found[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten().to(device), reduction="none")
        losses.append(loss.view(len(window), -1).mean(1).double())
    value = torch.cat(losses).mean().exp().item()
    if not math.isfinite(value):
        raise FloatingPointError(f"{desc}: the perplexity is {value}")
    return {"ppl": value, "windows": sum(map(len, windows)), "seqlen": seqlen, "tokens": len(ids)}
