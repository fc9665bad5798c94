"""README and docs: every command parses, the cheap ones run, the others are listed with what they need; links and the table are right."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import main
import opt
from run import cli
from scripts import plot_losses, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "demo/README.md", *sorted(ROOT.glob("results/*.md"))]
SCRIPTS = {"opt.py": opt, "main.py": main}
LAUNCHED_WITH = {"opt.sh": opt, "llama.sh": main, "real.sh": main, "ablation.sh": opt}  # these pass their flags on

# What no test runs, and what it needs.  A command that is neither here nor in RUN is an error.
NEEDS = {
    r"python (opt|main)\.py (facebook|meta-llama)/": "the hub",
    r"python main\.py MODEL --load": "a GPU",
    r"python main\.py (--load )?models/smollm2": "a real model, text and an hour",
    r"python main\.py --load DIR": "a saved folder; tests/test_saving.py loads them",
    r"python opt\.py --load models/opt-125m": "the hub: a model saved from it",
    r"python scripts/(real_model|massive|compare_export|compare_llmcompressor)\.py": "a real model, text and minutes",
    r"bash scripts/(opt|llama|ablation)\.sh|MODELS=|CELLS=|NPROC=|make real": "models, text and hours",
    r"torchrun ": "GPUs or minutes; tests/test_processes.py starts it",
    r"python scripts/table\.py out/": "what those wrote",
    r"bash scripts/(gpu_check|speedup)\.sh|python -m bench\.(linears|quantizing|tune|sweep|check|cublaslt)": "a GPU",
    r"python -m kernels\.build": "nvcc; tests/test_build.py runs it",
    r"python -m bench\.cost": "a real model; tests/test_bench_tools.py counts for others",
    r"python -m bench\.(solver|memory|predict|processes)|python demo/train\.py|make demo-full": "minutes to an hour",
    r"pip install|make( |$)": "an installation",
    r"python -m pytest": "is the tests",
    r"lm_eval ": "an exported model; tests/test_export.py loads one, tests/test_demo.py runs these tasks",
    r"python (opt|main)\.py --help": "nothing: tests/test_cli.py",
}
RUN = {  # what is added, to be quicker: the last flag counts
    r"python opt\.py demo/opt .*--output_path out/awrq\.json": "--nsamples 2 --eval_windows 2",
    r"python main\.py demo/llama .*--tasks": "--nsamples 2 --limit 2",
    r"python scripts/plot_losses\.py results/real/smollm2": "--out out/losses.png",
    r"python scripts/table\.py --ablation results/ablation\.json": "",
    r"python scripts/table\.py results/": "",
}


def commands(page):
    """The command lines of a page, without comments: of its ```bash blocks, and what stands between backquotes and begins as one."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from (re.split(r"\s#\s", line)[0].strip() for line in block.splitlines() if not line.startswith("#"))
    yield from re.findall(r"`((?:python|bash|make|pip|lm_eval) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


FOLLOWED = "extending.md"  # by tests/test_extending.py, which first makes the changes that its commands need
COMMANDS = sorted({(page.name, line) for page in PAGES if page.name != FOLLOWED for line in commands(page) if line})
CHEAP = [(line, more) for pattern, more in RUN.items() for line in sorted({line for _, line in COMMANDS}) if re.match(pattern, line)]


class Parsed(Exception):
    """Raised by an argument parser when it has accepted the arguments."""


def parse_script(script, words):
    try:
        cli.parse(cli.make_parser(*script.main.args, **script.main.keywords), words)
    except SystemExit as e:
        assert "--help" in words and e.code == 0


def parse_program(monkeypatch, words):
    """Start `python FILE.py` or `python -m MODULE`, up to where its parser has accepted the flags."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    start = (runpy.run_module, words[1], words[2:]) if words[0] == "-m" else (runpy.run_path, str(ROOT / words[0]), words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [start[1], *start[2]])
    with pytest.raises(Parsed):
        start[0](start[1], run_name="__main__")


def parse_bash(variables, path, flags):
    text = (ROOT / path).read_text() + (ROOT / "scripts/cells.sh").read_text()
    assert all(re.search(rf"\b{name}\b", text) for name in variables), variables
    if Path(path).name in LAUNCHED_WITH:
        parse_script(LAUNCHED_WITH[Path(path).name], ["MODEL", "--eval", "c4", *flags])  # which most of them add themselves
    else:
        assert all(flag in text for flag in flags if flag.startswith("--")), flags


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # the module is run a second time
@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_of_the_docs_parses(page, line, monkeypatch):
    assert line.startswith("python -c") or any(re.match(pattern, line) for pattern in (*RUN, *NEEDS)), "neither run nor listed in NEEDS"
    words = shlex.split(line)
    variables = [words.pop(0).split("=")[0] for _ in list(words) if re.match(r"[A-Z_]+=", words[0])]
    program, *rest = words
    if program == "torchrun":
        at = next(i for i, word in enumerate(rest) if word in SCRIPTS)
        torch.distributed.run.get_args_parser().parse_args(rest[: at + 1])
        program, rest = "python", rest[at:]
    if program == "python" and rest[0] in SCRIPTS:
        parse_script(SCRIPTS[rest[0]], rest[1:])
    elif rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in rest[2:])
    elif rest[0] == "-c":
        compile(rest[1], page, "exec")
    elif program == "python":
        parse_program(monkeypatch, rest)
    elif program == "bash":
        parse_bash(variables, rest[0], rest[1:])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE) and all(f"$({word.split('=')[0]})" in makefile for word in rest[1:])
    elif program == "pip":
        wanted = (ROOT / "requirements.txt").read_text().splitlines()
        assert rest[0] == "install" and (rest[1:] == ["-r", "requirements.txt"] or rest[1] in wanted)
    else:
        assert program == "lm_eval"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder from which the repository's files are found, and whose out/ is its own."""
    for name in ("demo", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("line", "more"), CHEAP)
def test_a_cheap_command_runs(line, more, checkout, run_script):
    module = {"plot_losses": plot_losses, "table": table, "opt": opt, "main": main}[Path(line.split()[1]).stem]
    status, out, err = run_script(module, *shlex.split(line)[2:], *more.split())
    assert status == 0, err
    if module is opt:
        (reader,) = (words[2] for words in map(shlex.split, commands(ROOT / "docs/cli.md")) if words[1:2] == ["-c"])
        exec(reader)
    if module is plot_losses:
        rows = [line for line in (ROOT / "README.md").read_text().split("## What is supported")[0].splitlines() if line.startswith("| ")]
        assert len(rows) > 5 and not set(rows) - set(out.splitlines()), "README.md: the table is not what this command prints"


def test_every_cheap_command_is_there():
    assert len(CHEAP) == len(RUN)


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(checkout, capsys):
    (code,) = snippets("README.md")
    exec(code.replace("nsamples=32", "nsamples=2").replace("text, recipe.seqlen", "text[:512], recipe.seqlen"), {})
    ppls = re.findall(r"^\d\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert len(ppls) == 2 and float(ppls[0]) == pytest.approx(float(ppls[1]), rel=1e-3)


def test_the_python_of_the_kernels_runs():
    for code in snippets("docs/kernels.md")[:1]:
        names = {"W": torch.randn(8, 64), "bias": None, "x": torch.randn(1, 2, 64)}
        exec(code, names)
        assert names["y"].shape == (1, 2, 8)


def test_every_flag_is_documented():
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    parser = cli.make_parser(*opt.main.args, **opt.main.keywords)
    flags = [action.option_strings for action in parser._actions if action.option_strings]
    assert not [names for names in flags if not any(name in page for name in names)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            linked = page.parent / path if path else page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}, target
