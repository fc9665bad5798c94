"""The command line: what it asks for, from flags as they are typed, and one line, at once, for what cannot be."""

import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

import conftest
import pytest
from conftest import CONTEXT

import main
import opt
import recipe
import run.pipeline
from recipe import METHODS, Recipe, UsageError
from run import cli

ROOT = Path(__file__).parents[1]
ROUNDING = [name for name, method in METHODS.items() if method.weights]

# The OPT commands of the paper's repository (ppl/run_opt.sh), and the recipe that each must mean.
PAPER = "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --blocksize 1"
PUBLISHED = {
    "--calib_data c4 --method full": {"wbits": 16, "act_bits": 16, "smooth": False},
    f"{PAPER} --method awrq --smooth --alpha 0.50 --min 0.10": {"wbits": 4, "act_bits": 8, "smooth": True},
    f"{PAPER} --method awrq": {"wbits": 4, "act_bits": 8, "smooth": False},
    "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --method smoothquant --alpha 0.50 --min 0.10": {
        "wbits": 4,
        "act_bits": 8,
        "smooth": True,
    },
    "--calib_data c4 --wbits 4 --act_bits 8 --groupsize -1 --method rtn": {"wbits": 4, "act_bits": 8, "smooth": False},
    "--calib_data c4 --wbits 4 --groupsize -1 --blocksize 1 --method gptq --smooth --alpha 0.50 --min 0.10": {
        "wbits": 4,
        "act_bits": 16,
        "smooth": True,
    },
    "--calib_data c4 --wbits 3 --groupsize -1 --blocksize 1 --method gptq": {"wbits": 3, "act_bits": 16, "smooth": False},
    "--calib_data c4 --act_bits 8 --method act_only --smooth --alpha 0.5 --min 0.1": {"wbits": 16, "act_bits": 8, "smooth": True},
    "--calib_data c4 --act_bits 8 --method act_only": {"wbits": 16, "act_bits": 8, "smooth": False},
    "--calib_data c4 --act_bits 6 --method act_only": {"wbits": 16, "act_bits": 6, "smooth": False},
}


def run_of(*argv, script=opt):
    """The Run that a command line asks for."""
    return cli.parse(cli.make_parser(*script.main.args, **script.main.keywords), [str(argument) for argument in argv])


def recipe_of(line, context=2048):
    return conftest.recipe_of(opt, line, context)


