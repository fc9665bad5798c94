"""Options beyond the paper: each equals the slow obvious computation on a small layer or model, and off it changes nothing."""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import reference
import torch
from conftest import CPU, VARIANTS, FinishedBlocks, decoder_blocks, recipe_of, tiny_model, token_ids
from conftest import quantize as quantize_model
from test_awrq import quantize

import kernels
import opt
import run.quantize
from families import FAMILIES, Residual
from formats.resume import ResumableStore, run_identity
from modelutils import decoder_of
from quant import Grid, Means, QuantLinear, fake_quant_act, find_grid, from_int, rtn
from recipe import METHODS, PRESETS, TARGETS, Recipe
from rotate import rotated
from run.calibrate import Stream
from run.quantize import BlockQuantizer, quantize_blocks
from run.report import recipe_name
from runtime import Clock, Place
from smoothquant import ALPHAS, search_scale

IDS = token_ids(4, 32)
PLUS = PRESETS["plus"]


def codes_of(store):
    """{(block, name): codes}"""
    return {(i, name): q for i in range(store.finished) for name, (q, _) in store.codes(i).items()}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# ---------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("groupsize", "C"), [(-1, 24), (8, 24), (7, 24), (64, 24)])
@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_a_clipped_grid_costs_least(clip, groupsize, C, sym):
    W, _ = reference.layer(7, C)
    W[3], W[4] = 0, W[4].abs()
    importance = torch.rand(C, generator=torch.Generator().manual_seed(0)) + 0.1
    found = find_grid(W, 3, groupsize, sym, clip, importance)
    scale, zero = (found.columns(p, C).expand(7, C) for p in (found.scale, found.zero))
    g = C if groupsize == -1 else groupsize
    for r, row in enumerate(W.double()):
        for i in range(0, C, g):
            part = slice(i, i + g)
            cost = reference.power if clip == "mse" else reference.weighted(importance[part].double())
            expected = reference.clipped(row[part], 3, sym, cost)
            assert (scale[r, i].item(), zero[r, i].item()) == pytest.approx(expected, rel=1e-5), f"{r=} {i=}"
    assert (
        (scale < find_grid(W, 3, groupsize, sym).columns(found.scale, C)).any()
        or groupsize == 7
        or (found.scale < find_grid(W, 3, groupsize, sym).scale).any()
    )


def test_rounding_to_nearest_clips_too():
    W, _ = reference.layer(8, 64)
    recipe = Recipe(method="rtn", wbits=3, clip="mse")
    q, grid = rtn(W, None, recipe, "layer")
    plain = from_int(*rtn(W, None, Recipe(method="rtn", wbits=3), "layer"))
    assert reference.power(from_int(q, grid) - W) < 0.9 * reference.power(plain - W)


def test_many_rows_are_clipped_in_parts(monkeypatch):
    W, _ = reference.layer(33, 24)
    whole = find_grid(W, 3, 7, clip="mse")
    monkeypatch.setattr("quant.CHUNK", 100)
    assert torch.equal(find_grid(W, 3, 7, clip="mse").scale, whole.scale)


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
@pytest.mark.parametrize("groupsize", [-1, 20])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("method", ["gptq", "awrq"])
def test_the_grid_of_the_reformulated_weight_step_by_step(method, actorder, groupsize, clip):
    """Grids found from W*, which is rounded from its first column on; groups without act-order as the loop reaches them."""
    W, X = reference.layer(12, 48, dead=3)
    recipe = {"wbits": 3, "act_bits": 5, "grid": "reformulated", "clip": clip, "actorder": actorder, "groupsize": groupsize}
    q, grid = quantize(W, X, method, **recipe)

    x = X.flatten(0, 1).double()
    seen = fake_quant_act(X, 5).flatten(0, 1).double() if method == "awrq" else x
    H, M, alive = seen.T @ seen, (x - seen).T @ seen, W.double()
    alive[:, :3], H.diagonal()[:3] = 0, 1
    inverse = torch.linalg.inv(reference.damped(H, 0.01))
    star, importance = alive + alive @ M @ inverse, 1 / inverse.diagonal()
    costs = {"none": None, "mse": lambda i, j: reference.power, "hessian": lambda i, j: reference.weighted(importance[i:j])}
    if actorder:
        *_, scale, zero = reference.block_loop(star, torch.eye(48).double(), 3, groupsize, cost=costs[clip])  # no error is passed on
        order = H.diagonal().argsort(descending=True, stable=True)
        U = reference.inverse_factor(H[order][:, order], 0.01)
        expected = torch.empty_like(q)
        expected[:, order] = reference.column_loop(star[:, order], U, scale[:, order], zero[:, order], 3)
    else:
        U = reference.inverse_factor(H, 0.01)
        expected, scale, zero = reference.block_loop(star, U, 3, groupsize, cost=costs[clip])
    same = (q == expected).double().mean().item()
    assert same >= 0.99, f"{same:.2%} of the codes are equal"
    close = ((grid.columns(grid.scale, 48).expand_as(W) - scale).abs() < 0.001 * scale).double().mean().item()
    assert close >= 0.98, f"{close:.2%} of the scales are equal"


