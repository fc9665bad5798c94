"""Walking a model: equal to the whole model and to the method done by hand, one block at a time, and every error says where it is."""

import argparse
import gc
import json
import math
import os
import re
import shutil
import warnings
import weakref
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import CONTEXT, TINY, VARIANTS, WORDS, save_model, tiny_model, token_ids
from evalutils import perplexity
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import modelutils
import opt
import quant
from datautils import eval_tokens
from modelutils import FAMILIES, METHODS, Clock, decoder_blocks, make_recipe, quantize, quantize_blocks, record_inputs, run_block
from quant import QuantLinear
from recipe import Recipe

IDS = token_ids(5, 48)
GPT2 = Path(__file__).parents[2] / "shared/data/tokenizers/gpt2"
ROUNDING = [name for name, method in METHODS.items() if method.weights]
LEARNING = [name for name, method in METHODS.items() if method.stats]
QUANTIZING = [name for name, method in METHODS.items() if method.weights or True in method.acts]


def recipes():
    """Every quantizing method, with and without smoothing and activation quantization as far as the table allows, and the options."""
    for name in QUANTIZING:
        method = METHODS[name]
        base = Recipe(method=name, wbits=4 if method.weights else 16, act_bits=8 if method.acts[0] else 16, smooth=method.smooth[0])
        yield from (replace(base, smooth=smooth) for smooth in method.smooth)
        yield from (replace(base, smooth=smooth, act_bits=6) for smooth in method.smooth if True in method.acts)
        if True in method.acts:
            yield replace(base, act_bits=5, act_pertoken=True)
        if method.stats:
            yield from (replace(base, true_sequential=True, smooth=smooth) for smooth in method.smooth)
            smooth = True in method.smooth
            yield replace(base, target="stream", target_mix=0.7, bias_correction=True)
            # Activations are not rounded here: with these options together a tie of the first block changes half of the codes after it.
            yield replace(base, target="stream", target_mix=1.0, grid="reformulated", smooth=smooth, true_sequential=True, act_bits=16)
        elif method.weights:
            yield replace(base, bias_correction=True)


RECIPES = list(recipes())
FEW = [
    Recipe(method="awrq", wbits=4, act_bits=8, smooth=True),
    Recipe(method="gptq", wbits=4, act_bits=6, true_sequential=True),
    Recipe(method="act_only", act_bits=6, act_pertoken=True, smooth=True),
]
BY_HAND = [(("opt", "pre-norm"), recipe) for recipe in RECIPES]  # every recipe once, every variant of every family with a few
BY_HAND += [(variant, recipe) for variant in VARIANTS if variant != ("opt", "pre-norm") for recipe in FEW]


def describe(recipe):
    options = [name for name in ("smooth", "act_pertoken", "true_sequential", "bias_correction") if getattr(recipe, name)]
    options += [value for value in (recipe.target, recipe.grid) if value in ("stream", "reformulated")]
    return "-".join([recipe.method, f"W{recipe.wbits}A{recipe.act_bits}", *options])


def run(model, recipe, ids=IDS, walk_batch=2):
    """Quantize in place: [Layer], {(block, name): (codes, Grid)}."""
    layers, codes = [], {}
    for i, (done, rounded) in enumerate(quantize_blocks(model, ids, recipe, "cpu", walk_batch)):
        layers += done
        codes |= {(i, name): pair for name, pair in rounded.items()}
    return layers, codes


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def distance(a, b):
    return (a.double() - b.double()).norm().item()


# ---------------------------------------------------------------------------
# Capture and replay


@pytest.mark.parametrize("walk_batch", [1, 2, 5])
def test_blocks_and_what_comes_after_them_are_the_model(model, walk_batch):
    with torch.no_grad():
        x, kwargs = record_inputs(model, IDS.split(walk_batch), "cpu")
        for i, block in enumerate(decoder_blocks(model)):
            modelutils.propagate(block, x, kwargs, f"block {i}")
        modules = dict(model.named_modules())
        for name in FAMILIES[model.config.model_type].after:
            if name in modules:
                x = [modules[name](h) for h in x]
    assert [len(h) for h in x] == [len(b) for b in IDS.split(walk_batch)]
    torch.testing.assert_close(torch.cat(x), logits(model), rtol=1e-5, atol=1e-5)


