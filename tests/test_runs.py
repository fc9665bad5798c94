"""opt.py as a user runs it: flags do what their help says, the paper's commands run as they stand, bad input is one line and exit 2."""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, WORDS, messages, save_model, tiny_model, toy_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import PUBLISHED

import opt
from formats import checkpoint
from formats.original import Original
from recipe import METHODS, PRESETS, UsageError
from run import cli as command_line
from run import pipeline
from run.report import SCHEMA

pytestmark = pytest.mark.slow

SCRIPT = Path(opt.__file__)


@pytest.fixture
def cli(run_script):
    """run(*arguments) of opt.py, as run_script."""
    return partial(run_script, opt)


@pytest.fixture
def json_of(cli, tiny_opt, corpora, tmp_path):
    """json_of(*arguments) -> the results of a run on the tiny model and the corpus `own`, where the arguments do not say otherwise."""

    def run(*arguments):
        path = tmp_path / "run.json"
        defaults = ("--data_dir", corpora, "--calib_data", "own", "--eval", "own", "--nsamples", 3, "--seqlen", 16, "--device", "cpu")
        status, out, err = cli(tiny_opt, *defaults, *arguments, "--output_path", path)
        assert status == 0 and not [line for line in err if not line.endswith(CUT)], err
        run = json.loads(path.read_text())
        path.unlink()
        return run | {"out": out}

    return run


# ---------------------------------------------------------------------------
# Runs

AWRQ = ("--method", "awrq", "--wbits", "4")
GROUPED = (*AWRQ, "--groupsize", "12")
SMOOTH = (*AWRQ, "--smooth")
CUT = "longer than the model's context, 64 tokens; their start is cut off"  # as are the demo's stories, for a tiny model
STREAM = (*AWRQ, "--target", "stream")
TASK = ("--tasks", SCRIPT.parent / "demo/tasks/world_why.yaml", "--limit", "4")


def numbers(run):
    return run["layers"], run["results"]


@pytest.fixture(scope="module")
def known():
    """The numbers of the runs without a flag, by their arguments."""
    return {}


