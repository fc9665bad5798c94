"""The rows of a task, for lm-evaluation-harness's `custom_dataset`: its `data_files` would be looked up in the working directory."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(task, **_metadata):
    lines = (Path(__file__).parent / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))
