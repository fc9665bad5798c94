"""How fast a materialized model reads a prompt and decodes: --benchmark_prefill, by plain calls; --benchmark, on a GPU by a CUDA graph."""

import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import StaticCache

from recipe import UsageError
from runtime import captured, seconds

READS = 5  # timed repetitions, after one warm-up


def decoding_step(model, length, device):
    """step(token ()) -> logits (1, 1, V), which decodes up to `length` tokens one by one, and a description of how.

    The cache has a fixed size, so that one CUDA graph does every step; models that do not support that get a growing cache.
    """
    cache = StaticCache(model.config, max_cache_len=length)
    if model.config._attn_implementation != "sdpa" or any(layer.is_sliding for layer in cache.layers):
        return growing(model), "call by call, a growing cache"
    token, position = (torch.zeros(1, 1, dtype=torch.int64, device=device) for _ in range(2))
    places = torch.arange(length, device=device).view(1, 1, 1, -1)

    def run():
        seen = places <= position
        out = model(token, position_ids=position, attention_mask=seen, past_key_values=cache, use_cache=True)
        position.add_(1)
        return out.logits

    how = "call by call, a fixed cache"
    if device.type == "cuda" and not model.visiting:
        run, how = captured(run, device), "a CUDA graph, a fixed cache"
        cache.reset()
        position.zero_()

    def step(new):
        token.copy_(new)
        return run()

    return step, how


def growing(model):
    """step(token ()) -> logits (1, 1, V), with a cache that grows."""
    cache = None

    def step(new):
        nonlocal cache
        out = model(new.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits

    return step


@torch.no_grad()
def decode(model, ids, check=False):
    """Feed ids (N,) to a materialized model one by one, as it decodes: {"ms_per_token": the median, "tokens": N, "how": in words}.

    check: also "ppl", exp of the mean negative log-likelihood of the tokens but the first; each token's activations then have scales of
    their own.  Raises UsageError if there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise UsageError(f"--benchmark: {len(ids)} tokens of text, needs 2 or more; give another corpus")
    ids, milliseconds, losses = ids.to(model.device), [], []
    step, how = decoding_step(model, len(ids), ids.device)
    for i in tqdm(range(len(ids)), desc="decoding", unit="token", leave=False):
        start = time.perf_counter()
        logits = step(ids[i])
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        milliseconds.append(1000 * (time.perf_counter() - start))
        if check and i + 1 < len(ids):
            losses.append(F.cross_entropy(logits[0].float(), ids[i + 1 : i + 2]).double())
    ppl = {"ppl": torch.stack(losses).mean().exp().item()} if check else {}
    return {"ms_per_token": statistics.median(milliseconds), "tokens": len(ids), "how": how} | ppl


@torch.no_grad()
def prefill(model, ids):
    """Time a materialized model reading ids (N,) as one prompt, up to the logits of the next token.

    Returns {"ms": the median, "tokens": N, "tokens_per_second", "how": in words}.
    """
    ids = ids.to(model.device)[None]
    how = "call by call" + ", blocks copied to the device in each" * bool(model.visiting)
    times = [seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), ids.device) for _ in range(READS + 1)][1:]
    took = statistics.median(times)
    return {"ms": 1000 * took, "tokens": ids.numel(), "tokens_per_second": ids.numel() / took, "how": how}