# flag: the arguments with it, what the JSON must then say, and the arguments of a run whose numbers differ (None: need not)
FLAGS = {
    "--method": (("--method", "rtn", "--wbits", "4"), ("recipe", "method", "rtn"), AWRQ),
    "--wbits": (("--method", "awrq", "--wbits", "3"), ("recipe", "wbits", 3), AWRQ),
    "--act_bits": ((*AWRQ, "--act_bits", "5"), ("recipe", "act_bits", 5), AWRQ),
    "--act_quant": (
        ("--method", "gptq", "--wbits", "4", "--act_quant"),
        ("recipe", "act_bits", 8),
        ("--method", "gptq", "--wbits", "4"),
    ),
    "--act_pertoken": ((*AWRQ, "--act_pertoken"), ("recipe", "act_pertoken", True), AWRQ),
    "--act_sym": ((*AWRQ, "--act_sym"), ("recipe", "act_sym", True), AWRQ),
    "--rest_dtype": ((*AWRQ, "--rest_dtype", "bfloat16"), ("recipe", "rest_dtype", "bfloat16"), AWRQ),
    "--rotate": ((*AWRQ, "--rotate"), ("recipe", "rotate", True), AWRQ),
    "--groupsize": (GROUPED, ("recipe", "groupsize", 12), AWRQ),
    "--sym": ((*AWRQ, "--sym"), ("recipe", "sym", True), AWRQ),
    "--smooth": (SMOOTH, ("recipe", "smooth", True), AWRQ),
    "--alpha": ((*SMOOTH, "--alpha", "0.8"), ("recipe", "alpha", 0.8), SMOOTH),
    "--min": ((*SMOOTH, "--min", "3.5"), ("recipe", "min", 3.5), SMOOTH),
    "--percdamp": ((*AWRQ, "--percdamp", "0.5"), ("recipe", "percdamp", 0.5), AWRQ),
    "--blocksize": ((*AWRQ, "--blocksize", "8"), ("recipe", "blocksize", 8), AWRQ),
    "--beam": ((*AWRQ, "--beam", "4"), ("recipe", "beam", 4), AWRQ),
    "--actorder": ((*GROUPED, "--actorder"), ("recipe", "actorder", True), GROUPED),
    "--true-sequential": ((*AWRQ, "--true-sequential"), ("recipe", "true_sequential", True), AWRQ),
    "--guided": ((*AWRQ, "--guided"), ("recipe", "guided", True), AWRQ),
    "--grid": ((*AWRQ, "--grid", "reformulated"), ("recipe", "grid", "reformulated"), AWRQ),
    "--clip": ((*AWRQ, "--clip", "hessian"), ("recipe", "clip", "hessian"), (*AWRQ, "--clip", "mse")),
    "--target": ((*AWRQ, "--target", "stream"), ("recipe", "target", "stream"), AWRQ),
    "--target_mix": ((*STREAM, "--target_mix", "0.9"), ("recipe", "target_mix", 0.9), STREAM),
    "--bias_correction": ((*AWRQ, "--bias_correction"), ("recipe", "bias_correction", True), AWRQ),
    "--tune_steps": ((*AWRQ, "--tune_steps", "3"), ("recipe", "tune_steps", 3), AWRQ),
    "--smooth_search": ((*SMOOTH, "--smooth_search"), ("recipe", "smooth_search", True), SMOOTH),
    "--preset": ((*AWRQ, "--preset", "plus"), ("recipe", "clip", PRESETS["plus"]["clip"]), AWRQ),
    "--calib_data": ((*AWRQ, "--calib_data", "ptb"), ("protocol", "calibration", "corpus", "ptb"), AWRQ),
    "--nsamples": ((*AWRQ, "--nsamples", "5"), ("protocol", "calibration", "nsamples", 5), AWRQ),
    "--seqlen": ((*AWRQ, "--seqlen", "20"), ("protocol", "calibration", "seqlen", 20), AWRQ),
    "--seed": ((*AWRQ, "--seed", "1"), ("protocol", "calibration", "seed", 1), AWRQ),
    "--data_dir": (("--eval", "ptb"), ("protocol", "evaluation", "ptb", "split", "validation"), None),
    "--text_field": (("--eval", "fields", "--text_field", "body"), ("results", "perplexity", "fields", "seqlen", 16), None),
    "--device": (("--device", "cpu"), ("hardware", "device", "cpu"), None),
    "--dtype": ((*AWRQ, "--dtype", "bfloat16"), ("protocol", "dtype", "bfloat16"), AWRQ),
    "--walk_batch": ((*AWRQ, "--walk_batch", "2"), ("protocol", "walk_batch", 2), None),
    "--output_path": (("--method", "full"), ("schema", SCHEMA), None),
    "--eval": (("--eval", "wikitext2"), ("results", "perplexity", "wikitext2", "seqlen", 16), None),
    "--eval_windows": (("--eval_windows", "2"), ("results", "perplexity", "own", "windows", 2), ()),
    "--new-eval": (("--eval", "ptb", "--new-eval"), ("results", "perplexity", "ptb-new", "seqlen", 16), None),
    "--tasks": (TASK, ("results", "tasks", "n-samples", "world_why", "effective", 4), None),
    "--limit": ((*TASK, "--limit", "3"), ("results", "tasks", "n-samples", "world_why", "effective", 3), None),
    "--num_fewshot": ((*TASK, "--num_fewshot", "0"), ("results", "tasks", "n-shot", "world_why", 0), None),
    "--batch_size": ((*TASK, "--batch_size", "2"), ("results", "tasks", "config", "batch_size", 2), None),
    "--system_instruction": (
        (*TASK, "--system_instruction", "Tell a story."),
        ("protocol", "tasks", "world_why", "system_instruction", "Tell a story."),
        TASK,
    ),
    "--compare_full": ((*AWRQ, "--compare_full"), ("full", "perplexity", "own", "seqlen", 16), None),
}
BY_THEMSELVES = {"--table_results", "--skip_missing", "--apply_chat_template", "--fewshot_as_multiturn"}
BY_THEMSELVES |= {"--save", "--load", "--export", "--checkpoint_dir", "--kernel", "--benchmark", "--benchmark_prefill", "--check"}
BY_THEMSELVES |= {"--recipe", "--gguf_like", "--push_to_hub", "--arithmetic"}


