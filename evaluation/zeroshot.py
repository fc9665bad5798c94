"""Tasks of lm-evaluation-harness: finding them and their data, and its scorer for quantized models."""

import difflib
import functools
import hashlib
import json
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from datautils import file_source, find_file, parse_json, read_rows
from modelutils import check_vocabulary
from processes import ALONE
from recipe import UsageError

NAMES = {"storycloze": "storycloze_2018"}  # names of the paper that lm-eval uses for something else


@functools.cache
def task_manager(everything):
    """lm-eval's index of task names, or one that only knows files.  Building the former reads many files and takes seconds."""
    return TaskManager(include_defaults=everything)


def load_tasks(patterns, data_dir=None, num_fewshot=None, skip_missing=False):
    """lm-eval's tasks and groups, data included: [Task or Group].  patterns: names, with wildcards as in lm-eval, or YAML files of tasks.

    data_dir: a folder NAME/SPLIT.jsonl[.gz] has the rows of each task, in the hub's form; the hub is then not used, and groups become
    their tasks.  Raises UsageError for an unknown task or broken rows, OSError if data is missing.  skip_missing: warn instead,
    unless no task is left.
    """
    manager = task_manager(not all(map(_is_yaml, patterns)))
    names = [name for pattern in patterns for name in _matching(NAMES.get(pattern, pattern), manager)]
    if data_dir is not None:
        names = [leaf for name in names for leaf in ([name] if _is_yaml(name) else _members(name, manager))]
    loaded = []
    for name in dict.fromkeys(names):
        try:
            here = data_dir is not None and not _is_yaml(name)
            if here:
                loaded += _load_local(name, manager, data_dir, num_fewshot)
            else:
                remedy = "correct the file or what it reads, or --skip_missing" if _is_yaml(name) else _way_out(name)
                loaded += _load(name, name, manager, OSError, remedy)
        except OSError as e:
            if not skip_missing:
                raise
            warnings.warn(f"skipped: {e}", stacklevel=2)
    if not loaded:
        raise OSError(f"--tasks {','.join(patterns)}: the data of none of them is there")
    return loaded


def leaves(tasks):
    """The tasks themselves, those of groups included."""
    return [leaf for task in tasks for leaf in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])]


def check_fewshot(task, n):
    """Raises UsageError if a task has too few examples for --num_fewshot n (or None)."""
    needed = n and n + (task.fewshot_cfg.split == task.config.test_split)  # lm-eval then draws one more, as one may be the item itself
    if needed and (there := len(list(task.fewshot_docs()))) < needed:
        raise UsageError(f"--num_fewshot {n}: draws from {needed} examples or more, {task.config.task} has {there}; ask for fewer")


def check_tasks(tasks, config, tokenizer, batch_size=1, **settings):
    """Raises UsageError for what lm-eval would stop on after hours: too few examples, text or prompts that the tokenizer cannot give the
    model, no chat template, beam search in batches.  settings: see zero_shot.
    """
    num_fewshot, chat, system = (settings.get(name) for name in ("num_fewshot", "apply_chat_template", "system_instruction"))
    around = rendered(chat_template(tokenizer, chat), tokenizer, system) if chat else ""
    for task in leaves(tasks):
        check_fewshot(task, num_fewshot)
        check_vocabulary(config, [torch.tensor(tokenizer(around + sample_text(task), verbose=False)["input_ids"])])
        check_special_tokens(task, num_fewshot, tokenizer, bool(chat or system))
        beams = (task.config.generation_kwargs or {}).get("num_beams", 1)
        if beams > 1 and batch_size != 1:
            raise UsageError(f"{task.config.task} searches with {beams} beams, which runs one prompt at a time here: give --batch_size 1")


def chat_template(tokenizer, name):
    """The text of a tokenizer's chat template; name: of one of several, or True.  Raises UsageError if it is not there."""
    known = tokenizer.chat_template
    several = known if isinstance(known, dict) else {"default": known} if known else {}
    found = several.get("default" if name is True else name)
    if not found:
        asked = "" if name is True else f" {name}"
        raise UsageError(f"--apply_chat_template{asked}: not in the tokenizer, whose chat templates are: {', '.join(several) or 'none'}")
    return found


