"""What measures whole runs: peaks of memory belong to the run alone, two checkouts are compared by all they give."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import decoder_blocks, quantize, tiny_model, token_ids
from matplotlib import image

from bench import checkouts, memory, processes
from bench.cost import cost
from formats.card import tensor_bytes
from formats.checkpoint import Store
from modelutils import decoder_of, open_decoder
from recipe import Recipe, UsageError
from rotate import rotated
from run.cli import parse
from run.flags import make_parser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

MIB = 2**20
SCRIPT = """
import json, pathlib, sys
import numpy
from safetensors.numpy import save_file
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if "--save" in flags:
    folder = pathlib.Path(flags["--save"])
    folder.mkdir()
    save_file({{"codes": numpy.array([{code}])}}, folder / "awrq-00001-of-00001.safetensors")
results = {{"perplexity": {{"world": {{"ppl": {ppl}}}}}, "tasks": None}}
content = {{"results": results, "layers": {{}}, "seconds": {{"solving": {seconds}, "evaluating": 9}}}}
pathlib.Path(flags.get("--output_path", "unread")).write_text(json.dumps(content))
"""


def test_a_peak_is_the_commands_own():
    """Not that of what started it: a process begins with the resident memory of its parent as its largest."""
    mine = torch.ones(300 * MIB, dtype=torch.uint8)
    small = memory.peak([sys.executable, "-c", "pass"], ROOT)
    large = memory.peak([sys.executable, "-c", f"b'1' * {100 * MIB}"], ROOT)
    assert small < mine.nbytes / 3 and 95 * MIB < large - small < 110 * MIB


def test_a_run_that_fails_is_no_peak():
    with pytest.raises(RuntimeError, match="no such thing"):
        memory.peak([sys.executable, "-c", "raise SystemExit('no such thing')"], ROOT)


@pytest.mark.parametrize("form", memory.FORMATS)
@pytest.mark.parametrize("family", memory.SCRIPTS)
def test_models_to_measure_are_whole(family, form, tmp_path):
    """Nothing is drawn anew when they are read, and the bound counts each of their tensors."""
    config = memory.configuration(family, 6, small=True)
    size = memory.write_model(tmp_path / "model", config, form)
    source = open_decoder(tmp_path / "model").source
    ends = {name: t for name, t in source.rest(source.names).items() if not name.startswith(source.prefix)}
    assert sum(t.nbytes for read in (ends, *map(source.read, range(6))) for t in read.values()) == size
    parts = memory.bound(config, imports=0)
    assert parts["blocks"] + parts["embedding and head"] == 2 * size  # float32, six of six blocks


def test_a_run_is_measured_and_leaves_nothing(tmp_path):
    """Of the script of the checkout that was named: this one takes 200 MiB."""
    (tmp_path / "opt.py").write_text(SCRIPT.format(code=1, ppl=2, seconds=3) + f"b'1' * {200 * MIB}")
    (tmp_path / "runs").mkdir()
    row = memory.measure(tmp_path, tmp_path / "runs", "opt", 2, "bin", small=True)
    assert 200 * MIB < row["peak"] < 300 * MIB and not list((tmp_path / "runs").iterdir())


def test_the_picture_of_peaks_has_both_checkouts(tmp_path):
    rows = [
        {"family": "opt", "format": "bin", "weights": n * MIB, "peak": 500 * MIB, "bound": {"imports": 400 * MIB, "blocks": 300 * MIB}}
        for n in (100, 800)
    ]
    for name, before in (("one.png", []), ("both.png", rows)):
        memory.plot(rows, before, tmp_path / name)
    one, both = (image.imread(tmp_path / name) for name in ("one.png", "both.png"))
    assert one.shape == both.shape and (one != both).any()


@pytest.mark.parametrize(("code", "ppl", "same"), [(7, 2.5, True), (8, 2.5, False), (7, 2.6, False)])
def test_checkouts_are_compared_by_tensors_and_numbers(code, ppl, same, tmp_path, monkeypatch, run_script):
    for name, given in (("mine", (7, 2.5, 3)), ("other", (code, ppl, 2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "opt.py").write_text(SCRIPT.format(**dict(zip(("code", "ppl", "seconds"), given, strict=True))))
    monkeypatch.setattr(checkouts, "ROOT", tmp_path / "mine")
    status, out, _ = run_script(checkouts, tmp_path / "other", "--only", "opt rtn")
    row = out.splitlines()[-1].split()
    assert status == (0 if same else 1) and ("yes" if same else "NO") in row and "1.50" in row


@pytest.mark.parametrize("name", checkouts.CASES)
def test_each_command_of_the_comparison_is_a_run(name):
    script, *flags = checkouts.CASES[name][0].split()
    main = importlib.import_module(script.removesuffix(".py")).main
    assert parse(make_parser(*main.args, **main.keywords), flags).model.startswith("demo/")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (("llama", "grouped"), {}),
        (("llama", "llama3"), {"rotate": True, "act_pertoken": True}),  # its head was tied
        (("opt", "post-norm"), {"smooth": True}),  # which keeps scales to divide by
    ],
)
def test_the_cost_of_a_setting_is_that_of_its_checkpoint(kind, settings, tmp_path):
    model = tiny_model(*kind)
    recipe = Recipe(method="smoothquant" if settings.get("smooth") else "rtn", wbits=4, rest_dtype="float16", **settings)
    decoder = decoder_of(model)
    decoder.stored_dtype = torch.float16
    store = Store(rotated(decoder, recipe.seed) if recipe.rotate else decoder, recipe)
    quantize(None, token_ids(1, 8), recipe, store=store)
    store.save(tmp_path / "saved", None)
    size, rest, integers, others, numbers, divisions = cost(decoder_of(model), recipe)
    assert size == sum(tensor_bytes(tmp_path / "saved").values())
    linears = [m for m in decoder_blocks(model).modules() if isinstance(m, torch.nn.Linear)]
    assert integers == sum(m.weight.numel() for m in linears) and others == model.get_output_embeddings().weight.numel()
    assert (divisions > 0) == any(name.endswith("in_scale") for name in store.blocks[0]) and numbers == 2 * (32 * 3 + 64)


def test_what_processes_gain_by_calculation(capsys):
    """The table of docs/processes.md, and what must hold of it."""
    processes.main(processes.parser().parse_args(["--calculate", "llama-65b", "--counts", "1,2,4,8"]))
    rows = {
        cells[1]: cells[2:6] for cells in (re.split(r"\s*\|\s*", line) for line in capsys.readouterr().out.splitlines()) if len(cells) > 5
    }
    page = (ROOT / "docs/processes.md").read_text()
    for name in ("reads", "statistics", "reduction", "solve", "propagation"):
        assert f"| {name} | {' | '.join(rows[name])} |" in page
    one, many = processes.calculated("llama-65b", 1), processes.calculated("llama-65b", 8)
    assert one["statistics"] == pytest.approx(8 * many["statistics"]) and one["reduction"] == 0 < many["reduction"]
    largest = processes.solve_operations(8192, 22016) / processes.A100["float"]
    assert many["solve"] == pytest.approx(largest)


def test_what_processes_gain_measured(tmp_path, monkeypatch, capsys):
    """Each number of processes in turn, the least time of all rounds, by what a run reports; a failed run is an error."""
    calls, times = [], iter([8.0, 5.0, 6.0, 3.0])

    def run(command, **kwargs):
        calls.append(command)
        seconds = {"loading": 100, "statistics": next(times), "solving": 1, "evaluation": 2}
        Path(command[-1]).write_text(json.dumps({"seconds": seconds}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(processes.subprocess, "run", run)
    processes.main(processes.parser().parse_args(["--rounds", "2", "opt.py", "demo/opt", "--method", "awrq"]))
    assert [("--nproc_per_node" in call) for call in calls] == [False, True, False, True]
    assert all(call[-5:-2] == ["demo/opt", "--method", "awrq"] for call in calls)
    out = capsys.readouterr().out
    assert re.search(r"quantizing \| +1 \| +7.0 \| +1.00", out) and re.search(r"quantizing \| +2 \| +4.0 \| +1.75", out)
    failed = subprocess.CompletedProcess([], 2, "", "opt.py: error: no such model")
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match="2 processes failed: opt.py: error: no such model"):
        processes.timed("opt.py", [], 2)
    with pytest.raises(UsageError, match="give a script"):
        processes.main(processes.parser().parse_args([]))
