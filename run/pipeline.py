"""The straight line of a run: check, open the model, read the text, quantize, measure, publish."""

import tempfile
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import kernels
from datautils import check_corpora, load_text
from evaluation.perplexity import perplexity
from evaluation.speed import decode, prefill
from formats.card import add_results, size_line, tensor_bytes
from formats.checkpoint import Store, check_saved, computes_integers, load_packed_config, open_checkpoint, packed_bytes
from formats.hub import push
from formats.resume import ResumableStore, abbreviate, check_shared, describe_config, differences, run_identity
from formats.shards import new_folder
from formats.whole import chosen
from modelutils import check_vocabulary, default_walk_batch, load_config, load_tokenizer, open_decoder
from processes import ALONE, World
from recipe import METHODS, Recipe, UsageError
from rotate import check_stream, rotated, untying
from run.checks import (
    check_lengths,
    check_same,
    check_scratch,
    check_sharing,
    check_space,
    check_targets,
    check_text,
    check_timed,
    check_writable,
)
from run.publish import EXPORTED, results_text
from run.quantize import calibration_place, quantize_blocks
from run.report import Record, show
from run.tune import check_room, tune
from runtime import Clock, commit, find_device, map_large_tensors, release


@dataclass(frozen=True)
class Subject:
    """What a run is about: a model to quantize, or with --load a quantized one, and how it was or will be quantized."""

    model: str  # the name of the unquantized one
    config: object  # its configuration
    recipe: Recipe
    seqlen: int  # tokens of a window of evaluation, which with --load need not be the recipe's
    tokenizer: object
    calibration: dict | None = None  # the protocol of the calibration, if it has been done


@dataclass(frozen=True)
class Walk:
    """How text goes through a model."""

    seqlen: int  # tokens of a window
    batch: int  # windows that run together
    world: World  # the processes that share the batches


def execute(run, launch=None):
    """Do what a run.cli.Run asks for.  Raises UsageError for what is impossible, FloatingPointError for NaN or Inf.

    launch: the run.launch.Launch of several processes.  Returns {number: reason} for tasks that failed during their evaluation.
    """
    # ---- What can be wrong is found before any long work ----
    code = commit()  # read first: the checkout may change while the run works
    map_large_tensors()
    device = find_device(launch.device(run.device) if launch else run.device)
    world = launch.connect(device) if launch else ALONE
    if not world.first:
        run = replace(run, save=None, export=None, gguf_like=None, push_to_hub=None, output_path=None)  # which are the first one's
    clock = Clock(device)
    check_writable(run.output_path)
    check_text(run)
    subject = (to_evaluate if run.load else to_quantize)(run)
    recipe, tokenizer = subject.recipe, subject.tokenizer
    check_lengths(run, subject.config)
    check_sharing(run, recipe, world)
    check_targets(run, subject)
    calibrates = recipe.method != "full" and subject.calibration is None
    check_corpora(recipe.calib_data if calibrates else None, run.corpora, run.data_dir)
    tasks = find_tasks(run, subject)
    most = recipe.nsamples // world.size if world.size > 1 else None  # so that each process has some
    walk_batch = run.walk_batch or default_walk_batch(subject.config, subject.seqlen, device, most)
    walk = Walk(subject.seqlen, world.share(walk_batch), world)

    # ---- Model and text: the headers of the weights, then all tokens ----
    with clock("loading"):
        decoder = (open_quantized if run.load else open_original)(run, subject, device)
        original = open_decoder(subject.model, run.dtype, device) if run.load and run.compare_full else decoder
    check_space(run, subject, decoder)
    evaluated = replace(recipe, seqlen=subject.seqlen)
    ids, texts, protocol = load_text(
        evaluated, run.corpora, tokenizer, (run.data_dir, run.text_field), clock, subject.calibration, run.eval_windows
    )
    check_vocabulary(subject.config, [ids, *texts.values()])
    check_timed(run, texts)
    protocol["tasks"] = task_protocols(tasks, run, tokenizer)
    check_same(world, protocol, ids, texts)

    # ---- Numbers, each written as soon as it is known ----
    origin = {"model": subject.model, "calibration": protocol["calibration"], "commit": code}
    about = {"model": subject.model, "protocol": protocol, "walk_batch": walk.batch, "processes": world.size, "commit": code}
    record = Record(recipe, about, clock, run.output_path)

    def measured(decoder):
        return measure(run, decoder, tokenizer, texts, tasks, clock, walk)

    if run.compare_full:
        record.add("full", original, measured(original))
    if not run.load and recipe.method != "full":
        decoder, made = quantize(run, decoder, subject, ids, origin, clock, walk)
        record.found |= made
    if run.export:
        from formats.export import export  # where it is needed: gguf, which checking the kernels does without

        print("\n".join(export(decoder.source, run.export[1], run.export[0], tokenizer, run.gguf_like, origin)))
    record.add("results", decoder, measured(decoder))
    about = record.write(decoder)
    show(about, run.table_results)
    publish(run, results_text(about))
    return record.found["failed"]


