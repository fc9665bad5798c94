"""--recipe: the settings of a run from a file."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from test_cli import run_of
from test_runs import AWRQ
from test_runs import cli as cli

import main
import opt
from formats.card import settings_yaml
from recipe import PRESETS, UsageError
from run import cli as command_line

PLUS = ("--method", "awrq", "--wbits", "3", "--preset", "plus", "--seqlen", "32", "--nsamples", "5")


def report_of(run, path):
    """The JSON that a run of these settings would write, as far as --recipe reads it."""
    path.write_text(json.dumps({"schema": 1, "model": "M", "recipe": vars(run.recipe), "protocol": {"dtype": "float32", "walk_batch": 2}}))
    return path


LINES = [
    PLUS, ("--method", "rtn", "--wbits", "4"), ("--method", "gptq", "--wbits", "4", "--preset", "serve"), ("--method", "full"),
    ("--method", "gptq", "--wbits", "4", "--act_quant"), ("--method", "smoothquant", "--wbits", "4", "--alpha", "0.7"),
    ("--method", "act_only", "--rotate"), ("--method", "awrq", "--wbits", "4", "--rest_dtype", "float16"),
]  # fmt: skip


@pytest.mark.parametrize("script", [opt, main])
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_the_json_of_a_run_is_its_recipe(script, line, tmp_path):
    run = run_of("MODEL", "--eval", "own", "--seqlen", 64, *line, script=script)
    path = report_of(run, tmp_path / "run.json")
    again = run_of("--recipe", path, "--eval", "own", script=script)
    assert again.recipe == run.recipe and (again.model, again.dtype, again.walk_batch) == ("M", "float32", 2)
    assert again.notes == (f"--recipe {path}: taken as it is",)


@pytest.mark.parametrize("script", [opt, main])
@pytest.mark.parametrize(
    "line", [*LINES, (*AWRQ, "--smooth", "--min", "0.1"), (*AWRQ, "--smooth", "--min", "0.01"), (*AWRQ, "--act_bits", "16")], ids=" ".join
)
def test_the_settings_on_a_card_are_its_recipe(script, line, tmp_path):
    """Also where a setting is the default of recipes, and that of the scripts is another."""
    recipe, path = run_of("MODEL", "--eval", "own", *line, script=script).recipe, tmp_path / "card.yaml"
    path.write_text(settings_yaml(recipe))
    assert run_of("MODEL", "--eval", "own", "--recipe", path, script=script).recipe == recipe


def test_the_same_codes_again(cli, tiny_opt, corpora, tmp_path):
    text = ("--data_dir", corpora, "--device", "cpu", "--eval", "own")
    settings = ("--smooth", "--calib_data", "own", "--nsamples", 3, "--seqlen", 16)
    path = tmp_path / "run.json"
    assert cli(tiny_opt, *AWRQ, *settings, *text, "--save", tmp_path / "a", "--output_path", path)[0] == 0
    status, out, err = cli("--recipe", path, *text, "--save", tmp_path / "b")
    assert status == 0 and "taken as it is" in out, err
    for file in (tmp_path / "a").glob("*.safetensors"):
        mine, again = load_file(file), load_file(tmp_path / "b" / file.name)
        assert all(tensor.equal(again[name]) for name, tensor in mine.items())


def test_flags_override_and_what_changes_is_said(tmp_path):
    path = report_of(run_of("MODEL", "--seqlen", 64, *PLUS), tmp_path / "run.json")
    run = run_of("OTHER", "--recipe", path, "--wbits", 4, "--no-rotate")
    assert run.recipe.wbits == 4 and not run.recipe.rotate and run.recipe.percdamp == PRESETS["plus"]["percdamp"]
    assert run.notes == (f"--recipe {path}: changed: wbits 3 -> 4, rotate True -> False, model M -> OTHER",)
    run = run_of("M", "--recipe", path, "--method", "rtn")
    assert run.recipe == run_of("M", *PLUS, "--method", "rtn").recipe and "percdamp 0.03 -> 0.01" in run.notes[0]


def test_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: gptq\nwbits: 3\npreset: plus\nact_bits: 6\nalpha: 1\npercdamp: 0.02\nsmooth_search: false\n")
    recipe = run_of("MODEL", "--recipe", path, "--seed", 1).recipe
    expected = ("--method", "gptq", "--act_quant", "--wbits", 3, "--preset", "plus", "--act_bits", 6, "--alpha", 1)
    assert recipe == run_of("MODEL", *expected, "--percdamp", 0.02, "--no-smooth_search", "--seed", 1).recipe
    path.write_text(yaml.safe_dump({"method": "awrq", "wbits": 4}))
    assert run_of("MODEL", "--recipe", path).recipe == run_of("MODEL", *AWRQ).recipe


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wbit: 4", ["wbit is no setting", "wbits"]),
        ("wbits: four", ["wbits is 'four'", "whole number"]),
        ("wbits: true", ["wbits is True", "whole number"]),
        ("percdamp: 1e-2", ["percdamp is '1e-2'", "1.0e-2"]),
        ("smooth: 1", ["smooth is 1", "true or false"]),
        ("method: magic", ["method magic", "awrq"]),
        ("preset: finest", ["preset finest", "plus"]),
        ("- wbits", ["no settings"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_what_is_no_recipe(text, parts, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as e:
        run_of("MODEL", "--recipe", path)
    assert all(part in str(e.value) for part in parts), e.value
    (tmp_path / "wrong.json").write_text("{")
    for wrong, part in ((tmp_path / "wrong.json", "is not JSON"), (tmp_path / "nowhere", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(UsageError, match=part):
            run_of("MODEL", "--recipe", wrong)
    with pytest.raises(UsageError, match="--preset paper does not go with --recipe"):
        run_of("MODEL", "--recipe", path, "--preset", "paper")
    with pytest.raises(UsageError, match="--recipe does not go with --load"):
        path.write_text("wbits: 4")
        run_of("--load", "x", "--recipe", path)


def test_the_model_may_come_from_the_command_line_alone():
    assert command_line.parse(command_line.make_parser(*opt.main.args, **opt.main.keywords), ["MODEL"]).notes == ()
