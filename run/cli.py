"""The command line: argv to a Run, or one line about what is wrong.  Imports nothing slow, so that --help is quick."""

import argparse
import importlib.metadata
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

from recipe import EXPORTS, METHODS, PRESETS, Recipe, UsageError
from run.flags import listed, make_parser, quiet_libraries
from run.settings import changes, read_settings


@dataclass(frozen=True)
class Run:
    """What a command line asks for.  Everything that can be checked without a model has been checked."""

    script: str  # that was run
    model: str | None  # hub name or folder; None: --load says which
    recipe: Recipe | None  # but for its seqlen; None: that of --load
    notes: tuple[str, ...]  # what is to be said of its settings
    seqlen: int | None  # tokens of a window; None: the recipe's with --load, else the model's context, at most 2048
    # what to evaluate, and on what
    corpora: tuple[str, ...]
    eval_windows: tuple[int, int] | None  # (first, end) of each corpus; None: all
    data_dir: str | None
    text_field: str
    compare_full: bool
    tasks: tuple[str, ...]  # names, wildcards or YAML files
    num_fewshot: int | None
    batch_size: int | str
    limit: int | float | None  # items of a task, or a share of them below 1
    skip_missing: bool
    apply_chat_template: bool | str  # the name of a template, True: the tokenizer's own
    system_instruction: str | None
    fewshot_as_multiturn: bool
    table_results: bool
    benchmark: int | None  # tokens
    benchmark_prefill: int | None  # tokens
    check: bool
    # folders
    save: str | None
    load: str | None
    checkpoint_dir: str | None
    export: tuple[str, str] | None  # (format, folder)
    gguf_like: str | None  # a file
    push_to_hub: str | None  # a repository
    output_path: str | None
    # how to compute
    arithmetic: str
    kernel: str
    device: str | None  # None: a GPU if there is one
    dtype: str
    walk_batch: int | None  # sequences; None: from the memory


# ---------------------------------------------------------------------------
# Flags to a Run

NEW_EVAL = {"ptb": "ptb-new", "c4": "c4-new"}
UNSET = object()


def parse(parser, argv=None):
    """The Run that a command line asks for.  Raises UsageError for flags that do not go together."""
    untyped = {action.dest: UNSET for action in parser._actions if action.dest != "help"}
    given = vars(parser.parse_args(argv, argparse.Namespace(**untyped)))
    typed = {flag: value for flag, value in given.items() if value is not UNSET and (flag, value) != ("model", None)}
    if "preset" in typed and "recipe" in typed:
        raise UsageError(f"--preset {typed['preset']} does not go with --recipe, which says every setting; give one of them")
    settings, model = read_settings(typed["recipe"]) if "recipe" in typed else ({}, None)
    defaults = {flag: parser.get_default(flag) for flag in given}
    preset = PRESETS[typed.get("preset", "paper")]
    values = defaults | {"model": model} | settings | preset | typed
    if values["fewshot_as_multiturn"] is None:
        values["fewshot_as_multiturn"] = bool(values["apply_chat_template"])  # as lm_eval does
    values |= {"eval": listed(values["eval"]), "tasks": listed(values["tasks"])}
    check_needs(values, typed)
    fallback = {flag: defaults[flag] for flag in (*settings, *preset) if flag not in typed}
    recipe = None if values["load"] else make_recipe(values, typed, fallback)
    used = values | (asdict(recipe) if recipe else {})
    return Run(
        script=parser.prog,
        recipe=recipe,
        notes=(changes(typed["recipe"], settings | ({"model": model} if model else {}), used),) if settings else (),
        corpora=tuple(dict.fromkeys(NEW_EVAL.get(name, name) if values["new_eval"] else name for name in values["eval"])),
        export=values["export"] and tuple(values["export"]),
        **{f.name: values[f.name] for f in fields(Run) if f.name not in ("script", "recipe", "notes", "corpora", "export")},
    )


def check_needs(values, typed):
    """Raises UsageError for a flag without the one that it needs, or with one that excludes it."""
    task_flags = ("num_fewshot", "batch_size", "limit", "skip_missing", "table_results", "apply_chat_template", "system_instruction")
    for flag, needs, there in (
        *((flag, "--tasks", values["tasks"]) for flag in task_flags),
        ("fewshot_as_multiturn", "--apply_chat_template, whose turns it means", values["apply_chat_template"]),
        ("check", "--benchmark", values["benchmark"]),
        ("kernel", "--load", values["load"]),
        ("arithmetic", "--load", values["load"]),
        ("kernel", "--arithmetic integers", values["arithmetic"] != "dequantized"),
        ("gguf_like", "--export gguf", values["export"] and values["export"][0] == "gguf"),
        ("push_to_hub", "--save or --export, whose folder it sends (`hf upload` sends any other)", values["save"] or values["export"]),
        ("benchmark", "--eval, whose first corpus it decodes", values["eval"]),
        ("benchmark_prefill", "--eval, whose first corpus it reads", values["eval"]),
        ("new_eval", "--eval, whose protocols it changes", values["eval"]),
        ("eval_windows", "--eval, whose windows it counts", values["eval"]),
        ("compare_full", "--eval or --tasks, which it evaluates twice", values["eval"] or values["tasks"]),
    ):
        if flag in typed and not there:
            raise UsageError(f"{shown(flag)} needs {needs}")
    if values["export"] and values["export"][0] not in EXPORTS:
        raise UsageError(f"--export {values['export'][0]}: no such format; choose from {', '.join(EXPORTS)}")
    if values["export"] and values["export"][0] == "gguf" and not values["gguf_like"]:
        raise UsageError("--export gguf needs --gguf_like FILE, the original model in GGUF, whose tokenizer and metadata it copies")
    if values["push_to_hub"] and values["save"] and values["export"]:
        raise UsageError(f"--push_to_hub {values['push_to_hub']}: sends one folder; give --save or --export, not both")
    if values["load"]:
        fixed = {f.name for f in fields(Recipe)} - {"seqlen"} | {"preset", "recipe", "act_quant", "save", "checkpoint_dir"}
        for flag in typed:
            if flag in fixed:
                raise UsageError(f"{shown(flag)} does not go with --load, which takes a model as it was quantized; leave it out")
        if values["seqlen"] is not None:
            Recipe(seqlen=values["seqlen"])  # raises if that is out of range
    elif values["model"] is None:
        raise UsageError("give MODEL, or --load FOLDER")
    if values["compare_full"] and values["method"] == "full" and not values["load"]:
        raise UsageError("--compare_full: --method full has nothing to compare")
    if not any(values[flag] for flag in ("eval", "tasks", "save", "export", "checkpoint_dir")):
        raise UsageError("nothing to evaluate: give --tasks or --eval, or --save to quantize only")


