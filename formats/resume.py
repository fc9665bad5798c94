"""Resuming: the store of a --checkpoint_dir, from which a run that was killed goes on after its last finished block."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from formats.checkpoint import Store
from formats.shards import Claim, read_json, read_shard, remove_partial, sha256, write_shard
from processes import ALONE
from recipe import Recipe, UsageError
from runtime import write_json

FORMAT = 2  # of a --checkpoint_dir; another one is refused


def differences(there, here, path=""):
    """Where two nested dicts differ: "KEY is VALUE there, VALUE here" of each leaf."""
    for key in there | here:
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key} is {a!s:.24} there, {b!s:.24} here"


def abbreviate(items, n=3):
    """The first n of a list of texts, and how many more there are."""
    return "; ".join([*items[:n], *([f"{len(items) - n} more"] if len(items) > n else [])])


def describe_config(config):
    """The part of a configuration that identifies a model, as JSON."""
    about_files = ("dtype", "_name_or_path", "architectures", "transformers_version", "quantization_config")
    return json.loads(json.dumps({key: value for key, value in config.to_dict().items() if key not in about_files}))


def run_identity(decoder, ids, recipe, device, walk_batch):
    """Everything that the codes of a run depend on, except the weights of the blocks: {key: value} for run.json."""
    return {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "model": {"model_type": decoder.config.model_type} | describe_config(decoder.config),
        "weights outside the blocks": decoder.source.digest(),
        "calibration": sha256(ids),
        "dtype": str(decoder.dtype),
        "walk_batch": walk_batch,
        "device": device.type,
        "torch": torch.__version__,
    }


def check_shared(name, folder, world):
    """Raises UsageError if a process does not see a folder that the first has made.  name: what a message calls it."""
    if False in (seen := world.gather(folder.is_dir())):
        raise UsageError(f"{name}: process {seen.index(False)} does not see it; name a folder on a file system that all machines share")


class ResumableStore(Store):
    """A Store in a folder from which a run that was killed goes on.

    run.json says which run it is: everything that the codes depend on, of the weights those outside the blocks.  Of block i there are its
    shard, as in a checkpoint, and block-i.json with output errors and checksums, those of the original block too, written last: without
    it the block is not finished.  inputs-i/ has what enters block i, the first unfinished one, a file for each batch.  tuning.json names
    the file that has where tuning is.

    Of several processes the first writes all this but the inputs, of which each writes those of its own sequences.  run.json also has
    their number, which may be another one when the run goes on.
    """

    def __init__(self, original, recipe, folder, run, world=ALONE):
        """run: of run_identity.  Raises UsageError, naming what differs, if the folder is of another run."""
        super().__init__(original, recipe, folder, world)
        self.entered = {}
        if world.first:
            self._open(run)
        self.agree()
        self.entered = world.share(self.entered)
        check_shared(f"--checkpoint_dir {folder}", self.folder, world)

    def _open(self, run):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim = Claim(self.folder, f"--checkpoint_dir {self.folder}")
        path = self.folder / "run.json"
        if not path.exists():
            if any(not file.name.endswith(".partial") for file in self.folder.iterdir()):
                raise UsageError(f"--checkpoint_dir {self.folder}: has other files in it; give it a folder of its own")
            write_json(path, run)
        there = read_json(path, ())
        there["recipe"] = asdict(Recipe()) | there.get("recipe", {})  # settings that are newer than the folder were not there
        if other := list(differences(there | {"processes": self.world.size}, run | {"processes": self.world.size})):
            raise UsageError(f"--checkpoint_dir {self.folder}: is of another run: {abbreviate(other)}; give another folder")
        if there.get("processes") != self.world.size:
            write_json(path, run | {"processes": self.world.size})
        remove_partial(self.folder, "*.partial")
        finished = next((i for i in range(len(self.original)) if not self._entry(i).exists()), len(self.original))
        for i in tqdm(range(finished), desc="checking finished blocks", unit="block", leave=False):
            self._take_over(i)
        self._drop_inputs()  # a run can be killed between its last write and this

    def _take_over(self, i):
        """Go on from block i, which is finished.  Raises UsageError unless it was made of the weights that are here now."""
        entry = read_json(self._entry(i), ("layers", "tensors", "source"))
        if self.original.source.digest(i) != entry["source"]:
            raise UsageError(f"--checkpoint_dir {self.folder}: is of another run: the weights of block {i} differ; give another folder")
        self.layers[i], self.blocks[i], self.entered = entry["layers"], entry["tensors"], entry.get("inputs")

    def _entry(self, i):
        return self.folder / f"block-{i:05}.json"

    def _inputs(self, i):
        return self.folder / f"inputs-{i:05}"

    def put(self, i, made, layers, streams):
        super().put(i, made, layers, streams)
        inputs = self._write_inputs(i + 1, streams) if i + 1 < len(self.original) else None
        if self.writes:
            entry = {"layers": layers, "tensors": self.blocks[i], "source": self.original.source.digest(i)}
            write_json(self._entry(i), entry | ({"inputs": inputs} if inputs else {}))
            self._drop_inputs()

    def _write_inputs(self, i, streams):
        """Write the inputs of block i: {file: {name: sha256}}, of all processes."""
        partial, world, sums = Path(f"{self._inputs(i)}.partial"), self.world, {}
        if self.writes:
            partial.mkdir()
        world.barrier()
        for k in range(len(streams[0])):
            file = f"{world.rank + k * world.size:05}.safetensors"
            sums[file] = write_shard(partial / file, {str(s): x[k] for s, x in enumerate(streams)})
        sums = {file: found for part in world.gather(sums) for file, found in part.items()}
        if self.writes:
            partial.rename(self._inputs(i))
        return dict(sorted(sums.items()))

    def restore_inputs(self, streams):
        """Load the inputs of the first unfinished block into Sequences, one for each stream."""
        for k, (file, sums) in enumerate(self.world.own(list(self.entered.items()))):
            found = read_shard(self._inputs(self.finished) / file, sums)
            for s, x in enumerate(streams):
                x[k] = found[str(s)]

    def keep_tuning(self, state):
        if not self.writes:
            return
        steps = len(state["divergence"])
        file = f"tuning-{steps:06}.safetensors"
        write_json(self.folder / "tuning.json", {"file": file, "tensors": write_shard(self.folder / file, state)})
        for other in set(self.folder.glob("tuning-*")) - {self.folder / file}:
            other.unlink()

    def tuning(self):
        path = self.folder / "tuning.json"
        if not path.exists():
            return {}
        entry = read_json(path, ("file", "tensors"))
        return read_shard(self.folder / entry["file"], entry["tensors"])

    def _drop_inputs(self):
        """Remove the inputs of all blocks but the one that is still needed."""
        for inputs in self.folder.glob("inputs-*"):
            if inputs != self._inputs(self.finished):
                shutil.rmtree(inputs)
