"""Read tensors by name from safetensors and .bin files.  Write files and folders that appear complete or not at all.

An open memory mapping makes the process grow with the file, so every call opens the file again and returns copies.
"""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import warnings
import weakref
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils.hub import cached_file, cached_files

from recipe import UsageError

REMEDY = "take the file from a copy, or make it anew"

# ---------------------------------------------------------------------------
# The weights of a model


@contextmanager
def _safetensors(path):
    """A safetensors file: {name: a function that reads it}, {name: shape}."""
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            yield {name: lambda name=name: f.get_tensor(name) for name in names}, {n: tuple(f.get_slice(n).get_shape()) for n in names}
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{path}: missing or damaged ({_line(e)}); {REMEDY}") from e


@contextmanager
def _pickled(path):
    """The same of a file that torch.save wrote.  Only tensors are unpickled; those of a zip file, as all newer ones are, by mapping it."""
    found = _unpickle(path, mmap=zipfile.is_zipfile(path))
    yield {name: lambda name=name: found[name].detach() for name in found}, {name: tuple(t.shape) for name, t in found.items()}


def _unpickle(path, mmap):
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch warns of, it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError) as e:
        # torch raises many types for a file that is not one of its own
        raise UsageError(
            f"{path}: missing, damaged, or not a file of weights that can be read without running what is in it ({_line(e)});"
            " take it from a copy, or where it is trusted let save_pretrained() of transformers write *.safetensors of it"
        ) from e
    if not (isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items())):
        raise UsageError(f"{path}: has no flat list of tensors by name; let save_pretrained() of transformers write the model again")
    return found


def _line(error):
    """The first sentence of an error's message."""
    return " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")


KINDS = {  # in the order of preference, {file, or with its shards the index: what opens it}
    "model.safetensors": _safetensors,
    "model.safetensors.index.json": _safetensors,
    "pytorch_model.bin": _pickled,
    "pytorch_model.bin.index.json": _pickled,
}


def find_weights(name):
    """The Shards of a local folder or hub model, of which only these files are downloaded.

    Raises UsageError, naming the file, if it has no weights, if one is damaged or missing, or if the hub gives none.
    """
    try:
        for kind, opened in KINDS.items():
            file = cached_file(name, kind, _raise_exceptions_for_missing_entries=False)
            if file and kind.endswith(".json"):
                return _find_shards(name, file, opened)
            if file:
                return Shards([file], opened)
    except OSError as e:
        raise UsageError(f"{name}: its weights cannot be had ({_line(e)})") from e
    raise UsageError(f"{name}: no weights there: neither *.safetensors nor pytorch_model*.bin; save the model into that folder")


def _find_shards(name, index, opened):
    """The Shards that an index lists."""
    weight_map = read_index(index, ("weight_map",))["weight_map"]
    files = sorted(set(weight_map.values()))
    paths = [Path(name, file) for file in files] if os.path.isdir(name) else cached_files(name, files)
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"{path}: this shard, which {index} lists, is missing; {REMEDY}")
    shards = Shards(paths, opened)
    for tensor in sorted(weight_map.keys() - shards.shapes.keys()):
        raise UsageError(f"{index}: lists the tensor {tensor}, which no shard has; {REMEDY}")
    return shards


