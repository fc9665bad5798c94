"""scripts/opt.sh and llama.sh with a stand-in for python, and scripts/table.py on made-up results."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import CPU, tiny_model

import main
import opt
from modelutils import decoder_of
from recipe import METHODS, PRESETS, Recipe
from run import cli
from run.pipeline import with_seqlen
from run.quantize import Layer
from run.report import SCHEMA, report
from runtime import Clock

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import compare_llmcompressor  # noqa: E402
import plot_losses  # noqa: E402
import table  # noqa: E402

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------
# opt.sh and llama.sh

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
    assert done.returncode == 0 and len(calls) == 9
    python.write_text("#!/bin/sh\nexit 9\n")
    assert sweep(script="real.sh", BITS="w3a8")[0].returncode == 1


def test_every_cell_of_the_real_model_is_a_command_that_main_takes(sweep, tmp_path):
    done, calls = sweep("--data_dir", "my data", script="real.sh")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1 + 8 * 3
    for script, *argv in calls:
        assert script == str(tmp_path / "my repo/main.py")
        args, recipe = parsed(main, argv, 8192)
        method, *rest, bits, seed = ["full", "w16a16", "0"] if argv[-1].endswith("full.json") else Path(args.output_path).stem.split("-")
        preset = PRESETS.get(method, {})
        assert (recipe.method, f"w{recipe.wbits}a{recipe.act_bits}") == ("awrq" if preset else method, bits) and seed == "0"
        expected = Recipe(recipe.method, recipe.wbits, recipe.act_bits, min=0.01, calib_data="c4-joined", nsamples=64, seqlen=512)
        smooth = rest == ["smooth"] or method == "smoothquant"
        tuned = {"tune_steps": 64} if rest == ["tuned"] else {}
        assert recipe == replace(expected, **{"smooth": smooth} | preset | tuned), argv
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


def test_the_ablation_reports_on_text_that_it_did_not_choose_by(ablation, tmp_path):
    ablation(MODELS="m", SEEDS="0", BITS="w4a8", CELLS="paper")
    for name, lines in (("stories", 100), ("world", 100)):
        folder = tmp_path / "out/ablation-text" / name
        parts = [(folder / part).read_text().splitlines() for part in ("choose/train.txt", "choose/test.txt", "report/test.txt")]
        assert sum(map(len, parts)) == lines == len(set().union(*parts)) and min(map(len, parts)) >= 8


def test_the_table_of_the_ablation(results, tmp_path, capsys):
    plus = {"method": "awrq", "wbits": 3, "act_bits": 8, **PRESETS["plus"]}

    def took(seconds, mebibytes):
        def edit(run):
            run["seconds"], run["peak_bytes"] = {"solving": seconds, "evaluation": 7}, {"host": 1, "device": mebibytes * 2**20}

        return edit

    for seed, published, ours in ((0, 8.0, 6.0), (1, 8.2, 6.4)):
        paper = {"method": "awrq", "wbits": 3, "act_bits": 8}
        results(f"m/w3a8-paper-{seed}.json", "/a/m", {"report": published}, took(2, 100), seed=seed, **paper)
        results(f"m/w3a8-plus-{seed}.json", "/a/m", {"report": ours}, took(3 + seed, 100 + 20 * seed), seed=seed, **plus)
    results("m/full.json", "/a/m", {"report": 5.0}, method="full")
    file = tmp_path / "compact.json"
    first = table.ablation([tmp_path / "opt"], file)
    assert table.ablation([file]) == first and "/a/m" not in file.read_text()
    assert "takes 1.75 times as long with plus, the median of 2 pairs" in first
    assert "the GPU's peak memory is at most 20 MiB larger with plus" in first
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line.startswith("| ")]
    assert rows == [["", "W3A8"], ["awrq", "8.100 ± 0.100 (2)"], ["awrq, plus", "6.200 ± 0.200 (2)"]]
    assert "- the full model: 5.000" in first and "- W3A8: awrq, plus closes 61 % of 3.100 that awrq loses" in first


def test_losses_are_drawn_over_the_unquantized_model(results, tmp_path, run_script):
    results("m/full.json", "/a/m", {"own": 10.0}, method="full")
    folder = tmp_path / "opt"
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "no run there but" in err[-1]
    awrq = {"method": "awrq", "wbits": 4, "act_bits": 8}
    results("m/tuned.json", "/a/m", {"own": 11.0}, tune_steps=8, **awrq)
    results("m/plain.json", "/a/m", {"own": 20.0, "other": 3.0}, **awrq)
    results("m/three.json", "/a/m", {"own": 30.0}, **awrq | {"wbits": 3})
    status, out, _ = run_script(plot_losses, folder, "--out", tmp_path / "a.png")
    assert status == 0 and [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:5]] == [
        ["unquantized", "10.00", "10.00"],
        ["awrq", "20.00", "30.00"],
        ["awrq, tune_steps 8", "11.00", "not run"],
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    results("n/full.json", "/a/n", {"own": 10.0}, method="full")
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "one model" in err[-1]
    shutil.rmtree(folder / "n")
    (folder / "m" / "full.json").unlink()
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "--method full" in err[-1]


def test_without_llmcompressor_there_is_a_line_about_it(run_script):
    status, _, err = run_script(compare_llmcompressor, "a-model", "--data_dir", "a-folder", "--out", "another")
    assert status == 2 and len(err) == 1 and "llmcompressor cannot be imported" in err[0] and "0.14.0.1" in err[0]


def test_the_committed_table_is_of_the_committed_numbers():
    results = SCRIPTS.parent / "results"
    assert table.ablation([results / "ablation.json"]) in (results / "ablation.md").read_text(encoding="utf-8")


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


# ---------------------------------------------------------------------------
# table.py


@pytest.fixture(scope="module")
def blank():
    """A report of opt.py, of which `results` makes others."""
    calibration = {"corpus": "c4", "split": "train", "source": "hub", "rule": "random", "nsamples": 128, "seqlen": 2048, "seed": 0}
    protocol = {"calibration": calibration, "evaluation": {}}
    found = {"model": "", "protocol": protocol | {"tasks": {}}, "walk_batch": 1, "results": {"perplexity": {}, "tasks": {}}, "full": None}
    found |= {"tuning": [], "failed": {}}
    found["layers"] = [Layer(0, "fc1", 0.5)]
    return report(Recipe(), decoder_of(tiny_model().half()), found, Clock(CPU))


@pytest.fixture
def results(blank, tmp_path):
    """Call it to write a result: results(file, model, {corpus: ppl}, recipe settings..., edit=function of the report)."""

    def write(file, model, ppl, edit=lambda run: None, seqlen=2048, **settings):
        run = copy.deepcopy(blank) | {"model": model}
        run["recipe"] |= settings
        if run["recipe"]["method"] == "full":
            run["protocol"]["calibration"] = None
        for corpus, value in ppl.items():
            how = {"corpus": corpus, "split": "test", "source": "hub", "rule": "joined", "seqlen": seqlen, "n_tokens": 9000}
            run["protocol"]["evaluation"][corpus] = how
            run["results"]["perplexity"][corpus] = {"ppl": value, "windows": 4, "seqlen": seqlen, "tokens": 8192}
        edit(run)
        path = tmp_path / "opt" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))

    return write


def tables(folder, capsys):
    """What table.py prints: {corpus: {row: {column: cell}}}."""
    table.main(table.parser().parse_args([str(folder)]))
    found = {}
    for part in capsys.readouterr().out.split("### ")[1:]:
        corpus, *lines = part.splitlines()
        header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|"))
        found[corpus] = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    return found


def fails(argv, monkeypatch, capsys):
    """The one line on stderr with which table.py exits."""
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, argv)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run() changes it
    with pytest.raises(SystemExit) as exit:
        table.parser().run(table.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def test_ours_beside_the_published(results, tmp_path, capsys):
    results("125m/full.json", "facebook/opt-125m", {"wikitext2": 27.6512, "ptb": 32.55, "c4": 24.61})
    results("125m/awrq.json", "/models/opt-125m/", {"wikitext2": 31.0, "ptb": 12345.6}, method="awrq", wbits=4, act_bits=8, smooth=True)
    results("mine/gptq.json", "mine", {"wikitext2": 30}, method="gptq", wbits=3, actorder=True, groupsize=128, alpha=0.7)
    found = tables(tmp_path / "opt", capsys)
    assert list(found) == ["wikitext2", "ptb", "c4"]
    wiki = found["wikitext2"]
    others = ["(22.00)", "(14.63)", "(12.47)", "(10.86)", "(10.13)", "(9.56)", "(9.34)"]
    assert list(wiki["full"].values()) == ["full", "27.65 (27.65)", *others, "–", "GPTQ paper, Table 3"]
    assert list(wiki["full"])[-2:] == ["mine", "published in"]
    assert wiki["awrq W4A8 + smoothing"]["opt-125m"] == "31.00" and wiki["awrq W4A8 + smoothing"]["published in"] == ""
    assert wiki["gptq W3A16, groupsize 128, actorder"]["mine"] == "30.00", "alpha is not used without smoothing"
    assert wiki["rtn W4A16"]["opt-66b"] == "(110)" and wiki["rtn W3A16"]["opt-1.3b"] == "(1.3e4)"
    assert found["ptb"]["full"]["opt-125m"] == "32.55 (32.54)", "the old protocol's, as ptb is"
    assert found["ptb"]["awrq W4A8 + smoothing"]["opt-125m"] == "1.2e+04"
    assert found["c4"]["full"]["opt-350m"] == "–" and "awrq W4A8 + smoothing" not in found["c4"]
    order = ["full", "rtn W4A16", "rtn W3A16", "gptq W4A16", "gptq W3A16", "awrq W4A8 + smoothing", "rptq W4A8"]
    assert [row for row in wiki if row in order] == order


def test_new_protocol_is_another_table(results, tmp_path, capsys):
    results("full.json", "facebook/opt-350m", {"ptb-new": 31.1, "ptb": 36.5})
    table.main(table.parser().parse_args([str(tmp_path / "opt")]))
    assert "- published values: new protocol: test split" in capsys.readouterr().out
    found = tables(tmp_path / "opt", capsys)
    assert found["ptb-new"]["full"]["opt-350m"] == "31.10 (31.08)" and found["ptb"]["full"]["opt-350m"] == "36.50"


def test_published_values_only_beside_windows_of_their_length(results, tmp_path, capsys):
    results("full.json", "facebook/opt-125m", {"wikitext2": 40}, seqlen=512)
    assert tables(tmp_path / "opt", capsys) == {
        "wikitext2": {"full": {"ours (published)": "full", "opt-125m": "40.00", "published in": ""}}
    }


def test_a_part_of_a_corpus_is_not_set_beside_the_published(results, tmp_path, monkeypatch, capsys):
    def part(run):
        run["protocol"]["evaluation"]["wikitext2"]["windows"] = "0 to 3"

    results("full.json", "facebook/opt-125m", {"wikitext2": 27.6}, part)
    error = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert all(text in error for text in ("full.json", "windows 0 to 3 of wikitext2", "--eval_windows"))


@pytest.fixture
def task_results(results):
    """Call it to write a result of tasks: task_results(file, model, {task: (acc, acc_norm)}, recipe settings..., edit=...)."""

    def write(file, model, found, edit=lambda run: None, **settings):
        def with_tasks(run):
            rows = {
                task: {"alias": task, "acc,none": acc, "acc_stderr,none": 0.01}
                | ({"acc_norm,none": norm, "acc_norm_stderr,none": 0.02} if norm else {})
                for task, (acc, norm) in found.items()
            }
            run["results"]["tasks"] = {
                "results": rows,
                "versions": dict.fromkeys(found, 1.0),
                "n-shot": dict.fromkeys(found, 0),
                "config": {"limit": None},
                "lm_eval_version": "0.4.13",
            }
            run["protocol"]["tasks"] = {task: {"split": "validation", "source": "hub"} for task in found}
            run["model_type"] = "llama"
            edit(run)

        results(file, model, {}, with_tasks, **settings)

    return write


def test_tasks_of_a_model_beside_the_published(task_results, tmp_path, capsys):
    task_results("a.json", "huggyllama/llama-7b", {"piqa": (0.7812, 0.774), "copa": (0.84, None)}, method="full")
    task_results("b.json", "huggyllama/llama-7b", {"piqa": (0.77, 0.77)}, method="awrq", wbits=4, act_bits=8)
    task_results("c.json", "meta-llama/Llama-2-7b-hf", {"piqa": (0.77, 0.79)}, method="full")
    found = tables(tmp_path / "opt", capsys)
    assert list(found) == ["llama-7b, acc", "llama-7b, acc_norm", "Llama-2-7b-hf, acc", "Llama-2-7b-hf, acc_norm"]
    acc = found["llama-7b, acc"]
    assert acc["full"]["piqa"] == "78.12 ± 1.00 (78.18)" and acc["full"]["copa"] == "84.00 ± 1.00 (84.00)"
    assert acc["full"]["average"] == "81.06 ± 0.71" and acc["full"]["published in"].startswith("EleutherAI/lm-evaluation-harness")
    assert acc["awrq W4A8"]["piqa"] == "77.00 ± 1.00" and acc["awrq W4A8"]["copa"] == acc["awrq W4A8"]["average"] == "–"
    assert found["llama-7b, acc_norm"]["smoothquant W6A6"]["piqa"] == "(76.75)", "of which we have no run"
    assert found["Llama-2-7b-hf, acc_norm"]["full"]["piqa"] == "79.00 ± 2.00 (79.05)"
    assert found["Llama-2-7b-hf, acc_norm"]["qqq W4A8, groupsize 128"]["piqa"] == "(78.51)"


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda run: run["protocol"]["tasks"]["piqa"].update(source="local"), ["piqa source", "local", "hub"]),
        (lambda run: run["results"]["tasks"]["n-shot"].update(piqa=5), ["piqa shots", "5"]),
        (lambda run: run["results"]["tasks"]["versions"].update(piqa=2.0), ["piqa version", "2.0"]),
        (lambda run: run["results"]["tasks"]["config"].update(limit=10), ["limit", "10"]),
        (lambda run: run["results"]["tasks"].update(lm_eval_version="0.5"), ["lm_eval", "0.5"]),
        (lambda run: run["protocol"].update(dtype="float32"), ["dtype", "float32"]),
        (lambda run: run["recipe"].update(method="full", wbits=16, act_bits=16), ["full of llama-7b again"]),
    ],
)
def test_protocols_of_tasks_are_not_mixed(task_results, tmp_path, monkeypatch, capsys, edit, parts):
    task_results("a.json", "llama-7b", {"piqa": (0.7, 0.7)}, method="full")
    task_results("b.json", "llama-7b", {"piqa": (0.6, 0.6)}, edit, method="rtn", wbits=4, act_bits=8)
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "b.json" in err and all(part in err for part in parts), err


@pytest.mark.parametrize("first", [False, True])
def test_windows_of_one_run_only_are_another_protocol(results, tmp_path, monkeypatch, capsys, first):
    def part(run):
        run["protocol"]["evaluation"]["own"]["windows"] = "0 to 3"

    results("a.json", "mine", {"own": 20.0}, edit=part if first else lambda run: None)
    results("b.json", "mine", {"own": 21.0}, method="rtn", wbits=4, act_bits=8, edit=lambda run: None if first else part(run))
    assert "windows" in fails([tmp_path / "opt"], monkeypatch, capsys)


def test_an_unfinished_run_is_named(results, tmp_path, capsys):
    results("a.json", "mine", {"own": 20.0}, edit=lambda run: run.update(complete=False, failed={"piqa, full": "LookupError: gone"}))
    with pytest.warns(UserWarning, match="a.json: is unfinished .piqa, full: LookupError: gone."):
        table.main(table.parser().parse_args([str(tmp_path / "opt")]))


def test_seeds_share_a_cell(results, tmp_path, monkeypatch, capsys):
    for seed, ppl in enumerate((20.0, 21.0, 24.0)):
        results(f"{seed}.json", "mine", {"own": ppl}, method="awrq", wbits=4, act_bits=8, seed=seed)
    table.main(table.parser().parse_args([str(tmp_path / "opt")]))
    text = capsys.readouterr().out
    assert "21.67 ± 2.00 (3)" in text and "- seeds: 0, 1, 2" in text
    results("again.json", "mine", {"own": 20.5}, method="awrq", wbits=4, act_bits=8, seed=1)
    assert "awrq W4A8 of mine again" in fails([tmp_path / "opt"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("calibration", key, value) for key, value in (("source", "local"), ("nsamples", 64), ("seqlen", 512), ("corpus", "ptb"))),
        *(("evaluation", key, value) for key, value in (("source", "local"), ("rule", "other"), ("seqlen", 512), ("n_tokens", 8999))),
        ("dtype", "dtype", "float32"),
    ],
)
def test_protocols_are_not_mixed(results, tmp_path, monkeypatch, capsys, part, key, value):
    def edit(run):
        protocol = run["protocol"]
        {"calibration": protocol["calibration"], "evaluation": protocol["evaluation"]["c4"], "dtype": protocol}[part][key] = value

    results("a.json", "opt-125m", {"c4": 20})
    results("b.json", "opt-125m", {"c4": 21}, method="rtn", wbits=4, act_bits=8)
    results("c.json", "opt-125m", {"c4": 22}, method="gptq", wbits=4, edit=edit)
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "c.json" in err and key in err and f" is {value}, but" in err


def test_models_may_have_different_tokenizers(results, tmp_path, capsys):
    results("a.json", "opt-125m", {"c4": 20})
    results("b.json", "mine", {"c4": 21}, edit=lambda run: run["protocol"]["evaluation"]["c4"].update(n_tokens=9999))
    assert tables(tmp_path / "opt", capsys)["c4"]["full"]["mine"] == "21.00"


def test_bad_input_is_one_line(results, tmp_path, monkeypatch, capsys):
    assert "no *.json there" in fails([tmp_path / "nowhere"], monkeypatch, capsys)
    results("a.json", "opt-125m", {"c4": 20})
    results("b/a.json", "facebook/opt-125m", {"c4": 20})
    err = fails([tmp_path / "opt"], monkeypatch, capsys)
    assert "a.json" in err and "b/a.json" in err and "full of opt-125m again" in err
    for content, expected in (
        ("{", "not JSON"),
        ("\ufeff", "not JSON"),
        ("[]", "schema is None"),
        (json.dumps({"schema": SCHEMA + 1}), f"schema is {SCHEMA + 1}"),
    ):
        (tmp_path / "opt/b/a.json").write_text(content)
        err = fails([tmp_path / "opt"], monkeypatch, capsys)
        assert "b/a.json" in err and expected in err


def test_published_values_have_sources():
    for family in json.loads((SCRIPTS / "published.json").read_text()).values():
        for corpus in family.get("perplexity", {}).values():
            assert corpus["evaluation"]
            for row in corpus["rows"]:
                assert row["source"] and row["recipe"].keys() <= table.DEFAULTS.keys() and len(row["ppl"]) == len(family["models"])
                assert all(value is None or value > 9 for value in row["ppl"])
        for tasks in family.get("tasks", []):
            assert tasks["evaluation"]
            for row in tasks["rows"]:
                assert row["source"] and row["model"] and row["recipe"].keys() <= table.DEFAULTS.keys()
                assert all(20 < value < 100 for metric in table.METRICS for value in row.get(metric, {}).values())