def test_every_flag_has_help_and_a_test():
    parser = command_line.make_parser(*opt.main.args, **opt.main.keywords)
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    for action in actions:
        assert action.help and len(action.help) > 10, action
    assert {action.option_strings[0] for action in actions if action.option_strings} == set(FLAGS) | BY_THEMSELVES
    switches = {option for action in actions for option in action.option_strings[1:]}
    on = {f"--no-{flag.replace('true_', 'true-')}" for flag, value in PRESETS["plus"].items() if value is True}
    assert on <= switches, "what a preset switches on can be switched off"


def test_help(cli):
    status, out, err = cli("--help")
    assert status == 0 and not err
    assert all(flag in out for flag in FLAGS) and "python opt.py facebook/opt-125m" in out


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_does_what_it_says(flag, json_of, known):
    arguments, (*path, expected), other = FLAGS[flag]
    run = value = json_of(*arguments)
    for key in path:
        value = value[key]
    assert value == expected
    if other is not None:
        known[other] = known.get(other) or numbers(json_of(*other))
        assert numbers(run) != known[other]


def test_tuning_has_other_sequences_than_the_codes(json_of, monkeypatch, tmp_path):
    given = {}

    def noting(name, place):
        function = getattr(pipeline, name)

        def call(*args):
            given[name] = args[place]
            return function(*args)

        monkeypatch.setattr(pipeline, name, call)

    for name in ("quantize_blocks", "tune", "run_identity"):
        noting(name, 1)
    plain = json_of(*AWRQ, "--checkpoint_dir", tmp_path / "plain")
    fitted = given["quantize_blocks"]
    tuned = json_of(*AWRQ, "--checkpoint_dir", tmp_path / "tuned", "--tune_steps", 4)
    assert given["quantize_blocks"].equal(fitted) and tuned["layers"] == plain["layers"]
    assert given["tune"].shape == (8, 16) and not (given["tune"][:, None] == fitted).all(-1).any()
    assert given["run_identity"].equal(torch.cat([fitted, given["tune"]])), "a killed run goes on with both"
    used = [run["protocol"]["calibration"] for run in (plain, tuned)]
    assert used[1] == used[0] | {"tune_samples": 8} and "tune_samples" not in used[0]
    assert "own train, seed 0, tuned on 8 more" in tuned["out"] and "tuned on" not in plain["out"]


def test_the_same_command_gives_the_same_numbers(json_of):
    assert numbers(json_of(*SMOOTH)) == numbers(json_of(*SMOOTH))


def test_walk_batch_changes_no_result(json_of):
    one, four = (json_of(*SMOOTH, "--walk_batch", n) for n in (1, 4))
    ppls = [run["results"]["perplexity"]["own"]["ppl"] for run in (one, four)]
    assert ppls[0] == pytest.approx(ppls[1], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_reports(json_of, method):
    row = METHODS[method]
    run = json_of("--method", method, *(["--wbits", "4"] if row.weights else []))
    layers = [(layer["block"], layer["name"]) for layer in run["layers"]]
    assert len(layers) == len(set(layers)) == (0 if method == "full" else 12)
    assert all(0 < layer["error"] < 1 for layer in run["layers"])
    assert run["results"]["perplexity"]["own"]["ppl"] > 1
    assert run["model_type"] == "opt" and run["results"]["tasks"] == {}
    assert (run["protocol"]["calibration"] is None) == (method == "full")
    ppl = run["results"]["perplexity"]["own"]
    assert re.search(rf"^\| own +\|[^|]+\| +{ppl['ppl']:.4f} \| +{ppl['windows']} \| +16 \|$", run["out"], re.MULTILINE), run["out"]
    assert "seconds: " in run["out"] and "peak memory: host" in run["out"]
    assert ("block 1: output errors" in run["out"]) == (method != "full")
    expected = {"evaluation", "loading"}
    if method != "full":
        expected |= {"calibration", "capture", "propagation", "statistics", "writing"}
        expected |= {"solving"} if row.weights else set()
        expected |= {"smoothing"} if row.smooth[0] else set()
    assert set(run["seconds"]) == expected


def test_tasks_as_a_table_or_as_json(json_of):
    assert re.search(r"^\| world_why +\| +0 \| +acc \|", json_of(*TASK, "--table_results")["out"], re.MULTILINE)
    assert '"world_why": {' in json_of(*TASK)["out"]


@pytest.mark.xdist_group("index of tasks")
def test_a_task_whose_data_is_missing(cli, tiny_opt, corpora):
    arguments = (tiny_opt, "--data_dir", corpora, "--eval", "", "--tasks", f"storycloze,{TASK[1]}", *TASK[2:])
    status, _, err = cli(*arguments)
    assert status == 2 and "storycloze_2018" in err[-1] and "--data_dir" in err[-1], err
    status, out, err = cli(*arguments, "--skip_missing", "--table_results")
    assert status == 0 and "| world_why" in out and any("skipped: storycloze_2018" in line for line in err), err


def test_the_commit_is_that_at_the_start(json_of, monkeypatch, tmp_path):
    """A checkout that moves while a run works changes nothing that the run does."""
    commits = iter(["first", *["later"] * 9])
    for module in (pipeline, checkpoint):
        monkeypatch.setattr(module, "commit", lambda: next(commits))
    assert json_of(*AWRQ, "--save", tmp_path / "saved")["commit"] == "first"
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]["commit"] == "first"


