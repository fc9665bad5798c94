"""A whole OPT gives the perplexities that it gave before: the demo's model those of an earlier commit, a larger one the published code's.

The values of the demo are in tests/golden.  The larger model is not in the repository; its tests need ../shared and take long.
"""

import json
from pathlib import Path

import pytest
from conftest import CPU, recipe_of

import opt
from datautils import calibration, eval_tokens
from evaluation.perplexity import perplexity
from formats.checkpoint import Store
from modelutils import load_tokenizer, open_decoder
from run.quantize import quantize_blocks

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests/golden/demo-opt.json").read_text())
SHARED = ROOT.parent / "shared"
MODEL, PUBLISHED_FILE = SHARED / "data" / "models" / "opt-outlier", SHARED / "golden" / "opt-outlier.json"
PUBLISHED = json.loads(PUBLISHED_FILE.read_text()) if PUBLISHED_FILE.exists() else [{"args": {}}]
# One of each method, with and without smoothing, at few bits; the other settings are in RECORDED and in test_awrq.py.
REPRESENTATIVE = (
    {"method": "act_only", "smooth": True},
    {"method": "smoothquant", "wbits": 4},
    {"method": "gptq", "wbits": 3},
    {"method": "awrq", "wbits": 4, "smooth": True},
    {"method": "awrq", "wbits": 4, "act_bits": 6},
)
SEQLEN, WALK_BATCH = 256, 8


def name_of(case):
    return "-".join(f"{value}" if key == "method" else f"{key}{value}" for key, value in case["args"].items())


def asked_for(settings):
    """By way of the command line, as the golden values were made."""
    flags = [text for flag, value in settings.items() for text in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])]
    return recipe_of(opt, " ".join(flags), SEQLEN)


def quantized(full, ids, recipe):
    """(decoder, mean output error of its linears)"""
    if recipe.method == "full":
        return full, 0
    store = Store(full, recipe)
    errors = [layer.error for layers in quantize_blocks(full, ids, recipe, store, walk_batch=WALK_BATCH) for layer in layers]
    return store.decoder(), sum(errors) / len(errors)


def tolerance(recipe):
    """The solver's codes depend on the order of sums, the others' hardly."""
    if recipe.method not in ("gptq", "awrq"):
        return 0.003
    return 0.02 if recipe.wbits < 4 or recipe.act_bits < 8 else 0.01


@pytest.fixture(scope="module")
def demo():
    """(decoder, calibration windows, held-out text)"""
    folder, data = ROOT / "demo/opt", ROOT / "demo/data"
    tokenizer = load_tokenizer(folder)
    text = eval_tokens("world", tokenizer, SEQLEN, data)[0][: 8 * SEQLEN]
    return open_decoder(folder), calibration("world", tokenizer, 8, SEQLEN, 0, data)[0], text


CASES = [pytest.param(case, marks=() if case["args"] in REPRESENTATIVE else pytest.mark.slow, id=name_of(case)) for case in RECORDED]


@pytest.mark.parametrize("case", CASES)
def test_the_demo_gives_what_it_gave(case, demo):
    full, ids, text = demo
    recipe = asked_for(case["args"])
    decoder, error = quantized(full, ids, recipe)
    ppl = perplexity(decoder, text, SEQLEN, CPU, WALK_BATCH)["ppl"]
    assert (ppl, error) == (pytest.approx(case["ppl"], rel=tolerance(recipe)), pytest.approx(case["error"], rel=10 * tolerance(recipe)))


@pytest.fixture(scope="module")
def larger():
    """(decoder, calibration windows, {corpus: text})"""
    tokenizer = load_tokenizer(MODEL)
    texts = {name: eval_tokens(name, tokenizer, SEQLEN, SHARED / "data")[0] for name in ("wikitext2", "c4")}
    return open_decoder(MODEL), calibration("c4", tokenizer, 64, SEQLEN, 0, SHARED / "data")[0], texts


@pytest.mark.slow
@pytest.mark.skipif(not (PUBLISHED_FILE.exists() and MODEL.exists()), reason="no ../shared with these values and their model")
@pytest.mark.parametrize("case", [case for case in PUBLISHED if case["args"] in REPRESENTATIVE or not case["args"]], ids=name_of)
def test_perplexity_is_the_published_codes(case, larger):
    full, ids, texts = larger
    recipe = asked_for(case["args"])
    decoder, _ = quantized(full, ids, recipe)
    ppl = perplexity(decoder, texts["c4"], SEQLEN, CPU, WALK_BATCH)["ppl"]
    assert ppl == pytest.approx(case["ppl"]["c4"], rel=tolerance(recipe))


def test_the_cases_are_all_there():
    assert len(RECORDED) == 18
    assert not PUBLISHED_FILE.exists() or [case["args"] for case in PUBLISHED] == [case["args"] for case in RECORDED]
    assert all(settings in [case["args"] for case in RECORDED] for settings in REPRESENTATIVE)
