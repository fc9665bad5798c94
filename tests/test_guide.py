"""Guidance: the weights of tokens are those of the whole model's gradient, and count in the statistics."""

import gc
import weakref
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, TINY, VARIANTS, quantize, tiny_model, token_ids
from test_families import CASES, tiny_config

import awrq
import gptq
from bench.family import random_model
from modelutils import decoder_of
from quant import fake_quant_act
from recipe import Recipe
from rotate import rotated
from run import guide
from run.guide import token_weights

IDS = token_ids(3, 16)
AWRQ = Recipe(method="awrq", wbits=3, act_bits=8)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in float32, whatever the machine is quick at."""
    monkeypatch.setattr(guide, "approximate", lambda *_: nullcontext())


def root_mean_square(gradients):
    return torch.cat(gradients, -1).square().mean(-1).sqrt().view(IDS.shape)


def of_whole_model(model, decoder, ids=IDS):
    """What token_weights gives, by the gradient of the whole model's loss."""
    family, outputs = decoder.family, {}
    for i, block in enumerate(model.get_submodule(family.blocks)):
        for name in decoder.linears:
            block.get_submodule(name).register_forward_hook(lambda _, __, out, key=(i, name): outputs.__setitem__(key, out))
    model.requires_grad_(True)
    logits = model(ids, use_cache=False).logits
    gradients = torch.autograd.grad(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"), outputs.values())
    found = dict(zip(outputs, gradients, strict=True))
    weights = [{g.linears[0]: root_mean_square([found[i, name] for name in g.linears]) for g in family.groups} for i in range(len(decoder))]
    return [{name: w / w.mean() for name, w in of.items()} for of in weights]


def check_weights(model, same_model):
    """The weights of a model are those of the gradient of `same_model`, which gets hooks."""
    decoder = decoder_of(model)
    expected = of_whole_model(same_model, decoder)
    found = token_weights(decoder, IDS, CPU)
    for here, there in zip(found.values(), expected, strict=True):
        assert here.keys() == there.keys()
        for name, w in here.items():
            torch.testing.assert_close(w, there[name], rtol=1e-3, atol=1e-4, msg=name)
            assert w.std() > 0.05 and (w[:, -1] < w.mean()).all()  # what comes after the last token costs nothing


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_weights_are_those_of_the_whole_model(variant):
    check_weights(tiny_model(*variant), tiny_model(*variant))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"), [case for case in CASES if case[0] not in TINY], ids=lambda x: x if isinstance(x, str) else ",".join(x)
)
def test_weights_are_those_of_the_whole_model_in_every_family(family, variant):
    model = random_model(tiny_config(family, variant)).float()
    check_weights(model, deepcopy(model))


@pytest.mark.slow
def test_some_sequences_at_a_time(monkeypatch):
    decoder = decoder_of(tiny_model("llama", "llama3"))
    whole = token_weights(decoder, IDS, CPU)
    monkeypatch.setattr(guide, "at_once", lambda *_: 2)
    for a, b in zip(token_weights(decoder, IDS, CPU).values(), whole.values(), strict=True):
        for name, w in a.items():
            torch.testing.assert_close(w, b[name], msg=name)


def test_they_count_in_the_statistics():
    x, target, w = torch.randn(4, 6, 24), torch.randn(4, 6, 24), torch.rand(4, 6)
    for make in (gptq.Hessian, awrq.Moments):
        stats = make(24, AWRQ, "cpu")
        stats.weights = w
        for batch in (slice(0, 3), slice(3, 4)):
            stats.add(*(x[batch], target[batch])[: 1 + (make is awrq.Moments)])
        stats.finish()
        q = x if make is gptq.Hessian else fake_quant_act(x, *AWRQ.acts)
        torch.testing.assert_close(stats.H, torch.einsum("btc,btd,bt->cd", q, q, w))
        if make is awrq.Moments:
            torch.testing.assert_close(stats.M, torch.einsum("btc,btd,bt->cd", target - q, q, w), rtol=1e-4, atol=1e-5)
    stats, lost = awrq.Moments(24, AWRQ, "cpu"), torch.randn(4, 6, 7)
    stats.weights = w
    stats.give_back(7)
    for batch in (slice(0, 3), slice(3, 4)):
        stats.add(x[batch], target[batch], lost[batch])
    stats.finish()
    q = fake_quant_act(x, *AWRQ.acts)
    torch.testing.assert_close(stats.R, torch.einsum("btr,btd,bt->rd", lost, q, w), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.H, torch.einsum("btc,btd,bt->cd", q, q, w))
    alike, plain = awrq.Moments(24, AWRQ, "cpu"), awrq.Moments(24, AWRQ, "cpu")
    alike.weights = torch.ones(4, 6)
    for stats in (alike, plain):
        stats.add(x, target)
        stats.finish()
    assert torch.equal(alike.H, plain.H) and torch.equal(alike.M, plain.M)