def test_what_is_saved_is_loaded_and_exported(json_of, cli, tiny_opt, corpora, tmp_path):
    saved, exported, blocks = tmp_path / "saved", tmp_path / "exported", tmp_path / "blocks"
    run = json_of(*SMOOTH, "--save", saved, "--export", "compressed-tensors", exported, "--checkpoint_dir", blocks)
    assert "in FP16" in run["out"] and (exported / "config.json").is_file()
    again = json_of(*SMOOTH, "--checkpoint_dir", blocks)
    assert numbers(again) == numbers(run), "all blocks are there already"
    path = tmp_path / "loaded.json"
    common = ("--load", saved, "--data_dir", corpora, "--eval", "own", "--seqlen", 16)
    status, out, err = cli(*common, "--kernel", "torch", "--benchmark", 12, "--check", "--output_path", path)
    assert status == 0 and not err and "kernel: torch" in out and "per token" in out, (out, err)
    ppl = [result["results"]["perplexity"]["own"]["ppl"] for result in (run, json.loads(path.read_text()))]
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-3)
    assert cli(*common[:-1], 32, "--output_path", path)[0] == 0
    longer = json.loads(path.read_text())
    assert longer["recipe"] == run["recipe"] and longer["protocol"]["calibration"] == run["protocol"]["calibration"], "of the quantization"
    assert longer["protocol"]["evaluation"]["own"]["seqlen"] == longer["results"]["perplexity"]["own"]["seqlen"] == 32
    assert cli(tiny_opt, *common, "--compare_full", "--benchmark", 12, "--benchmark_prefill", 20, "--output_path", path)[0] == 0
    both = json.loads(path.read_text())
    for part, tokens in (("benchmark", 12), ("prefill", 20)):
        assert both["full"][part]["tokens"] == both["results"][part]["tokens"] == tokens
    assert both["full"]["perplexity"]["own"]["ppl"] != both["results"]["perplexity"]["own"]["ppl"] == ppl[1]
    for wrong, part in (
        (("--save", tmp_path / "other"), "--save"),
        (("--wbits", 3), "--wbits"),
        (("--kernel", "cuda"), "--kernel"),
        (("--check",), "--benchmark"),
    ):
        status, _, err = cli(*common, *wrong, "--device", "cpu")
        assert status == 2 and len(err) == 1 and part in err[0], err


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_run(line, cli, tiny_opt, corpora):
    """As they stand, but for the model and what makes them short."""
    status, out, err = cli(tiny_opt, *line.split(), "--data_dir", corpora, "--nsamples", 3, "--seqlen", 16, "--device", "cpu")
    assert status == 0 and not err, err
    assert [row.split("|")[1].strip() for row in out.splitlines() if row.startswith("| ")] == ["corpus", "wikitext2", "ptb", "c4"]


def test_new_eval_is_a_shorthand(json_of):
    assert set(json_of("--eval", "wikitext2,ptb,c4", "--new-eval")["results"]["perplexity"]) == {"wikitext2", "ptb-new", "c4-new"}
    both = json_of("--eval", "ptb,c4-new,own,ptb")
    assert list(both["results"]["perplexity"]) == ["ptb", "c4-new", "own"]
    for name, how in both["protocol"]["evaluation"].items():
        assert {"corpus", "split", "rule", "source", "seqlen", "n_tokens"} <= set(how), name


