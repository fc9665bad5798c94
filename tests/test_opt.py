"""The published code's perplexities of a small trained OPT with outlier channels, in all 18 cases of its golden values.

What takes the time is the evaluation: 256 windows of C4 in each case, 1,725 of WikiText-2 only for the paper's own setting.
Everything is in one process, on tokens and a model made once; the command line has its own tests.
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

SHARED = Path(__file__).parents[2] / "shared"
MODEL, GOLDEN_FILE = SHARED / "data" / "models" / "opt-outlier", SHARED / "golden" / "opt-outlier.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else [{"args": {}}]
SEQLEN, WALK_BATCH = 256, 8
ON_WIKITEXT2 = {"method": "awrq", "wbits": 4, "smooth": True}

pytestmark = pytest.mark.skipif(not (GOLDEN_FILE.exists() and MODEL.exists()), reason="no ../shared with the golden values and their model")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return {name: eval_tokens(name, tokenizer, SEQLEN, SHARED / "data")[0] for name in ("wikitext2", "c4")}


@pytest.fixture(scope="module")
def ids(tokenizer):
    return calibration("c4", tokenizer, 64, SEQLEN, 0, SHARED / "data")[0]


@pytest.fixture(scope="module")
def full():
    return open_decoder(MODEL)


def asked_for(settings):
    """By way of the command line, as the golden values were made."""
    flags = [text for flag, value in settings.items() for text in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])]
    return recipe_of(opt, " ".join(flags), SEQLEN)


def tolerance(recipe):
    """As ../shared/golden/README.md says."""
    if recipe.method not in ("gptq", "awrq"):
        return 0.003
    return 0.02 if recipe.wbits < 4 or recipe.act_bits < 8 else 0.01


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda case: "-".join(f"{value}" if key == "method" else f"{key}{value}" for key, value in case["args"].items())
)
def test_perplexity_is_the_published_codes(case, full, ids, texts):
    decoder, recipe = full, asked_for(case["args"])
    if recipe.method != "full":
        store = Store(full, recipe)
        for _ in quantize_blocks(full, ids, recipe, store, walk_batch=WALK_BATCH):
            pass
        decoder = store.decoder()
    for corpus in ("c4", "wikitext2") if case["args"] == ON_WIKITEXT2 else ("c4",):
        ppl = perplexity(decoder, texts[corpus], SEQLEN, CPU, WALK_BATCH, corpus)["ppl"]
        assert ppl == pytest.approx(case["ppl"][corpus], rel=tolerance(recipe)), corpus


def test_the_cases_are_all_there():
    assert len(GOLDEN) == 18 and [case["args"] for case in GOLDEN].count(ON_WIKITEXT2) == 1
