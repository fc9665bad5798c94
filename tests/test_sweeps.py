"""scripts/opt.sh, llama.sh, real.sh and ablation.sh with a stand-in for python: the cells they run, and what they do when one fails."""

import os
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import main
import opt
from recipe import METHODS, PRESETS, Recipe
from run import cli
from run.pipeline import with_seqlen

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = pytest.mark.slow


STUB = """#!/usr/bin/env bash
[[ $1 != */table.py ]] || { echo "the table of ${!#}"; exit; }
printf '%s\\t' "$@" >> "$LOG"
echo >> "$LOG"
json=${!#}
[[ $json != *$FAIL* ]] || exit $STATUS
mkdir -p "${json%/*}"
echo '{}' > "$json"
"""


BITS = {"full": {""}, "rtn": {"w4a8", "w4a16", "w3a16"}, "smoothquant": {"w4a8"}, "act_only": {"w16a8", "w16a8-smooth"}}
BITS |= {"gptq": {f"w{w}a16{s}" for w in (4, 3) for s in ("", "-smooth")}}
BITS |= {"awrq": {f"{bits}{s}" for bits in ("w4a8", "w4a6", "w3a8") for s in ("", "-smooth")}}


CELLS = {f"{method}-{bits}".rstrip("-") for method in BITS for bits in BITS[method]}


LLAMA_CELLS = {"full", "rtn-w4a16", "rtn-w3a16", *(f"gptq-w{w}a16{smooth}" for w in (4, 3) for smooth in ("", "-smooth"))}


for bits in ("w4a8", "w4a6", "w3a8"):
    LLAMA_CELLS |= {f"{method}-{bits}" for method in ("rtn", "smoothquant")}
    LLAMA_CELLS |= {f"{method}-{bits}{smooth}" for method in ("gptq", "awrq") for smooth in ("", "-smooth")}