def make_recipe(values, typed, fallback):
    """The Recipe of {flag: value}, with what its method implies; seqlen is the model's to bound.

    Raises UsageError for a setting out of range, and for one of `typed`, {flag: value}, that the method cannot use.  fallback: what takes
    the place, {flag: value}, of what a preset or a file says and the method cannot use.
    """
    method = METHODS[values["method"]]
    acts = values["act_quant"] if values["act_quant"] in method.acts else method.acts[0]
    smooth = values["smooth"] if values["smooth"] in method.smooth else method.smooth[0]
    settings = {f.name: values[f.name] for f in fields(Recipe) if f.name != "seqlen"}
    for usable, what, flags in (
        (method.weights, "quantize weights", ("wbits", "groupsize", "sym", "blocksize", "clip", "bias_correction", "tune_steps")),
        (method.weights, "quantize weights, so nothing is kept", ("rest_dtype",)),
        (method.stats, "compensate errors", ("percdamp", "beam", "actorder", "true_sequential", "guided", "grid", "target")),
        (method.stats or values["clip"] != "hessian", "compensate errors", ("clip",)),
        (method.stats and values["target"] == "stream", "use a mix" + " without --target stream" * bool(method.stats), ("target_mix",)),
        (method.weights or acts, "quantize anything", ("rotate",)),
        (True in method.smooth or not values["smooth"], "smooth", ("smooth",)),
        (smooth, "smooth" + " without --smooth" * (True in method.smooth), ("alpha", "min", "smooth_search")),
        (not values["smooth_search"], "use an alpha with --smooth_search", ("alpha",)),
        (True in method.acts, "quantize activations", ("act_quant",)),
        (acts, "quantize activations" + " without --act_quant" * (True in method.acts), ("act_bits", "act_pertoken", "act_sym")),
        (values["act_bits"] < 16, "quantize activations with --act_bits 16", ("act_pertoken", "act_sym")),
    ):
        for flag in flags if not usable else ():
            if flag in typed and (flag, typed[flag]) not in NOTHING:
                raise UsageError(f"{shown(flag, typed[flag])}: --method {values['method']} does not {what}")
            if flag in fallback and flag in settings:  # what a method cannot use of a preset, it goes without
                settings[flag] = fallback[flag]
    if values["smooth"] is False and False not in method.smooth:
        raise UsageError(f"--no-smooth: --method {values['method']} does not go without smoothing")
    if method.weights and values["wbits"] == 16:
        raise UsageError(f"--method {values['method']} quantizes weights: give --wbits, 2 to 8")
    if not method.weights and (writes := [flag for flag in ("save", "checkpoint_dir", "export") if values[flag]]):
        raise UsageError(
            f"{shown(writes[0])}: --method {values['method']} rounds no weights, so there is nothing to pack; choose one that does"
        )
    recipe = Recipe(**settings | {"act_bits": values["act_bits"] if acts else 16, "smooth": smooth})
    return recipe if values["seqlen"] is None else replace(recipe, seqlen=values["seqlen"])


NOTHING = (("act_bits", 16), ("wbits", 16))  # a method that cannot quantize activations leaves them as they are


def shown(flag, value=None):
    """A flag as it is typed."""
    name = flag.replace("true_", "true-").replace("new_", "new-")
    if value is None or value is True:
        return f"--{name}"
    return f"--no-{name}" if value is False else f"--{name} {value}"  # `is`: 0 == False, and --alpha 0 is not --no-alpha


def main(script, doc, argv=None, **defaults):
    """A script from its command line to the end.  script, doc, defaults: see make_parser; argv: None for the process's."""
    parser = make_parser(script, doc, **defaults)
    with parser.one_line_errors(), processes(script) as parser.launch, parser.one_line_errors():
        run = parse(parser, argv)
        if (found := importlib.metadata.version("transformers")).partition(".")[0] != "5":  # else an import would fail in the middle
            raise UsageError(f"transformers {found} is installed, this program needs version 5: pip install -r requirements.txt")
        quiet_libraries(*[parser.launch.is_first] if parser.launch else [])
        for note in run.notes:
            print(note)
        from run.pipeline import execute  # only now: it takes seconds

        failed = execute(run, parser.launch)
    if failed:
        parser.exit(1, "".join(f"{parser.prog}: failed: {number}: {reason}\n" for number, reason in failed.items()))


def processes(script):
    """A context with the run.launch.Launch of the processes that torchrun has started, of which all but the first are silent; or None."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "LOCAL_RANK" not in os.environ:  # clusters set the first of these without torchrun
        return nullcontext()
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what its exchanges print when a process has ended is no help
    from run.launch import joined  # only now: it takes seconds

    return joined(script)
