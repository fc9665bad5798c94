"""Rotated weights are the same function: in float64 to 1e-10, for every family, with every fold at work."""

from copy import deepcopy

import pytest
import torch
from conftest import CPU, VARIANTS, decoder_blocks, tiny_model, token_ids
from test_decoder import walked
from torch import nn

from modelutils import decoder_of
from recipe import UsageError
from rotate import CHUNK, Rotation, hadamard, random_orthogonal, rotated, times_kronecker
from runtime import Place

HOME = Place(CPU, "device")


def exact_rms_norm(self, x):
    """transformers computes it in float32 whatever comes in."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def exact(monkeypatch):
    """exact(model): the model in float64 throughout."""

    def exact(model):
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                monkeypatch.setattr(type(module), "forward", exact_rms_norm)
        return model.double()

    return exact


def logits(decoder, ids):
    return torch.cat(walked(decoder, ids.split(2), HOME))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [pair for pair in VARIANTS if pair[1] != "post-norm"])
def test_a_rotated_model_is_the_same_function(family, variant, exact):
    model, ids = exact(tiny_model(family, variant)), token_ids(4, 24)
    original = decoder_of(model)
    turned = rotated(original, seed=3)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits(turned, ids), want, rtol=1e-10, atol=1e-10)
    for i in range(len(original)):
        before, after = original.source.read(i), turned.source.read(i)
        for name in original.linears:
            assert not torch.allclose(before[f"{name}.weight"], after[f"{name}.weight"], atol=1e-2), f"{name} is not rotated"
    with torch.no_grad():
        torch.testing.assert_close(turned.materialize(CPU)(ids, use_cache=False).logits, want, rtol=1e-10, atol=1e-10)


SHAPES = {
    "odd-hidden": {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12},
    "hidden-172": {"hidden_size": 172, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 86},
    "one-key-value-head": {"num_key_value_heads": 1},
    "head-of-20": {"head_dim": 20, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, exact):
    model, ids = exact(tiny_model("llama", "plain", **SHAPES[shape])), token_ids(2, 24)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits(rotated(decoder_of(model), seed=0), ids), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 12, 43, 64, 172, 576, 5120])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_a_rotation_is_orthogonal(n, keeps_ones):
    Q = Rotation(n, "a seed", keeps_ones)
    x = torch.randn(3, n, dtype=torch.float64)
    turned = Q(x, torch.float64)
    torch.testing.assert_close(turned @ turned.T, x @ x.T, rtol=1e-11, atol=1e-11)
    ones = torch.ones(n, dtype=torch.float64)
    assert torch.allclose(Q(ones, torch.float64), ones) == (keeps_ones or n == 1)
    gain = torch.rand(n, dtype=torch.float64)
    torch.testing.assert_close(Q(x, torch.float64, gain), Q(x * gain, torch.float64))


def test_a_rotation_spreads_an_outlier_over_all_channels():
    for keeps_ones in (False, True):
        x = torch.zeros(576)
        x[100] = 1
        assert Rotation(576, "0", keeps_ones)(x, torch.float64).abs().max() < 0.2


def test_rotations_of_seeds_differ_and_of_one_seed_agree():
    x = torch.randn(2, 64)
    a, b, c = (Rotation(64, seed)(x, torch.float64) for seed in ("1", "1", "2"))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_many_rows_are_rotated_in_chunks():
    x = torch.randn(CHUNK // 64 + 5, 64, dtype=torch.float64)
    Q = Rotation(64, "0")
    torch.testing.assert_close(Q(x, torch.float64), x @ Q(torch.eye(64), torch.float64))


def test_times_kronecker_is_the_product_with_the_whole_matrix():
    A, B, C = random_orthogonal(3, torch.Generator().manual_seed(0)), hadamard(4), hadamard(2)
    x = torch.randn(5, 2, 24, dtype=torch.float64)
    torch.testing.assert_close(times_kronecker(x, [A, B, C]), x @ torch.kron(torch.kron(A.contiguous(), B), C))


def test_the_head_is_not_read_for_the_norm(monkeypatch):
    """Of an RMSNorm: what one with a bias adds depends on whether the head has one."""
    for variant, reads in ((("llama", "llama3"), False), (("opt", "pre-norm"), True)):
        turned, asked = rotated(decoder_of(tiny_model(*variant)), seed=0), []
        source, norm = turned.source.original.source, turned.family.residual.final_norm
        whole = turned.source.rest({f"{norm}.weight", "lm_head.weight"})
        rest = source.rest
        monkeypatch.setattr(source, "rest", lambda names, rest=rest, asked=asked: asked.extend(names) or rest(names))
        found = turned.source.rest({f"{norm}.weight"})
        assert torch.equal(found[f"{norm}.weight"], whole[f"{norm}.weight"]) and (len(asked) > 1) == reads, asked


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(UsageError, match="after the residual sum"):
        rotated(decoder_of(tiny_model("opt", "post-norm")), seed=0)
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight[3] = 0
    with pytest.raises(UsageError, match="final_layer_norm.weight has a zero"):
        rotated(decoder_of(model), seed=0)


def test_the_original_stays_as_it_is():
    model = tiny_model("llama", "grouped")
    before = deepcopy(model.state_dict())
    turned = rotated(decoder_of(model), seed=0)
    turned.source.read(0), turned.source.rest(["lm_head.weight"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert isinstance(decoder_blocks(model)[0].mlp.up_proj, nn.Linear) and turned.config.tie_word_embeddings is False
