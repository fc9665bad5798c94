"""Tasks and their data: lm-evaluation-harness's own definitions, with its own results, on local rows; and every error path."""

import json
import re
import shutil
import warnings
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from conftest import CPU, WORDS, quantize, toy_tokenizer
from lm_eval.models.huggingface import HFLM
from test_zeroshot import AWRQ, quantized, unquantized

from evaluation import zeroshot
from evaluation.zeroshot import QuantizedLM, check_fewshot, item_values, leaves, load_tasks, task_protocol, zero_shot
from formats.checkpoint import Store
from modelutils import load_tokenizer, open_decoder
from run.report import accuracies

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("index of tasks")]  # one process: what they share takes seconds to make

SHARED = Path(__file__).parents[1].parent / "shared"
STORIES = SHARED / "data/models/stories260k"
needs_shared = pytest.mark.skipif(not STORIES.exists(), reason="the real model and tasks are not part of the repository")
FILES = zeroshot.task_manager(False)  # lm-eval would read its thousands of task files once more


def rows_of(name, n):
    """Rows as the hub has them, of the toy tokenizer's words."""
    words = [" ".join(WORDS[4 + (5 * k + i) % 90] for i in range(2 + k % 9)) for k in range(3 * n)]
    make = {
        "copa": lambda k, a, b, c: {"premise": f"{a}.", "choice1": b, "choice2": c, "question": ("cause", "effect")[k % 2], "label": k % 2},
        "piqa": lambda k, a, b, c: {"goal": a, "sol1": b, "sol2": c, "label": k % 2},
        "arc_easy": lambda k, a, b, c: {"question": a, "choices": {"text": [b, c], "label": ["A", "B"]}, "answerKey": "AB"[k % 2]},
        "storycloze_2018": lambda k, a, b, c: (
            dict.fromkeys((f"input_sentence_{i}" for i in range(1, 5)), a)
            | {"sentence_quiz1": b, "sentence_quiz2": c, "answer_right_ending": 1 + k % 2}
        ),
    }[name]
    return [make(k, *words[3 * k : 3 * k + 3]) for k in range(n)]


@pytest.fixture
def data(tmp_path):
    """A --data_dir of tiny tasks; with no train splits, and StoryCloze's test split, whose answers are not public, left out."""
    for name, splits in (
        ("copa", ["validation"]),
        ("piqa", ["validation"]),
        ("arc_easy", ["validation", "test"]),
        ("storycloze_2018", ["validation"]),
    ):
        (tmp_path / name).mkdir()
        for split in splits:
            path = tmp_path / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, 12 if split == "test" else 9)))
    return tmp_path


# ---------------------------------------------------------------------------
# Local rows


def test_local_rows_go_through_the_harness_own_definitions(data):
    (task,) = load_tasks(["copa"], data)
    row = rows_of("copa", 1)[0]
    assert task.eval_docs[0] == row and len(task.eval_docs) == 9
    assert task.doc_to_text(row) == row["premise"][:-1] + " because" and task.config.metric_list[0]["metric"] == "acc"
    assert task_protocol(task)["split"] == "validation" and task_protocol(task)["source"].startswith("copa/validation.jsonl (sha256 ")
    assert len(leaves(load_tasks(["arc_easy"], data))[0].eval_docs) == 12, "lm-eval evaluates ARC on its test split"


def test_names_wildcards_tags_and_order(data):
    names = [task.config.task for task in load_tasks(["piqa", "arc_eas*", "piqa", "copa"], data)]
    assert names == ["piqa", "arc_easy", "copa"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [task.config.task for task in load_tasks(["ai2_arc"], data, skip_missing=True)] == ["arc_easy"]


def test_storycloze_is_that_of_2018(data):
    with pytest.warns(UserWarning, match="storycloze_2018/test.jsonl; evaluated is validation"):
        (task,) = load_tasks(["storycloze"], data)
    assert task.config.task == "storycloze_2018" and task.eval_docs[1]["answer_right_ending"] == 2
    shutil.rmtree(data / "storycloze_2018")
    with pytest.raises(FileNotFoundError, match="storycloze_2018/test.jsonl.*cs.rochester.edu") as caught:
        load_tasks(["copa", "storycloze"], data)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="skipped: storycloze_2018"):
        assert [task.config.task for task in load_tasks(["copa", "storycloze"], data, skip_missing=True)] == ["copa"]
    with pytest.raises(OSError, match="none of them"), pytest.warns(UserWarning):
        load_tasks(["storycloze"], data, skip_missing=True)


