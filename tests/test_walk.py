"""What is run and when, what is in memory, and that every error says where it is."""

import gc
import weakref
from contextlib import contextmanager
from pkgutil import resolve_name

import pytest
import torch
from conftest import CPU, FIRST_VARIANTS, TINY, decoder_blocks, tiny_model, token_ids
from test_quantize import LEARNING, RECIPES, by_hand, describe, logits
from test_quantize import run as quantized
from torch import nn

import quant
import run.quantize
from evaluation.perplexity import perplexity
from families import FAMILIES
from formats.checkpoint import Store
from modelutils import Decoder, decoder_of
from recipe import METHODS, Recipe
from run.calibrate import FirstSequences, repeated
from run.quantize import BlockQuantizer, quantize_blocks
from runtime import Clock, Place

IDS = token_ids(5, 48)

# ---------------------------------------------------------------------------
# What is walked and when, and what is in memory


DECIDING = {(recipe.method, recipe.smooth, recipe.bias_correction): recipe for recipe in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DECIDING.values(), ids=describe)
def test_only_what_can_teach_something_is_run(monkeypatch, recipe):
    n, embed, decoder = [], Decoder.embed, decoder_of(tiny_model())
    monkeypatch.setattr(Decoder, "embed", lambda self, batches, place: n.append(sum(map(len, batches))) or embed(self, batches, place))
    next(quantize_blocks(decoder, IDS, recipe, Store(decoder, recipe), walk_batch=2))
    assert n == [5 if METHODS[recipe.method].stats or recipe.smooth or recipe.bias_correction else 1]


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("method", LEARNING)
def test_statistics_live_until_their_group_is_solved(monkeypatch, method, true_sequential):
    """One statistic for all linears that read the same input, gone when they are solved; one at a time in true sequence."""
    alive, live, widths, row = weakref.WeakSet(), [], [], METHODS[method]

    class Stats(resolve_name(row.stats)):
        def __init__(self, columns, recipe, device):
            super().__init__(columns, recipe, device)
            alive.add(self)
            widths.append(columns)

    def weights(*arguments):
        live.append(len(alive))
        return resolve_name(row.weights)(*arguments)

    monkeypatch.setattr(run.quantize, "resolve_name", lambda name: {row.stats: Stats, row.weights: weights}[name])
    recipe, decoder = Recipe(method=method, wbits=4, act_bits=8, true_sequential=true_sequential), decoder_of(tiny_model())
    for _ in quantize_blocks(decoder, IDS, recipe, Store(decoder, recipe)):
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
    decoder = decoder_of(model)
    sequences, block = decoder.embed(IDS.split(2), Place(CPU, "device")), decoder.block(0)
    with torch.no_grad():
        plain = [sequences.run(block, k, "block 0") for k in range(3)]
        runs = count_runs(monkeypatch, block.self_attn)
        with repeated(block, "self_attn", sequences):
            for k in (0, 1, 2, 2, 0, 1):
                assert torch.equal(sequences.run(block, k, "block 0"), plain[k])
        assert len(runs) == 3
        sequences.run(block, 0, "block 0")
        assert len(runs) == 4 and "forward" not in vars(block.self_attn)


@pytest.mark.slow
@pytest.mark.parametrize("model", FIRST_VARIANTS, indirect=True, ids="-".join)
@pytest.mark.parametrize(("true_sequential", "passes"), [(False, 2), (True, 1)])
def test_finished_attention_runs_once(monkeypatch, model, true_sequential, passes):
    """In true sequence three passes need its output: those for the other groups, and the one to the next block."""
    runs = count_runs(monkeypatch, decoder_blocks(model)[0].self_attn)
    quantized(model, Recipe(method="awrq", wbits=4, act_bits=8, true_sequential=true_sequential), IDS[:4], walk_batch=2)
    blocks, batches = 2, 2
    assert len(runs) == passes * blocks * batches, "and none for what enters the first block"


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNING)
def test_nothing_of_a_block_outlives_it_on_the_device(monkeypatch, method):
    """While a block is worked on, no codes, statistics, original weights or inputs of the linears before it are left."""
    seen, left, row = [], [], METHODS[method]
    stats, solve = resolve_name(row.stats), resolve_name(row.weights)
    model = tiny_model(seed=77)  # no other test has these weights, and keeps them
    before = {name: p.detach().clone() for name, p in decoder_blocks(model)[0].named_parameters() if p.dim() == 2}

    class Stats(stats):
        def __init__(self, columns, recipe, device):
            super().__init__(columns, recipe, device)
            if columns == 64:  # the block's last group: everything up to here belongs to this block
                gc.collect()
                mine = {id(p) for p in (*before.values(), *model.parameters())}
                tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and id(x) not in mine and not x.is_meta]
                tensors = [x for x in tensors if x.data_ptr() not in {p.data_ptr() for p in model.parameters()}]
                copies = [name for name, p in before.items() for x in tensors if x.shape == p.shape and torch.equal(x, p)]
                left.append([what for what, ref in seen if ref() is not None] + copies)
                seen.clear()

        def add(self, x):
            seen.append(("an input", weakref.ref(x)))
            super().add(x)

    def weights(W, stats, recipe, name):
        q, grid = solve(W, stats, recipe, name)
        for what, tensor in (("a weight", W), ("codes", q), ("H", stats.H)):
            seen.append((f"{what} of {name}", weakref.ref(tensor)))
        return q, grid

    first = FirstSequences.add

    def keep(self, x):
        first(self, x)
        seen.append(("a first sequence", weakref.ref(self.kept[-1])))

    monkeypatch.setattr(FirstSequences, "add", keep)
    monkeypatch.setattr(run.quantize, "resolve_name", lambda name: {row.stats: Stats, row.weights: weights}[name])
    quantized(model, Recipe(method=method, wbits=4, act_bits=8))
    assert len(left) == 2 and left[0], "the first block's own weights are there while it is worked on"
    assert len(seen) > 20
    assert left[1] == []