class Shards:
    """The tensors of some files of one kind: `shapes`, {name: shape}, from their headers, and read(names)."""

    def __init__(self, files, opened):
        """opened: of KINDS.  A pickled file that cannot be mapped is read now and kept, with a line that says so."""
        self.opened, self.whole, self.shapes, self.files = opened, {}, {}, {}
        self.states = {str(file): _state(file) for file in files}
        for file in self.states:
            if opened is _pickled and not zipfile.is_zipfile(file):
                self.whole[file] = _unpickle(file, mmap=False)
                size = sum(t.nbytes for t in self.whole[file].values())
                tqdm.write(f"{file}: in torch's old format, so all of it is in memory, {size / 2**30:.2f} GiB; *.safetensors take none")
                shapes = {name: tuple(t.shape) for name, t in self.whole[file].items()}
            else:
                with opened(file) as (_, shapes):
                    pass
            self.shapes |= shapes
            self.files |= dict.fromkeys(shapes, file)

    def read(self, names):
        """{name: tensor}, in memory of their own.  Raises UsageError if a file is another one than at first."""
        wanted, found = {}, {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        for file, names in wanted.items():
            if file in self.whole:
                found |= {name: self.whole[file][name].detach().clone(memory_format=torch.contiguous_format) for name in names}
                continue
            if _state(file) != self.states[file]:
                raise UsageError(f"{file}: has changed while it was read; run again when nothing writes there")
            with self.opened(file) as (read, _):
                found |= {name: read[name]().clone(memory_format=torch.contiguous_format) for name in names}
        return found


class Tensors:
    """Tensors in memory, read as Shards are."""

    def __init__(self, tensors):
        """tensors: {name: tensor}."""
        self.tensors, self.shapes = tensors, {name: tuple(t.shape) for name, t in tensors.items()}

    def read(self, names):
        return {name: self.tensors[name].detach().cpu().clone() for name in names}


def _state(file):
    try:
        stat = os.stat(file)
    except OSError as e:
        raise UsageError(f"{file}: cannot be read ({e.strerror}); {REMEDY}") from e
    return stat.st_size, stat.st_mtime_ns


# ---------------------------------------------------------------------------
# Our own shards


def sha256(tensor):
    """Of a tensor's type, shape and bytes: hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_shard(path, tensors):
    """Write {name: tensor} to a safetensors file, whole or not at all: {name: sha256}.  Raises OSError, for example if the disk is full."""
    partial = Path(f"{path}.partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with open(partial, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        save_file(tensors, partial, metadata={"format": "pt"})
        with open(partial, "rb") as f:
            os.fchmod(f.fileno(), mode)  # save_file lets nobody else read it
            os.fsync(f.fileno())  # after a crash, a file of this name must have its contents
        os.replace(partial, path)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({e})") from e
    return {name: sha256(tensor) for name, tensor in tensors.items()}


def read_shard(path, sums, check=True):
    """The tensors of a shard that `sums`, {name: sha256}, lists.  Raises UsageError, naming one, unless each is there and unchanged.

    check: whether checksums are compared.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in sums:
                if name not in f.keys():  # noqa: SIM118  not a dict
                    raise UsageError(f"{path}: the tensor {name} is missing; {REMEDY}")
                tensors[name] = f.get_tensor(name).clone()
    except (SafetensorError, FileNotFoundError) as e:
        raise UsageError(f"{path}: missing or damaged, so that the tensor {next(iter(sums))} cannot be read ({e}); {REMEDY}") from e
    for name, tensor in tensors.items():
        if check and sha256(tensor) != sums[name]:
            raise UsageError(f"{path}: the tensor {name} is damaged, its sha256 is not the one written down; {REMEDY}")
    return tensors


def data_bytes(path):
    """Bytes of the tensors in a safetensors file, without its header."""
    with open(path, "rb") as f:
        return os.path.getsize(path) - 8 - int.from_bytes(f.read(8), "little")


def read_json(path, keys):
    """An object that has these keys.  Raises UsageError if it is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text())
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path}: missing or damaged ({type(e).__name__}: {e}); take it from a copy, or make the folder anew") from e


def read_index(path, keys):
    """An object that has these keys, each with a text for every tensor.  Raises UsageError if it is missing or damaged."""
    content = read_json(path, keys)
    for key in keys:
        if not (isinstance(content[key], dict) and all(isinstance(value, str) for value in content[key].values())):
            raise UsageError(f"{path}: damaged, {key} is not an object with a text for every tensor; {REMEDY}")
        for name in sorted(content[key].keys() ^ content[keys[0]].keys()):
            raise UsageError(f"{path}: damaged, only one of {keys[0]} and {key} has the tensor {name}; {REMEDY}")
    return content


# ---------------------------------------------------------------------------
# Folders


class Claim:
    """Locks a folder for as long as this object lives, or until the process ends."""

    def __init__(self, folder, name):
        """name: what a message calls the folder.  Raises UsageError if another run has it."""
        descriptor = os.open(folder, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self.release()
            raise UsageError(f"{name}: another run is writing there now; wait for its end, or give another folder") from e
        except OSError:
            pass  # a file system without locks


def remove_partial(folder, pattern):
    """Remove the unfinished folder of a run that was killed."""
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def new_folder(folder):
    """A folder to write into.  It gets its name when everything is written, and is removed if something fails before.

    The name may be that of an empty folder, or of a link to one, whose place it then takes.
    """
    folder = Path(folder).resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    claim = Claim(partial, folder)
    remove_partial(partial, "*")
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.rename(partial, folder)
    except OSError as e:
        raise OSError(f"{folder}: cannot get its name ({e.strerror}); all of it is in {partial}, rename that") from e
    finally:
        claim.release()