# ---------------------------------------------------------------------------
# Checks


def to_quantize(run):
    """The Subject of a run that quantizes MODEL, or evaluates it as it is."""
    config = load_config(run.model, run.script)
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{run.model} is quantized already; give the original, or --load for what --save wrote")
    context = config.max_position_embeddings
    recipe = with_seqlen(run.recipe, run.seqlen or min(2048, context), context)
    check_stream(config, recipe.rotate, recipe.target)
    return Subject(run.model, config, recipe, recipe.seqlen, load_tokenizer(run.model))


def to_evaluate(run):
    """The Subject of a run that loads what --save wrote."""
    config, about = load_packed_config(run.load, run.script)
    original = load_config(run.model, run.script) if run.model else config
    untied = {"tie_word_embeddings": False} if about["recipe"].rotate else {}
    if other := list(differences(describe_config(config), describe_config(original) | untied)):
        raise UsageError(f"--load {run.load}: is not a checkpoint of {run.model}: {abbreviate(other)}")
    model = run.model or about.get("model", run.load)
    if run.compare_full and not is_original(model, run.script):
        raise UsageError(f"--compare_full: {model} is not the unquantized model; with --load give that as MODEL")
    if run.arithmetic == "integers" and not computes_integers(about["recipe"]):
        raise UsageError(
            f"--arithmetic integers: {run.load} has {about['recipe'].wbits}-bit weights, and they take up to 4 bits; leave it out"
        )
    recipe = about["recipe"]
    seqlen = with_seqlen(recipe, run.seqlen or recipe.seqlen, config.max_position_embeddings).seqlen
    return Subject(model, config, recipe, seqlen, load_tokenizer(run.load), about.get("calibration") or {})


def is_original(name, script):
    """Whether there is an unquantized model."""
    try:
        return not getattr(load_config(name, script), "quantization_config", None)
    except UsageError:
        return False


def with_seqlen(recipe, seqlen, context):
    """The recipe with this sequence length.  Raises UsageError if the model's context is shorter."""
    if seqlen > context:
        raise UsageError(f"--seqlen {seqlen}: the model's context is {context} tokens")
    return replace(recipe, seqlen=seqlen)


def find_tasks(run, subject):
    """lm-eval's tasks and groups, with their data: [Task or Group]."""
    if not run.tasks:
        return []
    from evaluation.zeroshot import check_tasks, load_tasks  # where they are needed: lm-eval takes seconds to import

    tasks = load_tasks(run.tasks, run.data_dir, run.num_fewshot, run.skip_missing)
    check_tasks(tasks, subject.config, subject.tokenizer, run.batch_size, **task_settings(run))
    return tasks


def task_protocols(tasks, run, tokenizer):
    """{name: what it is evaluated on}"""
    if not tasks:
        return {}
    from evaluation.zeroshot import leaves, prompt_protocol, task_protocol

    around = prompt_protocol(tokenizer, **task_settings(run))
    return {task.config.task: task_protocol(task) | around for task in leaves(tasks)}