def test_the_context_is_the_default_seqlen(cli, tiny_opt, corpora, tmp_path):
    path = tmp_path / "new" / "folder" / "run.json"
    status, _, err = cli(tiny_opt, "--data_dir", corpora, "--eval", "own", "--output_path", path)
    assert status == 0, err
    run = json.loads(path.read_text())
    assert run["results"]["perplexity"]["own"]["seqlen"] == run["recipe"]["seqlen"] == CONTEXT
    assert run["recipe"]["method"] == "full" and run["layers"] == []


def test_a_dead_input_is_a_warning_and_the_run_goes_on(cli, tmp_path, corpora):
    model = tiny_model()
    with torch.no_grad():
        for p in model.model.decoder.layers[1].final_layer_norm.parameters():
            p.zero_()
    folder = save_model(tmp_path / "dead", model)
    status, out, err = cli(folder, *AWRQ, "--data_dir", corpora, "--calib_data", "own", "--eval", "own", "--nsamples", 3, "--seqlen", 16)
    assert status == 0 and "| own" in out
    assert len(err) == 1 and err[0].startswith("warning: block 1 fc1"), err


@pytest.mark.parametrize("arguments", [("--save", "new"), ("--export", "compressed-tensors", "new"), ("--checkpoint_dir", "new")], ids=str)
def test_quantizing_alone_is_a_whole_job(cli, tiny_opt, corpora, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    short = ("--data_dir", corpora, "--calib_data", "own", "--eval", "", "--nsamples", 3, "--seqlen", 16, "--device", "cpu")
    status, out, err = cli(tiny_opt, *AWRQ, *short, *arguments)
    assert status == 0 and not err and "| own" not in out and list((tmp_path / "new").iterdir())


# ---------------------------------------------------------------------------
# Bad input


@pytest.fixture
def refused(cli, tiny_opt, corpora, tmp_path, monkeypatch):
    """refused(parts, *arguments, model=, loads=): one line with every part, exit status 2, nothing written; before weights are read."""

    def run(parts, *arguments, model=tiny_opt, loads=False):
        if not loads:
            monkeypatch.setattr(Original, "read", lambda *_: pytest.fail("weights are read first"))
        folder = tmp_path / "results"
        folder.mkdir()
        defaults = ("--data_dir", corpora, "--calib_data", "own", "--eval", "own", "--nsamples", 3, "--seqlen", 16)
        status, out, err = cli(model, *defaults, "--output_path", folder / "run.json", *arguments)
        assert status == 2
        assert len(err) == 1, err
        assert err[0].startswith("opt.py: error: ") and all(str(part) in err[0] for part in parts), err
        assert not re.search(r"^\|", out, re.MULTILINE), "a table of results"
        assert not list(folder.iterdir()), "half-written"

    return run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--method", "magic"), ["--method", "magic", "awrq"]),
        (("--wbits", "four", "--method", "rtn"), ["--wbits", "four"]),
        ((*AWRQ, "--wbits", "1"), ["--wbits 1", "2 to 8"]),
        ((*AWRQ, "--wbits", "9"), ["--wbits 9", "2 to 8"]),
        ((*AWRQ, "--wbits", "16"), ["--wbits", "awrq"]),
        (("--method", "rtn"), ["--wbits", "rtn"]),
        ((*AWRQ, "--act_bits", "3"), ["--act_bits 3", "4 to 8"]),
        ((*AWRQ, "--act_bits", "9"), ["--act_bits 9", "4 to 8"]),
        (("--rotate",), ["--rotate", "full"]),
        (("--act_sym",), ["--act_sym", "full"]),
        (("--method", "gptq", "--wbits", "4", "--act_sym"), ["--act_sym", "gptq", "--act_quant"]),
        ((*AWRQ, "--groupsize", "0"), ["--groupsize 0"]),
        ((*AWRQ, "--groupsize", "-2"), ["--groupsize -2"]),
        ((*AWRQ, "--blocksize", "0"), ["--blocksize 0"]),
        ((*SMOOTH, "--alpha", "1.5"), ["--alpha 1.5", "0 and 1"]),
        ((*SMOOTH, "--alpha", "-0.5"), ["--alpha -0.5", "0 and 1"]),
        ((*SMOOTH, "--alpha", "nan"), ["--alpha nan"]),
        ((*SMOOTH, "--min", "0"), ["--min 0", "positive"]),
        ((*SMOOTH, "--min", "-1"), ["--min -1", "positive"]),
        ((*AWRQ, "--percdamp", "-0.1"), ["--percdamp -0.1"]),
        ((*AWRQ, "--clip", "some"), ["--clip", "some", "hessian"]),
        ((*AWRQ, "--grid", "any"), ["--grid", "any", "reformulated"]),
        ((*AWRQ, "--target", "moon"), ["--target", "moon", "stream"]),
        ((*AWRQ, "--target", "residual"), ["--target residual", "--true-sequential"]),
        ((*AWRQ, "--target", "residual", "--true-sequential", "--target_mix", "0.5"), ["--target_mix 0.5", "--target stream"]),
        ((*STREAM, "--target_mix", "1.5"), ["--target_mix 1.5", "between 0"]),
        ((*AWRQ, "--target_mix", "0.3"), ["--target_mix 0.3", "--target stream"]),
        ((*AWRQ, "--preset", "finest"), ["--preset", "finest", "plus"]),
        (("--method", "rtn", "--wbits", "4", "--preset", "plus", "--no-actorder"), ["--no-actorder", "rtn"]),
        ((*AWRQ, "--nsamples", "0"), ["--nsamples 0"]),
        ((*AWRQ, "--tune_steps", "-1"), ["--tune_steps -1"]),
        (("--method", "act_only", "--tune_steps", "3"), ["--tune_steps 3", "act_only"]),
        ((*AWRQ, "--seed", "-1"), ["--seed -1"]),
        (("--seqlen", "1"), ["--seqlen 1"]),
        (("--seqlen", CONTEXT + 1), [f"--seqlen {CONTEXT + 1}", f"{CONTEXT} tokens"]),
        (("--walk_batch", "0"), ["--walk_batch", "0"]),
        (("--walk_batch", "x"), ["--walk_batch", "x"]),
        (("--method", "rtn", "--wbits", "4", "--smooth"), ["--smooth", "rtn"]),
        (("--method", "gptq", "--wbits", "4", "--act_bits", "6"), ["--act_bits 6", "gptq", "--act_quant"]),
        (("--eval_windows", "0"), ["--eval_windows", "0"]),
        (("--eval_windows", "3:3"), ["--eval_windows", "3:3"]),
        (("--eval_windows", "a:b"), ["--eval_windows", "a:b"]),
        (("--eval_windows", "0:100000"), ["--eval_windows 0:100000", "own", "windows of 16"]),
        (("--eval", "nowhere"), ["nowhere", "wikitext2", "own"]),
        (("--eval", ","), ["nothing to evaluate", "--eval"]),
        ((*AWRQ, "--calib_data", "nowhere"), ["nowhere", "c4", "own"]),
        ((*AWRQ, "--calib_data", "ptb-new"), ["ptb-new", "evaluation"]),
        (("--data_dir", "/no/such/folder"), ["--data_dir", "/no/such/folder"]),
        (("--eval", "short"), ["short", "tokens", "seqlen 16"]),
        ((*AWRQ, "--calib_data", "short"), ["short", "tokens", "seqlen 16"]),
        ((*AWRQ, "--nsamples", "100000"), ["own", "100000"]),
        (
            (*AWRQ, "--calib_data", "short", "--seqlen", "4", "--nsamples", "1", "--tune_steps", "9"),
            ["short", "1 needed and 18 more for --tune_steps"],
        ),
        ((*AWRQ, "--calib_data", "one", "--eval", "one"), ["one", "share", "validation"]),
        ((*AWRQ, "--calib_data", "c4", "--nsamples", "100000"), ["c4", "100000"]),
        (("--device", "cuda" if not torch.cuda.is_available() else "cuda:99"), ["--device", "cuda", "cpu"]),
        (("--device", "abacus"), ["--device", "abacus", "cpu"]),
        (("--dtype", "float8"), ["--dtype", "float8", "bfloat16"]),
    ],
    ids=lambda x: " ".join(map(str, x[-2:])) if isinstance(x, tuple) else "",
)
def test_a_bad_setting(refused, arguments, parts):
    refused(parts, *arguments)


