"""Does vLLM serve an export in the activations that it says, with every tensor as it allocates it?  Asks vLLM's source, not installed.

url=$(curl -s https://pypi.org/simple/vllm/ | grep -o 'https://[^"#]*/vllm-0.33.0.tar.gz'); curl -sO "$url"     # one file, 47 MB
python scripts/check_vllm.py vllm-0.33.0.tar.gz models/llama-ct models/qwen3-ct models/opt-ct

SOURCE is vLLM's source archive, a wheel, or an unpacked folder of either.  (`pip download` of the archive would build it, and load
gigabytes.)  Of it are run: how the configuration is read, what is ignored, which scheme a layer gets, and what that scheme allocates for
the layers as vLLM fuses them; the rest of vLLM is not needed.  A folder passes if its linears get CompressedTensorsWNA8Int, or
CompressedTensorsWNA16 where it leaves activations unquantized, and if every tensor has the name, the shape and the type that are
allocated.  Scales are allocated in the model's type; ours are float32, which vLLM casts: that is said, and is no failure.  Exit status 1
if a folder does not pass.
"""

import argparse
import ast
import math
import re
import sys
import tarfile
import zipfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import safe_open

from modelutils import load_config, skeleton
from recipe import UsageError
from run.flags import Parser

ROOT = "vllm/model_executor/"
CONFIG = f"{ROOT}layers/quantization/compressed_tensors/compressed_tensors.py"
UTILS = f"{ROOT}layers/quantization/compressed_tensors/utils.py"
MATCHING = f"{ROOT}layers/quantization/utils/config_utils.py"
SCHEMES = f"{ROOT}layers/quantization/compressed_tensors/schemes/"
MARLIN = f"{ROOT}layers/quantization/utils/marlin_utils.py"
PARAMETER = f"{ROOT}parameter.py"
READ = (CONFIG, UTILS, MATCHING, MARLIN, PARAMETER)
WANTED = {True: "CompressedTensorsWNA8Int", False: "CompressedTensorsWNA16"}  # the scheme, by whether activations are quantized

# ---------------------------------------------------------------------------
# vLLM's source


def source_files(source):
    """{name: a function that reads it} of an archive, a wheel or a folder."""
    source = Path(source)
    if source.is_dir():
        return {str(path.relative_to(source.parent)): path.read_bytes for path in source.rglob("*") if path.is_file()}
    if source.is_file() and zipfile.is_zipfile(source):
        wheel = zipfile.ZipFile(source)
        return {name: lambda name=name: wheel.read(name) for name in wheel.namelist()}
    if source.is_file() and tarfile.is_tarfile(source):
        archive = tarfile.open(source)  # noqa: SIM115  it is read from as long as this runs
        return {member.name: lambda member=member: archive.extractfile(member).read() for member in archive if member.isfile()}
    raise UsageError(f"{source}: no source archive, wheel or folder of vLLM; `python {sys.argv[0]} --help` says how to fetch one")