@contextmanager
def one_line(*parts):
    with pytest.raises(UsageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_mean_what_they_meant(line):
    defaults = {"groupsize": -1, "blocksize": 1, "alpha": 0.5, "min": 0.1, "percdamp": 0.01, "seed": 0, "nsamples": 128, "seqlen": 2048}
    recipe = recipe_of(line)
    assert {key: getattr(recipe, key) for key in PUBLISHED[line] | defaults} == PUBLISHED[line] | defaults
    assert recipe.method == line.split("--method ")[1].split()[0]
    assert not (recipe.sym or recipe.actorder or recipe.act_pertoken or recipe.true_sequential)


def test_the_defaults():
    assert recipe_of("") == Recipe(method="full", wbits=16, act_bits=16, seqlen=2048)
    assert recipe_of("", context=64).seqlen == 64
    assert recipe_of("", context=4096).seqlen == 2048


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_implies(method):
    """Read from the table: activations and smoothing are as it says, and can be asked for where it allows both."""
    row, wbits = METHODS[method], " --wbits 4" if METHODS[method].weights else ""
    plain = recipe_of(f"--method {method}{wbits}")
    assert plain.smooth == row.smooth[0] and plain.act_bits == (8 if row.acts[0] else 16)
    for flag, allowed, field, value in (
        ("--smooth", row.smooth, "smooth", True),
        ("--act_quant", row.acts, "act_bits", 8),
    ):
        if True in allowed:
            assert getattr(recipe_of(f"--method {method}{wbits} {flag}"), field) == value
        else:
            with one_line(flag, method):
                recipe_of(f"--method {method}{wbits} {flag}")


@pytest.mark.parametrize("method", ROUNDING)
def test_a_method_that_rounds_weights_wants_to_know_how(method):
    for line in (f"--method {method}", f"--method {method} --wbits 16"):
        with one_line("--wbits", method):
            recipe_of(line)


def refusals():
    """Settings that a method cannot use, from the table: (command line, flag)."""
    for name, row in METHODS.items():
        start = f"--method {name}" + " --wbits 4" * bool(row.weights)
        if not row.weights:
            flags = ("--wbits 4", "--groupsize 64", "--sym", "--blocksize 8", "--clip mse", "--bias_correction")
            yield from ((f"{start} {flag}", flag) for flag in flags)
        if not row.stats:
            flags = (
                "--percdamp 0.1",
                "--beam 4",
                "--actorder",
                "--true-sequential",
                "--guided",
                "--grid reformulated",
                "--target stream",
                "--clip hessian",
            )
            yield from ((f"{start} {flag}", flag) for flag in flags)
        yield f"{start} --target_mix 0.3", "--target_mix 0.3"  # without --target stream, if it can be
        if False not in row.smooth:
            yield f"{start} --no-smooth", "--no-smooth"
        if not row.smooth[0]:  # unless it is asked for, if it can be
            yield from ((f"{start} {flag}", flag) for flag in ("--alpha 0.3", "--min 0.2", "--smooth_search"))
        if row.acts[0]:
            yield from ((f"{start} --act_bits 16 {flag}", flag) for flag in ("--act_pertoken", "--act_sym"))
        else:
            yield from ((f"{start} {flag}", flag) for flag in ("--act_bits 6", "--act_pertoken"))


@pytest.mark.parametrize(("line", "flag"), list(refusals()))
def test_a_setting_that_a_method_cannot_use_is_an_error(line, flag):
    with one_line(flag, line.split()[1]):
        recipe_of(line)


@pytest.mark.parametrize(
    "line",
    [
        "--method gptq --wbits 4 --act_quant --act_bits 6 --act_pertoken",
        "--method gptq --wbits 4 --act_bits 16",
        "--method act_only --wbits 16",
        "--method full --act_bits 16",
        "--method awrq --wbits 4 --smooth --alpha 0.3 --min 0.2 --percdamp 0.1 --actorder --true-sequential --sym --groupsize 64",
        "--method smoothquant --wbits 8 --smooth --alpha 0.3",
        "--method act_only --act_bits 16 --smooth",
        "--method rtn --wbits 4 --no-smooth",
    ],
)
def test_settings_that_go_together(line):
    recipe, typed = recipe_of(line), line.split()
    for flag in ("alpha", "min", "percdamp", "groupsize"):
        if f"--{flag}" in typed:
            assert getattr(recipe, flag) == float(typed[typed.index(f"--{flag}") + 1]), flag
    for flag in ("actorder", "true_sequential", "sym", "act_pertoken"):
        assert getattr(recipe, flag) == (f"--{flag.replace('true_', 'true-')}" in typed), flag


def test_seqlen_beyond_the_context():
    assert recipe_of("--seqlen 64", context=CONTEXT).seqlen == 64
    with one_line("--seqlen 65", CONTEXT):
        recipe_of("--seqlen 65", context=CONTEXT)


# ---------------------------------------------------------------------------
# As typed, not by value


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--method gptq --wbits 4 --act_bits 8", ["--act_bits 8", "--act_quant"]),  # its default, and yet it asks for W4A8
        ("--method gptq --wbits 4 --act_bits 6", ["--act_bits 6", "--act_quant"]),
        ("--method rtn --wbits 4 --preset plus --smooth", ["--smooth", "rtn"]),
        ("--method rtn --wbits 4 --preset plus --clip hessian", ["--clip hessian", "rtn"]),
        ("--method rtn --wbits 4 --percdamp 0.01", ["--percdamp 0.01", "rtn"]),
        ("--method act_only --groupsize -1", ["--groupsize -1", "act_only"]),
        ("--method awrq --wbits 4 --beam 4 --blocksize 8", ["--blocksize 8", "1 with --beam"]),
        ("--method awrq --wbits 4 --beam 1000", ["--beam 1000", "128"]),
        ("--method rtn --wbits 4 --no-actorder", ["--no-actorder", "rtn"]),
        ("--method rtn --wbits 4 --preset plus --no-actorder", ["--no-actorder", "rtn"]),
        ("--method awrq --wbits 4 --alpha 0.5", ["--alpha 0.5", "--smooth"]),
        ("--method awrq --wbits 4 --target_mix 0.5", ["--target_mix 0.5", "--target stream"]),
        ("--method smoothquant --wbits 4 --no-smooth", ["--no-smooth", "smoothquant"]),
    ],
)
def test_a_flag_typed_at_its_default_is_seen(line, parts):
    with one_line(*parts):
        recipe_of(line)


@pytest.mark.parametrize("flag", ["--alpha 0", "--alpha 1", "--min 1", "--smooth_search"])
def test_a_refused_flag_is_shown_as_it_was_typed(flag):
    """0 == False and 1 == True: --alpha 0 was reported as --no-alpha, which there is not."""
    with pytest.raises(UsageError, match=rf"^{flag}(\.0)?: --method gptq does not smooth"):
        recipe_of(f"--method gptq --wbits 4 {flag}")