def test_sequences_of_several_lengths(model):
    batches = [IDS[:2], IDS[2:3, :10], IDS[3:, :10]]
    with torch.no_grad():
        x, kwargs = record_inputs(model, batches, "cpu")
        blocks = decoder_blocks(model)
        ours = [run_block(blocks[0], h, kwargs, "block 0") for h in x]
        seen = []
        with blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0])):
            for ids in batches:
                model(ids)
    assert len(kwargs) == 3
    for mine, plain in zip(ours, seen, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_capture_leaves_no_trace_and_runs_one_block(model):
    blocks, before = decoder_blocks(model), deepcopy(model.state_dict())
    calls = []
    handles = [block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        x, _ = record_inputs(model, IDS.split(2), "cpu")
    for handle in handles:
        handle.remove()
    assert calls == [0, 0, 0], "only the first block runs, once for each batch"
    assert decoder_blocks(model) is blocks and len(blocks) == 2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_block_list_comes_back_after_an_error():
    model = tiny_model()
    with pytest.raises(IndexError), torch.no_grad():
        record_inputs(model, [torch.full((1, 4), 10**6)], "cpu")
    assert len(decoder_blocks(model)) == 2


def test_a_block_may_return_a_tensor_or_a_tuple():
    x = torch.randn(2, 3, 4)
    for block in (lambda x: 2 * x, lambda x: (2 * x, "attention")):
        assert torch.equal(run_block(block, x, {x.shape[:2]: {}}, "block 0"), 2 * x)


# ---------------------------------------------------------------------------
# Quantizing: against the method done by hand


class ByHand(nn.Module):
    """y = W @ quant(x / s) + b, one sequence at a time."""

    def __init__(self, W, bias, s, recipe):
        super().__init__()
        self.W, self.bias, self.s, self.bits, self.per_token = W, bias, s, recipe.act_bits, recipe.act_pertoken

    def rounded(self, x):
        return x if self.bits == 16 else reference.fake_quant_act(x[None].clone(), self.bits, self.per_token)[0]

    def forward(self, x):
        y = F.linear(self.rounded(x.reshape(-1, x.shape[-1]) / self.s), self.W, self.bias)
        return y.view(*x.shape[:-1], -1)


def round_by_hand(recipe, W, X, Xq, T):
    """Codes, scale, zero of W (R, C); X, Xq, T (N, C): inputs, quantized, and those of the target.  A method that rounds weights needs its
    obvious computation here."""
    grid = reference.grids(W, recipe.wbits, -1)
    if recipe.method in ("rtn", "smoothquant"):
        return reference.codes(W, *grid, recipe.wbits), *grid
    seen = {"gptq": X, "awrq": Xq}[recipe.method]
    H, M = seen.T @ seen, (T - seen).T @ seen
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    alive = W.masked_fill(dead, 0)
    U = reference.inverse_factor(H, recipe.percdamp)
    target = alive + alive @ M @ torch.linalg.inv(reference.damped(H, recipe.percdamp))
    if recipe.grid == "reformulated":
        return reference.block_loop(target, U, recipe.wbits)
    return reference.block_loop(target, U, recipe.wbits, first=alive, grid_of=W)


@torch.no_grad()
def by_hand(model, ids, recipe, codes_to_use=None):
    """Method notes, sections 1 to 4, in float64, one sequence at a time, scales divided out at run time and nowhere folded.

    A code that differs from ours for a tie changes all that follows, so after a layer is rounded it goes on with `codes_to_use`, ours.
    Returns the quantized model, {(block, name): codes}, {(block, name): error}.  The error of a layer whose rows take 1/s is that of the
    scaled layer.
    """
    absorb = {name: group for name, group in model.absorb.items() if not model.keeps_in_scale.issuperset(group)}
    groups, model = model.groups, deepcopy(model).double()
    full = deepcopy(model)
    n_heads, n_kv = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)

    def of_rows(s, rows):
        """The scales of an absorbing linear's rows, from those of the columns that read them."""
        return s if len(s) == rows else s.view(n_heads, -1)[:: n_heads // n_kv].flatten()

    codes, errors = {}, {}

    def watch(model, i, names):
        """{name: [what it reads in each sequence (T, C)]} of block i"""
        block = decoder_blocks(model)[i]
        seen = {name: [] for name in names}

        def keep(module, args, name):
            seen[name].append(args[0].reshape(-1, args[0].shape[-1]))

        handles = [block.get_submodule(n).register_forward_pre_hook(lambda module, args, n=n: keep(module, args, n)) for n in names]
        for sequence in ids:
            model(sequence[None])
        for handle in handles:
            handle.remove()
        return seen

    for i, block in enumerate(decoder_blocks(model)):
        names = [name for group in groups for name in group]
        seen, aim, s = watch(model, i, names), watch(full, i, names), {}
        for group in groups:
            act = torch.stack([x.abs().amax(0) for x in seen[group[0]]]).amax(0)
            weight = torch.stack([block.get_submodule(n).weight.abs().amax(0) for n in group]).amax(0)
            s[group] = (act**recipe.alpha / weight ** (1 - recipe.alpha)).clamp(min=recipe.min) if recipe.smooth else torch.ones_like(act)
            if group[0] in ("self_attn.out_proj", "self_attn.o_proj"):  # query heads that read one head of values share its scales
                heads = s[group].view(n_heads, -1)
                for h in range(n_heads):
                    first = h // (n_heads // n_kv) * (n_heads // n_kv)
                    heads[h] = heads[first : first + n_heads // n_kv].max(0).values
        for step in [[group] for group in groups] if recipe.true_sequential else [groups]:
            seen, made = watch(model, i, names) if recipe.true_sequential else seen, {}
            for group in step:
                for name in group:
                    linear = block.get_submodule(name)
                    W, X, T = linear.weight * s[group], [x / s[group] for x in seen[name]], [x / s[group] for x in aim[name]]
                    made[name] = ByHand(W, linear.bias, s[group], recipe)
                    Xq = [made[name].rounded(x) for x in X]
                    mix = recipe.target_mix if recipe.target == "stream" else 0
                    T = [mix * t + (1 - mix) * x for t, x in zip(T, X, strict=True)]
                    if METHODS[recipe.method].weights:
                        codes[i, name], scale, zero = round_by_hand(recipe, W, *map(torch.cat, (X, Xq, T)))
                        q = codes_to_use[i, name][0].double() if codes_to_use else codes[i, name]
                        made[name].W = reference.weight(q, scale, zero)
                    shift = 0
                    if recipe.bias_correction and linear.bias is not None:
                        shift = torch.cat(T).mean(0) @ W.T - torch.cat(Xq).mean(0) @ made[name].W.T
                        made[name].bias = nn.Parameter(linear.bias + shift)
                    out = of_rows(s[absorb[name]], len(W)) if name in absorb else 1
                    y, yq = X[0] @ W.T / out, (Xq[0] @ made[name].W.T + shift) / out
                    errors[i, name] = ((y - yq).square().sum() / y.square().sum()).item()
            for name, linear in made.items():
                path, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(path), attribute, linear)
    return model, codes, errors


@pytest.mark.parametrize(
    ("model", "recipe"), BY_HAND, indirect=["model"], ids=lambda x: "-".join(x) if isinstance(x, tuple) else describe(x)
)
def test_every_method_equals_the_same_done_by_hand(model, recipe):
    """An activation halfway between two codes may go one way in float32 and the other in float64, and then all that follows with it;
    moving the weights a little moves such a tie elsewhere."""
    if far_from_by_hand(model, recipe):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        assert not far_from_by_hand(model, recipe)


def far_from_by_hand(model, recipe):
    """Falsy, or by how much the logits differ.  Codes and layer errors must agree in any case."""
    full, quantized = logits(model), deepcopy(model)
    layers, codes = run(quantized, recipe)
    hand, hand_codes, hand_errors = by_hand(model, IDS, recipe, codes)
    expected = torch.cat([logits(hand, sequence[None]) for sequence in IDS])

    assert codes.keys() == hand_codes.keys()
    for key, (q, _) in codes.items():
        agree = (q == hand_codes[key]).double().mean().item()
        # One activation at a tie moves all after it: weights changed by 1e-6 of themselves change 13 % of the second block.
        assert agree >= (0.85 if key[0] else 0.97), f"{key}: {agree:.2%} of the codes agree"
    assert [(layer.block, layer.name) for layer in layers] == list(hand_errors)
    for layer in layers:
        assert layer.error == pytest.approx(hand_errors[layer.block, layer.name], rel=0.02, abs=1e-9), layer

    # All sequences at once, where by hand they go one by one: the activation scales must be per sequence.
    far, loss = distance(logits(quantized), expected), distance(expected, full)
    return far > 0.05 * loss + 1e-5 * full.norm().item() and f"{far:.3g}, and quantization itself costs {loss:.3g}"


@pytest.mark.parametrize("recipe", RECIPES, ids=describe)
def test_what_is_yielded_is_what_the_model_computes_with(recipe):
    """Codes and grids, spread by hand, are the weights; every linear of a block is quantized once; nothing is left on the hooks."""
    model = tiny_model()
    recipe = replace(recipe, groupsize=-1 if recipe.wbits == 16 else 12)  # 32 = 12 + 12 + 8
    before = dict(deepcopy(decoder_blocks(model)).named_modules())
    layers, codes = run(model, recipe)
    names = [name for group in TINY["opt"]["groups"] for name in group]
    assert [(layer.block, layer.name) for layer in layers] == [(i, name) for i in (0, 1) for name in names]
    assert set(codes) == ({(i, name) for i in (0, 1) for name in names} if METHODS[recipe.method].weights else set())
    for i, block in enumerate(decoder_blocks(model)):
        assert not [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            linear = block.get_submodule(name)
            assert isinstance(linear, QuantLinear) and not linear._forward_pre_hooks
            assert linear.act_bits == recipe.act_bits and linear.per_token == recipe.act_pertoken
            if (i, name) in codes:
                q, grid = codes[i, name]
                R, C = before[f"{i}.{name}"].weight.shape
                assert q.shape == (R, C) and q.dtype == torch.uint8 and q.max() < 2**recipe.wbits
                assert grid.scale.shape == grid.zero.shape == (R, math.ceil(C / 12)), f"{i} {name}"
                r, c = torch.meshgrid(torch.arange(R), torch.arange(C), indexing="ij")
                by_hand = grid.scale[r, c // 12] * (q.float() - grid.zero[r, c // 12])
                torch.testing.assert_close(linear.weight, by_hand)
            elif not recipe.smooth:
                assert torch.equal(linear.weight, before[f"{i}.{name}"].weight)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.true_sequential], ids=describe)
def test_no_result_depends_on_the_walk_batch(recipe):
    codes, ppls = [], []
    for walk_batch in (1, 2, 3):
        model = tiny_model("opt", "post-norm" if recipe.smooth else "pre-norm")
        codes.append(run(model, recipe, walk_batch=walk_batch)[1])
        ppls.append(perplexity(model, IDS.flatten(), 48, "cpu", walk_batch)["ppl"])
    assert ppls == pytest.approx([ppls[0]] * 3, rel=1e-3)
    for key, (q, _) in codes[0].items():
        for other in codes[1:]:
            agree = (q == other[key][0]).double().mean().item()
            assert agree >= (0.995 if key[0] == 0 else 0.97), f"{key} {agree:.2%}"


@pytest.mark.parametrize("method", QUANTIZING)
def test_the_model_keeps_its_type(method):
    """bfloat16 in, bfloat16 out, and still the model: quantized with 8 bits it stays close to its float32 self."""
    recipe = Recipe(
        method=method,
        wbits=8 if METHODS[method].weights else 16,
        act_bits=8 if METHODS[method].acts[0] else 16,
        smooth=METHODS[method].smooth[-1],
    )
    model = tiny_model()
    full = logits(model)
    model.to(torch.bfloat16)
    run(model, recipe)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert distance(logits(model), full) < 0.1 * full.norm().item()


# ---------------------------------------------------------------------------
# Smoothing


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_alone_changes_no_logit(model, alpha):
    before = logits(model)
    norms = [p.clone() for name, p in model.named_parameters() if "norm" in name]
    layers, codes = run(model, Recipe(method="act_only", act_bits=16, smooth=True, alpha=alpha))
    after = logits(model)
    assert ((after - before).abs() <= 1e-3 * before.abs().clamp(min=1e-2 * before.abs().max())).all(), (after - before).abs().max()
    assert not codes and len(layers) == 2 * sum(map(len, model.groups)) and all(layer.error < 1e-9 for layer in layers)
    moved = any(not torch.equal(p, q) for p, q in zip((p for n, p in model.named_parameters() if "norm" in n), norms, strict=True))
    assert moved == (len(norms) > 0 and "q_proj" not in "".join(model.keeps_in_scale)), "the norms absorb scales where that is exact"
    for block in decoder_blocks(model):
        kept = {name for name, m in block.named_modules() if isinstance(m, QuantLinear) and m.in_scale is not None}
        assert kept == model.keeps_in_scale


def test_smoothing_moves_the_outliers(model):
    """It does something: at few activation bits the smoothed model is closer to the full one."""
    full, losses = logits(model), []
    for smooth in (False, True):
        quantized = deepcopy(model)
        run(quantized, Recipe(method="act_only", act_bits=6, smooth=smooth))
        losses.append(distance(logits(quantized), full))
    assert losses[1] < losses[0]


def test_dead_channels_do_not_stop_smoothing():
    """Zero weights and inputs give no 0/0, with any alpha."""
    for alpha in (0.0, 0.5, 1.0):
        model = tiny_model()
        with torch.no_grad():
            for block in decoder_blocks(model):
                block.fc1.weight[3], block.fc1.bias[3] = 0, 0  # a dead unit: fc2 never sees input 3
                block.fc2.weight[:, 5] = 0
        before = logits(model)
        run(model, Recipe(method="act_only", act_bits=16, smooth=True, alpha=alpha))
        assert distance(logits(model), before) < 1e-5 * before.norm().item()


# ---------------------------------------------------------------------------
# What is walked and when, and what is in memory


@pytest.mark.parametrize("recipe", RECIPES, ids=describe)
def test_only_what_can_teach_something_is_run(monkeypatch, recipe):
    n = []
    record = modelutils.record_inputs
    monkeypatch.setattr(modelutils, "record_inputs", lambda m, batches, d: n.append(sum(map(len, batches))) or record(m, batches, d))
    run(tiny_model(), recipe)
    assert n == [5 if METHODS[recipe.method].stats or recipe.smooth or recipe.bias_correction else 1]


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("method", LEARNING)
def test_statistics_live_until_their_group_is_solved(monkeypatch, method, true_sequential):
    """One statistic for all linears that read the same input, gone when they are solved; one at a time in true sequence."""
    alive, live, widths = weakref.WeakSet(), [], []

    class Stats(METHODS[method].stats):
        def __init__(self, columns, recipe, device):
            super().__init__(columns, recipe, device)
            alive.add(self)
            widths.append(columns)

    def weights(W, stats, recipe, name):
        live.append(len(alive))
        return METHODS[method].weights(W, stats, recipe, name)

    solve = METHODS[method]
    monkeypatch.setitem(METHODS, method, replace(solve, stats=Stats, weights=lambda *a: live.append(len(alive)) or solve.weights(*a)))
    for _ in quantize_blocks(tiny_model(), IDS, Recipe(method=method, wbits=4, act_bits=8, true_sequential=true_sequential)):
        assert not alive, "solved, and still there"
    assert widths == [32, 32, 32, 64] * 2
    assert live == ([1] * 8 if true_sequential else [4, 3, 2, 1] * 2)


def count_runs(monkeypatch, module):
    """A list that grows by one whenever a module of this type has run to its end."""
    runs, forward = [], type(module).forward

    def counted(*args, **kwargs):
        out = forward(*args, **kwargs)
        runs.append(1)
        return out

    monkeypatch.setattr(type(module), "forward", counted)
    return runs


def test_a_repeated_part_gives_to_each_input_its_own_output(monkeypatch, model):
    """In whatever order they come, and nothing is left of it."""
    block = decoder_blocks(model)[0]
    with torch.no_grad():
        x, kwargs = record_inputs(model, IDS.split(2), "cpu")
        plain = [run_block(block, h, kwargs, "block 0") for h in x]
        runs = count_runs(monkeypatch, block.self_attn)
        with modelutils.repeated(block, "self_attn"):
            for k in (0, 1, 2, 2, 0, 1):
                assert torch.equal(run_block(block, x[k], kwargs, "block 0"), plain[k])
        assert len(runs) == 3
        run_block(block, x[0], kwargs, "block 0")
        assert len(runs) == 4 and "forward" not in vars(block.self_attn) and not block._forward_pre_hooks


@pytest.mark.parametrize(("true_sequential", "passes"), [(False, 2), (True, 1)])
def test_finished_attention_runs_once(monkeypatch, model, true_sequential, passes):
    """In true sequence three passes need its output: those for the other groups, and the one to the next block."""
    runs = count_runs(monkeypatch, decoder_blocks(model)[0].self_attn)
    run(model, Recipe(method="awrq", wbits=4, act_bits=8, true_sequential=true_sequential), IDS[:4], walk_batch=2)
    capture, blocks, batches = 2, 2, 2
    assert len(runs) == capture + passes * blocks * batches


@pytest.mark.parametrize("method", LEARNING)
def test_nothing_of_a_block_outlives_it_on_the_device(monkeypatch, method):
    """While a block is worked on, no codes, statistics, original weights or inputs of the linears before it are left."""
    seen, left, old = [], [], METHODS[method]
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in decoder_blocks(model)[0].named_parameters() if p.dim() == 2}

    class Stats(old.stats):
        def __init__(self, columns, recipe, device):
            super().__init__(columns, recipe, device)
            if columns == 64:  # the block's last group: everything up to here belongs to this block
                gc.collect()
                mine = {id(p) for p in before.values()}
                tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and id(x) not in mine]
                copies = [name for name, p in before.items() for x in tensors if x.shape == p.shape and torch.equal(x, p)]
                left.append([what for what, ref in seen if ref() is not None] + copies)
                seen.clear()

        def add(self, x):
            seen.append(("an input", weakref.ref(x)))
            super().add(x)

    def weights(W, stats, recipe, name):
        q, grid = old.weights(W, stats, recipe, name)
        for what, tensor in (("a weight", W), ("codes", q), ("H", stats.H)):
            seen.append((f"{what} of {name}", weakref.ref(tensor)))
        return q, grid

    first = modelutils.FirstSequences.add

    def keep(self, x):
        first(self, x)
        seen.append(("a first sequence", weakref.ref(self.x)))

    monkeypatch.setattr(modelutils.FirstSequences, "add", keep)
    monkeypatch.setitem(METHODS, method, replace(old, stats=Stats, weights=weights))
    quantize(model, IDS, Recipe(method=method, wbits=4, act_bits=8), "cpu", 2, Clock("cpu"))
    assert len(left) == 2 and left[0], "the first block's own weights are there while it is worked on"
    assert len(seen) > 20
    assert left[1] == []


