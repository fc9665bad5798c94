"""Our codes in other people's formats: a row of FORMATS for each."""

from collections.abc import Callable
from dataclasses import dataclass

from families import FAMILIES
from formats import compressed, llamacpp
from formats.card import size_line, tensor_bytes, write_card
from formats.checkpoint import check_packable
from formats.shards import new_folder


@dataclass(frozen=True)
class Format:
    """How another format says what we have.  like: a file of the original in that format, where it needs one."""

    check: Callable  # (recipe, config of the model, like, tokenizer): raises UsageError for what it cannot say
    write: Callable  # (formats.checkpoint.Store, empty folder, tokenizer, like)
    readers: Callable  # (recipe, config of the model, folder) -> [card.Reader]
    kind: tuple[str, tuple[str, ...]]  # library and tags of its card
    sizes: Callable  # (folder, config of the model) -> {name in the model: bytes}


FORMATS = {  # by the name that --export takes: recipe.EXPORTS
    "compressed-tensors": Format(
        compressed.check, compressed.write, compressed.readers, ("transformers", ("compressed-tensors", "vllm")), tensor_bytes
    ),
    "gguf": Format(llamacpp.check, llamacpp.write, llamacpp.readers, ("gguf", ("gguf", "llama.cpp")), llamacpp.sizes),
}


def check_export(name, recipe, config, like=None, tokenizer=None):
    """Raises UsageError for what a format cannot say.  like: see Format."""
    check_packable(recipe)
    FORMATS[name].check(recipe, config, like, tokenizer)


def export(store, folder, name, tokenizer, like=None, about=None):
    """Write the blocks of a formats.checkpoint.Store in another format, into a new folder, which appears when it is complete.

    like: see Format; about: see card.model_card.  Returns the lines to print of it: its size by part, and who reads it.
    """
    form, config, recipe = FORMATS[name], store.original.config, store.recipe
    form.check(recipe, config, like, tokenizer)
    with new_folder(folder) as partial:
        form.write(store, partial, tokenizer, like)
        size = size_line(form.sizes(partial, config), FAMILIES[config.model_type])
        write_card(partial, about or {}, recipe, form.kind, form.readers(recipe, config, "FOLDER"), size)
    return [f"{folder}: written as {name}; {size}", *map(str, form.readers(recipe, config, folder))]