def rendered(template, tokenizer, system):
    """A short conversation in a chat template.  Raises UsageError if the template does not work."""
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "a"}]
    for conversation in (turns, turns[-1:]):  # lm-eval goes without the system's turn where a template refuses it
        try:
            return tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # whatever jinja makes of it
            error = e
    raise UsageError(f"--apply_chat_template: the tokenizer's chat template does not work ({error}); correct it") from error


def check_special_tokens(task, num_fewshot, tokenizer, surrounded=False):
    """Raises UsageError if a task needs a first or last token that the tokenizer does not have.

    surrounded: whether there is a chat template or a system's text, so that no prompt is empty.
    """
    kind, first = task.config.output_type, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if kind == "generate_until":
        missing = tokenizer.eos_token_id is None and "EOS token, at which a generation ends"
    elif first != (None, None):
        return
    else:
        shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
        bare = kind == "loglikelihood_rolling" or (not (shots or surrounded) and any(task.doc_to_text(doc) == "" for doc in task.eval_docs))
        missing = bare and "BOS or EOS token, which stands before a text without a prompt"
    if missing:
        raise UsageError(f"{task.config.task}: the tokenizer has no {missing}; name one in the model's tokenizer_config.json")


def sample_text(task, n=100):
    """Prompts and answers of the first n items of a task that are plain text."""
    texts = (text for doc, _ in zip(task.eval_docs, range(n), strict=False) for text in (task.doc_to_text(doc), task.doc_to_target(doc)))
    return "\n".join(["a", *(text for text in texts if isinstance(text, str))])


def _is_yaml(name):
    return Path(name).suffix in (".yaml", ".yml")


def _matching(pattern, manager):
    """Names of tasks, groups and tags, or the YAML file itself."""
    if _is_yaml(pattern):
        if not Path(pattern).is_file():
            raise FileNotFoundError(f"--tasks {pattern}: no such file")
        return [pattern]
    found = manager.match_tasks([pattern])
    if not found:
        near = difflib.get_close_matches(pattern, manager.all_tasks)
        raise UsageError(f"unknown task {pattern!r}; nearest: {', '.join(near) or 'none'}; `lm_eval ls tasks` prints all")
    return found


def _members(name, manager):
    """Names of the tasks of a tag or group, or the task's own."""
    entry = manager.task_index[name]
    children = sorted(entry.tags) if name in manager.all_tags else entry.cfg["task"] if name in manager.all_groups else None
    if children is None:
        return [name]
    children = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
    return [leaf for child in children for leaf in _members(child, manager)]


def _load(name, spec, manager, error, remedy):
    """The task, group or tasks of a name, a file or a configuration, with their data.  error, remedy: what is raised if that fails."""
    try:
        loaded = manager.load([spec])
    except Exception as e:  # the hub, the network and a task's own code raise many types; the remedy is the same
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise error(f"{name}: its data cannot be loaded ({reason}); {remedy}") from e
    grouped = {task for group in loaded["groups"].values() for task in group.get_all_tasks()}
    members = {group for group in loaded["groups"].values() for group in group.get_all_groups()}
    return [g for g in loaded["groups"].values() if g not in members] + [t for t in loaded["tasks"].values() if t not in grouped]


def _way_out(name, split="validation"):
    way = f"give --data_dir DIR with {name}/{split}.jsonl in it, or --skip_missing"
    if name.startswith("storycloze"):
        way += "; StoryCloze is licensed: ask for it at https://cs.rochester.edu/nlp/rocstories/ and convert it as docs/tasks.md says"
    return way


def _load_local(name, manager, data_dir, num_fewshot):
    """A task on the rows of data_dir/name; all else is lm-eval's own, which its YAML includes.  See load_tasks."""
    config = manager.task_index[name].cfg
    splits = {use: config.get(f"{use}_split") for use in ("test", "validation", "training", "fewshot")}
    files = {s: file for s in splits.values() if s and (file := find_file(data_dir, name, s, (".jsonl", ".jsonl.gz")))}
    needed = [splits["test"] or splits["validation"]]
    if needed[0] not in files and splits["validation"] in files:
        warnings.warn(f"{name}: --data_dir {data_dir} has no {name}/{needed[0]}.jsonl; evaluated is validation", stacklevel=2)
        needed = [splits["validation"]]
    if num_fewshot or config.get("num_fewshot"):
        needed.append(next(s for use in ("fewshot", "training", "validation", "test") if (s := splits[use])))
    for split in needed:
        if split not in files:
            raise FileNotFoundError(f"{name}: --data_dir {data_dir} has no {name}/{split}.jsonl; {_way_out(name, split)}")
    changes = {f"{use}_split": None for use, split in splits.items() if split not in files}  # lm-eval reads unused splits too
    changes |= {"include": str(manager.task_index[name].yaml_path), "dataset_kwargs": {"files": {s: str(f) for s, f in files.items()}}}
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, f"{name}.yaml")
        spec.write_text(json.dumps(changes)[:-1] + ', "custom_dataset": !function evaluation.zeroshot.local_rows}', encoding="utf-8")
        return _load(name, str(spec), manager, UsageError, f"correct {' and '.join(map(str, files.values()))}")