@pytest.mark.parametrize("method", ["gptq", "awrq"])
def test_at_three_bits_it_pays(method):
    W, X = reference.layer(64, 96)
    x, xq = X.flatten(0, 1), fake_quant_act(X, 8).flatten(0, 1)
    paper, ours, weighed = (
        reference.output_error(W, x, from_int(*quantize(W, X, method, wbits=3, **settings)), xq)
        for settings in ({}, {"grid": "reformulated", "clip": "mse"}, {"grid": "reformulated", "clip": "hessian"})
    )
    assert ours < 0.95 * paper and weighed < 0.95 * paper


@pytest.mark.parametrize("clip", ["mse", "hessian"])
@pytest.mark.filterwarnings("ignore:awrq. all")
def test_without_any_input_a_clipped_grid_is_that_of_rounding_to_nearest(clip):
    W, X = reference.layer(8, 32)
    q, grid = quantize(W, torch.zeros_like(X), "awrq", clip=clip)
    expected, nearest = rtn(W, None, Recipe(method="rtn", wbits=4, clip=clip), "layer")
    assert torch.equal(q, expected) and torch.equal(grid.scale, nearest.scale)


# ---------------------------------------------------------------------------
# Targets: against the method done by hand in test_modelutils.py, and here:


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awrq"])
@pytest.mark.parametrize("true_sequential", [False, True])
def test_nothing_of_the_stream_is_the_layers_own_target(method, true_sequential):
    settings = {"method": method, "wbits": 4, "act_bits": 8, "smooth": True, "true_sequential": true_sequential}
    if method == "gptq":
        settings["act_bits"] = 16
    targets = ({}, {"target": "stream", "target_mix": 0}, {"target": "stream"})
    codes = [codes_of(quantize_model(tiny_model(), IDS, Recipe(**settings, **target))[1]) for target in targets]
    assert all(torch.equal(q, codes[1][key]) for key, q in codes[0].items())
    assert any(not torch.equal(q, codes[2][key]) for key, q in codes[0].items())


@pytest.mark.slow
def test_the_stream_pays(monkeypatch):
    """What the model computes on its calibration text is closer to the unquantized model's; closer still where layers give back."""
    model = tiny_model(num_hidden_layers=4)
    full = logits(model, ids := token_ids(32, 48))

    def lost(target):
        recipe = Recipe(method="awrq", wbits=4, act_bits=8, true_sequential=True, target=target)
        quantized, *_ = quantize_model(deepcopy(model), ids, recipe, walk_batch=4)
        return (logits(quantized, ids) - full).norm().item()

    layer, stream, residual = map(lost, TARGETS)
    assert max(stream, residual) < 0.95 * layer
    monkeypatch.setattr(Residual, "read_before", lambda *_: {})
    assert residual < 0.98 * lost("residual")


@pytest.mark.slow
@pytest.mark.parametrize("walk_batch", [1, 3])
def test_the_stream_is_the_unquantized_model(monkeypatch, model, walk_batch):
    """Beside smoothed, partly quantized blocks it goes on with what the original computes."""
    streams = []
    monkeypatch.setattr(run.quantize, "Stream", lambda *args: streams.append(Stream(*args)) or streams[0])
    expected = []
    for block in decoder_blocks(original := deepcopy(model)):
        block.register_forward_hook(lambda block, args, out: expected.append(out if torch.is_tensor(out) else out[0]))
    logits(original)
    recipe = Recipe(method="awrq", wbits=3, act_bits=8, smooth=True, true_sequential=True, target="stream")
    store = FinishedBlocks(decoder_of(model), recipe)
    for i, _ in enumerate(quantize_blocks(store.original, IDS, recipe, store, walk_batch=walk_batch)):
        torch.testing.assert_close(torch.cat(list(streams[0])), expected[i], rtol=1e-3, atol=1e-3)
        assert not hasattr(streams[0], "block")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["stream", "residual"])