@pytest.mark.parametrize(("flags", "parts"), [("--rotate", []), ("--target residual --true-sequential", ["--target stream"])])
def test_a_model_whose_blocks_do_not_add_to_the_stream_as_it_is(refused, flags, parts, tmp_path):
    model = save_model(tmp_path / "model", tiny_model("opt", "post-norm"))
    refused([flags.removesuffix(" --true-sequential"), "residual sum", *parts], *AWRQ, *flags.split(), model=model)


def test_windows_are_counted_from_the_first(json_of):
    """Of any two parts of a text the mean of the losses is that of the whole."""
    losses = [math.log(json_of("--eval_windows", part)["results"]["perplexity"]["own"]["ppl"]) for part in ("0:2", "2:4", "4")]
    assert sum(losses[:2]) / 2 == pytest.approx(losses[2], rel=1e-6)


def test_what_was_rotated_is_compared_with_the_original(cli, tiny_opt, corpora, tmp_path):
    """Its head is its own now, the original's is the embedding; that makes it no other model."""
    text = ("--data_dir", corpora, "--eval", "own", "--seqlen", 16, "--device", "cpu")
    status, out, _ = cli(tiny_opt, *text, *AWRQ, "--rotate", "--calib_data", "own", "--nsamples", 3, "--save", tmp_path / "saved")
    assert status == 0 and "tied to the embedding before" in out
    status, out, err = cli(tiny_opt, *text, "--load", tmp_path / "saved", "--compare_full")
    assert status == 0 and "full" in out, err