def local_rows(files, **_metadata):
    """The splits of a task, for lm-eval's custom_dataset.  files: {split: file}.  Raises UsageError, naming a broken row."""
    return datasets.DatasetDict({s: datasets.Dataset.from_list(read_rows(Path(file), _row_parser())) for s, file in files.items()})


def _row_parser():
    """line -> the row that it holds.  All rows have the fields of the first: a missing one would become None, and that a wrong answer."""
    fields = []

    def parse(line):
        row = parse_json(line)
        if not isinstance(row, dict):
            raise UsageError("not an object with the task's fields")
        if not fields:
            fields.extend(row)
        if set(row) != set(fields):
            raise UsageError(f"its fields are {', '.join(row)}, those of the lines before {', '.join(fields)}")
        return row

    return parse


def prompt_protocol(tokenizer, apply_chat_template=False, system_instruction=None, fewshot_as_multiturn=False, **_settings):
    """What stands around the prompts of all tasks, as far as there is anything; settings: see zero_shot."""
    around = {"system_instruction": system_instruction} if system_instruction else {}
    if apply_chat_template:
        text = chat_template(tokenizer, apply_chat_template)
        around |= {"chat_template": f"sha256 {hashlib.sha256(text.encode()).hexdigest()}", "fewshot_as_multiturn": fewshot_as_multiturn}
    return around


def task_protocol(task):
    """What an lm-eval task is evaluated on: {"split", "source"}."""
    config = task.config
    split, kwargs = config.test_split or config.validation_split, config.dataset_kwargs or {}
    if config.custom_dataset is local_rows:
        return {"split": split, "source": file_source(Path(kwargs["files"][split]))}
    return {"split": split, "source": ", ".join(map(str, filter(None, (config.dataset_path, config.dataset_name)))) or "the task's own"}


def _pieces(key, context, continuation, size):
    """A request of lm-eval's scorer, cut into requests of at most `size` tokens of continuation.  Only a whole one keeps its key."""
    if not continuation:
        raise UsageError(f"an answer without a token, after {key and key[0][-40:]!r}; correct the rows of the task")
    for i in range(0, len(continuation), size):
        yield key if len(continuation) <= size else None, context + continuation[:i], continuation[i : i + size]


def padding_token(tokenizer, vocab_size):
    """The id of a token to pad with that the model knows: of the tokenizer's own, in lm-eval's order, else any of its special ones.

    What it generates after the end of a row is padding too, and decoding leaves out only special tokens.  Token 0 where there is none:
    then nothing is generated, as that needs an EOS token.
    """
    found = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids)
    return next((token for token in found if token is not None and token < vocab_size), 0)


