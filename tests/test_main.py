"""main.py as a user runs it: what the paper's commands mean, tasks and text in one run, and bad input of its own."""

import json
import sys
from functools import partial

import pytest
from conftest import recipe_of, save_model, tiny_model, toy_tokenizer
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from test_runs import CUT, TASK
from transformers import AutoConfig

import main
import opt
from families import FAMILIES
from run import cli

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("index of tasks")]  # one process: what they share takes seconds to make

# The LLaMA commands of the paper's repository (zero_shot/run_llama.sh in the forms that its README has), and what each must mean.
TASKS = "--tasks piqa,arc_easy,arc_challenge,boolq,copa,storycloze --table_results"
PAPER = "--calib_data c4 " + TASKS + " --wbits 4 --act_bits 8 --groupsize -1"
PUBLISHED = {
    f"--calib_data c4 {TASKS} --method full": (16, 16, False),
    f"{PAPER} --blocksize 1 --method awrq --smooth --alpha 0.50 --min 0.01": (4, 8, True),
    f"{PAPER} --blocksize 1 --method awrq": (4, 8, False),
    f"{PAPER} --method smoothquant --alpha 0.50 --min 0.01": (4, 8, True),
    f"{PAPER} --method rtn": (4, 8, False),
    f"--calib_data c4 {TASKS} --wbits 4 --groupsize -1 --blocksize 1 --method gptq --smooth --alpha 0.50 --min 0.01": (4, 16, True),
    f"--calib_data c4 {TASKS} --wbits 4 --groupsize -1 --blocksize 1 --method gptq": (4, 16, False),
    f"--calib_data c4 {TASKS} --act_bits 8 --method act_only --smooth --alpha 0.50 --min 0.01": (16, 8, True),
    f"--calib_data c4 {TASKS} --act_bits 8 --method act_only": (16, 8, False),
}


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_mean_what_they_meant(line):
    recipe = recipe_of(main, line, 4096)
    assert (recipe.wbits, recipe.act_bits, recipe.smooth) == PUBLISHED[line]
    assert (recipe.alpha, recipe.min, recipe.nsamples, recipe.seqlen) == (0.5, 0.01, 128, 2048)
    asked = cli.parse(cli.make_parser(*main.main.args, **main.main.keywords), ["MODEL", *line.split()])
    assert asked.corpora == () and asked.table_results and asked.batch_size == 1 and asked.tasks[-1] == "storycloze"
    assert recipe.method == line.split("--method ")[1].split()[0]


def test_the_scripts_differ_by_family_and_defaults_only():
    parsers = {module: cli.make_parser(*module.main.args, **module.main.keywords) for module in (main, opt)}
    flags = {module: {a.dest: (a.option_strings, a.default) for a in parser._actions} for module, parser in parsers.items()}
    assert {name for name in flags[opt] if flags[main].get(name) != flags[opt][name]} == {"min", "eval"}
    assert flags[main].keys() == flags[opt].keys()
    assert {family.script for family in FAMILIES.values()} == {"main.py", "opt.py"}
    assert "0.1" in parsers[main].format_help() and "0.01" in parsers[main].format_help()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny") / "llama", tiny_model("llama", "grouped"))


@pytest.fixture
def run(run_script):
    """run(*arguments) of main.py, as run_script."""
    return partial(run_script, main)


SHORT = ("--calib_data", "own", "--nsamples", 3, "--seqlen", 16, "--device", "cpu")


