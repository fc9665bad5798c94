"""Chat templates: prompts are those of lm_eval's own adapter, and what cannot work is found before long work."""

import json

import lm_eval
import pytest
from conftest import CPU, WORDS, tiny_model, toy_tokenizer
from lm_eval.models.huggingface import HFLM
from test_growing import task_file

from evaluation import zeroshot
from modelutils import decoder_of
from recipe import UsageError

pytestmark = pytest.mark.slow

PLAIN = "{% for turn in messages %}{{ turn.content }} word7 {% endfor %}word8 "
OTHER = PLAIN.replace("word8", "word9")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
FILES = zeroshot.task_manager(False)


def with_template(template, words=WORDS):
    tokenizer = toy_tokenizer(words)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def task(tmp_path):
    rows = [{"q": f"word{i}", "choices": [f"word{i + 1} word3", "word4"], "gold": i % 2} for i in range(1, 6)]
    shots = {"doc_to_text": "{{q}}", "fewshot_split": "test", "metric_list": [{"metric": "brier_score"}]}  # which moves with each score
    file = task_file(tmp_path, "early", **shots)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return zeroshot.load_tasks([file])[0]


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (PLAIN, {}),
        (PLAIN, {"system_instruction": "word5", "num_fewshot": 2}),
        (PLAIN, {"num_fewshot": 2, "fewshot_as_multiturn": False}),
        (NO_SYSTEM, {"system_instruction": "word5"}),
    ],
)
def test_prompts_and_results_are_those_of_the_harness(task, template, settings):
    model, tokenizer = decoder_of(tiny_model("llama", "grouped")).materialize(CPU), with_template(template)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True, "bootstrap_iters": 0} | settings
    ours = zeroshot.zero_shot(model, tokenizer, [task], **settings)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=with_template(template)), tasks=[task], log_samples=False, task_manager=FILES, **settings
    )
    assert ours["results"] == theirs["results"]
    bare = zeroshot.zero_shot(model, tokenizer, [task], num_fewshot=settings.get("num_fewshot"), bootstrap_iters=0)
    assert bare["results"] != ours["results"] and tokenizer.chat_template == template


def test_one_of_several_templates_is_the_one_that_is_used(task):
    model = decoder_of(tiny_model("llama", "grouped")).materialize(CPU)
    named, alone = with_template({"default": PLAIN, "other": OTHER}), with_template(OTHER)
    found = zeroshot.zero_shot(model, named, [task], apply_chat_template="other", bootstrap_iters=0)
    assert found["results"] == zeroshot.zero_shot(model, alone, [task], apply_chat_template=True, bootstrap_iters=0)["results"]
    protocol = zeroshot.prompt_protocol(named, apply_chat_template="other", num_fewshot=2)
    assert (
        protocol == zeroshot.prompt_protocol(alone, apply_chat_template=True) != zeroshot.prompt_protocol(named, apply_chat_template=True)
    )
    assert zeroshot.prompt_protocol(named) == {}
    assert zeroshot.prompt_protocol(named, system_instruction="word5") == {"system_instruction": "word5"}


@pytest.mark.parametrize(
    ("template", "name", "line"),
    [
        (None, True, "--apply_chat_template: not in the tokenizer, whose chat templates are: none"),
        (PLAIN, "tools", "--apply_chat_template tools: .*: default"),
        ({"other": PLAIN, "more": PLAIN}, True, "--apply_chat_template: .*: other, more"),
        ("{% for", True, "--apply_chat_template: the tokenizer's chat template does not work"),
        ("{{ raise_exception('roles') }}", True, "does not work .roles."),
        ("{{ messages[0].content + 1 }}", True, "does not work"),
    ],
)
def test_a_template_that_cannot_work_is_found_before(task, template, name, line):
    with pytest.raises(UsageError, match=line):
        zeroshot.check_tasks([task], tiny_model("llama", "grouped").config, with_template(template), apply_chat_template=name)


def test_a_template_whose_tokens_the_model_does_not_know(task):
    tokenizer = with_template(PLAIN + " <|im_start|>", [*WORDS, "<|im_start|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    config = tiny_model("llama", "grouped").config
    zeroshot.check_tasks([task], config, tokenizer)
    with pytest.raises(UsageError, match=f"token {len(WORDS)}, the model knows {config.vocab_size}"):
        zeroshot.check_tasks([task], config, tokenizer, apply_chat_template=True)
