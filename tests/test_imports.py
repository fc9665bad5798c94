"""Imports run one way, from kernels and quant up to the scripts that one runs.  READS is the whole order."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READS = {  # a module: those right before it, whose own it may import too
    "kernels": (),
    "datautils": (),
    "quant": ("kernels",),
    "gptq": ("quant",),
    "smoothquant": ("quant",),
    "awrq": ("gptq",),
    "modelutils": ("awrq", "smoothquant"),
    "speed": ("modelutils",),
    "zeroshot": ("modelutils", "datautils"),
    "evalutils": ("speed", "zeroshot"),
    "checkpoint": ("evalutils",),
    "opt": ("checkpoint",),
    "main": ("checkpoint",),
}
ENTRY_SCRIPTS = {"opt", "main"}
LIBRARY = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/**/*.py")])
OTHERS = sorted(path for folder in ("demo", "scripts") for path in ROOT.glob(f"{folder}/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def name(path):
    return str(path.relative_to(ROOT))


def allowed(module):
    """What a module may import: all modules on the way to it."""
    return {module}.union(*map(allowed, READS[module])) - ENTRY_SCRIPTS


def imported(source):
    """Top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_run_one_way(path):
    module = Path(name(path)).with_suffix("").parts[0]
    assert module in READS, f"{module}.py is new: give it a line in READS"
    wrong = set(imported(path.read_text())) & READS.keys() - allowed(module)
    assert not wrong, f"{name(path)} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", OTHERS, ids=name)
def test_nothing_imports_an_entry_script(path):
    assert not ENTRY_SCRIPTS & set(imported(path.read_text()))


@pytest.mark.parametrize("path", LIBRARY + OTHERS + TESTS, ids=name)
def test_no_star_imports(path):
    stars = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars, f"{name(path)}: line {stars[0].lineno}"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("quant", "import gptq", {"gptq"}),
        ("gptq", "def f():\n    from smoothquant import fold", {"smoothquant"}),
        ("modelutils", "import awrq, datautils", {"datautils"}),
        ("opt", "from main import main", {"main"}),
        ("evalutils", "import torch.nn, quant\nfrom kernels.build import load", set()),
    ],
)
def test_this_test_can_fail(module, source, wrong):
    assert set(imported(source)) & READS.keys() - allowed(module) == wrong
