"""Tuning: its gradients are those of the whole model, codes stay, what is learnt is saved, and a killed run goes on."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, in_child, tiny_model, token_ids, toy_tokenizer
from test_checkpoint import recipe
from test_families import tiny_config

from bench.family import random_model
from formats.checkpoint import Store, open_checkpoint
from formats.resume import ResumableStore, run_identity
from modelutils import decoder_of
from quant import QuantLinear
from recipe import STEP_SAMPLES, TUNE_SAMPLES
from rotate import rotated
from run import tune as tuning
from run.quantize import quantize_blocks
from run.tune import Student, Teacher, TunedLinear, as_float, divergence_of, plan, tune

pytestmark = pytest.mark.slow

IDS = token_ids(6, 16)
KINDS = {
    "opt": (("opt", "pre-norm"), {"smooth": True}),
    "in_scale": (("opt", "post-norm"), {"smooth": True, "groupsize": 12}),
    "llama": (("llama", "llama3"), {"rotate": True, "act_pertoken": True}),
    "qwen3": (("qwen3", "wide"), {"wbits": 3, "groupsize": 16, "act_sym": True}),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in float32, whatever the machine is quick at."""
    monkeypatch.setattr(tuning, "multiplies_bfloat16", lambda _: False)


def finished(kind, folder=None, ids=IDS, **settings):
    """A Store whose blocks are all there."""
    (family, variant), own = KINDS[kind]
    chosen = recipe(**own | {"tune_steps": 8} | settings)
    decoder = decoder_of(tiny_model(family, variant))
    decoder = rotated(decoder, chosen.seed) if chosen.rotate else decoder
    store = ResumableStore(decoder, chosen, folder, run_identity(decoder, ids, chosen, CPU, 1)) if folder else Store(decoder, chosen)
    for _ in quantize_blocks(decoder, ids, chosen, store):
        pass
    return store


def kl(model, wanted, ids):
    """The mean divergence, sequence by sequence, of a whole model."""
    found = [model(x).logits[0].log_softmax(-1) for x in ids.split(1)]
    return sum((w.exp() * (w - q)).sum(-1).mean() for w, q in zip(wanted, found, strict=True)) / len(ids)