class QuantizedLM(huggingface.HFLM):
    """lm-eval's adapter and scorer for a model of transformers, which also tells quantized linears which tokens are padding."""

    lengths = None  # (B,): tokens of each row of the batch to come; None: there is no padding

    def __init__(self, model, tokenizer, batch_size=1, world=ALONE):
        """batch_size: a number or "auto"; world: the processes.World, of which each process has its share of the items."""
        own = deepcopy(tokenizer)  # lm-eval sets its pad token, and --save writes the model's
        own.pad_token_id = padding_token(own, model.config.vocab_size)
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size)
        self.world = world

    # lm-eval takes each of several processes for the only one, so that it draws the same examples for a prompt as for one.  It makes all
    # requests in each, gets the answers to all, and only what is between is shared.

    def loglikelihood(self, requests, *args, **kwargs):
        return self._shared(super().loglikelihood, requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests, *args, **kwargs):
        return self._shared(super().loglikelihood_rolling, requests, *args, **kwargs)

    def generate_until(self, requests, *args, **kwargs):
        return self._shared(super().generate_until, requests, *args, **kwargs)

    def _shared(self, answer, requests, *args, **kwargs):
        """answer(requests), of which each process finds those of its share of the items."""
        if self.world.size == 1:
            return answer(requests, *args, **kwargs)
        items = [(request.task_name, request.doc_id) for request in requests]
        whose = {item: k % self.world.size for k, item in enumerate(dict.fromkeys(items))}
        own = [request for request, item in zip(requests, items, strict=True) if whose[item] == self.world.rank]
        found = [iter(part) for part in self.world.gather(answer(own, *args, **kwargs) if own else [])]
        return [next(found[whose[item]]) for item in items]

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        """lm-eval's; but a continuation longer than the model's context, on which lm-eval stops, is scored in pieces, one after the other.

        Raises UsageError for a token that the model does not know, and for a continuation without tokens.
        """
        check_vocabulary(self.config, [torch.tensor(context + continuation) for _, context, continuation in requests])
        size = self.max_length
        cut = sum(len(context) + len(continuation) > size + 1 for _, context, continuation in requests)
        if cut:  # lm-eval says it of each, on a log that we silence
            longer = f"{cut} of {len(requests)} prompts with an answer are longer than the model's context, {size} tokens"
            warnings.warn(f"{longer}; their start is cut off", stacklevel=2)

        def pad(length, rows, **side):
            self.lengths = torch.tensor([len(row) for row in rows])
            return huggingface_pad(length, rows, **side)

        # The scorer pads with token 0, which can be a real one, and passes neither lengths nor a mask on: here it still knows them.
        huggingface_pad = huggingface.pad_and_concat
        pieces = [list(_pieces(*request, size)) for request in requests]
        with patch.object(huggingface, "pad_and_concat", pad):
            scores = iter(super()._loglikelihood_tokens([piece for request in pieces for piece in request], *args, **kwargs))
        parts = [[next(scores) for _ in request] for request in pieces]
        return [(sum(score for score, _ in part), all(greedy for _, greedy in part)) for part in parts]

    def _model_call(self, inps, **kwargs):
        lengths, self.lengths = self.lengths, None
        real = None if lengths is None else (torch.arange(inps.shape[1]) < lengths[:, None]).to(inps.device)
        with self.model.batch.padded(real):
            return super()._model_call(inps, **kwargs)

    def _model_generate(self, context, **kwargs):
        with self.model.batch.padded(kwargs["attention_mask"].bool()):
            return super()._model_generate(context, **kwargs)


def item_values(samples, row):
    """{"metric,filter": "0110...", one digit per item in the order of the items} of a task, of metrics that are a mean of zeros and ones.

    samples: what lm-eval logged of each item and filter; row: its results of the task.  Other metrics are left out.
    """
    values = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {
        key: "".join(str(int(value)) for value in column)
        for key, column in values.items()
        if all(np.isscalar(value) and value in (0, 1) for value in column) and sum(column) / len(column) == row.get(key)
    }


def zero_shot(model, tokenizer, tasks, batch_size=1, world=ALONE, **settings):
    """What lm-eval finds of a materialized model on tasks (see load_tasks), with its versions and settings, ready for JSON.

    Beside it, "items": {task: item_values of it}, with which models are compared item by item.

    batch_size: a number or "auto"; results do not depend on it.  world: the processes.World that shares the items.  settings: arguments of
    lm-eval's simple_evaluate, as num_fewshot, limit and apply_chat_template.
    """
    lm = QuantizedLM(model, tokenizer, batch_size, world)
    if chat := settings.get("apply_chat_template"):
        lm.tokenizer.chat_template = chat_template(tokenizer, chat)  # lm-eval would name the chosen one and use the default
        settings["apply_chat_template"] = True
    if not world.first:
        settings["bootstrap_iters"] = 0  # which takes many processes; only the first one's results are wanted
    found = simple_evaluate(
        lm,
        tasks=tasks,
        batch_size=batch_size,
        log_samples=True,
        task_manager=task_manager(False),
        **settings,
    )
    if world.first:  # what lm-eval returns to others depends on how they were started
        samples = found.pop("samples")  # with the texts, which may be large or licensed
        found["items"] = {task: item_values(samples[task], found["results"][task]) for task in samples}
    return json.loads(json.dumps(world.share(found), default=handle_non_serializable), parse_constant=lambda constant: None)
