"""The house: imports run one way, files and functions stay small.  FLOORS is the whole order."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # a room may import those above it; a folder is a room, but for formats/, whose files lie on several floors
    ("recipe", "families"),
    ("kernels", "datautils", "runtime", "processes"),
    ("quant", "formats.shards", "formats.names", "formats.card", "formats.hub"),
    ("gptq", "smoothquant", "formats.original", "formats.codes"),
    ("awrq", "modelutils"),
    ("rotate", "formats.checkpoint", "evaluation"),
    ("formats.resume", "formats.compressed", "formats.llamacpp", "formats.whole"),
    ("formats.export", "awrq_hf"),
    ("run",),
    ("opt", "main", "bench"),
)
FLOOR = {room: k for k, floor in enumerate(FLOORS) for room in floor}
ENTRY_SCRIPTS = {"opt", "main"}
FOLDERS = ("kernels", "formats", "run", "evaluation", "bench")
LIBRARY = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py") if path.stem != "__init__")])
OTHERS = sorted(path for folder in ("demo", "scripts") for path in ROOT.glob(f"{folder}/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
RUN_ORDER = (
    "flags",
    "settings",
    "launch",
    "cli",
    "calibrate",
    "guide",
    "quantize",
    "tune",
    "paired",
    "report",
    "publish",
    "checks",
    "pipeline",
)  # each reads those before it


def name(path):
    return str(path.relative_to(ROOT))


def room(module):
    """The room that a dotted module is in, or None if it is none of ours."""
    top = module.split(".")[0]
    return next((candidate for candidate in (".".join(module.split(".")[:2]), top) if candidate in FLOOR), None)


def imported(source):
    """All modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(imported, modules):
    """Which of our modules an import is of: itself, or the one that has the name; None for others."""
    return next((found for found in (imported, imported.rpartition(".")[0]) if found in modules), None)


def reached(start, edges):
    """All that can be reached from here.  edges: {node: set of nodes}."""
    seen, todo = set(), [start]
    while todo:
        new = edges.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def wrong(module, source):
    """What a module must not import."""
    own = room(module)
    rooms = {found for found in map(room, imported(source)) if found}
    return sorted(found for found in rooms if found != own and (FLOOR[found] >= FLOOR[own] or found in ENTRY_SCRIPTS))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_run_one_way(path):
    module = name(path).removesuffix(".py").replace("/", ".")
    assert room(module), f"{name(path)} is new: give it a place in FLOORS"
    assert not wrong(module, path.read_text())
    if module.startswith("run."):
        inside = {found.split(".")[1] for found in imported(path.read_text()) if found.startswith("run.")}
        later = RUN_ORDER[RUN_ORDER.index(path.stem) + 1 :]
        assert path.stem == "cli" or not inside & set(later), "cli calls pipeline, after parsing; else this order holds"


@pytest.mark.slow
def test_imports_make_no_circle():
    """Inside a room too, wherever in a file they are."""
    paths = [*LIBRARY, *(ROOT / folder / "__init__.py" for folder in FOLDERS)]
    modules = {name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in paths}
    edges = {module: {ours(found, modules) for found in imported(path.read_text())} for module, path in modules.items()}
    assert "kernels.build" in reached("bench.tune", edges)
    assert not [module for module in modules if module in reached(module, edges)]


@pytest.mark.parametrize("path", OTHERS, ids=name)
def test_nothing_imports_an_entry_script(path):
    assert not ENTRY_SCRIPTS & {found.split(".")[0] for found in imported(path.read_text())}


@pytest.mark.parametrize("path", LIBRARY + OTHERS + TESTS, ids=name)
def test_no_star_imports(path):
    stars = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars, f"{name(path)}: line {stars[0].lineno}"


@pytest.mark.parametrize("path", LIBRARY + OTHERS, ids=name)
def test_files_and_functions_are_small(path):
    source = path.read_text()
    if path.parts[-2] != "kernels":
        assert len(source.splitlines()) <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and path.parts[-2] != "kernels":
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert len(arguments) <= 7, f"{node.name}: {arguments}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_only_the_command_line_names_a_run(path):
    """Everything else takes what it needs."""
    assert name(path) in ("run/cli.py", "run/pipeline.py") or "run.cli.Run" not in set(imported(path.read_text()))


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("quant", "import gptq", ["gptq"]),
        ("gptq", "def f():\n    from smoothquant import fold", ["smoothquant"]),
        ("modelutils", "import awrq, datautils", ["awrq"]),
        ("formats.checkpoint", "from formats.export import export", ["formats.export"]),
        ("opt", "from main import main", ["main"]),
        ("evaluation.perplexity", "import torch.nn, quant\nfrom kernels.build import load", []),
    ],
)
def test_this_test_can_fail(module, source, found):
    assert wrong(module, source) == found