# ---------------------------------------------------------------------------
# Steps


def open_original(run, subject, device):
    """The Decoder of MODEL, to be quantized, or evaluated as it is."""
    return open_decoder(run.model, run.dtype, device, subject.config, subject.recipe.rest_dtype)


def open_quantized(run, subject, device):
    """The quantized Decoder of --load; says what will compute its integers."""
    kernel = None
    if run.arithmetic != "dequantized" and computes_integers(subject.recipe):
        kernel, line = kernels.select(run.kernel, device, subject.recipe.groupsize)
        print(line)
    return open_checkpoint(run.load, run.dtype, device, kernel, run.arithmetic)


def quantize(run, decoder, subject, ids, origin, clock, walk):
    """Quantize block by block, print the output errors of each, and write --save.

    ids (nsamples + tune_samples, T), the latter for tuning; origin: what Store.finish has to tell.

    Returns the quantized Decoder, and {"layers": [Layer], "tuning": the divergence at every step of tuning, or []}.
    """
    recipe, layers = subject.recipe, []
    fitted, others = ids[: recipe.nsamples], ids[recipe.nsamples :]
    if recipe.rotate:
        decoder = rotated(decoder, recipe.seed)
        if more := untying(decoder):
            print(f"rotated: the head, tied to the embedding before, is a matrix of its own now and takes {more / 2**20:.1f} MiB")
    with ExitStack() as stack:
        unfinished = stack.enter_context(new_folder(run.save)) if run.save else None
        if run.checkpoint_dir:
            identity = run_identity(decoder, ids, recipe, clock.device, walk.batch)
            store = ResumableStore(decoder, recipe, run.checkpoint_dir, identity, walk.world)
        else:
            store = new_store(decoder, recipe, unfinished, walk.world)
        if recipe.tune_steps:
            check_room(store, others, clock.device)  # or it would fail after hours
        place = calibration_place(decoder, fitted, recipe, clock.device, walk.world)
        print(f"calibration sequences are kept {place}")
        for done in quantize_blocks(decoder, fitted, recipe, store, place, walk.batch, clock):
            errors = (f"{layer.name.rpartition('.')[2]} {layer.error:.1e}" for layer in done)
            tqdm.write(f"block {done[0].block}: output errors  " + "  ".join(errors))
            layers += done
        warn_of_losses(layers)
        divergence = tuned(store, others, clock) if recipe.tune_steps else []
        if run.save:
            with clock("writing"):
                store.finish(unfinished, subject.tokenizer, origin)
                check_saved(unfinished)
    if run.save:
        store.folder = store.folder if run.checkpoint_dir else Path(run.save)
        print(f"{run.save}: {store.size()}; {size_line(tensor_bytes(run.save), decoder.family)}")
    if place := walk.world.share((store.folder, store.blocks) if run.save else None):
        store.folder, store.blocks = place  # the folder that the others read has got its name
    return store.decoder(), {"layers": layers, "tuning": divergence}


def warn_of_losses(layers):
    """Warn of [Layer] whose outputs are mostly lost; where there are massive tokens, that is of them."""
    lost = [layer for layer in layers if layer.error > 0.5]
    if lost:
        worst = max(lost, key=lambda layer: layer.error)
        warnings.warn(
            f"{len(lost)} of {len(layers)} layers lose more than half of their output, block {worst.block} {worst.name} the most"
            f" (error {worst.error:.2f}): do not trust this model before you have evaluated it",
            stacklevel=2,
        )


def new_store(decoder, recipe, folder, world):
    """A Store in the folder that the first process has, or None; several processes without one need a temporary folder on each machine."""
    if (shared := world.share(folder)) is not None:
        check_shared(f"--save, {shared}", shared, world)
        return Store(decoder, recipe, shared, world)
    if world.size == 1 or METHODS[recipe.method].weights is None:
        return Store(decoder, recipe)
    if world.local_rank == 0:
        check_scratch(packed_bytes(decoder, recipe))
    temporary = tempfile.TemporaryDirectory(prefix="awrq-") if world.local_rank == 0 else None
    names = world.gather(temporary and temporary.name)
    store = Store(decoder, recipe, names[world.rank - world.local_rank], world, writes=world.local_rank == 0)
    store.temporary = temporary  # it goes with the store
    return store


