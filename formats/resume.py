"""Resuming: the store of a --checkpoint_dir, from which a run that was killed goes on after its last finished block."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from formats.checkpoint import Store
from formats.shards import Claim, read_json, read_shard, remove_partial, sha256, write_shard
from recipe import UsageError
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


class ResumableStore(Store):
    """A Store in a folder from which a run that was killed goes on.

    run.json says which run it is: everything that the codes depend on, of the weights those outside the blocks.  Of block i there are its
    shard, as in a checkpoint, and block-i.json with output errors and checksums, those of the original block too, written last: without
    it the block is not finished.  inputs-i/ has what enters block i, the first unfinished one, a file for each batch.  tuning.json names
    the file that has where tuning is.
    """

    def __init__(self, original, recipe, folder, run):
        """run: of run_identity.  Raises UsageError, naming what differs, if the folder is of another run."""
        super().__init__(original, recipe, folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim = Claim(self.folder, f"--checkpoint_dir {folder}")
        path = self.folder / "run.json"
        if not path.exists():
            if any(not file.name.endswith(".partial") for file in self.folder.iterdir()):
                raise UsageError(f"--checkpoint_dir {folder}: has other files in it; give it a folder of its own")
            write_json(path, run)
        if other := list(differences(read_json(path, ()), run)):
            raise UsageError(f"--checkpoint_dir {folder}: is of another run: {abbreviate(other)}; give another folder")
        remove_partial(self.folder, "*.partial")
        finished = next((i for i in range(len(original)) if not self._entry(i).exists()), len(original))
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
        entry = {"layers": layers, "tensors": self.blocks[i], "source": self.original.source.digest(i)}
        if i + 1 < len(self.original):
            entry["inputs"] = self._write_inputs(i + 1, streams)
        write_json(self._entry(i), entry)
        self._drop_inputs()

    def _write_inputs(self, i, streams):
        """Write the inputs of block i: {file: {name: sha256}}."""
        partial = Path(f"{self._inputs(i)}.partial")
        partial.mkdir()
        sums = {}
        for k in range(len(streams[0])):
            sums[f"{k:05}.safetensors"] = write_shard(partial / f"{k:05}.safetensors", {str(s): x[k] for s, x in enumerate(streams)})
        partial.rename(self._inputs(i))
        return sums

    def restore_inputs(self, streams):
        """Load the inputs of the first unfinished block into Sequences, one for each stream."""
        for k, (file, sums) in enumerate(self.entered.items()):
            found = read_shard(self._inputs(self.finished) / file, sums)
            for s, x in enumerate(streams):
                x[k] = found[str(s)]

    def keep_tuning(self, state):
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
