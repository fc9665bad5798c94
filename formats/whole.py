"""A whole quantized model: loaded from a folder of ours, and written into one again by its own save_pretrained and push_to_hub."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from types import MethodType

import torch

import kernels
from formats.checkpoint import FILES, INDEX, Store, open_checkpoint
from formats.codes import packed_linear
from formats.hub import create_repo, upload
from modelutils import Decoder, load_tokenizer, skeleton
from quant import Grid, IntLinear, Part, QuantLinear
from recipe import UsageError

TOKENIZER = "tokenizer_config.json"


def load(folder, dtype="auto", device="cpu", kernel=None, arithmetic="auto"):
    """The whole model of a folder that --save wrote, on the device, ready to evaluate or to generate; arguments as of open_checkpoint.

    arithmetic: "integers", "dequantized" (once, when it is loaded), or "auto": integers on a GPU, dequantized on a CPU, where exact
    integers take ten times as long for a token.  Its save_pretrained and push_to_hub write a folder of this format again.
    """
    device = torch.device(device)
    decoder = open_checkpoint(folder, dtype, device, kernel, chosen(arithmetic, device))
    model = decoder.materialize(device)
    model.name_or_path = model.config.name_or_path = str(folder)
    return saves_itself(model, decoder.source.recipe, decoder.source.about, decoder.stored_dtype)


def chosen(arithmetic, device):
    """What "auto" means where text is generated."""
    return arithmetic if arithmetic != "auto" else "dequantized" if device.type == "cpu" else "integers"


# ---------------------------------------------------------------------------
# Back into a folder


def saves_itself(model, recipe, about, stored_dtype=None):
    """Give a whole quantized model a save_pretrained and a push_to_hub that write our format.

    about: {"model", "calibration"}, see Store.finish; stored_dtype: of the unquantized tensors (None: the model's).
    """

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As of transformers, but in the format that --save writes; a tokenizer is copied where the folder has none."""
        repo, token = kwargs.pop("repo_id", Path(save_directory).name), kwargs.pop("token", None)
        if unknown := kwargs.keys() - {"max_shard_size", "safe_serialization", "is_main_process"}:
            raise UsageError(f"save_pretrained of an AWRQ model cannot {', '.join(sorted(unknown))}; leave that out")
        if not kwargs.get("is_main_process", True):
            return
        write(repacked(self, recipe, stored_dtype), save_directory, self.name_or_path, about)
        if push_to_hub:
            upload(save_directory, create_repo(repo, token), token)

    def push_to_hub(self, repo_id, *, private=None, token=None, max_shard_size=None, **upload_arguments):
        """As of transformers, in the format that --save writes, with a model card."""
        repo = create_repo(repo_id, token, private)
        with tempfile.TemporaryDirectory() as folder:
            write(repacked(self, recipe, stored_dtype), folder, self.name_or_path, about)
            return upload(folder, repo, token, **upload_arguments)

    model.save_pretrained, model.push_to_hub = MethodType(save_pretrained, model), MethodType(push_to_hub, model)
    return model


class Rest:
    """The tensors of a whole model outside its blocks: a source of a Decoder, see formats.original."""

    def __init__(self, tensors, tied):
        self.tensors, self.tied = tensors, tied

    def rest(self, names):
        return {name: self.tensors[name].detach().cpu() for name in names}


def repacked(model, recipe, stored_dtype=None):
    """A Store of a whole quantized model as it is now.  Raises UsageError if a part of it is not in memory."""
    config = model.config
    empty = skeleton(config, model.dtype)
    empty.generation_config = model.generation_config
    tensors = model.state_dict()
    for name in (name for name, tensor in tensors.items() if tensor.is_meta):
        raise UsageError(f"{name}: is not in memory, so this model cannot be saved; load it without offloading")
    tied = {t: s for t, s in empty.all_tied_weights_keys.items() if tensors[t].data_ptr() == tensors[s].data_ptr()}
    store = Store(Decoder(empty, Rest(tensors, tied), stored_dtype), recipe)
    for i, block in enumerate(model.get_submodule(store.original.family.blocks)):
        store.blocks[i] = block.stored if hasattr(block, "stored") else packed_block(block, recipe, store)
    return store


def packed_block(block, recipe, store):
    """{name: tensor} of a block, its codes packed.  store: says how other tensors are stored."""
    tensors = dict(block.state_dict())
    for name, module in block.named_modules():
        if not isinstance(module, (IntLinear, QuantLinear, Part)) or name.endswith(".whole"):  # which is in a Part
            continue
        own = {key: tensors.pop(key) for key in [*tensors] if key.startswith(f"{name}.")}
        if isinstance(module, QuantLinear):
            tensors |= {f"{name}.{part}": t for part, t in module.stored.items()}
            tensors |= {key: own[key] for part in ("bias", "in_scale") if (key := f"{name}.{part}") in own}
        elif isinstance(module, Part):
            tensors |= integer_tensors(name, module.together.whole, module.index, slice(module.start, module.start + module.rows), recipe)
        else:
            tensors |= integer_tensors(name, module, 0, slice(0, module.rows), recipe)
    return {name: store.as_stored(t.detach().cpu(), name).clone() for name, t in tensors.items()}


def integer_tensors(name, whole, index, rows, recipe):
    """{name: tensor}, as they are stored, of the linear that is some rows of an IntLinear, its index-th.  rows: a slice."""
    scale, zero = (p[:, rows].T.contiguous() for p in (whole.scale, whole.zero))
    grid = Grid(scale, zero.float(), recipe.wbits, recipe.groupsize)
    found = packed_linear(name, kernels.unpack_w4(whole.packed.cpu())[rows, : whole.columns], grid, recipe.wbits)
    found |= {f"{name}.bias": whole.bias[rows]} if whole.biased[index] else {}
    return found | ({} if whole.in_scale is None else {f"{name}.in_scale": whole.in_scale})


def write(store, folder, name, about):
    """Write a Store into a folder, which may have other files already; if it has no tokenizer, that of the model `name` is copied."""
    folder = Path(folder).resolve()
    tokenizer = None
    if not (folder / TOKENIZER).is_file():
        try:
            tokenizer = load_tokenizer(name)
        except UsageError as e:
            warnings.warn(f"{folder}: written without a tokenizer, which --load needs: {e}", stacklevel=3)
    if not folder.is_dir() or not any(folder.iterdir()):
        return store.save(folder, tokenizer, about)
    made = Path(tempfile.mkdtemp(dir=folder, prefix=f"{FILES}-"))  # in it, as another place can be on another disk
    try:
        store.finish(made, tokenizer, about)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return move_files(made, folder)


def move_files(made, folder):
    """Move a finished folder's files into another and remove the shards of the model there, which is without an index meanwhile.

    Raises OSError, which says where the rest is, if a file cannot be moved.
    """
    old = {path.name for path in folder.glob(f"{FILES}-*.safetensors")} - {path.name for path in made.iterdir()}
    try:
        (folder / INDEX).unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == INDEX):  # the index last: without it there is no model
            os.replace(path, folder / path.name)
    except OSError as e:
        raise OSError(f"{folder}: not all of the model could be moved there ({e.strerror}); the rest is in {made}, move that") from e
    made.rmdir()
    for name in old:
        (folder / name).unlink()
