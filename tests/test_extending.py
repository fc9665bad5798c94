"""docs/extending.md, followed to the letter in a copy of the program."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_families import tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARTS = ("*.py", "run", "formats", "evaluation", "kernels", "bench", "tests", "demo/opt", "demo/data")


@pytest.fixture
def copy(tmp_path):
    """A copy of the program without what the examples add."""
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            place = tmp_path / "copy" / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, place)
    table = tmp_path / "copy/families.py"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not line.startswith('    "granite":')))
    return tmp_path / "copy"


def follow(folder, section):
    """Apply the blocks of a section of the document: how many lines it adds, and its commands."""
    text = (ROOT / "docs/extending.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    added, commands = 0, []
    for language, name, body in BLOCK.findall(text):
        if language == "bash":
            commands += body.splitlines()
        elif language == "python":
            (folder / name).write_text(body)
            added += len(body.splitlines())
        else:
            old, *new = body.splitlines()
            source = (folder / name).read_text()
            assert source.count(f"\n{old[1:]}\n") == 1 and all(line.startswith("+") for line in new), name
            (folder / name).write_text(source.replace(old[1:], "\n".join([old[1:], *(line[1:] for line in new)])))
            added += len(new)
    return added, commands


def run(folder, command):
    done = subprocess.run([sys.executable, *command.split()[1:]], cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_method(copy):
    added, (command,) = follow(copy, "A method")
    assert added == 26 + 2, "the file and two rows"
    status, out, err = run(copy, command + " --save saved")
    assert status == 0 and re.search(r"world, imatrix W3A8: perplexity \d\.", out), err
    status, again, err = run(copy, "python opt.py --load saved --data_dir demo/data --eval world --seqlen 256 --kernel torch")
    assert status == 0 and "imatrix W3A8" in again, err
    status, out, err = run(copy, "python -m pytest -q -n 0 tests/test_imports.py tests/test_cli.py -k imatrix")
    assert status == 0 and " passed" in out, out


def test_a_family(copy):
    """In one line, as it says."""
    tiny_config("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7}).save_pretrained(copy / "FOLDER")
    status, _, err = run(copy, "python -m bench.family FOLDER")
    assert status == 2 and "granite family" in err
    added, (command,) = follow(copy, "A family of models")
    assert added == 1
    status, out, err = run(copy, command)
    assert status == 0 and "granite, 2 blocks" in out and "| rotated" in out, err


def test_a_corpus(copy):
    _, (command,) = follow(copy, "A corpus")
    (copy / "DATA/stories").mkdir(parents=True)
    for split in ("train", "validation"):
        shutil.copy(ROOT / f"demo/data/world/{'train' if split == 'train' else 'test'}.txt", copy / f"DATA/stories/{split}.txt")
    status, out, err = run(copy, command)
    assert status == 0 and "stories, rtn W4A8: perplexity" in out, err