@torch.no_grad()
def teacher_of(store, ids=IDS):
    whole = store.original.materialize(CPU)
    return [whole(x).logits[0].log_softmax(-1) for x in ids.split(1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_that_is_tuned_computes_what_it_did(kind):
    store = finished(kind)
    block, x = store.decoder().block(0), torch.randn(2, 5, 64)
    for name, (q, grid) in store.codes(0).items():
        frozen = block.get_submodule(name)
        assert isinstance(frozen, QuantLinear)
        frozen.batch.size, inputs = 2, x[..., : q.shape[1]].contiguous()
        torch.testing.assert_close(TunedLinear(frozen, q, grid)(inputs), frozen(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "keeps"), [*((kind, "nothing") for kind in KINDS), ("opt", "blocks"), ("in_scale", "graphs"), ("llama", "graphs")]
)
def test_gradients_are_those_of_the_whole_model(kind, keeps):
    """Whether blocks and graphs are kept or made again for every step, back and forth."""
    store = finished(kind)
    wanted, place = teacher_of(store), tuning.sequences_place(store.original.config, torch.float32, IDS.numel(), CPU)
    student = Student(store, CPU, 16)
    student.keeps_blocks, student.keeps_graphs = keeps != "nothing", keeps == "graphs"
    student.blocks = student.blocks if student.keeps_blocks else {}
    with torch.no_grad():
        entering = as_float(store.original).embed(IDS.split(1), place)
    losses = [
        student.divergence(entering[k], {name: found for (name, _), found in entering.arguments.items()}, wanted[k]) for k in range(2)
    ]
    assert bool(student.blocks) == student.keeps_blocks
    found = {name: p.grad.clone() for name, p in student.parameters.items() if p.grad is not None}

    whole = store.decoder().materialize(CPU)
    own = Student(store, CPU, 16)
    for i in range(len(store.original)):
        whole.get_submodule(store.original.family.blocks)[i] = own.block(i)
    for name, p in own.parameters.items():
        path, _, attribute = name.rpartition(".")
        whole.get_submodule(path)._parameters[attribute] = p
        p.grad = None
    whole.batch.size = 1
    own.decoder.batch.size = 1
    loss = kl(whole, wanted[:2], IDS[:2])
    (2 * loss).backward()
    assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-4)
    largest = max(p.grad.abs().max().item() for p in own.parameters.values() if p.grad is not None)
    for name, p in own.parameters.items():
        assert (p.grad is None) == (name not in found), name
        if p.grad is not None:  # a bias of k_proj has none but what rounding makes, as it changes no attention
            close = partial(torch.testing.assert_close, found[name], p.grad, rtol=1e-3, msg=name)
            close(atol=1e-7 * largest + 1e-5 * p.grad.abs().max().item())
    assert any(name.endswith("scale") for name in found) and any("norm" in name for name in found)


def test_nan_in_a_gradient_names_it_and_nothing_of_it_is_kept(tmp_path, monkeypatch):
    store, step = finished("llama", tmp_path), tuning.Optimizer.step

    def spoiled(self, s, *args):
        if s == 4:  # after which the state would be kept
            name, p = next(item for item in self.parameters.items() if item[0].endswith("q_proj.scale"))
            p.grad[0] = float("nan")
        step(self, s, *args)

    monkeypatch.setattr(tuning.Optimizer, "step", spoiled)
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in the gradient of .*q_proj\.scale at step 5"):
        tune(store, IDS, CPU)
    assert not store.tuned and not store.tuning()


def test_tuning_leaves_what_the_store_has():
    store = finished("opt")
    tensors = [{name: t.clone() for name, t in block.items()} for block in store.blocks.values()]
    tune(store, IDS, CPU)
    for before, after in zip(tensors, store.blocks.values(), strict=True):
        assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_rows_of_zeros_have_no_say_in_the_rate():
    """As where a model's MLP is padded; the grid of such a row has scale 1."""
    store = finished("llama")
    block = store.decoder().block(0)
    q, grid = store.codes(0)["mlp.up_proj"]
    q[3:5], grid.scale[3:5] = grid.zero[3:5].to(q.dtype), 1
    linear = TunedLinear(block.get_submodule("mlp.up_proj"), q, grid)
    assert linear.scale.max() < 0.5 and grid.scale[3] == 1
    linear.batch.size, x = 2, torch.randn(2, 5, q.shape[1])
    assert not linear(x)[..., 3:5].any()


@pytest.mark.parametrize(("wbits", "rate"), [(3, 1), (4, 1), (5, 1 / 2), (8, 1 / 16)])
def test_the_rate_falls_with_the_steps_of_the_grid(wbits, rate, monkeypatch):
    found = {}
    monkeypatch.setattr(tuning.Optimizer, "__init__", lambda self, parameters, rates, steps: found.update(rates) or 1 / 0)
    store = finished("llama", wbits=wbits)
    with pytest.raises(ZeroDivisionError):
        tune(store, IDS, CPU)
    sizes = Student(store, CPU, 16).sizes
    assert found == {name: pytest.approx(tuning.RATE * rate * size) for name, size in sizes.items()} and min(sizes.values()) > 0


def test_norms_that_multiply_by_one_more_than_their_weight_learn():
    """Those of Gemma are zeros after a rotation."""
    model = random_model(tiny_config("gemma")).float()
    decoder, chosen = rotated(decoder_of(model), 0), recipe(rotate=True, tune_steps=2)
    store = Store(decoder, chosen)
    for _ in quantize_blocks(decoder, IDS, chosen, store):
        pass
    tune(store, IDS, CPU)
    norms = [t for name, t in store.tuned.items() if "norm" in name]
    assert len(norms) == 5 and all(t.any() for t in norms)


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_brings_the_model_nearer_and_keeps_its_codes(kind, tmp_path):
    store = finished(kind, tune_steps=24)
    wanted, before = teacher_of(store), [store.codes(i) for i in range(len(store.original))]
    with torch.no_grad():
        at_first = kl(store.decoder().materialize(CPU), wanted, IDS).item()
    assert len(tune(store, IDS, CPU)) == 24
    with torch.no_grad():
        at_last = kl(store.decoder().materialize(CPU), wanted, IDS).item()
    assert at_last < 0.97 * at_first, (at_first, at_last)
    for i, codes in enumerate(before):
        for name, (q, grid) in store.codes(i).items():
            assert q.equal(codes[name][0]) and grid.zero.equal(codes[name][1].zero) and not grid.scale.equal(codes[name][1].scale)
    assert not any("embed" in name or "lm_head" in name for name in store.tuned)
    store.save(tmp_path / "saved", toy_tokenizer())
    opened = open_checkpoint(tmp_path / "saved")
    opened.source.kernel = None
    with torch.no_grad():
        assert kl(opened.materialize(CPU), wanted, IDS).item() == pytest.approx(at_last, rel=1e-6)


def test_a_killed_run_goes_on_with_tuning(tmp_path, monkeypatch):
    """From where it was last kept; its result is that of one in one piece, also where tuning had ended."""
    monkeypatch.setattr(tuning, "KEEP_EVERY", 3)
    whole = finished("llama")
    losses = tune(whole, IDS, CPU)

    def killed():
        store = finished("llama", tmp_path)
        keep = store.keep_tuning

        def once(state):
            keep(state)
            raise SystemExit(1)

        store.keep_tuning = once
        tune(store, IDS, CPU)

    assert in_child(killed) == 256  # one exit status, no signal
    for _ in range(2):
        store = finished("llama", tmp_path)
        assert len(store.tuning()["divergence"]) in (3, 8)
        assert tune(store, IDS, CPU) == pytest.approx(losses, rel=1e-6)
        for name, t in whole.tuned.items():
            torch.testing.assert_close(store.tuned[name], t, rtol=1e-6, atol=1e-9)
        assert len(list(tmp_path.glob("tuning-*"))) == 1
        del store


def test_every_sequence_has_its_turn():
    steps = plan(5, 5, seed=0)
    assert [len(step) for step in steps] == [STEP_SAMPLES] * 5 and sorted(k for step in steps for k in step) == sorted([*range(5)] * 2)
    assert plan(5, 5, seed=0) == steps != plan(5, 5, seed=1)


@pytest.mark.parametrize("steps", [0, 1, 5, TUNE_SAMPLES // STEP_SAMPLES, 200])
def test_no_sequence_has_a_second_turn_until_there_are_as_many_as_there_may_be(steps):
    samples = recipe(tune_steps=steps).tune_samples
    turns = [k for step in plan(samples, steps, seed=0) for k in step] if steps else []
    assert len(turns) == steps * STEP_SAMPLES and samples == min(len(turns), TUNE_SAMPLES)
    assert set(turns[:samples]) == set(range(samples))


def test_the_divergence_is_that_of_the_formula():
    logits, wanted = torch.randn(7, 30, requires_grad=True), torch.randn(7, 30).log_softmax(-1)
    expected = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
    expected.backward()
    loss, gradient = divergence_of(logits.detach(), wanted)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_products_in_bfloat16_are_near(kind):
    store = finished(kind)
    wanted, place = teacher_of(store, IDS[:1]), tuning.sequences_place(store.original.config, torch.float32, IDS.numel(), CPU)
    with torch.no_grad():
        entering = as_float(store.original).embed(IDS[:1].split(1), place)
    arguments = {name: found for (name, _), found in entering.arguments.items()}
    found = []
    for quick in (False, True):
        student = Student(store, CPU, 16, quick)
        loss = student.divergence(entering[0], arguments, wanted[0])
        found.append((loss, {name: p.grad for name, p in student.parameters.items() if p.grad is not None}))
    (exact, gradients), (near, others) = found
    assert near != exact and near == pytest.approx(exact, rel=0.1) and gradients.keys() == others.keys()
    whole, other = (torch.cat([g.flatten() for g in of.values()]) for of in (gradients, others))
    assert 0 < (other - whole).norm() < 0.3 * whole.norm()  # as roundings of activations turn out otherwise
    assert {p.dtype for p in student.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_multiplies_in_bfloat16_is_near(kind):
    """A tenth of what rounding to 4 bits moves the model by, at most."""
    store = finished(kind)
    exact = torch.cat(teacher_of(store))
    teacher = Teacher(store.original, IDS, CPU, quick=True)
    found = torch.cat([teacher.sequence(k)[2] for k in range(len(IDS))])
    rounded = torch.cat([store.decoder().materialize(CPU)(x).logits[0].log_softmax(-1) for x in IDS.split(1)])
    moved, lost = (F.kl_div(other, exact, reduction="batchmean", log_target=True).item() for other in (found, rounded))
    assert found.dtype == torch.float32 and 0 < moved < lost / 10


def test_logits_in_bfloat16_are_near_and_have_a_gradient():
    head, x = torch.nn.Linear(64, 300), torch.randn(1, 9, 64, requires_grad=True)
    exact, quick = (tuning.logits_of(head, x, how) for how in (False, True))
    assert torch.equal(exact, head(x)[0]) and quick.dtype == torch.float32
    assert 0 < (quick - exact).abs().max() < 0.02 * exact.abs().max()
    (mine,), (other,) = (torch.autograd.grad(logits.square().sum(), x) for logits in (exact, quick))
    torch.testing.assert_close(other, mine, rtol=0, atol=0.02 * mine.abs().max().item())


@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_only_what_is_far_from_its_original_is_tuned_in_bfloat16(bits, device, monkeypatch):
    monkeypatch.setattr(tuning, "multiplies_bfloat16", lambda _: device)
    assert tuning.is_quick(recipe(wbits=bits), CPU) == (device and bits <= 4)
    given = []
    for name in ("Student", "Teacher"):
        make = getattr(tuning, name)
        monkeypatch.setattr(tuning, name, lambda *args, make=make: given.append(args[-1]) or make(*args))
    tune(finished("llama", wbits=bits, tune_steps=1), IDS, CPU)
    assert given == [device and bits <= 4] * 2