@pytest.mark.parametrize("source", ["original", "store"])
def test_one_block_at_a_time_is_in_memory(monkeypatch, source):
    """Counted by what is built and what is emptied."""
    monkeypatch.setitem(TINY["opt"]["settings"], "num_hidden_layers", 5)
    recipe, there, most = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True), weakref.WeakSet(), []
    decoder = decoder_of(tiny_model())
    store = Store(decoder, recipe)
    build = Decoder.block

    def block(self, i):
        there.add(built := build(self, i))
        most.append(sum(not next(b.parameters()).is_meta for b in there))
        return built

    monkeypatch.setattr(Decoder, "block", block)
    assert len(list(quantize_blocks(decoder, IDS, recipe, store, walk_batch=2))) == 5
    if source == "store":
        most.clear()
        perplexity(store.decoder(), IDS.flatten(), 48, CPU, 2)
    assert most == [1] * 5


def test_embedding_and_head_are_in_memory_only_while_they_are_needed(monkeypatch):
    decoder, read = decoder_of(tiny_model("llama", "plain")), []
    rest = decoder.source.rest
    monkeypatch.setattr(decoder.source, "rest", lambda names: read.append(sorted(names)) or rest(names))
    perplexity(decoder, IDS.flatten(), 48, CPU, 2)
    assert read == [["model.embed_tokens.weight", "model.norm.weight"], ["lm_head.weight", "model.norm.weight"]]


# ---------------------------------------------------------------------------
# NaN, Inf, dead inputs


@contextmanager
def not_finite(*parts):
    with pytest.raises(FloatingPointError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def linears_of(variants):
    return [(f, v, name) for f, v in variants for group in TINY[f]["groups"] for name in group]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant", "name"), linears_of([*FIRST_VARIANTS, ("opt", "post-norm")]))
def test_inf_in_an_activation_names_block_and_layer(family, variant, name):
    """Both while quantizing and while evaluating.  The weights themselves are finite."""
    model = tiny_model(family, variant)
    with torch.no_grad():
        decoder_blocks(model)[1].get_submodule(name).weight[:, :16].fill_(3e38)
    with not_finite("block 1", name, "Inf"):
        quantized(model, Recipe(method="act_only", act_bits=8))
    with not_finite("block 1", name, "Inf"):
        perplexity(decoder_of(model), IDS.flatten(), 48, CPU, 2)


@pytest.mark.parametrize("method", LEARNING)
def test_inf_in_the_statistics_names_block_and_layer(method):
    model = tiny_model()
    with torch.no_grad():
        decoder_blocks(model)[1].fc1.weight.mul_(1e25)  # finite itself, and so are the outputs; the squares are not
    with not_finite("block 1", "fc2", "statistics"):
        quantized(model, Recipe(method=method, wbits=4, act_bits=8))


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
        quantized(model, Recipe(method=method, wbits=8, act_bits=8))


def test_a_layer_error_that_cannot_be_computed_in_float32_is_not_hidden():
    """As above, for a method without statistics: the error is the one of by-hand arithmetic, not 0."""
    model = tiny_model()
    model.groups, model.absorb, model.keeps_in_scale = TINY["opt"]["groups"], {}, set()
    with torch.no_grad():
        decoder_blocks(model)[1].fc1.weight.mul_(1e25)
    recipe = Recipe(method="rtn", wbits=4, act_bits=8)
    *_, expected = by_hand(model, IDS, recipe)
    for layer in quantized(model, recipe)[1]:
        assert layer.error == pytest.approx(expected[layer.block, layer.name], rel=0.05), layer


@pytest.mark.slow
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
        model, layers, codes = quantized(model, recipe)
    (message,) = {str(w.message) for w in caught}
    assert all(part in message for part in ("block 1", "q_proj", "k_proj", "v_proj", "nearest")), message
    for name in TINY["opt"]["groups"][0]:
        W = tiny_model().get_submodule(FAMILIES["opt"].blocks)[1].get_submodule(name).weight
        # Rows of v take 1/s, and all columns of all three the same smallest scale: neither changes a code.
        assert (codes[1, name][0] == quant.rtn(W, None, recipe, "")[0]).double().mean() >= 0.995, name
    assert [layer.error for layer in layers if layer.block == 1 and layer.name in TINY["opt"]["groups"][0]] == [0, 0, 0]
    assert len(layers) == 12 and logits(model).isfinite().all()


@pytest.mark.parametrize("failing", ["capture", "quantizing", "naming the layer"])
def test_no_hook_stays_behind_after_an_error(monkeypatch, failing):
    """Hooks are counted on every module that lives when the error has been raised."""
    decoder = decoder_of(tiny_model())
    recipe = Recipe(method="awrq", wbits=4, act_bits=8)
    if failing == "capture":
        with pytest.raises(IndexError):
            decoder.embed([torch.full((1, 4), 10**6)], Place(CPU, "device"))
        hooked = list(decoder.skeleton.modules())
    else:
        sequences, block = decoder.embed(IDS.split(2), Place(CPU, "device")), decoder.block(1)
        with torch.no_grad():
            block.fc1.weight[:, :16].fill_(3e38)
        with pytest.raises(FloatingPointError):
            if failing == "quantizing":
                BlockQuantizer(1, block, sequences, decoder, recipe, Clock("cpu")).run()
            else:
                sequences.run(block, 0, "block 1")
        hooked = list(block.modules())
    names = [type(m).__name__ for m in hooked if m._forward_hooks or (m._forward_pre_hooks and m is not hooked[0])]
    assert not names