def tuned(store, ids, clock):
    """Tune the blocks of a finished Store, print the gain, and return the divergence at every step."""
    with clock("tuning"):
        divergence = tune(store, ids, clock.device)
    tenth = max(1, len(divergence) // 10)
    before, after = (sum(part) / tenth for part in (divergence[:tenth], divergence[-tenth:]))
    print(f"tuning: {len(divergence)} steps, divergence from the unquantized model {before:.4f} nats at first, {after:.4f} at last")
    return divergence


def measure(run, decoder, tokenizer, texts, tasks, clock, walk):
    """Measure a Decoder.  Yields each number as soon as it is known: (kind, name, value), see run.report.Record.add.

    texts: {corpus: ids (N,)}; walk: a Walk.
    """
    for name, tokens in texts.items():
        with clock("evaluation"):
            found = perplexity(decoder, tokens, walk.seqlen, clock.device, walk.batch, name, walk.world)
        yield "perplexity", name, found
    if tasks:
        model = materialized(decoder, clock)
        for task in tasks:
            yield "tasks", *evaluate_task(run, model, tokenizer, task, clock, walk.world)
        del model
    if run.benchmark or run.benchmark_prefill:
        decoder, first = generating(decoder, run.arithmetic, clock.device), next(iter(texts.values()))
        model = materialized(decoder, clock)
        for kind, name, tokens, timed in (
            ("benchmark", "decoding", run.benchmark, partial(decode, check=run.check)),
            ("prefill", "reading a prompt", run.benchmark_prefill, prefill),
        ):
            if tokens:
                with clock("benchmark"):
                    found = timed(model, first[:tokens])
                yield kind, name, found | {"how": f"{found['how']}, {decoder.source.arithmetic}"}
        del model
    release(clock.device)


def materialized(decoder, clock):
    """The whole model of a Decoder, on the device."""
    with clock("loading"):
        return decoder.materialize(clock.device)


def evaluate_task(run, model, tokenizer, task, clock, world):
    """(name, what zero_shot finds of a task or group, or the exception that it raises: the others can still be had).

    Where several processes share the items, the exception is raised: others would wait for what this one has to give.
    """
    from evaluation.zeroshot import zero_shot

    name = getattr(task, "task_name", None) or task.name
    try:
        with clock("tasks"):
            found = zero_shot(model, tokenizer, [task], run.batch_size, world, **task_settings(run))
    except Exception as error:  # whatever the task's own code, its rows or lm-eval raise
        if world.size > 1:
            raise
        if not isinstance(error, UsageError | FloatingPointError):
            traceback.print_exc()
        found = error
    return name, found


def task_settings(run):
    """What lm-eval is asked to do with each task."""
    return {
        "num_fewshot": run.num_fewshot,
        "limit": run.limit,
        "system_instruction": run.system_instruction,
        "apply_chat_template": run.apply_chat_template,
        "fewshot_as_multiturn": run.fewshot_as_multiturn,
    }


def generating(decoder, arithmetic, device):
    """The same Decoder with the arithmetic that it generates in."""
    quantized = isinstance(decoder.source, Store)
    return decoder.source.dequantized().decoder() if quantized and chosen(arithmetic, device) == "dequantized" else decoder


def publish(run, measured):
    """Put what was measured, Markdown or "", into the cards of the folders that the run wrote, and send one to the hub if that is asked."""
    exported = run.export and run.export[1]
    for folder, note in ((run.save, ""), (exported, EXPORTED)):
        if folder and measured:
            add_results(folder, note + measured)
    if run.push_to_hub:
        folder = run.save or exported
        print(f"{folder}: sent to https://huggingface.co/{push(folder, run.push_to_hub)}")