def test_storycloze_is_converted_as_the_docs_say(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR/storycloze_2018").mkdir(parents=True)
    header = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2"
    (tmp_path / "cloze_test_val.csv").write_text(f'{header},AnswerRightEnding\nid,One.,"Two, three.",Four.,Five.,"Say ""six"".",Seven.,2\n')
    exec(code)
    with pytest.warns(UserWarning, match="evaluated is validation"):
        (task,) = load_tasks(["storycloze"], tmp_path / "DIR")
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc) == "One. Two, three. Four. Five."
    assert task.doc_to_choice(doc) == ['Say "six".', "Seven."] and int(task.doc_to_target(doc)) == 1


def test_few_shot_examples_need_their_split(data):
    with pytest.raises(FileNotFoundError, match="copa/train.jsonl"):
        load_tasks(["copa"], data, num_fewshot=2)
    shutil.copy(data / "copa/validation.jsonl", data / "copa/train.jsonl")
    found = [zero_shot(quantized(), toy_tokenizer(), load_tasks(["copa"], data, num_fewshot=n), num_fewshot=n) for n in (0, 2)]
    assert [run["n-shot"]["copa"] for run in found] == [0, 2]


def test_more_examples_than_there_are(data):
    shutil.copy(data / "copa/validation.jsonl", data / "copa/train.jsonl")
    (task,) = load_tasks(["copa"], data, num_fewshot=10)
    for n in (None, 0, 8):
        check_fewshot(task, n)
        zero_shot(quantized(), toy_tokenizer(), [task], num_fewshot=n, limit=1)
    with pytest.raises(ValueError, match="--num_fewshot 9: draws from 10 examples or more, copa has 9"):
        check_fewshot(task, 9)


def test_results_are_those_of_the_harness(data):
    """The same model, unquantized: ours against lm-eval's own adapter.  What we return goes through JSON."""
    model, tokenizer, tasks = unquantized("llama", "grouped"), toy_tokenizer(), load_tasks(["copa", "piqa", "arc_easy"], data)
    ours = zero_shot(model, tokenizer, tasks, batch_size=3)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), tasks=tasks, log_samples=False, task_manager=FILES
    )
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours
    assert ours["results"] == theirs["results"] and ours["versions"] == theirs["versions"]
    assert ours["n-samples"]["arc_easy"] == {"original": 12, "effective": 12} and ours["lm_eval_version"]
    again = zero_shot(model, tokenizer, tasks, batch_size=3)
    assert (again["results"], again["items"]) == (ours["results"], ours["items"]), "tasks can be evaluated again"
    assert zero_shot(model, tokenizer, tasks, limit=4)["n-samples"]["piqa"]["effective"] == 4
    assert zero_shot(model, tokenizer, tasks, limit=0.5)["n-samples"]["arc_easy"]["effective"] == 6


def test_the_items_of_a_task(data):
    """One digit per item: those of lm-eval's own samples, their mean is its accuracy, and no text comes with them."""
    model, tokenizer, tasks = unquantized("llama", "grouped"), toy_tokenizer(), load_tasks(["copa", "arc_easy"], data)
    ours = zero_shot(model, tokenizer, tasks, batch_size=3)
    theirs = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), tasks=tasks, task_manager=FILES)
    assert set(ours["items"]) == {"copa", "arc_easy"} and set(ours["items"]["arc_easy"]) == {"acc,none", "acc_norm,none"}
    for task, metrics in ours["items"].items():
        for key, digits in metrics.items():
            samples = {sample["doc_id"]: sample[key.partition(",")[0]] for sample in theirs["samples"][task]}
            assert digits == "".join(f"{samples[k]:.0f}" for k in range(len(samples)))
            assert sum(map(int, digits)) / len(digits) == ours["results"][task][key]
    assert "samples" not in ours and rows_of("copa", 1)[0]["choice1"] not in json.dumps(ours)


def test_items_are_of_metrics_that_are_a_mean_of_zeros_and_ones():
    columns = {"acc": [1, 0.0, True], "exact": [np.float64(1), np.bool_(False), np.int64(1)], "f1": [(0, 1)] * 3, "ppl": [0.5, 1, 0]}
    columns |= {"list": [[1], [0], [1]], "least": [0, 1, 1]}  # the last of them is not averaged
    samples = [
        {"doc_id": k, "filter": name, "metrics": list(columns)} | {metric: values[k] for metric, values in columns.items()}
        for name in ("none", "strict")
        for k in (2, 0, 1)
    ]
    row = {f"{metric},{name}": 2 / 3 for metric in columns for name in ("none", "strict")} | {"least,none": 0.0, "least,strict": 0.0}
    assert item_values(samples, row) == dict.fromkeys(("acc,none", "exact,none", "acc,strict", "exact,strict"), "101")