def test_tasks_and_text_of_both_models_in_one_run(run, tiny_llama, corpora, tmp_path):
    path = tmp_path / "run.json"
    awrq = ("--method", "awrq", "--wbits", 4, "--smooth", "--compare_full", "--table_results", "--batch_size", 4)
    status, out, err = run(tiny_llama, "--data_dir", corpora, *SHORT, *TASK, "--eval", "own", *awrq, "--output_path", path)
    assert status == 0 and len(err) == 2 and all(line.endswith(CUT) for line in err), err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
    result = json.loads(path.read_text())
    assert result["recipe"]["min"] == 0.01 and result["model_type"] == "llama"
    for label, numbers in (("full", result["full"]), ("awrq W4A8 + smoothing, min 0.01", result["results"])):
        ppl = numbers["perplexity"]["own"]["ppl"]
        found = numbers["tasks"]["results"]["world_why"]
        assert ["own", label, f"{ppl:.4f}"] in [row[:3] for row in rows], rows
        assert ["world_why", "0", "acc", label, f"{found['acc,none']:.4f}", f"{found['acc_stderr,none']:.4f}"] in rows, rows
        assert ["average", "", "acc", label] in [row[:4] for row in rows]
    assert result["full"]["perplexity"] != result["results"]["perplexity"]
    tasks = result["results"]["tasks"]
    (row,) = (row for row in rows if row[0] == "average" and row[3] == "awrq W4A8 + smoothing, min 0.01 - full")
    ours, full = (numbers["tasks"]["results"]["world_why"]["acc,none"] for numbers in (result["results"], result["full"]))
    assert float(row[4]) == pytest.approx(ours - full, abs=1e-4) and 0 <= float(row[5]) < 1
    assert {"results", "versions", "configs", "n-shot", "n-samples", "lm_eval_version"} <= tasks.keys()
    assert result["protocol"]["tasks"]["world_why"]["split"] == "test" and result["seconds"]["tasks"] > 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ["nothing to evaluate", "--tasks", "--eval"]),
        (("--tasks", "nowhere.yaml"), ["nowhere.yaml", "no such file"]),
        ((*TASK, "--num_fewshot", "-1"), ["--num_fewshot", "-1"]),
        ((*TASK, "--num_fewshot", "few"), ["--num_fewshot", "few"]),
        ((*TASK, "--batch_size", "0"), ["--batch_size", "0"]),
        ((*TASK, "--batch_size", "large"), ["--batch_size", "large"]),
        ((*TASK, "--limit", "0"), ["--limit", "0", "share"]),
        ((*TASK, "--limit", "2.5"), ["--limit", "2.5", "share"]),
        ((*TASK, "--compare_full"), ["--compare_full", "full"]),
        (("--tasks", "coppa"), ["unknown task 'coppa'", "copa"]),
        (("--tasks", "copa"), ["copa/validation.jsonl", "--data_dir"]),
        (("--tasks", "piq?"), ["piqa/validation.jsonl", "--skip_missing"]),
        (("--tasks", ",,"), ["nothing to evaluate", "--tasks"]),
    ],
    ids=lambda x: " ".join(map(str, x[-2:])) if isinstance(x, tuple) else "",
)
def test_bad_input(monkeypatch, run, tiny_llama, corpora, arguments, parts):
    monkeypatch.setattr("run.pipeline.open_decoder", lambda *_: pytest.fail("the weights are opened first"))
    status, out, err = run(tiny_llama, "--data_dir", corpora, *arguments)
    assert status == 2 and len(err) == 1 and not out, (out, err)
    assert err[0].startswith("main.py: error: ") and all(str(part) in err[0] for part in parts), err


def test_the_other_scripts_model(run, tiny_opt, tiny_llama):
    status, _, err = run(tiny_opt, *TASK)
    assert status == 2 and len(err) == 1 and "opt.py" in err[0].removeprefix("main.py: error:") and str(tiny_opt) in err[0], err


def test_a_tokenizer_of_another_model(run, tiny_llama, tmp_path):
    folder = save_model(
        tmp_path / "other", tiny_model("llama", "plain"), toy_tokenizer(["<unk>", *(f"filler{i}" for i in range(120)), "Pip"])
    )
    status, _, err = run(folder, *TASK)
    assert status == 2 and len(err) == 1 and "121" in err[0] and "tokenizer" in err[0], err


def test_a_mixture_of_experts_is_refused_by_name(run, tmp_path):
    AutoConfig.for_model("mixtral", num_hidden_layers=2).save_pretrained(tmp_path)
    status, _, err = run(tmp_path, *TASK)
    assert status == 2 and len(err) == 1 and "a mixture of 8 experts, whose weights would stay unquantized" in err[0], err


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (401, "GatedRepo", ["is gated", "https://huggingface.co/meta-llama/Llama-2-7b", "hf auth login"]),
        (403, "GatedRepo", ["is gated", "ask for access"]),
        (401, "RepoNotFound", ["no model there", "private", "hf auth login"]),
    ],
    ids=["without a token", "without access", "private or not there"],
)
def test_a_model_that_the_hub_does_not_give(monkeypatch, run, status, code, parts):
    """The hub's answers, made up where its client sends its requests; the client is otherwise as it is."""
    http = sys.modules[type(default_client_factory()).__module__.partition(".")[0]]
    refusal = http.Response(status, headers={"X-Error-Code": code, "X-Error-Message": "Access to this model is restricted."})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_client_factory(lambda: http.Client(transport=http.MockTransport(lambda request: refusal)))
    try:
        exit_status, _, err = run("meta-llama/Llama-2-7b", *TASK)
    finally:
        set_client_factory(default_client_factory)
    assert exit_status == 2 and len(err) == 1 and all(part in err[0] for part in ["meta-llama/Llama-2-7b", *parts]), err