class Source:
    """The parts of vLLM's source that say how it reads a folder."""

    def __init__(self, source):
        """source: see source_files.  Raises UsageError if a part is not there."""
        self.files, self.version = {}, "of unknown version"
        for name, read in source_files(source).items():
            _, inside, rest = name.rpartition(ROOT)
            if inside and (ROOT + rest in READ or (ROOT + rest).startswith(SCHEMES)):
                self.files[ROOT + rest] = read().decode()
            if name.endswith("METADATA") or name.endswith("PKG-INFO") and "egg-info" not in name:
                self.version = re.search(r"^Version: (\S+)", read().decode(), re.MULTILINE)[1]
        for name in READ:
            if name not in self.files:
                raise UsageError(f"{source}: has no {name}; this script knows vLLM 0.33.0")

    @property
    def names(self):
        """What vLLM's code is run with, besides what it defines: {name: thing}."""
        from compressed_tensors import CompressionFormat
        from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy, QuantizationType

        known = (CompressionFormat, ActivationOrdering, QuantizationArgs, QuantizationStrategy, QuantizationType, Fraction)
        names = {thing.__name__: thing for thing in known} | {"torch": torch, "math": math, "re": re, "__name__": "vllm"}
        return names | {"cast": lambda _, value: value, "logger": MagicMock()}

    def settings(self, about):
        """vLLM's CompressedTensorsConfig of a quantization_config, as far as it chooses schemes, which stand for themselves."""
        names = self.names
        define(functions(self.files[MATCHING]), names)
        define(functions(self.files[UTILS]), names)
        for scheme in set(re.findall(r"\bCompressedTensors\w+", self.files[CONFIG])) - {"CompressedTensorsConfig"}:
            names[scheme] = lambda scheme=scheme, **arguments: SimpleNamespace(scheme=scheme, arguments=arguments)
        keep = re.compile(r"_is_\w+|_get_scheme_from_parts|get_scheme_dict|_quantization_scheme_map_from_config")
        kind = define_class(self.files[CONFIG], "CompressedTensorsConfig", names, keep)
        kind._check_scheme_supported = staticmethod(lambda *_, **__: True)  # by the device: any
        made = kind()
        made.target_scheme_map = made._quantization_scheme_map_from_config(about)
        made.ignore, made.quant_format, made.packed_modules_mapping = about.get("ignore", []), about.get("format"), FUSED
        return made

    def allocated(self, chosen, sizes, columns):
        """What a scheme allocates for a layer of linears with these rows, [rows, ...], and columns: {name: parameter}."""
        text = next(text for path, text in self.files.items() if path.startswith(SCHEMES) and f"class {chosen.scheme}(" in text)
        names, made = self.names, {}
        names |= {table: dict.fromkeys(range(2, 9)) for table in re.findall(r"\b\w+_SUPPORTED_TYPES_MAP\b", text)}
        names |= dict.fromkeys((*re.findall(r"\b\w+Parameter\b", text), "MPLinearLayerConfig"), SimpleNamespace)
        names["envs"] = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
        names["choose_mp_linear_kernel"] = lambda config: MagicMock(__name__="kernel")  # which one runs it changes no tensor
        names |= {"MarlinLinearKernel": None, "verify_group_size_divides_partition": lambda *_: None}  # there is one partition
        define(functions(self.files[MARLIN], "marlin_repeat_scales_on_all_ranks"), names)
        scheme = define_class(text, chosen.scheme, names)(**chosen.arguments)
        with torch.device("meta"):
            scheme.create_weights(
                layer=SimpleNamespace(register_parameter=made.__setitem__),
                output_size=sum(sizes),
                input_size=columns,
                output_partition_sizes=sizes,
                input_size_per_partition=columns,
                params_dtype=torch.bfloat16,
                weight_loader=None,
            )
        return made

    def places(self, parameter, sizes):
        """Where in a parameter linears with these rows go, by vLLM's own arithmetic: [(its rows there, the first of them)]."""
        found = [(rows, sum(sizes[:k])) for k, rows in enumerate(sizes)]
        if len(sizes) == 1:
            return [(len(parameter.data), 0)]
        if getattr(parameter, "packed_dim", None) != 0:
            return found
        names = self.names
        define(functions(self.files[PARAMETER], "_adjust_shard_indexes_for_packing"), names)
        return [names["_adjust_shard_indexes_for_packing"](*place, parameter.packed_factor, None) for place in found]


def functions(text, *only):
    """The functions of a Python file; only: the ones with these names."""
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and (not only or node.name in only)]


def define_class(text, name, names, keep=re.compile(".*")):
    """A class of a Python file, without its bases, and with the methods that `keep` matches."""
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
    found.bases, found.body = [], [part for part in found.body if not isinstance(part, ast.FunctionDef) or keep.fullmatch(part.name)]
    define([found], names)
    return names[name]


def define(nodes, names):
    """Run definitions in `names`.  Annotations are not looked at, and empty mappings are the defaults of what would need an import."""
    tree = ast.parse("from __future__ import annotations")
    tree.body += nodes
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.args.defaults = [d if isinstance(d, ast.Constant) else ast.Dict([], []) for d in node.args.defaults]
    exec(compile(ast.fix_missing_locations(tree), "vllm", "exec"), names)


# ---------------------------------------------------------------------------
# A folder

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # packed_modules_mapping of its models
TYPES = {torch.int32: ("I32",), torch.int64: ("I64",)}
FLOATS = ("F16", "BF16", "F32")  # for any other type: vLLM casts them
SHOWN = 5  # of what is wrong


def layers_of(model):
    """{name in vLLM: [names in the model]} of all linears, fused as vLLM fuses them."""
    found = {}
    for name in (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)):
        path, _, last = name.rpartition(".")
        fused = next((fused for fused, parts in FUSED.items() if last in parts), last)
        found.setdefault(f"{path}.{fused}" if path else fused, []).append(name)
    return found


