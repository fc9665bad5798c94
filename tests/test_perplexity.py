"""Perplexity equals the plain computation with the whole model, whatever its head does."""

import math
import re
from copy import deepcopy

import pytest
import torch
from conftest import CPU, TINY, VARIANTS, decoder_blocks, quantize, tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.perplexity import perplexity
from families import FAMILIES
from modelutils import decoder_of
from recipe import METHODS, Recipe
from runtime import Place


def plain_perplexity(model, ids, seqlen):
    """exp of the mean over windows of the mean negative log-likelihood, one window and one token at a time, in float64."""
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[start : start + seqlen]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        nll = [logits[t].logsumexp(0) - logits[t, window[t + 1]] for t in range(seqlen - 1)]
        losses.append(sum(nll) / (seqlen - 1))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.slow
@pytest.mark.parametrize(("seqlen", "walk_batch"), [(2, 3), (24, 1), (24, 100)])
def test_perplexity_is_the_plain_computation(model, seqlen, walk_batch):
    """Five windows and a tail that is dropped."""
    ids = token_ids(1, 5 * seqlen + seqlen - 1)[0]
    expected, windows = plain_perplexity(model, ids, seqlen)
    decoder = decoder_of(model)
    result = perplexity(decoder, ids, seqlen, CPU, walk_batch)
    assert result == {"ppl": pytest.approx(expected, rel=1e-5), "windows": windows, "seqlen": seqlen, "tokens": 5 * seqlen} and windows == 5
    assert result["ppl"] == perplexity(decoder, ids[: 5 * seqlen], seqlen, CPU, walk_batch)["ppl"]


# Every variant with two methods, every method on several families; test_quantize.py has more.
PAIRS = [(variant, method) for i, variant in enumerate(VARIANTS) for k, method in enumerate(METHODS) if (i - k) % 3 == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), PAIRS, indirect=["model"], ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_perplexity_of_a_quantized_model_is_the_plain_computation(model, method):
    """The plain one runs window by window, ours three at a time: activation scales are per window in both."""
    row, ids = METHODS[method], token_ids(1, 24 * 7)[0]
    recipe = Recipe(method=method, wbits=4 if row.weights else 16, act_bits=6 if row.acts[-1] else 16, smooth=row.smooth[-1])
    decoder = decoder_of(model)
    full = perplexity(decoder, ids, 24)["ppl"]
    if method != "full":
        model, store, _ = quantize(model, ids.view(7, 24), recipe)
        decoder = store.decoder()
    expected, _ = plain_perplexity(model, ids, 24)
    assert perplexity(decoder, ids, 24, CPU, 3)["ppl"] == pytest.approx(expected, rel=1e-3)
    assert (expected == pytest.approx(full, rel=1e-6)) == (method == "full"), "the test would not see quantization"


def test_perplexity_of_a_half_precision_model_takes_its_loss_in_float32():
    model = tiny_model().to(torch.bfloat16)
    ids = token_ids(1, 24 * 5)[0]
    expected, _ = plain_perplexity(model, ids, 24)
    assert perplexity(decoder_of(model), ids, 24)["ppl"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_changes_nothing(model):
    before = deepcopy(model.state_dict())
    ids = token_ids(1, 48)[0]
    assert perplexity(decoder_of(model), ids, 24) == perplexity(decoder_of(model), ids, 24)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_perplexity_shows_progress(capsys):
    perplexity(decoder_of(tiny_model()), token_ids(1, 48)[0], 24, desc="my corpus")
    err = capsys.readouterr().err
    assert re.search(r"my corpus:.*/2 .*block", err) and re.search(r"my corpus: logits.*/2 .*batch", err)


def test_a_perplexity_that_is_not_finite_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.mul_(1e6)  # logits of a million: exp of the loss overflows
    with pytest.raises(FloatingPointError, match="^my corpus: the perplexity is (nan|inf)$"):
        perplexity(decoder_of(model), token_ids(1, 48)[0], 24, desc="my corpus")
    model = tiny_model()
    with torch.no_grad():
        decoder_blocks(model)[1].fc2.weight.mul_(1e38)  # finite by itself, not what comes out
    with pytest.raises(FloatingPointError, match="block 1: .*fc2"):
        perplexity(decoder_of(model), token_ids(1, 48)[0], 24)


def set_head_options(config):
    """Whatever the models of the field do after their final norm, where a configuration has it."""
    for option, value in {"logits_scaling": 8.0, "final_logit_softcapping": 5.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5}.items():
        if hasattr(config, option):
            setattr(config, option, value)


@pytest.mark.parametrize("family", [*TINY, "granite", "gemma2", "cohere"])
def test_perplexity_ends_with_the_models_own_head(monkeypatch, family):
    """Scaling and soft-capping of logits, multipliers of embeddings: rows that are in the table, and families with such heads."""
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, FAMILIES["llama"]))
    settings = TINY.get(family, TINY["llama"])["settings"] | {"num_key_value_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(family, **settings)
    for option, value in {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}.items():
        if hasattr(config, option):
            setattr(config, option, value)
    set_head_options(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    ids = token_ids(5, 12)
    decoder = decoder_of(model)
    sequences = decoder.embed(ids.split(2), Place(CPU, "device"))
    for i, block in decoder.visits(CPU, "test"):
        with torch.no_grad():
            sequences.propagate(block, f"block {i}")
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(decoder.logits(sequences))), model(ids).logits, rtol=1e-4, atol=1e-4)