def test_a_run_weighs_the_tokens_of_each_block(monkeypatch):
    """Every statistic gets the weights of its own block and group; quantizing then gives other codes, and with equal weights the same."""
    recipe = Recipe(method="awrq", wbits=3, act_bits=8, true_sequential=True, guided=True, target="stream")
    seen, add = [], awrq.Moments.add

    def spy(stats, *args):
        seen.append(stats.weights)
        add(stats, *args)

    monkeypatch.setattr(awrq.Moments, "add", spy)
    decoder = decoder_of(tiny_model("llama", "llama3"))
    expected = token_weights(decoder, IDS, CPU)
    _, guided, _ = quantize(tiny_model("llama", "llama3"), IDS, recipe, 2)
    names = [(i, g.linears[0]) for i in range(2) for g in decoder.family.groups for _ in range(2)]  # two batches
    assert len(seen) == len(names) and all(torch.equal(w, expected[i][name]) for w, (i, name) in zip(seen, names, strict=True))
    assert not same_codes(guided, quantize(tiny_model("llama", "llama3"), IDS, Recipe(**vars(recipe) | {"guided": False}), 2)[1])
    alike = {i: {name: torch.ones_like(w) for name, w in of.items()} for i, of in expected.items()}
    monkeypatch.setattr("run.quantize.token_weights", lambda *_: dict(alike))
    unguided = quantize(tiny_model("llama", "llama3"), IDS, Recipe(**vars(recipe) | {"guided": False}), 2)[1]
    assert same_codes(quantize(tiny_model("llama", "llama3"), IDS, recipe, 2)[1], unguided)


def same_codes(a, b):
    return all(a.codes(i)[name][0].equal(q) for i in range(b.finished) for name, (q, _) in b.codes(i).items())


def test_a_rotated_model_weighs_in_its_own_basis():
    """What writes the residual stream has the same weights as before: a rotation keeps lengths."""
    decoder = decoder_of(tiny_model("llama", "llama3"))
    before, after = token_weights(decoder, IDS, CPU), token_weights(rotated(decoder, 0), IDS, CPU)
    for name in decoder.family.residual.writers:
        torch.testing.assert_close(after[0][name], before[0][name], rtol=1e-3, atol=1e-4)


def test_nan_names_block_and_layer():
    model = tiny_model("llama", "llama3")
    decoder = decoder_of(model)
    nan = torch.tensor([float("nan")])
    with pytest.raises(FloatingPointError, match="block 1: NaN or Inf in the gradient of the loss at the output of mlp.up_proj"):
        guide.check({"mlp.gate_proj": torch.ones(1), "mlp.up_proj": nan}, "block 1")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 3e38
    with pytest.raises(FloatingPointError, match="block 1"):
        token_weights(decoder, IDS, CPU)


def test_tokens_that_cost_nothing_count_alike():
    """A model whose head is zero has no gradient anywhere."""
    model = tiny_model("llama", "llama3")
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
    assert all((w == 1).all() for of in token_weights(decoder_of(model), IDS, CPU).values() for w in of.values())


@pytest.mark.parametrize("turn", [False, True])
def test_approximate_weights_are_near(monkeypatch, turn):
    decoder = decoder_of(tiny_model("llama", "llama3"))
    decoder.stored_dtype = torch.float16  # a rotated model is read in this type, which bfloat16's contexts refuse
    decoder = rotated(decoder, 0) if turn else decoder
    exact = token_weights(decoder, IDS, CPU)
    monkeypatch.setattr(guide, "approximate", lambda *_: torch.autocast("cpu", torch.bfloat16))
    near = token_weights(decoder, IDS, CPU)
    for a, b in zip(exact.values(), near.values(), strict=True):
        for name, w in a.items():
            assert 0 < (b[name] - w).norm() < 0.1 * w.norm(), name


def test_a_run_that_goes_on_weighs_the_blocks_that_are_left():
    decoder = decoder_of(tiny_model("llama", "llama3"))
    whole, rest = token_weights(decoder, IDS, CPU), token_weights(decoder, IDS, CPU, first=1)
    assert list(rest) == [1] and all(torch.equal(w, whole[1][name]) for name, w in rest[1].items())


def test_the_head_is_freed_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        head = decoder_of(tiny_model("llama", "llama3")).head(CPU)
        head(torch.zeros(1, 2, 32))
        weight = weakref.ref(head.model.lm_head.weight)
        del head
        assert weight() is None
    finally:
        gc.enable()
