"""The model card of a folder: what is in it, how it was made, who reads it, and how large its parts are."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils.hub import cached_file

from recipe import Recipe
from runtime import replace_text

CARD = "README.md"
PAPER = "https://github.com/linzhao-ai/AWRQ"
MB = 1e6
WRITTEN = ("method", "seed", "act_bits", "min")  # also where they are the default: the scripts have their own of the last two


@dataclass(frozen=True)
class Reader:
    """A program that reads a folder."""

    name: str
    command: str  # "": it does not read it, and the note says why
    note: str = ""

    def __str__(self):
        return f"{self.name}: {self.command}" + (f" ({self.note})" if self.note and self.command else self.note)


# ---------------------------------------------------------------------------
# Sizes


def part_of(name, family):
    """Which part of a model a stored tensor belongs to.  name: in the model, with what the format adds; family: a families.Family."""
    module = name.rpartition(".")[0]
    if name.startswith(f"{family.blocks}."):
        inner = module.removeprefix(f"{family.blocks}.").partition(".")[2]
        return "quantized linears" if inner in {linear for group in family.groups for linear in group.linears} else "other"
    return "embedding" if module in family.residual.embeddings else "head" if module == family.residual.head else "other"


def tensor_bytes(folder, config=None):
    """{name: bytes} of all tensors in the safetensors files of a folder, from their headers."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        found |= {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"}
    return found


def size_line(sizes, family):
    """The size of a folder by part, in a line.  sizes: {name: bytes}, see part_of."""
    parts = dict.fromkeys(("quantized linears", "embedding", "head", "other"), 0)
    for name, size in sizes.items():
        parts[part_of(name, family)] += size
    whole = sum(parts.values())
    each = ", ".join(f"{name} {size / MB:.1f}" for name, size in parts.items() if size)
    return f"{(whole - parts['quantized linears']) / MB:.1f} of {whole / MB:.1f} MB are unquantized ({each})"


# ---------------------------------------------------------------------------
# The card


def base_name(model):
    """What a card calls the base model: a hub name as it is, of a local folder the last part of its path."""
    return Path(model).resolve().name if os.path.isdir(model) else model


def base_license(model):
    """{"license", "license_name", "license_link"}, as far as the base model's own card says; {} if it has none that can be had."""
    with suppress(Exception):  # whatever hub, network and YAML raise: the card then says that it is not known
        if path := cached_file(model, CARD, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False):
            data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
            return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    return {}


def settings_yaml(recipe):
    """The settings of a recipe that are WRITTEN or not the default, as --recipe takes them."""
    default = asdict(Recipe())
    lines = {name: value for name, value in asdict(recipe).items() if value != default[name] or name in WRITTEN}
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())


def calibration_line(used, recipe):
    """What a model was calibrated on, in a line.  used: the protocol of a calibration, or None if it is not known."""
    if not recipe.calibrated:
        return "It needed no calibration text."
    if not used:
        return "What it was calibrated on is not known."
    tuned = f", tuned on {used['tune_samples']} more" if "tune_samples" in used else ""
    return f"Calibrated on {used['nsamples']} x {used['seqlen']} tokens of {used['corpus']} {used['split']}, seed {used['seed']}{tuned}."


def model_card(about, recipe, kind, readers, size):
    """The text of a card.

    about: {"model": name of the unquantized one, "calibration": its protocol}, as far as known; kind: (library, tags) of the format;
    readers: [Reader]; size: of size_line.
    """
    library, tags = kind
    model = about.get("model")
    license = base_license(model) if model else {}
    bits = f"W{recipe.wbits}A{recipe.act_bits}"
    base = {"base_model": base_name(model), "base_model_relation": "quantized"} if model else {}
    data = ModelCardData(
        **base, **license, library_name=library, pipeline_tag="text-generation", tags=["awrq", "quantized", bits.lower(), *tags]
    )
    named = base_name(model) if model else "A model"
    loading = "\n".join(
        f"- {reader.name}: {'`' + reader.command + '` ' if reader.command else ''}{reader.note}".rstrip() for reader in readers
    )
    unknown = "" if license else "\nThe base model's card names no licence; that of the base model applies.\n"
    text = f"""# {named}, {bits}

{named}, quantized by [AWRQ]({PAPER}) to {recipe.wbits}-bit weights and {recipe.act_bits}-bit activations ({recipe.method}).
{size}.
{unknown}
## How to load it

{loading}

## How it was made

{calibration_line(about.get("calibration"), recipe)} Settings, as `--recipe FILE` takes them; all others are the default:

```yaml
{settings_yaml(recipe)}```
"""
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def write_card(folder, *args):
    """Write the card of a folder; the other arguments are those of model_card."""
    replace_text(Path(folder, CARD), model_card(*args))


def add_results(folder, text):
    """Add what was measured, as Markdown, to the card of a folder."""
    path = Path(folder, CARD)
    replace_text(path, f"{path.read_text(encoding='utf-8')}\n## What was measured\n\n{text}\n")