@pytest.mark.parametrize("what", ["quantize", "perplexity"])
def test_one_block_at_a_time_is_on_the_device(monkeypatch, what):
    """Counted by what is sent there: `cpu:0` plays the device, and blocks run only there."""
    model, device, there, most, ran = tiny_model(), torch.device("cpu:0"), set(), [], []
    blocks = list(decoder_blocks(model))
    send = nn.Module.to

    def to(module, where, *args, **kwargs):
        mine = {i for i, block in enumerate(blocks) if any(m is block for m in module.modules())}
        if torch.device(where) == device:
            there.update(mine)
        else:
            there.difference_update(mine)
        most.append(len(there))
        return send(module, where, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i in there))
    if what == "quantize":
        run_on = quantize_blocks(model, IDS, Recipe(method="awrq", wbits=4, act_bits=8, smooth=True), device, 2)
        assert len(list(run_on)) == 2
    else:
        perplexity(model, IDS.flatten(), 48, device, 2)
    assert max(most) == 1, "blocks on the device together"
    assert ran and all(ran), "a block ran elsewhere"
    assert not there, "left on the device"


# ---------------------------------------------------------------------------
# NaN, Inf, dead inputs


@contextmanager
def not_finite(*parts):
    with pytest.raises(FloatingPointError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def linears_of(variants=VARIANTS):
    return [(f, v, name) for f, v in variants for group in TINY[f]["groups"] for name in group]


@pytest.mark.parametrize(("family", "variant", "name"), linears_of(), ids="-".join)
def test_inf_in_an_activation_names_block_and_layer(family, variant, name):
    """Both while quantizing and while evaluating.  The weights themselves are finite."""
    model = tiny_model(family, variant)
    with torch.no_grad():
        decoder_blocks(model)[1].get_submodule(name).weight[:, :16].fill_(3e38)
    with not_finite("block 1", name, "Inf"):
        run(deepcopy(model), Recipe(method="act_only", act_bits=8))
    with not_finite("block 1", name, "Inf"):
        perplexity(model, IDS.flatten(), 48, "cpu", 2)


@pytest.mark.parametrize("method", LEARNING)
def test_inf_in_the_statistics_names_block_and_layer(method):
    model = tiny_model()
    with torch.no_grad():
        decoder_blocks(model)[1].fc1.weight.mul_(1e25)  # finite itself, and so are the outputs; the squares are not
    with not_finite("block 1", "fc2", "statistics"):
        run(model, Recipe(method=method, wbits=4, act_bits=8))


@pytest.mark.parametrize("method", LEARNING)
def test_statistics_whose_mean_overflows_name_block_and_layer(method):
    """Every entry of H is finite, but not their mean, which the damping is a share of."""
    model, squares = tiny_model(), torch.zeros(64, dtype=torch.float64)
    block = decoder_blocks(model)[1]

    def add_squares(_, args):
        squares.add_(args[0].detach().double().square().flatten(0, -2).sum(0))

    with block.fc2.register_forward_pre_hook(add_squares):
        logits(model)
    assert squares.max() < 0.6 * squares.sum()
    with torch.no_grad():
        for p in block.fc1.parameters():
            p.mul_((1.5 * torch.finfo(torch.float32).max / squares.sum()).sqrt())
    with not_finite("block 1", "fc2"):
        run(model, Recipe(method=method, wbits=8, act_bits=8))


def test_a_layer_error_that_cannot_be_computed_in_float32_is_not_hidden():
    """As above, for a method without statistics: the error is the one of by-hand arithmetic, not 0."""
    model = tiny_model()
    model.groups, model.absorb, model.keeps_in_scale = TINY["opt"]["groups"], {}, set()
    with torch.no_grad():
        decoder_blocks(model)[1].fc1.weight.mul_(1e25)
    recipe = Recipe(method="rtn", wbits=4, act_bits=8)
    *_, expected = by_hand(model, IDS, recipe)
    for layer in run(model, recipe)[0]:
        assert layer.error == pytest.approx(expected[layer.block, layer.name], rel=0.05), layer


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("method", LEARNING)
def test_a_dead_input_is_a_named_warning_and_rounding_to_nearest(method, smooth):
    if smooth not in METHODS[method].smooth:
        pytest.skip(f"{method} does not allow smooth={smooth}")
    model = tiny_model()
    with torch.no_grad():
        norm = decoder_blocks(model)[1].self_attn_layer_norm
        norm.weight.zero_()
        norm.bias.zero_()
    recipe = Recipe(method=method, wbits=4, act_bits=8, smooth=smooth)
    with pytest.warns(UserWarning) as caught:
        layers, codes = run(model, recipe)
    (message,) = {str(w.message) for w in caught}
    assert all(part in message for part in ("block 1", "q_proj", "k_proj", "v_proj", "nearest")), message
    for name in TINY["opt"]["groups"][0]:
        W = tiny_model().get_submodule(FAMILIES["opt"].blocks)[1].get_submodule(name).weight
        # Rows of v take 1/s, and all columns of all three the same smallest scale: neither changes a code.
        assert (codes[1, name][0] == quant.rtn(W, None, recipe, "")[0]).double().mean() >= 0.995, name
    assert [layer.error for layer in layers if layer.block == 1 and layer.name in TINY["opt"]["groups"][0]] == [0, 0, 0]
    assert len(layers) == 12 and logits(model).isfinite().all()


def test_quantize_prints_each_block_and_returns_every_layer(capsys):
    clock = Clock("cpu")
    layers = quantize(tiny_model(), IDS, Recipe(method="awrq", wbits=4, act_bits=8, smooth=True), "cpu", 2, clock)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block ")]
    assert len(layers) == 12 and len(lines) == 2
    for i, line in enumerate(lines):
        assert line.startswith(f"block {i}:")
        for layer in layers[6 * i : 6 * i + 6]:
            assert f"{layer.name.rpartition('.')[2]} {layer.error:.1e}" in line
    assert {"capture", "smoothing", "statistics", "solving", "propagation"} == set(clock.seconds)
    assert all(seconds > 0 for seconds in clock.seconds.values())


# ---------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(("family", "variant"), VARIANTS, ids="-".join)
def test_a_family_row_is_the_model(family, variant):
    """Its groups are the block's linears in the order of execution; those of a group read the same tensor; its modules exist."""
    model, row = tiny_model(family, variant), FAMILIES[family]
    block, order = decoder_blocks(model)[0], []
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: order.append((name, args[0])))
    logits(model, IDS[:1])
    position = {name: k for k, (name, _) in enumerate(order)}
    read = dict(order)
    flat = [name for group in row.groups for name in group.linears]
    assert sorted(flat) == sorted(linears) and len(set(flat)) == len(flat)
    starts = [min(position[name] for name in group.linears) for group in row.groups]
    assert starts == sorted(starts)
    for group in row.groups:
        block.get_submodule(group.producer)
        assert all(torch.equal(read[name], read[group.linears[0]]) for name in group.linears)
    assert row.after[-1] == "lm_head"
    assert tuple(group.linears for group in row.groups) == TINY[family]["groups"]


