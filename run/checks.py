"""Checks of the inputs of a run and of the places it writes to, made before any long work."""

import os
import shutil
import tempfile
from itertools import product
from pathlib import Path

from formats.checkpoint import check_packable, packed_bytes
from formats.hub import check_push
from formats.resume import abbreviate, differences
from formats.shards import sha256
from recipe import METHODS, UsageError
from run.tune import state_bytes

DEMO = Path(__file__).resolve().parents[1] / "demo"


def check_text(run):
    """Raises UsageError for a demo model on text from the hub: it only knows the words of its own world."""
    place = Path(run.model or run.load).resolve()
    names = [*run.corpora, *([run.recipe.calib_data] if run.recipe and run.recipe.method != "full" else [])]
    if place.parent == DEMO and run.data_dir is None and not all(name.startswith("hub:") for name in names):
        text = f"--data_dir {os.path.relpath(DEMO / 'data')} --calib_data world --eval world"
        raise UsageError(f"{place.name} is a demo model, with text of its own: add {text}")


def check_sharing(run, recipe, world):
    """Raises UsageError for what several processes cannot share."""
    if world.size == 1:
        return
    if METHODS[recipe.method].stats and recipe.nsamples < world.size and not run.load:
        raise UsageError(f"--nsamples {recipe.nsamples}: fewer sequences than the {world.size} processes; start no more than that")
    for flag in ("benchmark", "benchmark_prefill"):
        if getattr(run, flag):
            raise UsageError(
                f"--{flag}: times one process; leave it out with torchrun, and time what --save wrote with --load, without torchrun"
            )


def check_same(world, protocol, ids, texts):
    """Raises UsageError unless the processes of several machines have the same text and tasks: they would find nonsense, or never meet.

    ids: the calibration sequences or None; texts: {corpus: ids (N,)}.
    """
    if world.size == 1:
        return
    tokens = {name: sha256(found) for name, found in texts.items()} | ({} if ids is None else {"calibration": sha256(ids)})
    first, *others = world.gather(protocol | {"tokens": tokens})
    for rank, found in enumerate(others, 1):
        if other := list(differences(found, first)):
            raise UsageError(f"process {rank} has other data than process 0: {abbreviate(other)}; give all machines the same files")


def check_lengths(run, config):
    """Raises UsageError unless a model can take what the benchmarks give it."""
    context = config.max_position_embeddings
    for flag, tokens, least in (("benchmark", run.benchmark, 2), ("benchmark_prefill", run.benchmark_prefill, 1)):
        if tokens and not least <= tokens <= context:
            raise UsageError(f"--{flag} {tokens}: must be {least} to {context} tokens, the model's context")


def check_timed(run, texts):
    """Raises UsageError unless the first corpus has the tokens that the benchmarks read.  texts: {corpus: ids (N,)}."""
    for flag in ("benchmark", "benchmark_prefill"):
        tokens = getattr(run, flag)
        if tokens and tokens > (there := len(texts[run.corpora[0]])):
            raise UsageError(f"--{flag} {tokens}: the text of {run.corpora[0]} has {there} tokens; give fewer")


def check_targets(run, subject):
    """Raises UsageError if something that the run will write cannot be written, as far as this can be seen beforehand."""
    if run.save or run.checkpoint_dir:
        check_packable(subject.recipe)
    if run.export:
        from formats.export import check_export  # see pipeline.py

        check_export(run.export[0], subject.recipe, subject.config, run.gguf_like, subject.tokenizer)
    if run.push_to_hub:
        check_push(run.push_to_hub)
    targets = {f"--{flag} {folder}": Path(folder).resolve() for flag, folder in folders(run).items()}
    inside = targets | ({f"--output_path {run.output_path}": Path(run.output_path).resolve()} if run.output_path else {})
    for (inner, path), (outer, folder) in product(inside.items(), targets.items()):
        if inner != outer and folder in (path, *path.parents):
            raise UsageError(f"{inner}: is in {outer}, which appears as a whole; give places beside each other")
    for flag, folder in folders(run).items():
        if flag != "checkpoint_dir":
            check_target(f"--{flag}", Path(folder))


def folders(run):
    """{flag: folder} of everything a run writes, in the order of writing."""
    found = {"checkpoint_dir": run.checkpoint_dir, "save": run.save, "export": run.export and run.export[1]}
    return {flag: folder for flag, folder in found.items() if folder is not None}


def check_target(flag, folder):
    """Raises UsageError unless a folder of this name can be made, or is there and empty."""
    real = folder.resolve()
    if real.exists() and not (real.is_dir() and not any(real.iterdir())):
        raise UsageError(f"{flag} {folder}: is there already; give another name")
    if real == Path.cwd():
        raise UsageError(f"{flag} {folder}: is the folder that you are in; give a name in it")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        probe = Path(tempfile.mkdtemp(dir=real.parent))
    except OSError as e:
        raise UsageError(f"{flag} {folder}: cannot write into {real.parent} ({e.strerror}); give another folder") from e
    try:
        if real.exists():
            probe.chmod(real.stat().st_mode)
            os.rename(probe, real)
        else:
            probe.rmdir()
    except OSError as e:
        probe.rmdir()
        raise UsageError(f"{flag} {folder}: is an empty folder that nothing can replace ({e.strerror}); give a name in it") from e


def check_space(run, subject, decoder):
    """Raises UsageError if the disk has too little room for what a run writes, by an estimate."""
    size, kept, needed = packed_bytes(decoder, subject.recipe), resuming_bytes(decoder, subject.recipe), {}
    for flag, folder in folders(run).items():
        there = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
        device = there.stat().st_dev
        linked = flag == "save" and device in needed  # --save makes hard links to the blocks of --checkpoint_dir
        needed[device] = needed.get(device, 0) + (0 if linked else size + kept * (flag == "checkpoint_dir"))
        free = shutil.disk_usage(there).free
        if free < needed[device]:
            raise UsageError(
                f"--{flag} {folder}: about {needed[device] / 2**30:.2f} GiB are needed there, and {free / 2**30:.2f} GiB are free;"
                " give a folder with more room"
            )


def resuming_bytes(decoder, recipe):
    """Estimated bytes that --checkpoint_dir needs at most beside the blocks: two inputs of a block, or two states of tuning."""
    streams, tokens = 1 if recipe.target == "layer" else 2, recipe.nsamples * recipe.seqlen
    inputs = streams * tokens * decoder.config.hidden_size * decoder.dtype.itemsize
    return 2 * max(inputs, state_bytes(decoder, recipe) if recipe.tune_steps else 0)


def check_scratch(needed):
    """Raises UsageError if the folder of temporary files has no room for so many bytes of quantized blocks."""
    folder = tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(folder).free):
        raise UsageError(
            f"no room for the quantized blocks: they take about {needed / 2**30:.2f} GiB, and {folder} has {free / 2**30:.2f} GiB left;"
            " let TMPDIR name a folder with more, or give --save"
        )


def check_writable(path):
    """Raises UsageError unless a file can be written at path (its folder is made if need be), or path is None."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UsageError(f"--output_path {path}: is a folder; give the name of a file in it")
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UsageError(f"--output_path {path}: cannot write into {folder} ({e.strerror}); give another folder") from e