@pytest.fixture
def sweep(tmp_path):
    """Call it to run a copy of a script, from a folder that is not the repository's: its result, and the arguments of every `python`."""
    scripts = tmp_path / "my repo" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("cells.sh", "opt.sh", "llama.sh", "ablation.sh", "real.sh"):
        shutil.copy(SCRIPTS / name, scripts / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    log = tmp_path / "log"

    def run(*flags, script="opt.sh", fail="no such cell", **variables):
        log.write_text("")
        clean = {k: v for k, v in os.environ.items() if k not in ("OUT", "MODELS", "MODEL_PREFIX", "PYTHON")}
        env = clean | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log), "FAIL": fail, "STATUS": "3"} | variables
        done = subprocess.run(["bash", str(scripts / script), *flags], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return done, [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]

    return run


def parsed(script, argv, context):
    """What a command asks for: its Run, and the recipe for a model of that context.  Raises if the method cannot use a setting."""
    run = cli.parse(cli.make_parser(*script.main.args, **script.main.keywords), argv)
    return run, with_seqlen(run.recipe, run.seqlen or min(2048, context), context)


# ---------------------------------------------------------------------------
# Every cell is a command that its program takes


def test_every_cell_is_a_command_that_opt_takes(sweep, tmp_path):
    done, calls = sweep("--data_dir", "my data")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "my repo/out/opt"
    models = list(dict.fromkeys(args[1] for args in calls))
    assert models == [f"facebook/opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "350m")]
    assert len(calls) == len(models) * len(CELLS)
    for script, *argv in calls:
        assert script == str(tmp_path / "my repo/opt.py")
        args, recipe = parsed(opt, argv, 2048)
        cell = Path(args.output_path).stem
        method, _, rest = cell.partition("-")
        assert Path(args.output_path) == out / args.model.removeprefix("facebook/opt-") / f"{cell}.json"
        smooth = METHODS[method].smooth == (True,) or rest.endswith("-smooth")
        bits = "w16a16" if method == "full" else rest.removesuffix("-smooth")
        assert (recipe.method, f"w{recipe.wbits}a{recipe.act_bits}", recipe.smooth) == (method, bits, smooth), cell
        assert recipe == Recipe(method, recipe.wbits, recipe.act_bits, smooth=smooth), "everything else as published, which is the default"
        assert args.data_dir == "my data"
    assert {path.relative_to(out / "66b").stem for path in (out / "66b").iterdir()} == CELLS


def test_every_cell_of_llama_is_a_command_that_main_takes(sweep, tmp_path):
    done, calls = sweep("--data_dir", "my data", "--batch_size", "auto", script="llama.sh")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "my repo/out/llama"
    models = list(dict.fromkeys(args[1] for args in calls))
    assert sorted(model.rpartition("/")[2].lower().removesuffix("-hf") for model in models) == sorted(
        f"llama-{size}" for size in ("7b", "13b", "30b", "65b", "2-7b", "2-13b", "2-70b")
    )
    assert len(calls) == len(models) * len(LLAMA_CELLS)
    for script, *argv in calls:
        assert script == str(tmp_path / "my repo/main.py")
        args, recipe = parsed(main, argv, 4096)
        path = Path(args.output_path)
        assert path.parent == out / args.model.rpartition("/")[2]
        method, _, rest = path.stem.partition("-")
        smooth = METHODS[method].smooth == (True,) or rest.endswith("-smooth")
        bits = "w16a16" if method == "full" else rest.removesuffix("-smooth")
        assert (recipe.method, f"w{recipe.wbits}a{recipe.act_bits}", recipe.smooth) == (method, bits, smooth), path.stem
        assert recipe == Recipe(method, recipe.wbits, recipe.act_bits, smooth=smooth, min=0.01), "everything else as published"
        assert args.tasks == ("piqa", "arc_easy", "arc_challenge", "boolq", "copa") and args.corpora == ()
        assert args.data_dir == "my data" and args.batch_size == "auto"
    assert {path.stem for path in (out / "Llama-2-70b-hf").iterdir()} == LLAMA_CELLS


def test_the_scripts_take_the_python_of_make_where_it_is(sweep, tmp_path):
    """And $PYTHON before that."""
    python = tmp_path / "my repo/.venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "bin/python", python)
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 9\n")
    done, calls = sweep(script="real.sh", BITS="w4a8")
    assert done.returncode == 0 and len(calls) == 11
    python.write_text("#!/bin/sh\nexit 9\n")
    assert sweep(script="real.sh", BITS="w3a8")[0].returncode == 1


def test_every_cell_of_the_real_model_is_a_command_that_main_takes(sweep, tmp_path):
    done, calls = sweep("--data_dir", "my data", script="real.sh")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1 + 10 * 3
    for script, *argv in calls:
        assert script == str(tmp_path / "my repo/main.py")
        args, recipe = parsed(main, argv, 8192)
        method, *rest, bits, seed = ["full", "w16a16", "0"] if argv[-1].endswith("full.json") else Path(args.output_path).stem.split("-")
        preset = PRESETS.get(method, {})
        assert (recipe.method, f"w{recipe.wbits}a{recipe.act_bits}") == ("awrq" if preset else method, bits) and seed == "0"
        expected = Recipe(recipe.method, recipe.wbits, recipe.act_bits, min=0.01, calib_data="c4-joined", nsamples=64, seqlen=512)
        smooth = rest == ["smooth"] or method == "smoothquant"
        last = {"tune_steps": 0} if "untuned" in rest else {}
        assert recipe == replace(expected, **{"smooth": smooth, "tune_steps": 64 * ("tuned" in rest)} | preset | last), argv
        assert args.corpora == ("wikitext2", "c4-joined") and args.eval_windows == (0, 24)


@pytest.fixture
def ablation(sweep, tmp_path):
    """Call it to run ablation.sh with a text of a hundred lines."""
    world = tmp_path / "my repo/demo/data/world"
    world.mkdir(parents=True)
    for split, lines in (("train", 60), ("test", 40)):
        (world / f"{split}.txt").write_text("".join(f"{split} {i}\n" for i in range(lines)))
    (tmp_path / "stories.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    return partial(sweep, script="ablation.sh", TEXT=str(tmp_path / "stories.txt"), OUT=str(tmp_path / "out"))


def test_every_cell_of_the_ablation_is_a_command_that_its_script_takes(ablation, tmp_path):
    done, calls = ablation(MODELS=f"{tmp_path}/stories {tmp_path}/repo/demo/opt", SEEDS="0 3", BITS="w4a8 w3a8")
    assert done.returncode == 0, done.stderr
    assert ablation(MODELS=f"{tmp_path}/stories {tmp_path}/repo/demo/opt", SEEDS="0 3", BITS="w4a8 w3a8")[1] == [], "all are finished"
    recipes = {}
    for script, *argv in calls:
        args, recipe = parsed({"opt.py": opt, "main.py": main}[Path(script).name], argv, 512)
        cell = Path(args.output_path).stem
        assert args.corpora == ("choose", "report") and recipe.calib_data == "choose" and recipe.nsamples == 64
        if cell == "full":
            continue
        bits, _, name = cell.partition("-")
        name, _, seed = name.rpartition("-")
        assert (f"w{recipe.wbits}a{recipe.act_bits}", recipe.seed) == (bits, int(seed))
        recipes[Path(args.model).name, cell] = recipe
    names = {cell.split("-", 1)[1].rpartition("-")[0] for _, cell in recipes}
    assert len(recipes) == 2 * 2 * 2 * len(names) and {"paper", "plus", "clip-mse", "no-rotate"} < names
    plain = recipes["stories", "w4a8-paper-0"]
    assert plain == Recipe("awrq", 4, 8, min=0.01, calib_data="choose", nsamples=64, seqlen=512)
    assert {key: getattr(recipes["stories", "w4a8-plus-0"], key) for key in PRESETS["plus"]} == PRESETS["plus"]


def test_the_ablation_needs_a_text_for_other_models_than_the_demos(ablation, tmp_path):
    done, calls = ablation(TEXT="", SEEDS="0", BITS="w4a8", CELLS="paper")
    assert done.returncode == 0, done.stderr
    assert {argv[0].removeprefix(str(tmp_path)) for _, *argv in calls} == {"/my repo/demo/opt", "/my repo/demo/llama"}
    done, calls = ablation(TEXT="", MODELS="other")
    assert done.returncode == 2 and "other needs a text" in done.stderr and not calls


def test_the_ablation_reports_on_text_that_it_did_not_choose_by(ablation, tmp_path):
    ablation(MODELS="m", SEEDS="0", BITS="w4a8", CELLS="paper")
    for name, lines in (("stories", 100), ("world", 100)):
        folder = tmp_path / "out/ablation-text" / name
        parts = [(folder / part).read_text().splitlines() for part in ("choose/train.txt", "choose/test.txt", "report/test.txt")]
        assert sum(map(len, parts)) == lines == len(set().union(*parts)) and min(map(len, parts)) >= 8


# ---------------------------------------------------------------------------
# Cells that are finished, that fail, that cannot be had


def test_llama_skips_finished_cells_and_names_failed_ones(sweep):
    where = {"script": "llama.sh", "MODELS": "x/a b", "MODEL_PREFIX": "my models/", "OUT": "other"}
    done, calls = sweep(fail="b/awrq-w4a6.json", **where)
    assert len(calls) == 2 * len(LLAMA_CELLS) and {args[1] for args in calls} == {"my models/x/a", "my models/b"}
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "llama.sh: failed: b/awrq-w4a6"
    done, calls = sweep(**where)
    assert done.returncode == 0 and [Path(args[-1]).name for args in calls] == ["awrq-w4a6.json"]


def test_storycloze_is_in_the_table_if_its_rows_are_there(sweep, tmp_path):
    (tmp_path / "my data/storycloze_2018").mkdir(parents=True)
    one = {"script": "llama.sh", "MODELS": "a"}
    done, calls = sweep("--data_dir", "my data", OUT="without", **one)
    assert done.returncode == 0 and "storycloze is left out" in done.stderr and ",copa" in str(calls) and ",storycloze" not in str(calls)
    assert "storycloze" not in sweep("--data_dir", "my data", "--tasks", "piqa", OUT="own", **one)[0].stderr
    (tmp_path / "my data/storycloze_2018/validation.jsonl.gz").touch()
    done, calls = sweep("--data_dir", "my data", OUT="with", **one)
    assert done.returncode == 0 and not done.stderr
    assert all(args[args.index("--tasks") + 1].endswith(",copa,storycloze") for args in calls)


def test_a_model_that_cannot_be_had(sweep):
    done, calls = sweep(MODELS="a b", fail="/a/", STATUS="2", OUT="first")
    assert done.returncode == 2 and len(calls) == 1 and "a cannot be had as asked" in done.stderr, "nothing can be had"
    done, calls = sweep(MODELS="a b c", fail="/b/", STATUS="2", OUT="second")
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("the table of"), done.stderr
    assert len(calls) == 2 * len(CELLS) + 1 and done.stderr.splitlines()[-1] == "opt.sh: failed: b", "its other cells are left out"


def test_a_cell_that_is_wrong_by_itself_stops_no_later_sweep(sweep):
    wrong = {"MODELS": "a b", "fail": "a/rtn-w4a8", "STATUS": "2"}
    done, calls = sweep(**wrong)
    assert done.returncode == 1 and len(calls) == 2 * len(CELLS)
    done, calls = sweep(**wrong)
    assert done.returncode == 1 and len(calls) == 1 and "the table of" in done.stdout, "as the first that runs of its model"


def test_the_table_is_printed_at_the_end_and_unfinished_cells_run_again(sweep, tmp_path):
    done, _ = sweep(MODELS="a")
    assert done.stdout.splitlines()[-1] == f"the table of {tmp_path}/my repo/out/opt"
    (tmp_path / "my repo/out/opt/a/full.json").write_text('{\n "complete": false\n}\n')
    done, calls = sweep(MODELS="a")
    assert done.returncode == 0 and [Path(args[-1]).name for args in calls] == ["full.json"]


def test_finished_cells_are_skipped_and_failed_ones_named(sweep, tmp_path):
    where = {"MODELS": "a b", "MODEL_PREFIX": "my models/", "OUT": "other"}
    done, calls = sweep(fail="b/awrq-w4a6.json", **where)
    assert len(calls) == 2 * len(CELLS), "the others run"
    assert {args[1] for args in calls} == {"my models/a", "my models/b"}
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "opt.sh: failed: b/awrq-w4a6"
    assert len(list(tmp_path.glob("other/opt/*/*.json"))) == len(calls) - 1
    done, calls = sweep(**where)
    assert done.returncode == 0 and [Path(args[-1]).name for args in calls] == ["awrq-w4a6.json"]
    assert sweep(**where)[1] == []


def test_a_run_that_writes_nothing_has_failed(sweep, tmp_path):
    (tmp_path / "bin/python").write_text("#!/usr/bin/env bash\n")
    done, _ = sweep(MODELS="a")
    assert done.returncode == 1 and len(done.stderr.split()) == 2 + len(CELLS)