def test_an_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["--output_path", tmp_path / "file"], "--output_path", tmp_path / "file" / "run.json")


def test_an_output_that_is_a_folder(refused, tmp_path):
    refused(["--output_path", tmp_path, "folder"], "--output_path", tmp_path)


@pytest.fixture
def folder(tiny_opt, tmp_path):
    """A copy of the tiny model to spoil."""
    return shutil.copytree(tiny_opt, tmp_path / "opt")


def test_not_an_opt_model(refused, folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    refused([folder, "llama", "opt"], model=folder)


def test_no_model_folder(refused, tmp_path):
    refused([tmp_path / "nowhere", "no model"], model=tmp_path / "nowhere")


def test_no_weights(refused, folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("run.pipeline.load_text", lambda *_: pytest.fail("text is tokenized first"))
    refused([folder, "safetensors"], model=folder)


def test_no_tokenizer(refused, folder, monkeypatch):
    monkeypatch.setattr("run.pipeline.load_text", lambda *_: pytest.fail("text is tokenized first"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused([folder, "tokenizer"], model=folder)


def test_a_tokenizer_of_another_model(refused, folder):
    toy_tokenizer(["<unk>", *(f"filler{i}" for i in range(len(WORDS))), *WORDS[4:]]).save_pretrained(folder)
    refused([len(WORDS), "tokenizer"], model=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused, folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.1.self_attn.k_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["NaN or Inf", "layers.1.self_attn.k_proj.weight"], model=folder, loads=True)


@pytest.mark.parametrize("arguments", [AWRQ, ("--method", "full")], ids=["quantizing", "evaluating"])
def test_activations_that_are_not_finite(refused, folder, arguments):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["block 1", "fc1", "NaN or Inf"], *arguments, model=folder, loads=True)


# ---------------------------------------------------------------------------
# In a process of its own


def user(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=240)


def test_a_run_from_another_folder(tiny_opt, corpora, tmp_path):
    short = ("--data_dir", corpora, "--calib_data", "own", "--eval", "own", "--nsamples", 3, "--seqlen", 16, "--device", "cpu")
    run = user(tiny_opt, *SMOOTH, *short, "--output_path", tmp_path / "run.json")
    assert run.returncode == 0 and not messages(run.stderr), run.stderr
    assert "| own" in run.stdout and "quantizing (awrq)" in run.stderr
    keys = "schema model model_type recipe protocol results full layers tuning failed complete seconds peak_bytes versions commit hardware"
    assert set(json.loads((tmp_path / "run.json").read_text())) == set(keys.split())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_error(tmp_path):
    run = user(tmp_path / "nowhere", "--method", "awrq", "--wbits", "4")
    assert run.returncode == 2 and not run.stdout
    assert len(messages(run.stderr)) == 1 and str(tmp_path / "nowhere") in run.stderr, run.stderr


def test_room_for_tuning_is_found_before_quantizing(refused, monkeypatch):
    def full(config, dtype, tokens, device, streams):
        raise UsageError(f"no room for {tokens} tokens")

    monkeypatch.setattr("run.tune.sequences_place", full)
    refused(["no room for 128 tokens"], *AWRQ, "--tune_steps", "4")