# ---------------------------------------------------------------------------
# What is not there, or broken


@pytest.mark.parametrize(
    ("names", "error", "parts"),
    [
        (["hellaswag"], FileNotFoundError, ["hellaswag/validation.jsonl", "--skip_missing"]),
        (["hellaswg"], ValueError, ["unknown task 'hellaswg'", "hellaswag"]),
        (["no-*"], ValueError, ["unknown task 'no-*'"]),
        ([""], ValueError, ["unknown task ''"]),
        (["nowhere.yaml"], FileNotFoundError, ["nowhere.yaml"]),
    ],
)
def test_what_is_not_there(data, names, error, parts):
    with pytest.raises(error) as caught:
        load_tasks(names, data)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(OSError, match="piqa: its data cannot be loaded.*--data_dir DIR with piqa/validation.jsonl"):
        load_tasks(["piqa"])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 10: not JSON"),
        ("", "line 10: not JSON"),
        ("3", "line 10: not an object"),
        ('{"premise": "word1.", "question": "cause", "label": 0}', "line 10: its fields are premise, question, label, those .* choice1"),
        (json.dumps(rows_of("copa", 1)[0] | {"label": "one"}), "cannot be loaded"),
    ],
)
def test_a_broken_file_is_named(data, line, part):
    path = data / "copa/validation.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"copa: .*{part}.*; correct .*copa/validation.jsonl"):
        load_tasks(["copa"], data, skip_missing=True)


def test_a_broken_task_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: [")
    with pytest.raises(OSError, match="mine.yaml: its data cannot be loaded .*; correct the file") as caught:
        load_tasks([str(path)])
    assert "\n" not in str(caught.value) and "--data_dir" not in str(caught.value)


# ---------------------------------------------------------------------------
# Real tasks


def item_scores(model, tokenizer, tasks, batch_size, limit=60):
    """[[log-likelihood of each choice] of each item] and the accuracies."""
    found = lm_eval.simple_evaluate(
        QuantizedLM(model, tokenizer, batch_size), tasks=tasks, limit=limit, log_samples=True, task_manager=FILES
    )
    items = [item for task in found["samples"].values() for item in task]
    return [[score for score, _ in item["filtered_resps"]] for item in items], accuracies(found)


@needs_shared
def test_accuracies_of_a_real_model_equal_the_lm_eval_commands(tmp_path):
    """What `lm_eval --model hf --model_args pretrained=...,dtype=float32` does, on task files of its own that read the same rows."""
    names = ["copa", "piqa", "arc_easy"]
    tasks, model = load_tasks(names, SHARED / "data"), open_decoder(STORIES).materialize(CPU)
    ours = zero_shot(model, load_tokenizer(STORIES), tasks, batch_size=8, limit=50)
    index, files = zeroshot.task_manager(True).task_index, []
    for name in names:
        split = "test" if name == "arc_easy" else "validation"
        others = dict.fromkeys({"training_split", "validation_split", "test_split"} - {f"{split}_split"})
        local = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(SHARED / f"data/{name}/{split}.jsonl")}},
        }
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps({"include": str(index[name].yaml_path)} | others | local))
    theirs = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={STORIES},dtype=float32",
        tasks=list(map(str, files)),
        task_manager=FILES,
        batch_size=8,
        limit=50,
        device="cpu",
    )
    assert list(accuracies(ours)) == names
    assert ours["results"] == theirs["results"]


@needs_shared
def test_accuracies_of_a_real_quantized_model_do_not_depend_on_the_batch(capsys):
    decoder, tokenizer, tasks = open_decoder(STORIES), load_tokenizer(STORIES), load_tasks(["copa"], SHARED / "data")
    text = (SHARED / "data/tinystories/train.txt").read_text()[:100_000]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 8 * 256]).view(8, 256)
    store = Store(decoder, AWRQ)
    model, *_ = quantize(None, ids, AWRQ, store=store)
    (alone, accuracy), *others = (item_scores(model, tokenizer, tasks, batch_size) for batch_size in (1, 8, "auto"))
    close = [k for k, scores in enumerate(alone) if (top := sorted(scores))[-1] - top[-2] < 1e-4]
    with capsys.disabled():
        print(f" [items whose choices are closer than 1e-4: {close or 'none'}]", end="")
    for scores, other in others:
        # A float32 sum that depends on the batch can move an activation over a tie, and rarely all after it: seven items in a hundred.
        same = sum(a == pytest.approx(b, abs=1e-3) for a, b in zip(alone, scores, strict=True))
        assert same >= 0.9 * len(alone), f"{same} of {len(alone)} items"
        assert abs(other["copa"][0] - accuracy["copa"][0]) <= len(close) / len(alone)