def test_it_does_not_matter_where_sequences_are_kept(target, tmp_path):
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, true_sequential=True, target=target)
    found = []
    for home in ("device", "host", tmp_path):
        store = FinishedBlocks(decoder_of(tiny_model()), recipe)
        list(quantize_blocks(store.original, IDS, recipe, store, Place(CPU, home), walk_batch=2))
        found.append({(i, name): q for i, made in store.blocks.items() for name, (q, _) in made.codes.items()})
    assert all(torch.equal(q, other[key]) for other in found[1:] for key, q in found[0].items())


@pytest.mark.slow
def test_true_sequence_and_smoothing_change_no_function_before_rounding(monkeypatch, model):
    before = logits(model)
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 4, -1)
    monkeypatch.setattr(BlockQuantizer, "round_group", lambda self, g, _: {n: (self.linears[n].weight.data, grid) for n in g.linears})
    monkeypatch.setattr(run.quantize, "from_int", lambda W, _: W)
    recipe = Recipe(method="awrq", wbits=4, act_bits=16, smooth=True, true_sequential=True, target="stream", bias_correction=True)
    store = FinishedBlocks(decoder_of(model), recipe)
    errors = [layer.error for layers in quantize_blocks(store.original, IDS, recipe, store) for layer in layers]
    assert max(errors) < 1e-6
    assert (logits(store.model(model)) - before).norm() < 1e-4 * before.norm()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["stream", "residual"])
def test_a_run_with_a_stream_goes_on_where_it_was_killed(target, tmp_path):
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True, true_sequential=True, target=target)
    whole, decoder = codes_of(quantize_model(tiny_model(), IDS, recipe)[1]), decoder_of(tiny_model())

    def store():
        return ResumableStore(decoder, recipe, tmp_path, run_identity(decoder, IDS, recipe, CPU, 1))

    killed = quantize_blocks(decoder, IDS, recipe, store())
    next(killed)
    killed.close()
    del killed
    again = codes_of(quantize_model(None, IDS, recipe, store=store())[1])
    assert whole.keys() == again.keys() and all(torch.equal(q, again[key]) for key, q in whole.items())


# ---------------------------------------------------------------------------
# Biases


@pytest.mark.parametrize("per_token", [False, True])
def test_the_corrected_bias_leaves_no_error_on_average(per_token):
    W, X = reference.layer(6, 16)
    target = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(method="rtn", wbits=3, act_bits=5, act_pertoken=per_token)
    means, Q = Means(16, recipe, "cpu"), from_int(*rtn(W, None, recipe, "layer"))
    for x, t in zip(X.split(3), target.split(3), strict=True):
        means.add(x, t)
    xq = fake_quant_act(X, 5, per_token)
    lost = (target.double() @ W.double().T - xq.double() @ Q.double().T).flatten(0, 1).mean(0)
    torch.testing.assert_close(means.correction(W, Q).double(), lost, rtol=1e-4, atol=1e-6)
    assert lost.abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.weights])
def test_a_corrected_model_is_right_on_average(method):
    """The first linears of the first block, whose inputs no rounding has changed; a model without biases is left as it is."""
    recipe = Recipe(method=method, wbits=3, act_bits=8, smooth=METHODS[method].smooth[0], bias_correction=True)
    model, read = tiny_model(), []
    quantized, *_ = quantize_model(model, IDS, recipe)
    for m in (model, quantized):
        attention = decoder_blocks(m)[0].self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.register_forward_hook(lambda linear, args, out: read.append(out.flatten(0, -2).mean(0)))
        logits(m)
    torch.testing.assert_close(read[:2], read[2:], rtol=1e-3, atol=1e-4)
    bare, *_ = quantize_model(tiny_model("llama", "plain"), IDS, recipe)
    assert all(linear.bias is None for linear in bare.modules() if hasattr(linear, "in_scale"))


# ---------------------------------------------------------------------------
# Smoothing