@pytest.mark.parametrize("flag", ["--limit 3", "--batch_size 1", "--num_fewshot 0", "--table_results", "--skip_missing"])
def test_flags_of_tasks_need_tasks(flag):
    with one_line(flag.split()[0], "needs --tasks"):
        run_of("MODEL", *flag.split())
    run_of("MODEL", "--tasks", "copa", *flag.split())


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("MODEL --check", ["--check", "--benchmark"]),
        ("MODEL --kernel torch", ["--kernel", "--load"]),
        ("MODEL --kernel auto", ["--kernel", "--load"]),
        ("MODEL --eval , --tasks copa --benchmark 4", ["--benchmark", "--eval"]),
        ("MODEL --eval , --tasks copa --benchmark_prefill 4", ["--benchmark_prefill", "--eval"]),
        ("MODEL --eval , --tasks copa --new-eval", ["--new-eval", "--eval"]),
        ("MODEL --eval , --method rtn --wbits 4 --save x --compare_full", ["--compare_full", "--eval or --tasks"]),
        ("--load x --eval , --export compressed-tensors y --compare_full", ["--compare_full", "--eval or --tasks"]),
        ("--load x --seqlen 0", ["--seqlen 0", "at least 2"]),
        ("MODEL --eval ,", ["nothing to evaluate", "--tasks", "--eval", "--save"]),
        ("MODEL --compare_full", ["--compare_full", "full"]),
        ("MODEL --export onnx x --method rtn --wbits 4", ["--export onnx", "compressed-tensors"]),
        ("MODEL --save x", ["--save", "full", "nothing to pack"]),
        ("MODEL --method act_only --checkpoint_dir x", ["--checkpoint_dir", "act_only", "nothing to pack"]),
        ("MODEL --method act_only --export compressed-tensors x", ["--export", "act_only", "nothing to pack"]),
        ("", ["MODEL", "--load"]),
        *(
            (f"--load x {flag}", [flag.split()[0], "--load", "leave it out"])
            for flag in ("--method full", "--wbits 4", "--smooth", "--true-sequential", "--calib_data c4", "--preset paper", "--save y")
        ),
        ("--load x --checkpoint_dir y", ["--checkpoint_dir", "--load"]),
    ],
)
def test_what_does_not_go_together(line, parts):
    with one_line(*parts):
        run_of(*line.split())


@pytest.mark.parametrize("line", ["MODEL --eval , --method rtn --wbits 4 --save x", "--load x --eval , --export compressed-tensors y"])
def test_writing_alone_is_a_whole_job(line):
    run = run_of(*line.split())
    assert not run.corpora and not run.tasks and (run.save or run.export)


@pytest.mark.parametrize("flag", ["--load", "--save", "--checkpoint_dir", "--export compressed-tensors", "--data_dir", "--output_path"])
def test_an_empty_name_is_an_error(flag, capsys):
    """As of an unset variable in a shell: --load "" quantized MODEL instead, --checkpoint_dir "" kept nothing."""
    with pytest.raises(SystemExit) as caught:
        run_of("MODEL", "--method", "rtn", "--wbits", 4, *flag.split(), "")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and flag.split()[0] in error and "is empty" in error


def test_a_run_is_complete_and_frozen():
    run = run_of("MODEL", "--eval", "ptb,c4-new,own,ptb", "--new-eval", "--device", "tpu", "--limit", "0.5", "--tasks", "a,b,a")
    assert run.corpora == ("ptb-new", "c4-new", "own") and run.tasks == ("a", "b") and run.limit == 0.5
    assert run.device == "tpu", "checked when torch is there"
    assert run.recipe.method == "full" and run.seqlen is None and run.script == "opt.py"
    assert run_of("--load", "x").recipe is None
    with pytest.raises(AttributeError):
        run.model = "other"
    other = run_of("MODEL", "--eval", "c4", script=main)
    assert other.script == "main.py" and other.recipe.min == 0.01 and run_of("MODEL", "--tasks", "copa", script=main).corpora == ()


# ---------------------------------------------------------------------------
# Quickly, and in one line


@pytest.mark.parametrize("arguments", [["--help"], ["MODEL", "--no_such_flag"], ["MODEL", "--method", "magic"], ["MODEL", "--limit", "3"]])
@pytest.mark.parametrize("script", ["opt.py", "main.py"])
def test_help_and_wrong_flags_import_nothing_slow(script, arguments):
    command = [sys.executable, "-X", "importtime", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "run.cli" in imported and not {"torch", "transformers", "numpy", "datasets"} & imported
    assert done.returncode == (0 if arguments == ["--help"] else 2)


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError("a: b"), 2), (OSError("disk full"), 2), (FloatingPointError("NaN"), 2), (ValueError("zip()"), None)]
)
def test_what_the_user_did_is_one_line_and_our_own_bugs_are_tracebacks(error, status, monkeypatch, capsys):
    def fail(run, launch):
        raise error

    monkeypatch.setattr(run.pipeline, "execute", fail)
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit if status else type(error)) as caught:
        opt.main(["MODEL"])
    if status:
        assert caught.value.code == status and capsys.readouterr().err == f"opt.py: error: {error}\n"


def test_warnings_in_a_run_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(run.pipeline, "execute", lambda run, launch: warnings.warn("block 1 fc2: something", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        opt.main(["MODEL"])
    assert capsys.readouterr().err.splitlines() == ["warning: block 1 fc2: something"]


def test_names_of_flags_are_those_of_the_tables():
    from formats.export import FORMATS
    from quant import CLIPS

    assert tuple(CLIPS) == recipe.CLIPS and tuple(FORMATS) == recipe.EXPORTS
    for method in METHODS.values():
        for name in (method.weights, method.stats, *(method.stream or ())):
            assert name is None or callable(resolve_name(name)), name


def test_another_major_version_of_transformers_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(SystemExit) as stopped:
        opt.main(["MODEL"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "transformers 4.57.6" in err[0] and "needs version 5" in err[0] and "requirements.txt" in err[0]
