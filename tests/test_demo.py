"""The demo: its world is what the generator writes, its models know that world, and planted outliers change nothing that they compute."""

import json
import math
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import train, world

DEMO = Path(__file__).parent.parent / "demo"
pytestmark = pytest.mark.slow

GENERATED = ["data/world/train.txt", "data/world/test.txt", *(f"tasks/{task}.jsonl" for task in world.TASKS)]
CHANCE = {"world_deed": 1 / 4, "world_why": 1 / 2}


def load(family):
    return AutoModelForCausalLM.from_pretrained(DEMO / family, dtype=torch.float32), AutoTokenizer.from_pretrained(DEMO / family)


def lines(name):
    return (DEMO / name).read_text(encoding="utf-8").splitlines()


def items(task):
    return [json.loads(line) for line in lines(f"tasks/{task}.jsonl")]


def opening(story):
    """The (hero, thing, place) that a story opens with, as a set of words."""
    return frozenset(story.partition(".")[0].split()) & (world.PEOPLE.keys() | world.PLACES.keys() | set(world.THINGS))


def test_generator_writes_the_committed_bytes(tmp_path):
    world.write(tmp_path)
    for name in GENERATED:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
    assert list(islice(world.stories(world.SEED + 1), 5)) != list(islice(world.stories(world.SEED), 5))


def test_held_out_stories_are_held_out():
    """Neither a story nor even the combination it opens with is in the training text, of which train.txt is the first part."""
    training = list(islice(world.stories(world.SEED), 20_000))
    assert lines("data/world/train.txt") == training[: world.N_TRAIN]
    seen = set(map(opening, training))
    for story in lines("data/world/test.txt") + [row["context"] for task in world.TASKS for row in items(task)]:
        assert len(opening(story)) == 3 and opening(story) not in seen, story


def test_items_are_balanced():
    for task in world.TASKS:
        rows = items(task)
        assert len(rows) == world.N_ITEMS
        assert all(len(set(row["choices"])) == len(row["choices"]) == round(1 / CHANCE[task]) for row in rows)
        shares = Counter(row["answer"] for row in rows)
        assert max(shares.values()) - min(shares.values()) <= 1, f"{task} {shares}"


def test_a_simple_reader_finds_the_same_answers():
    """What a person does in a place is in the training text, what they like in the story itself: a regular expression finds both."""
    text = "\n".join(islice(world.stories(world.SEED), 20_000))
    deeds = {(person, place): deed for person, place, deed in re.findall(r"(\w+) went to the (\w+) and (\w+)\.", text)}
    assert len(deeds) == len(world.PEOPLE) * len(world.PLACES)
    for row in items("world_deed"):
        person, place = re.search(r"(\w+) went to the (\w+) and$", row["context"]).groups()
        assert row["choices"][row["answer"]] == f"{deeds[person, place]}."
    asked = [(row, re.search(r"They were hungry\. (\w+)$", row["context"])) for row in items("world_why")]
    hungry = [(row, found[1]) for row, found in asked if found]
    assert len(hungry) >= 10
    for row, person in hungry:
        liked = re.search(rf"{person} liked (\w+)s\.", row["context"])[1]
        assert liked in row["choices"][row["answer"]], row


@pytest.mark.parametrize("family", train.FAMILIES)
def test_tokenizer(family):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / family)
    bos = {"opt": "</s>", "llama": "<s>"}[family]
    for text in (lines("data/world/test.txt")[0], "Ben\n\nwas  here, Ω and 猫!"):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids[0]) == bos and tokenizer.bos_token == bos
        assert bos not in tokenizer.convert_ids_to_tokens(ids[1:])
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("family", train.FAMILIES)
def test_checkpoint_is_small_and_fp16(family):
    assert sum(path.stat().st_size for path in (DEMO / family).iterdir()) <= 4 * 2**20
    tensors = load_file(DEMO / family / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("family", train.FAMILIES)
def test_model_knows_the_world(family):
    """Perplexity of held-out text: far below what word counts alone give, and near the world's own."""
    model, tokenizer = load(family)
    ids = tokenizer("\n\n".join(lines("data/world/test.txt")), return_tensors="pt", verbose=False).input_ids[0]
    counts = ids.bincount().float() / len(ids)
    unigram = math.exp(-torch.special.xlogy(counts, counts).sum().item())
    windows = ids[: 24 * train.SEQLEN].view(-1, train.SEQLEN)
    with torch.no_grad():
        perplexity = math.exp(train.loss_of(model, windows).item())
    assert perplexity < 2.5 and perplexity < unigram / 10, f"{perplexity=} {unigram=}"


@pytest.mark.parametrize("family", train.FAMILIES)
def test_planting_keeps_the_function(family):
    """The committed models hold planted outliers; taking them out, and putting them back, changes no logit and no bit of a weight."""
    model, tokenizer = load(family)
    ids = tokenizer(lines("data/world/test.txt")[:1], return_tensors="pt").input_ids
    planted = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
        train.plant(model, inverse=True)
        assert torch.equal(model(ids).logits, logits)
        changed = {name.split(".")[-2] for name, p in model.named_parameters() if not torch.equal(p, planted[name])}
        readers = {name.split(".")[-1] for producer, consumers in train.SITES[family] for name in (producer, *consumers)}
        assert changed == readers
        train.plant(model)
    assert all(torch.equal(p, planted[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", train.FAMILIES)
def test_planted_channels_are_outliers(family):
    """In every block the planted channels of a norm's output are several times the others, and gone when the planting is undone."""
    model, tokenizer = load(family)
    ids = tokenizer(lines("data/world/test.txt")[:1], return_tensors="pt").input_ids

    def spread(model):
        """Per block, the largest |x| of the first group's input over the median channel's largest."""
        peaks = []
        hooks = [
            block.get_submodule(train.SITES[family][0][0]).register_forward_hook(
                lambda _module, _args, x: peaks.append(x.abs().amax((0, 1)))
            )
            for block in train.blocks_of(model)
        ]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        return torch.stack([peak.max() / peak.median() for peak in peaks])

    planted, plain = spread(model), spread(train.plant(model, inverse=True))
    assert (planted > 2 * plain).all(), f"{planted=} {plain=}"


def test_tasks_run_in_lm_eval_from_any_directory(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("llama")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu")
    manager = TaskManager(include_path=str(DEMO / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=list(CHANCE), task_manager=manager, limit=60, bootstrap_iters=0)["results"]
    for task, chance in CHANCE.items():
        for metric in ("acc,none", "acc_norm,none"):
            assert results[task][metric] > chance + 0.3 * (1 - chance), f"{task} {metric} {results[task]}"


@pytest.mark.parametrize("family", train.FAMILIES)
def test_items_fit_the_context(family):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / family)
    for task in world.TASKS:
        for row in items(task):
            assert len(tokenizer(f"{row['context']} {max(row['choices'], key=len)}").input_ids) <= train.SEQLEN, row