SHARED_ROWS = torch.arange(8).view(4, 1, 2).expand(-1, 2, -1).flatten()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, SHARED_ROWS], ids=["own rows", "shared rows"])
@pytest.mark.parametrize(
    ("outliers", "wbits", "act_bits", "settings"),
    [(2, 3, 8, {}), (2, 4, 5, {"act_pertoken": True}), (2, 16, 5, {}), (2, 4, 16, {"groupsize": 8}), (0, 3, 8, {"act_sym": True})],
)
def test_the_search_finds_the_least_expected_error(outliers, wbits, act_bits, settings, rows):
    """Against a loop over rows, columns and tokens in float64."""
    W, X = reference.layer(10, 16, outliers=outliers)
    recipe = Recipe(method="awrq", wbits=wbits, act_bits=act_bits, smooth=True, smooth_search=True, min=0.5, **settings)
    tokens = [(b, t) for b in range(X.shape[0]) for t in range(X.shape[1])]

    def expected(s):
        _, step, _ = kernels.act_codes(X / s, act_bits, recipe.act_pertoken, recipe.act_sym)
        step = step.expand(*X.shape[:2], 1)
        grid = find_grid(W * s, wbits if wbits < 16 else 4, recipe.groupsize)
        wide = grid.columns(grid.scale, 16).expand(10, 16)
        total = 0.0
        for b, t in tokens:
            for r in range(10):
                for c in range(16):
                    size = X[b, t].square().sum().item()
                    if wbits < 16:
                        total += (wide[r, c] * X[b, t, c] / s[c]).item() ** 2 / size
                    if act_bits < 16:
                        total += (step[b, t, 0] * W[r, c] * s[c]).item() ** 2 / size
        return total

    tokens = tokens[:: len(tokens) // 12]  # enough, as a loop takes long
    X = torch.stack([X[b, t] for b, t in tokens])[None]
    tokens = [(0, t) for t in range(len(tokens))]
    found = search_scale(X, W.split((4, 6)), recipe, rows)
    rms_x, rms_w = (X.square() / X.square().sum(-1, keepdim=True)).mean((0, 1)).sqrt(), W.square().mean(0).sqrt()
    tried = [torch.ones(16)]
    for alpha in ALPHAS:
        s = rms_x**alpha / rms_w ** (1 - alpha)
        s = (s / s.log().mean().exp()).clamp(min=0.5)
        tried.append(s if rows is None else torch.stack([max(s[c] for c in range(16) if rows[c] == row) for row in rows]))
    torch.testing.assert_close(found, min(tried, key=expected))
    assert not outliers or expected(found) < 0.9 * expected(torch.ones(16)), "smoothing outliers gains"


def test_a_massive_token_does_not_decide_for_the_others():
    """One token of a thousand times the size, in one channel: its scale is not what the others are smoothed by."""
    W, X = reference.layer(32, 64)
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, act_pertoken=True, smooth=True, smooth_search=True)
    without = search_scale(X, [W], recipe)
    X[0, 0, 5] += 3000
    assert (search_scale(X, [W], recipe) / without - 1).abs().max() < 0.5


@pytest.mark.parametrize("walk_batch", [1, 3])
def test_a_search_looks_at_the_first_sequences(monkeypatch, walk_batch):
    monkeypatch.setattr(run.quantize, "SEARCHED", 4)
    seen = []
    monkeypatch.setattr(run.quantize, "search_scale", lambda x, weights, *_: seen.append(x) or torch.ones(x.shape[-1]))
    recipe = Recipe(method="smoothquant", wbits=4, act_bits=8, smooth=True, smooth_search=True)
    quantize_model(tiny_model(), token_ids(7, 16), recipe, walk_batch)
    assert [x.shape for x in seen] == [(4, 16, 32), (4, 16, 32), (4, 16, 32), (4, 16, 64)] * 2
    expected = []
    model = tiny_model()
    decoder_blocks(model)[0].self_attn.q_proj.register_forward_pre_hook(lambda linear, args: expected.append(args[0]))
    logits(model, token_ids(7, 16)[:4])
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_token_of_zeros_counts_for_nothing(per_token):
    """A ReLU can leave one, whose grid has a step of 1 although there is nothing to round."""
    W, X = reference.layer(32, 64, outliers=3)
    recipe = Recipe(method="awrq", wbits=4, act_bits=6, act_pertoken=per_token, smooth=True, smooth_search=True)
    with_zeros = torch.cat((X, torch.zeros_like(X[:, :1])), 1)
    found = search_scale(X, [W], recipe)
    assert (found != 1).any()
    torch.testing.assert_close(search_scale(with_zeros, [W], recipe), found)


def test_a_search_leaves_out_what_reads_a_rotated_stream(monkeypatch):
    monkeypatch.setattr(run.quantize, "search_scale", lambda x, weights, *_: torch.full(x.shape[-1:], 2.0))
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True, smooth_search=True, rotate=True)
    decoder = rotated(decoder_of(tiny_model("llama", "plain")), recipe.seed)
    sequences = decoder.embed(IDS.split(2), Place(CPU, "device"))
    block = BlockQuantizer(0, decoder.block(0), sequences, decoder, recipe, Clock(CPU))
    with torch.no_grad():
        block.smooth()
    assert set(block.scales) == {"self_attn.o_proj", "mlp.down_proj"}


@pytest.mark.slow
def test_a_searched_model_is_the_same_function(model):
    before = logits(model)
    smoothed, _, layers = quantize_model(model, IDS, Recipe(method="act_only", smooth=True, smooth_search=True))
    assert all(layer.error < 1e-9 for layer in layers)
    assert (logits(smoothed) - before).norm() < 1e-4 * before.norm()


