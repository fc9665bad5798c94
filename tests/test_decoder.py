"""A decoder walked block by block is the model, wherever its sequences are kept; its skeleton never changes."""

import math
from copy import deepcopy

import pytest
import torch
from conftest import CPU, TINY, VARIANTS, decoder_blocks, quantize, tiny_model, token_ids
from torch import nn

from families import FAMILIES
from modelutils import Sequences, decoder_of, default_walk_batch, run_block
from recipe import Recipe
from runtime import Place

IDS = token_ids(5, 48)
AWRQ = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@torch.no_grad()
def walked(decoder, batches, place):
    """The logits of every batch."""
    sequences = decoder.embed(batches, place)
    for i, block in decoder.visits(CPU, "test"):
        sequences.propagate(block, f"block {i}")
    return list(decoder.logits(sequences))


@pytest.mark.slow
@pytest.mark.parametrize(("walk_batch", "home"), [(1, "device"), (2, "folder"), (5, "device")])
def test_a_walked_decoder_is_the_model(model, walk_batch, home, tmp_path):
    found = walked(decoder_of(model), IDS.split(walk_batch), Place(CPU, tmp_path if home == "folder" else home))
    assert [len(part) for part in found] == [len(b) for b in IDS.split(walk_batch)]
    torch.testing.assert_close(torch.cat(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sequences_of_several_lengths(model):
    batches = [IDS[:2], IDS[2:3, :10], IDS[3:, :10]]
    for found, ids in zip(walked(decoder_of(model), batches, Place(CPU, "device")), batches, strict=True):
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_materialized_decoder_is_the_model(model):
    whole = decoder_of(model).materialize(CPU)
    assert torch.equal(logits(whole), logits(model))
    assert whole.state_dict().keys() == model.state_dict().keys() and not any(p.is_meta for p in whole.parameters())
    assert len({p.data_ptr() for p in whole.parameters()}) == len({p.data_ptr() for p in model.parameters()}), "tied where the model is"


def test_a_decoder_reads_a_model_and_changes_nothing(model):
    before, decoder = deepcopy(model.state_dict()), decoder_of(model)
    walked(decoder, IDS.split(2), Place(CPU, "device"))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.is_meta for p in decoder.skeleton.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in decoder.skeleton.modules())
    block = decoder.block(0)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    assert any(p.any() for p in decoder.block(0).parameters()), "every visit has its own tensors"


def test_capture_runs_no_block(monkeypatch, model):
    ran, decoder = [], decoder_of(model)
    kind = type(decoder_blocks(model)[0])
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: ran.append(1))
    sequences = decoder.embed(IDS.split(2), Place(CPU, "device"))
    assert not ran and [len(x) for x in sequences.x] == [2, 2, 1]


def test_a_block_may_return_a_tensor_or_a_tuple():
    x = torch.randn(2, 3, 4)
    for block in (lambda x: 2 * x, lambda x: (2 * x, "attention")):
        assert torch.equal(run_block(block, x, {}, "block 0"), 2 * x)


def test_sequences_are_replaced_one_by_one():
    sequences = Sequences(Place(CPU, "device"))
    for x in IDS.float()[..., None].split(1):
        sequences.record(0, x)
    sequences.propagate(lambda x: x + 1, "block 0")
    assert torch.equal(torch.cat(list(sequences)), IDS.float()[..., None] + 1)


def test_walk_batch_by_default():
    config = tiny_model().config
    batches = [default_walk_batch(config, seqlen, CPU) for seqlen in (1, 64, 2048, 10**6)]
    assert batches == sorted(batches, reverse=True) and batches[0] > 1 and batches[-1] == 1


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
    assert tuple(group.linears for group in row.groups) == TINY[family]["groups"]


# ---------------------------------------------------------------------------
# Blocks that do not fit


@pytest.fixture(scope="module", params=[AWRQ, Recipe(method="act_only", act_bits=6, smooth=True), None], ids=["codes", "scales", "full"])
def four_blocks(request):
    """A decoder of codes, of weights with scales, and of what it was; and all of it at once."""
    model = tiny_model("llama", "grouped", num_hidden_layers=4)
    decoder = quantize(model, token_ids(4, 32), request.param)[1].decoder() if request.param else decoder_of(model)
    return decoder, decoder.materialize(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("blocks_that_fit", [0, 1, 2, 4])
def test_blocks_that_do_not_fit_are_made_when_they_run(four_blocks, blocks_that_fit):
    """What is kept of them is what is stored, packed, and they compute the same again and again."""
    (decoder, whole), ids = four_blocks, token_ids(2, 16)
    size, others = (sum(t.nbytes for t in module.parameters()) for module in (whole.model.layers[0], whole))
    memory = others - 4 * size + size * (blocks_that_fit + 1.5) if blocks_that_fit < 4 else math.inf
    model = decoder.materialize(CPU, memory)
    assert model.visiting == 4 - blocks_that_fit == sum(not list(block.parameters()) for block in model.model.layers)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits, whole(ids).logits)
        with (
            model.batch.padded(torch.arange(16) < torch.tensor([[3], [16]])),
            whole.batch.padded(torch.arange(16) < torch.tensor([[3], [16]])),
        ):
            assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.slow
def test_a_materialized_model_generates_with_a_visiting_block():
    decoder = quantize(tiny_model("opt", "pre-norm"), token_ids(4, 32), AWRQ)[1].decoder()
    length = {"max_new_tokens": 8, "do_sample": False}
    made = [decoder.materialize(CPU, memory).generate(token_ids(2, 5), **length) for memory in (0, math.inf)]
    assert torch.equal(*made)