def headers(folder):
    """{name: (shape, type)} of all tensors of a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118  not a dict
            found |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    return found


def read_config(folder):
    """The configuration of a folder, and its quantization_config apart."""
    config = load_config(folder)
    about = getattr(config, "quantization_config", None) or {}
    if about.get("quant_method") != "compressed-tensors":
        raise UsageError(f"{folder}: is no export in compressed-tensors; give what --export compressed-tensors wrote")
    del config.quantization_config
    return config, about


class Check:
    """What vLLM makes of a folder: `wrong`, lines; `cast`, scales of another type; `schemes`, {name: layers}."""

    def __init__(self, source, folder):
        self.source, self.folder = source, folder
        self.config, about = read_config(folder)
        self.model, self.there, self.settings = skeleton(self.config, torch.float32), headers(folder), source.settings(about)
        self.wrong, self.cast, self.schemes, self.replaced, self.known = [], [], {}, set(), set()
        for name, linears in layers_of(self.model).items():
            self.layer(name, linears)
        self.others()
        wanted = WANTED[any(group["input_activations"] for group in about["config_groups"].values())]
        if other := sorted(set(self.schemes) - {wanted}):
            self.wrong.insert(0, f"its activations are for {wanted}, vLLM takes {', '.join(other)}")

    def tensor(self, name, shape, dtype):
        """Note what is wrong with a tensor: whether nothing is."""
        self.known.add(name)
        found, kind = self.there.get(name, (None, None))
        if kind is None:
            self.wrong.append(f"{name}: missing")
        elif found != tuple(shape):
            self.wrong.append(f"{name}: {found}, vLLM allocates {tuple(shape)}")
        elif kind not in TYPES.get(dtype, FLOATS):
            self.wrong.append(f"{name}: {kind}, vLLM allocates {dtype}")
        else:
            return True
        return False

    def layer(self, name, linears):
        """A layer of vLLM, made of these linears."""
        modules = [self.model.get_submodule(linear) for linear in linears]
        parts = self.settings.get_scheme_dict(modules[0], name)
        if parts is None:
            return  # ignored: an ordinary linear
        self.replaced |= {f"{linear}.weight" for linear in linears}
        weights, activations = parts["weights"], parts["input_activations"]
        try:
            chosen = self.settings._get_scheme_from_parts(weights, activations, parts["output_activations"], parts["format"], name)
        except NotImplementedError as e:
            how = " and ".join(f"{'' if q.symmetric else 'a'}symmetric, per {q.strategy}" for q in (weights, activations) if q)
            self.wrong.append(f"{name}: {str(e).split(' for ')[0]} for {how}".replace("QuantizationStrategy.", ""))
            self.known |= {key for key in self.there if key.rpartition(".")[0] in linears}
            return
        self.schemes[chosen.scheme] = self.schemes.get(chosen.scheme, 0) + 1
        rows = [module.out_features for module in modules]
        for suffix, parameter in self.source.allocated(chosen, rows, modules[0].in_features).items():
            self.parameter(suffix, parameter, name, dict(zip(linears, rows, strict=True)))

    def parameter(self, suffix, parameter, layer, rows):
        """One parameter of a layer, which the linears, {name: rows}, fill one after the other."""
        whole, end = parameter.data, 0
        if suffix == "weight_shape":  # each linear's is read by itself
            for linear in rows:
                self.tensor(f"{linear}.{suffix}", whole.shape, whole.dtype)
            return
        for linear, (size, first) in zip(rows, self.source.places(parameter, [*rows.values()]), strict=True):
            key = f"{linear}.{suffix}"
            if first != end:
                self.wrong.append(f"{key}: begins within a word of {layer}")
            end = first + size
            if self.tensor(key, (size, *whole.shape[1:]), whole.dtype) and whole.is_floating_point() and self.there[key][1] == "F32":
                self.cast.append(key)
        if end != len(whole):
            self.wrong.append(f"{layer}.{suffix}: its linears fill {end} of {len(whole)} rows")

    def others(self):
        """All that no scheme has allocated."""
        for name, tensor in self.model.state_dict().items():
            if name not in self.replaced and (name in self.there or name not in self.model.all_tied_weights_keys):
                self.tensor(name, tensor.shape, tensor.dtype)
        self.wrong += [f"{name}: vLLM has no place for it" for name in sorted(self.there.keys() - self.known)]

    def show(self):
        schemes = ", ".join(f"{n} layers {scheme}" for scheme, n in self.schemes.items()) or "no scheme"
        print(f"{self.folder}: {self.config.model_type}, {len(self.there)} tensors, {schemes}")
        if self.cast:
            print(f"  {len(self.cast)} scales are float32: vLLM casts them to the model's type")
        for line in self.wrong[:SHOWN]:
            print(f"  WRONG {line}")
        if len(self.wrong) > SHOWN:
            print(f"  WRONG and {len(self.wrong) - SHOWN} more")


def main(args):
    source = Source(args.source)
    print(f"vLLM {source.version}, its source")
    checks = [Check(source, folder) for folder in args.folders]
    for check in checks:
        check.show()
    wrong = sum(bool(check.wrong) for check in checks)
    print(f"{wrong} of {len(checks)} folders are wrong" if wrong else "every tensor is as vLLM allocates it")
    sys.exit(1 if wrong else 0)


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="vLLM's source archive, wheel, or unpacked folder")
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="that --export compressed-tensors wrote")
    return parser


if __name__ == "__main__":
    parser().run(main)
