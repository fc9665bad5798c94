"""--recipe: the settings of a run from a file, YAML or the JSON that a run wrote.  Imports nothing slow, so that --help is quick."""

import difflib
import json
from dataclasses import fields
from pathlib import Path

from recipe import DTYPES, METHODS, PRESETS, Recipe, UsageError

KINDS = {f.name: type(f.default) for f in fields(Recipe)} | {"preset": str, "act_quant": bool, "dtype": str, "walk_batch": int}
CHOICES = {"method": METHODS, "preset": PRESETS, "dtype": DTYPES}


def read_settings(path):
    """{flag: value} of a file, with the recipe's names, and the model's name or None.

    The JSON of a run has its recipe, the type that it computed in and the sequences that ran together: all that its codes depend on but for
    the machine.  YAML may name a preset too, which its other lines override.  Raises UsageError for what is no setting.
    """
    content, model = read_mapping(path), None
    if "schema" in content and isinstance(content.get("recipe"), dict):
        model, protocol = content.get("model"), content.get("protocol") or {}
        content = content["recipe"] | {key: protocol[key] for key in ("dtype", "walk_batch") if key in protocol}
    for key, value in content.items():
        check_setting(path, key, value)
    settings = PRESETS[content.pop("preset", "paper")] | content
    if "act_bits" in settings:
        settings.setdefault("act_quant", settings["act_bits"] < 16)
    return settings, model


def read_mapping(path):
    """The mapping that a YAML or JSON file has."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--recipe {path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    try:
        if Path(path).suffix == ".json":
            content = json.loads(text)
        else:
            import yaml  # where it is needed

            content = yaml.safe_load(text)
    except ValueError as e:
        raise UsageError(f"--recipe {path}: is not JSON ({e})") from e
    except yaml.YAMLError as e:
        raise UsageError(f"--recipe {path}: is not YAML ({e})") from e
    if not isinstance(content, dict):
        raise UsageError(f"--recipe {path}: has no settings; it is lines of NAME: VALUE, or the JSON that --output_path wrote")
    return content


def check_setting(path, key, value):
    """Raises UsageError unless a setting is there, and its value of the right kind."""
    if key not in KINDS:
        near = difflib.get_close_matches(str(key), KINDS, 1) or KINDS
        raise UsageError(f"--recipe {path}: {key} is no setting; nearest: {', '.join(near)}")
    kind = KINDS[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        what = {int: "a whole number", float: "a number, in YAML with a point, as 1.0e-2", bool: "true or false", str: "a word"}[kind]
        raise UsageError(f"--recipe {path}: {key} is {value!r}, must be {what}")
    if value not in CHOICES.get(key, (value,)):
        raise UsageError(f"--recipe {path}: {key} {value} is none of {', '.join(CHOICES[key])}")


def changes(path, settings, used):
    """A line about which settings of a file were overridden, or are of no use to the method.  used: {flag: value} of the run."""
    other = [f"{flag} {value} -> {used[flag]}" for flag, value in settings.items() if flag in used and used[flag] != value]
    return f"--recipe {path}: {'changed: ' + ', '.join(other) if other else 'taken as it is'}"