# ---------------------------------------------------------------------------
# Loading


@contextmanager
def one_line(error, *parts):
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.fixture
def folder(tiny_opt, tmp_path):
    """A copy of the tiny model to spoil."""
    return shutil.copytree(tiny_opt, tmp_path / "opt")


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_good_folder_loads(folder):
    config = modelutils.load_config(folder)
    model = modelutils.load_model(folder)
    assert config.model_type == "opt" and not model.training
    expected = tiny_model()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in expected.state_dict().items())
    assert modelutils.load_tokenizer(folder)("word3 word1")["input_ids"] == [WORDS.index("word3"), WORDS.index("word1")]


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_the_type_of_a_model(tmp_path, dtype, device, expected):
    """It stays in host memory, whatever the device."""
    folder = save_model(tmp_path / "half", tiny_model().half())
    model = modelutils.load_model(folder, dtype, torch.device(device))
    assert model.dtype == expected and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/nowhere/opt", ""])
def test_no_model_there(name):
    with one_line(OSError, name, "no model there"):
        modelutils.load_config(name)


def test_a_model_of_another_family(folder):
    edit_config(folder, model_type="gpt2")
    with one_line(ValueError, folder, "gpt2", *FAMILIES):
        modelutils.load_config(folder)


@pytest.mark.parametrize("settings", [{"model_type": "not-a-type"}, {"hidden_size": "wide"}])
def test_a_config_that_transformers_refuses(folder, settings):
    edit_config(folder, **settings)
    with one_line((OSError, ValueError), folder, next(iter(settings.values()))):
        modelutils.load_config(folder)


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    with one_line(OSError, folder, "config.json"):
        modelutils.load_config(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with one_line(OSError, folder, "safetensors"):
        modelutils.load_model(folder)
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with one_line(OSError, folder, "safetensors", "save_pretrained"):
        modelutils.load_model(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with one_line((OSError, ValueError), folder):
        modelutils.load_model(folder)


def test_a_weight_that_is_not_in_the_file(folder):
    """transformers would draw it at random, and say so on a log that we silence."""
    edit_weights(folder, lambda tensors: tensors.pop("model.decoder.layers.1.fc1.weight"))
    with one_line((OSError, ValueError), folder, "layers.1.fc1.weight"):
        modelutils.load_model(folder)


def test_a_weight_of_another_shape(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.decoder.layers.1.fc1.weight": torch.zeros(8, 8)}))
    with one_line((OSError, ValueError), folder, "layers.1.fc1.weight"):
        modelutils.load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    edit_weights(folder, lambda tensors: tensors["model.decoder.layers.1.fc1.weight"][2, 3].fill_(value))
    with one_line(FloatingPointError, folder, "layers.1.fc1.weight"):
        modelutils.load_model(folder)


# ---------------------------------------------------------------------------
# Tokenizer


@pytest.fixture
def bpe(tmp_path):
    """A byte-level BPE as OPT's: vocab.json and merges.txt, </s> is 2; the tokenizer alone knows of no first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.model.save(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return folder, tokenizer


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("beside", [True, False], ids=["with tokenizer.json", "without"])
def test_opt_begins_each_text_with_its_first_token(bpe, beside, asks):
    folder, plain = bpe
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": asks}))
    if beside:
        plain.save(str(folder / "tokenizer.json"))
    tokenizer = modelutils.load_tokenizer(folder)
    for text in ("word1 word2", "", "\n\n = Title = \n\n the"):
        assert tokenizer(text)["input_ids"] == [2] * asks + plain.encode(text).ids, repr(text)


def test_the_first_token_is_not_put_twice(bpe):
    """A tokenizer.json that adds it by itself, under a configuration that asks for it."""
    folder, _ = bpe
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    modelutils.load_tokenizer(folder).save_pretrained(folder)
    assert "TemplateProcessing" in (folder / "tokenizer.json").read_text()
    assert modelutils.load_tokenizer(folder)("word1")["input_ids"].count(2) == 1


@pytest.mark.skipif(not GPT2.exists(), reason="no ../shared with GPT-2's vocabulary, which OPT renumbers")
def test_wikitext2_has_as_many_tokens_as_everybody_says(tmp_path):
    """287,645 with OPT's tokenizer: GPT-2's 287,644, and </s> before them."""
    words = [word for word in json.loads((GPT2 / "vocab.json").read_text()) if word != "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    shutil.copy(GPT2 / "merges.txt", tmp_path)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ids, _ = eval_tokens("wikitext2", modelutils.load_tokenizer(tmp_path), 2048, GPT2.parents[1])
    assert len(ids) == 287_645 and ids[0] == vocab["</s>"]


@pytest.mark.parametrize("gone", [["tokenizer.json", "tokenizer_config.json"], ["tokenizer.json"]])
def test_no_tokenizer(folder, gone):
    """transformers would make an empty one, which turns every text into nothing."""
    for name in gone:
        (folder / name).unlink()
    with one_line(OSError, folder, "tokenizer"):
        modelutils.load_tokenizer(folder)


@pytest.mark.parametrize("gone", [["vocab.json", "merges.txt"], ["vocab.json"], ["merges.txt"]])
def test_half_a_tokenizer(bpe, gone):
    for name in gone:
        (bpe[0] / name).unlink()
    with one_line(OSError, bpe[0], "tokenizer"):
        modelutils.load_tokenizer(bpe[0])


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with one_line(OSError, folder, "tokenizer"):
        modelutils.load_tokenizer(folder)


def test_a_vocabulary_that_does_not_fit():
    config = tiny_model().config
    modelutils.check_vocabulary(config, [torch.tensor([1, config.vocab_size - 1]), torch.zeros(2, 3)])
    with one_line(ValueError, config.vocab_size):
        modelutils.check_vocabulary(config, [torch.tensor([1]), torch.tensor([[0, config.vocab_size]])])


# ---------------------------------------------------------------------------
# Command line

# The OPT commands of the paper's repository (ppl/run_opt.sh), and the recipe that each must mean.
PAPER = "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --blocksize 1"
PUBLISHED = {
    "--calib_data c4 --method full": {"wbits": 16, "act_bits": 16, "smooth": False},
    f"{PAPER} --method awrq --smooth --alpha 0.50 --min 0.10": {"wbits": 4, "act_bits": 8, "smooth": True},
    f"{PAPER} --method awrq": {"wbits": 4, "act_bits": 8, "smooth": False},
    "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --method smoothquant --alpha 0.50 --min 0.10": {
        "wbits": 4,
        "act_bits": 8,
        "smooth": True,
    },
    "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --method rtn": {"wbits": 4, "act_bits": 8, "smooth": False},
    "--calib_data c4 --wbits 4 --groupsize -1 --blocksize 1 --method gptq --smooth --alpha 0.50 --min 0.10": {
        "wbits": 4,
        "act_bits": 16,
        "smooth": True,
    },
    "--calib_data c4 --wbits 3 --groupsize -1 --blocksize 1 --method gptq": {"wbits": 3, "act_bits": 16, "smooth": False},
    "--calib_data c4 --act_bits 8 --method act_only --smooth --alpha 0.5 --min 0.1": {"wbits": 16, "act_bits": 8, "smooth": True},
    "--calib_data c4 --act_bits 8 --method act_only": {"wbits": 16, "act_bits": 8, "smooth": False},
    "--calib_data c4 --act_bits 6 --method act_only": {"wbits": 16, "act_bits": 6, "smooth": False},
}


def recipe_of(line, context=2048):
    return make_recipe(opt.parser().parse_args(["MODEL", *line.split()]), context)


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_mean_what_they_meant(line):
    defaults = {"groupsize": -1, "blocksize": 1, "alpha": 0.5, "min": 0.1, "percdamp": 0.01, "seed": 0, "nsamples": 128, "seqlen": 2048}
    recipe = recipe_of(line)
    assert {key: getattr(recipe, key) for key in PUBLISHED[line] | defaults} == PUBLISHED[line] | defaults
    assert recipe.method == line.split("--method ")[1].split()[0]
    assert not (recipe.sym or recipe.actorder or recipe.act_pertoken or recipe.true_sequential)


def test_the_defaults():
    assert recipe_of("") == Recipe(method="full", wbits=16, act_bits=16, seqlen=2048)
    assert recipe_of("", context=64).seqlen == 64
    assert recipe_of("", context=4096).seqlen == 2048


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_implies(method):
    """Read from the table: activations and smoothing are as it says, and can be asked for where it allows both."""
    row, wbits = METHODS[method], " --wbits 4" if METHODS[method].weights else ""
    plain = recipe_of(f"--method {method}{wbits}")
    assert plain.smooth == row.smooth[0] and plain.act_bits == (8 if row.acts[0] else 16)
    for flag, allowed, field, value in (
        ("--smooth", row.smooth, "smooth", True),
        ("--act_quant", row.acts, "act_bits", 8),
    ):
        if True in allowed:
            assert getattr(recipe_of(f"--method {method}{wbits} {flag}"), field) == value
        else:
            with one_line(ValueError, flag, method):
                recipe_of(f"--method {method}{wbits} {flag}")


@pytest.mark.parametrize("method", ROUNDING)
def test_a_method_that_rounds_weights_wants_to_know_how(method):
    for line in (f"--method {method}", f"--method {method} --wbits 16"):
        with one_line(ValueError, "--wbits", method):
            recipe_of(line)


def refusals():
    """Settings that a method cannot use, from the table: (command line, flag)."""
    for name, row in METHODS.items():
        start = f"--method {name}" + " --wbits 4" * bool(row.weights)
        if not row.weights:
            flags = ("--wbits 4", "--groupsize 64", "--sym", "--blocksize 8", "--clip mse", "--bias_correction")
            yield from ((f"{start} {flag}", flag) for flag in flags)
        if not row.stats:
            flags = ("--percdamp 0.1", "--actorder", "--true-sequential", "--grid reformulated", "--target stream", "--clip hessian")
            yield from ((f"{start} {flag}", flag) for flag in flags)
        yield f"{start} --target_mix 0.3", "--target_mix 0.3"  # without --target stream, if it can be
        if False not in row.smooth:
            yield f"{start} --no-smooth", "--no-smooth"
        if not row.smooth[0]:  # unless it is asked for, if it can be
            yield from ((f"{start} {flag}", flag) for flag in ("--alpha 0.3", "--min 0.2", "--smooth_search"))
        if not row.acts[0]:
            yield from ((f"{start} {flag}", flag) for flag in ("--act_bits 6", "--act_pertoken"))


@pytest.mark.parametrize(("line", "flag"), list(refusals()))
def test_a_setting_that_a_method_cannot_use_is_an_error(line, flag):
    with one_line(ValueError, flag, line.split()[1]):
        recipe_of(line)


@pytest.mark.parametrize(
    "line",
    [
        "--method gptq --wbits 4 --act_quant --act_bits 6 --act_pertoken",
        "--method gptq --wbits 4 --act_bits 16",
        "--method full --act_bits 16",
        "--method awrq --wbits 4 --smooth --alpha 0.3 --min 0.2 --percdamp 0.1 --actorder --true-sequential --sym --groupsize 64",
        "--method smoothquant --wbits 8 --smooth --alpha 0.3",
        "--method act_only --act_bits 16 --smooth",
        "--method rtn --wbits 4 --no-smooth",
    ],
)
def test_settings_that_go_together(line):
    args = opt.parser().parse_args(["MODEL", *line.split()])
    recipe = make_recipe(args, 2048)
    for flag in ("alpha", "min", "percdamp", "actorder", "true_sequential", "sym", "groupsize", "act_pertoken"):
        assert getattr(recipe, flag) == getattr(args, flag), flag
    assert recipe.act_bits == (args.act_bits if METHODS[args.method].acts[0] or args.act_quant else 16)


def test_seqlen_beyond_the_context():
    assert recipe_of("--seqlen 64", context=CONTEXT).seqlen == 64
    with one_line(ValueError, "--seqlen 65", CONTEXT):
        recipe_of("--seqlen 65", context=CONTEXT)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(name)}: .*cpu") as caught:
        modelutils.device(name)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_there():
    assert modelutils.device("cpu") == torch.device("cpu")


def test_walk_batch_by_default():
    config = tiny_model().config
    batches = [modelutils.default_walk_batch(config, seqlen, "cpu") for seqlen in (1, 64, 2048, 10**6)]
    assert batches == sorted(batches, reverse=True) and batches[0] > 1 and batches[-1] == 1


def test_a_clock_adds_up():
    clock = Clock("cpu")
    for _ in range(2):
        with clock("work"):
            sum(range(10**5))
    first = clock.seconds["work"]
    with clock("work"):
        sum(range(10**5))
    assert 0 < first < clock.seconds["work"] and set(clock.seconds) == {"work"}


def test_warnings_in_a_run_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("sys.argv", ["opt.py", "MODEL"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        opt.parser().run(lambda args: warnings.warn("block 1 fc2: something", stacklevel=1))
    assert capsys.readouterr().err.splitlines() == ["warning: block 1 fc2: something"]