def test_a_search_that_finds_nothing_worth_it_leaves_nothing_to_divide_by(monkeypatch):
    """Where no norm could take the scale, as in a post-norm OPT, a linear would else divide by 1 for ever."""
    monkeypatch.setattr(run.quantize, "search_scale", lambda x, weights, *_: torch.ones(x.shape[-1]))
    recipe = Recipe(method="smoothquant", wbits=4, act_bits=8, smooth=True, smooth_search=True)
    model, *_ = quantize_model(tiny_model("opt", "post-norm"), IDS, recipe)
    assert all(module.in_scale is None for module in model.modules() if isinstance(module, QuantLinear))


# ---------------------------------------------------------------------------
# Presets


def test_paper_is_the_default():
    for line in ("--method awrq --wbits 4", "--method smoothquant --wbits 4", "--method act_only"):
        assert recipe_of(opt, f"{line} --preset paper") == recipe_of(opt, line)
    assert PRESETS["paper"] == {}


def test_a_preset_sets_what_a_single_option_overrides():
    recipe = recipe_of(opt, "--method awrq --wbits 4 --preset plus")
    assert {key: getattr(recipe, key) for key in PLUS} == PLUS
    assert recipe_name(vars(recipe)) == "awrq W4A8, plus"
    served = recipe_of(opt, "--method awrq --wbits 4 --preset serve")
    assert served == replace(recipe, act_sym=True) and recipe_name(vars(served)) == "awrq W4A8, serve"
    best = recipe_of(opt, "--method awrq --wbits 4 --preset best")
    assert best == replace(recipe, target="residual", guided=True, beam=8, tune_steps=128) and recipe_name(vars(best)) == "awrq W4A8, best"
    changed = recipe_of(opt, "--method awrq --wbits 4 --preset plus --clip none --no-actorder")
    assert (changed.clip, changed.actorder) == ("none", False)
    assert recipe_name(vars(changed)) == "awrq W4A8, plus, clip none, no actorder"
    old = {key: value for key, value in vars(served).items() if key not in ("bias_correction", "guided")}  # as of an older JSON
    assert recipe_name(old | {"tune_steps": 64}) == "awrq W4A8, serve, no bias_correction, tune_steps 64"
    assert recipe_name(vars(replace(recipe, guided=True))) == "awrq W4A8, plus, guided"
    for line, name in {
        "--method gptq --wbits 4 --preset plus": "gptq W4A16, plus",
        "--method gptq --wbits 4 --preset plus --no-smooth": "gptq W4A16, plus, no smooth",
        "--method awrq --wbits 4 --preset plus --no-smooth --no-rotate": "awrq W4A8, plus, no rotate, no smooth",
    }.items():
        assert recipe_name(vars(recipe_of(opt, line))) == name, line
    assert recipe_name(vars(replace(recipe, rotate=False, actorder=False, clip="none"))).startswith(
        "awrq W4A8 + smoothing, grid reformulated"
    )
    assert {key: getattr(changed, key) for key in PLUS.keys() - {"clip", "actorder"}} == {
        key: PLUS[key] for key in PLUS.keys() - {"clip", "actorder"}
    }
    assert recipe_of(opt, "--method awrq --wbits 4") == Recipe(method="awrq", wbits=4, act_bits=8), "a preset of one run is no other's"


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_cannot_use_of_a_preset_it_goes_without(method):
    bits = " --wbits 3" if METHODS[method].weights else ""
    plain, recipe = recipe_of(opt, f"--method {method}{bits}"), recipe_of(opt, f"--method {method}{bits} --preset plus")
    assert (recipe != plain) == (method != "full")
    if not METHODS[method].stats:
        assert not recipe.actorder and recipe.grid == "weight" and recipe.target == "layer" and recipe.clip != "hessian"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "preset"),
    [*((variant, ("plus", "serve")[k % 2]) for k, variant in enumerate(VARIANTS)), (VARIANTS[-1], ("plus", "serve")[len(VARIANTS) % 2])],
    indirect=["model"],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else None,
)  # every family with both
def test_a_preset_runs_on_every_model(model, preset):
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, **PRESETS[preset])
    if FAMILIES[model.config.model_type].residual.obstacle(model.config):
        recipe = replace(recipe, rotate=False, target="stream")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized, _, layers = quantize_model(model, IDS, recipe, walk_batch=2)
    assert len(layers) == sum(map(len, model.groups)) * 2 and logits(quantized).isfinite().all()
