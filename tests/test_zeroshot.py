"""Our adapter of lm-evaluation-harness: a score does not depend on the batch, and what a model or a tokenizer cannot do is found before."""

import time
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, FIRST_VARIANTS, WORDS, quantize, tiny_model, token_ids, toy_tokenizer
from lm_eval.models.huggingface import HFLM

import quant
from evaluation import zeroshot
from evaluation.zeroshot import QuantizedLM
from gptq import one_thread
from modelutils import decoder_of
from quant import Batch
from recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("index of tasks")]  # one process: what they share takes seconds to make

AWRQ = Recipe(method="awrq", wbits=4, act_bits=8, smooth=True)


@cache
def quantized(family="llama", variant="grouped", recipe=AWRQ):
    """A quantized model, whole, that no test changes."""
    return quantize(tiny_model(family, variant), token_ids(4, 32), recipe)[0]


@cache
def unquantized(family="llama", variant="plain"):
    return decoder_of(tiny_model(family, variant)).materialize(CPU)


def requests(seed=0):
    """(key, context, continuation) as lm-eval's scorer gets them: of many lengths, and some end with token 0, which it pads with."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for k, n in enumerate((3, 40, 7, 7, 21, 30, 5, 12)):
        ids = torch.randint(4, len(WORDS), (n,), generator=g).tolist()
        ids[-3:] = [0, 0, ids[-1]] if k % 2 else [0, 0, 0]  # the last one is never fed to the model
        made.append((None, ids[:-2], ids[-2:]))
    return made


def a_task(kind, prompts=("a", "b"), shots=0, **generation):
    config = SimpleNamespace(task="it", output_type=kind, num_fewshot=shots, generation_kwargs=generation or None)
    return SimpleNamespace(config=config, eval_docs=prompts, doc_to_text=lambda doc: doc, doc_to_target=lambda doc: doc)


def special(bos, eos):
    return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)


@pytest.mark.parametrize(
    ("task", "tokens", "missing"),
    [
        (a_task("generate_until"), (0, None), "no EOS token"),
        (a_task("generate_until"), (None, 0), None),
        (a_task("loglikelihood_rolling"), (None, None), "no BOS or EOS token"),
        (a_task("loglikelihood_rolling"), (0, None), None),
        (a_task("multiple_choice", ("a", "")), (None, None), "no BOS or EOS token"),
        (a_task("multiple_choice", ("a", ""), shots=2), (None, None), None),
        (a_task("multiple_choice"), (None, None), None),
    ],
)
def test_a_task_whose_tokens_the_tokenizer_lacks_is_found_before(task, tokens, missing):
    if missing is None:
        zeroshot.check_special_tokens(task, None, special(*tokens))
    else:
        with pytest.raises(ValueError, match=f"^it: the tokenizer has {missing}.*tokenizer_config.json"):
            zeroshot.check_special_tokens(task, None, special(*tokens))


def test_beam_search_runs_one_prompt_at_a_time():
    tokenizer, config = toy_tokenizer(), tiny_model("llama", "plain").config
    task = a_task("generate_until", ("word1",), num_beams=4)
    task.has_training_docs = task.has_validation_docs = lambda: False
    zeroshot.check_tasks([task], config, tokenizer, 1)
    for batch_size in (2, "auto"):
        with pytest.raises(ValueError, match="4 beams.*--batch_size 1"):
            zeroshot.check_tasks([task], config, tokenizer, batch_size)


def test_a_pad_token_is_one_that_the_model_knows():
    tokenizer = toy_tokenizer([*WORDS, "<pad beyond>"])
    for name in ("pad_token", "unk_token", "eos_token", "bos_token"):
        setattr(tokenizer, name, None)
    model = unquantized()
    assert QuantizedLM(model, tokenizer).tokenizer.pad_token_id < model.config.vocab_size == len(WORDS)
    tokenizer.pad_token = "<pad beyond>"
    assert QuantizedLM(model, tokenizer).tokenizer.pad_token_id < model.config.vocab_size


def test_the_tokenizer_that_is_saved_later_stays_as_it_was():
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    QuantizedLM(unquantized(), tokenizer)
    assert tokenizer.pad_token is None


@pytest.fixture
def announced(monkeypatch):
    """[(input ids, which tokens are no padding)] of every batch that runs."""
    seen, call = [], HFLM._model_call

    def watch(self, inps, **kwargs):
        seen.append((inps, self.model.batch.real))
        return call(self, inps, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", watch)
    return seen


# ---------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_true_lengths_reach_the_linears(announced, batch_size):
    lm = QuantizedLM(quantized(), toy_tokenizer(), batch_size)
    lm._loglikelihood_tokens(requests(), disable_tqdm=True)
    fed = sorted(context + continuation[:-1] for _, context, continuation in requests())
    met = []
    for inps, real in announced:
        real = torch.ones_like(inps, dtype=torch.bool) if real is None else real
        met += [row[mine].tolist() for row, mine in zip(inps, real, strict=True)]
        assert (real.long().diff(dim=1) <= 0).all(), "padding is on the right"
        assert not inps[~real].any()
    assert sorted(met) == fed and any(row[-1] == 0 for row in fed)


@pytest.mark.parametrize(("family", "variant"), FIRST_VARIANTS, ids=map("-".join, FIRST_VARIANTS))
def test_scores_do_not_depend_on_the_batch(monkeypatch, family, variant):
    model, tokenizer = quantized(family, variant), toy_tokenizer()

    def scores(batch_size):
        return torch.tensor([s for s, _ in QuantizedLM(model, tokenizer, batch_size)._loglikelihood_tokens(requests(), disable_tqdm=True)])

    alone = scores(1)
    for batch_size in (3, 8, "auto"):
        torch.testing.assert_close(scores(batch_size), alone, rtol=0, atol=1e-3)
    monkeypatch.setattr(Batch, "padded", contextmanager(lambda self, real: (yield)))
    assert (scores(8) - alone).abs().max() > 1e-2, "the test would not see padding in the ranges"


def test_batches_are_several_times_faster(capsys):
    """Processor time on one thread, the best of three: other work on the machine then does not count."""
    model, made, seconds = quantized(), [request for seed in range(6) for request in requests(seed)], {1: [], 16: []}
    with one_thread():
        for batch_size in 3 * list(seconds):
            lm = QuantizedLM(model, toy_tokenizer(), batch_size)
            start = time.process_time()
            lm._loglikelihood_tokens(made, disable_tqdm=True)
            seconds[batch_size].append(time.process_time() - start)
    ratio = min(seconds[1]) / min(seconds[16])
    with capsys.disabled():
        print(f" [batches of 16: {ratio:.1f} times as fast]", end="")
    assert ratio > 2


@pytest.mark.parametrize("per_token", [False, True])
def test_a_row_has_the_grid_that_it_has_alone(monkeypatch, per_token):
    """Bit for bit: every input of every linear, in a padded batch, against the same row by itself."""
    recipe = Recipe(method="act_only", act_bits=6, act_pertoken=per_token)
    model, seen, rounding = quantized(recipe=recipe), [], quant.fake_quant_act

    def watch(x, *args):
        seen.append((x.clone(), rounding(x, *args)))
        return seen[-1][1]

    monkeypatch.setattr(quant, "fake_quant_act", watch)
    lengths = torch.tensor([24, 3, 17])
    ids = token_ids(3, 24)
    with torch.no_grad(), model.batch.padded(torch.arange(24) < lengths[:, None]):
        model(ids)
    assert len(seen) == 14
    for x, out in seen:
        for row, got, n in zip(x, out, lengths, strict=True):
            assert torch.equal(got[:n], rounding(row[None, :n], 6, per_token)[0])
            assert not got[n:].any()
    (batched, _), *_ = seen  # before it there is no matrix product, whose sums may depend on the batch
    for row, n, words in zip(batched, lengths, ids, strict=True):
        seen.clear()
        with torch.no_grad():
            model(words[None, :n])
        assert torch.equal(seen[0][0][0], row[:n])
        assert torch.equal(seen[0][1][0], rounding(row[None, :n], 6, per_token)[0])


def test_a_mask_of_another_shape_is_refused():
    model = quantized()
    with (
        pytest.raises(AssertionError, match="5.* tokens announced"),
        torch.no_grad(),
        model.batch.padded(torch.arange(5) < torch.tensor([[3]])),
    ):
        model(token_ids(1, 7))
    assert model.batch.real is None


@pytest.mark.parametrize(("family", "variant"), [("llama", "grouped"), ("opt", "pre-norm")], ids="-".join)
def test_generated_text_does_not_depend_on_the_batch(monkeypatch, family, variant):
    """Here lm-eval pads on the left, with a mask."""
    model = quantized(family, variant, Recipe(method="act_only", act_bits=6))
    prompts = [" ".join(WORDS[4 + (7 * k + i) % 90] for i in range(n)) for k, n in enumerate((3, 20, 9, 1))]
    asked = [SimpleNamespace(args=(prompt, {"until": ["word95"], "max_gen_toks": 6, "do_sample": False})) for prompt in prompts]

    def texts(batch_size):
        return QuantizedLM(model, toy_tokenizer(), batch_size).generate_until(asked, disable_tqdm=True)

    alone = texts(1)
    assert texts(4) == alone and len(set(alone)) > 1
    seen, padded = [], Batch.padded
    monkeypatch.setattr(Batch, "padded", lambda self, real: seen.append(real) or padded(self, real))
    texts(4)
    assert [real.sum(1).tolist() for real in seen] == [sorted((len(prompt.split()) for prompt in prompts), reverse=True)]


@pytest.mark.parametrize("missing", [("pad_token",), ("pad_token", "unk_token")], ids=len)
def test_a_text_that_ends_early_in_a_batch_is_the_one_that_it_is_alone(missing):
    """What generation puts after its end is no text, whichever special token the tokenizer has; token 0 is a word here."""
    model, tokenizer = decoder_of(tiny_model("llama", "plain")).materialize(CPU), toy_tokenizer()
    for name in missing:
        setattr(tokenizer, name, None)
    ends = tokenizer.convert_tokens_to_ids("word9")

    def end(_, args, kwargs, out):
        out.logits[:, -1, model.config.eos_token_id] += 1e6 * (kwargs["input_ids"] == ends).any(1)

    model.register_forward_hook(end, with_kwargs=True)
    how = {"until": ["word95"], "max_gen_toks": 6, "do_sample": False}
    asked = [SimpleNamespace(args=(prompt, how)) for prompt in ("word5 word6 word7", "word8 word9")]
    batched, alone = (QuantizedLM(model, tokenizer, n).generate_until(asked, disable_tqdm=True) for n in (2, 1))
    assert batched == alone and alone[1] == "" != alone[0]


def test_a_token_that_the_model_does_not_know():
    lm = QuantizedLM(quantized(), toy_tokenizer())
    with pytest.raises(ValueError, match=f"{len(WORDS)}.*do not belong together"):
        lm._loglikelihood_tokens([(None, [5, len(WORDS)], [6])], disable_tqdm=True)


def test_an_answer_longer_than_the_context_is_scored_piece_by_piece():
    """lm-eval stops there.  Answers that fit are as they were, also in the same batch."""
    model, n, words = unquantized(), 64, token_ids(1, 200)[0].tolist()
    long, short = (None, words[:5], words[5:160]), (None, words[5:9], words[9:20])
    lm = QuantizedLM(model, toy_tokenizer(), batch_size=3)
    with pytest.warns(UserWarning, match="^1 of 2 prompts with an answer are longer than .* 64 tokens"):
        found = lm._loglikelihood_tokens([long, short], disable_tqdm=True)
    expected = 0.0
    for start in range(5, 160, n):
        end = min(start + n, 160)
        window = torch.tensor([words[max(0, end - n - 1) : end]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].log_softmax(-1)
        scores = logits.gather(1, window[0, 1:, None])[:, 0]
        expected += scores[start - end :].sum().item()
    (alone,) = HFLM(pretrained=model, tokenizer=toy_tokenizer())._loglikelihood_tokens([short], disable_tqdm=True)
    assert found == [(pytest.approx(expected, rel=1e-5), False), (pytest.approx(alone[0], rel=1e-5), alone[1])]


def test_a_long_prompt_loses_its_start_and_that_is_said(recwarn):
    model, words = unquantized(), token_ids(1, 90)[0].tolist()
    lm = QuantizedLM(model, toy_tokenizer())
    ((cut, _),) = lm._loglikelihood_tokens([(None, words[:80], words[80:])], disable_tqdm=True)
    assert "1 of 1 prompts with an answer are longer" in str(recwarn.pop(UserWarning).message)
    ((fits, _),) = lm._loglikelihood_tokens([(None, words[25:80], words[80:])], disable_tqdm=True)
    assert cut == fits and not [w for w in recwarn if "longer" in str(w.message)]


def test_an_answer_without_tokens():
    with pytest.raises(ValueError, match="without a token, after 'Tom is'"):
        QuantizedLM(quantized(), toy_tokenizer())._loglikelihood_tokens([(("Tom is", " "), [5, 6], [])], disable_tqdm=True)
