"""scripts/check_vllm.py, on a stand-in for vLLM's source."""

import tarfile

import pytest
from conftest import tiny_model, toy_tokenizer
from safetensors.torch import load_file, save_file
from test_checkpoint import TYPES, saved
from test_export import SERVE

from formats.export import export
from scripts import check_vllm

# ---------------------------------------------------------------------------
# What vLLM makes of an export: a stand-in for the parts of its source that the script runs

VLLM = {
    "layers/quantization/compressed_tensors/compressed_tensors.py": """
class CompressedTensorsConfig(Base):
    @classmethod
    def _quantization_scheme_map_from_config(cls, config):
        group = config["config_groups"]["group_0"]
        acts = group["input_activations"]
        found = {"weights": QuantizationArgs.model_validate(group["weights"]), "format": group["format"], "output_activations": None}
        return {"Linear": found | {"input_activations": acts and QuantizationArgs.model_validate(acts)}}

    def get_scheme_dict(self, layer, layer_name: Unknown = None):
        return None if should_ignore_layer(layer_name, self.ignore) else self.target_scheme_map["Linear"]

    def _get_scheme_from_parts(self, weight_quant, input_quant, output_quant, format, layer_name):
        if input_quant is None or input_quant.num_bits != 8:
            return CompressedTensorsWNA16(weight_quant=weight_quant)
        if input_quant.symmetric and input_quant.strategy == QuantizationStrategy.TOKEN.value:
            return CompressedTensorsWNA8Int(weight_quant=weight_quant)
        raise NotImplementedError("no scheme for this")
""",
    "layers/quantization/compressed_tensors/utils.py": "def should_ignore_layer(name, ignore=Proxy({})):\n    return name in ignore\n",
    "layers/quantization/utils/config_utils.py": "",
    "layers/quantization/utils/marlin_utils.py": "def marlin_repeat_scales_on_all_ranks(group_size, is_row_parallel):\n    return False\n",
    "parameter.py": """
def _adjust_shard_indexes_for_packing(shard_size, shard_offset, packed_factor, marlin_tile_size):
    return round(shard_size // packed_factor), round(shard_offset // packed_factor)
""",
    "layers/quantization/compressed_tensors/schemes/wna8.py": """
class CompressedTensorsWNA8Int(Base):
    def __init__(self, weight_quant):
        self.bits, self.sym = weight_quant.num_bits, weight_quant.symmetric

    def create_weights(self, layer, output_size, input_size, params_dtype, **kwargs):
        factor, words = Fraction(32, self.bits), lambda n: math.ceil(n * self.bits / 32)
        weight = torch.empty(output_size, words(input_size), dtype=torch.int32)
        layer.register_parameter("weight_packed", PackedParameter(data=weight, packed_dim=1, packed_factor=factor))
        layer.register_parameter("weight_scale", ScaleParameter(data=torch.empty(output_size, 1, dtype=params_dtype)))
        layer.register_parameter("weight_shape", PlainParameter(data=torch.empty(2, dtype=torch.int64)))
        if not self.sym:
            zero = torch.empty(words(output_size), 1, dtype=torch.int32)
            layer.register_parameter("weight_zero_point", PackedParameter(data=zero, packed_dim=0, packed_factor=factor))
""",
}
SCHEMES = "layers/quantization/compressed_tensors/schemes"
VLLM[f"{SCHEMES}/wna16.py"] = VLLM[f"{SCHEMES}/wna8.py"].replace("WNA8Int", "WNA16")  # which allocates the same


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A source archive."""
    path, folder = tmp_path_factory.mktemp("vllm") / "vllm-1.2.3.tar.gz", tmp_path_factory.mktemp("source")
    files = {f"vllm/model_executor/{name}": text for name, text in VLLM.items()} | {"PKG-INFO": "Name: vllm\nVersion: 1.2.3\n"}
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            (folder / "file").write_text(text)
            archive.add(folder / "file", f"vllm-1.2.3/{name}")
    return path


@pytest.mark.slow
def test_checking_an_export_against_vllm(run_script, vllm, tmp_path):
    """Green where every tensor is as it is allocated; red for asymmetric activations, another shape or type, and a tensor too many."""
    exports = {}
    for name, kind, settings in (
        ("llama", TYPES[2], SERVE),
        ("qwen3", TYPES[4], SERVE | {"wbits": 3, "sym": True}),
        ("opt", TYPES[0], SERVE | {"wbits": 3, "sym": True}),
        ("asymmetric", TYPES[2], {"act_pertoken": True}),
        ("narrow", TYPES[2], SERVE | {"wbits": 3}),  # k and v have 16 rows: their zero points fill no words
        ("16 bits", TYPES[2], {"method": "gptq", "act_bits": 16}),
        ("6 bits", TYPES[2], SERVE | {"act_bits": 6}),
    ):
        exports[name] = tmp_path / name
        export(
            saved(tmp_path / "saved" / name, tiny_model(*kind), {"method": "rtn"} | settings),
            exports[name],
            "compressed-tensors",
            toy_tokenizer(),
        )
    status, out, _ = run_script(check_vllm, vllm, *(exports[name] for name in ("llama", "qwen3", "opt", "16 bits")))
    assert status == 0 and "vLLM 1.2.3" in out and "every tensor is as vLLM allocates it" in out and "14 scales are float32" in out, out

    def damaged(change):
        path = next(exports["llama"].glob("model-00001*.safetensors"))
        tensors = load_file(path)
        prefix = "model.layers.0.mlp.down_proj."
        save_file(tensors | {prefix + name: t.contiguous() for name, t in change(tensors, prefix).items()}, path, {"format": "pt"})
        found = run_script(check_vllm, vllm, exports["llama"])[:2]
        save_file(tensors, path, {"format": "pt"})
        return found

    for (status, out), part in (
        (run_script(check_vllm, vllm, exports["asymmetric"])[:2], "no scheme for asymmetric, per channel and asymmetric, per token"),
        (run_script(check_vllm, vllm, exports["narrow"])[:2], "its linears fill"),
        (run_script(check_vllm, vllm, exports["6 bits"])[:2], "vLLM takes CompressedTensorsWNA16"),
        (
            damaged(lambda t, p: {"weight_packed": t[f"{p}weight_packed"][:, 1:]}),
            "down_proj.weight_packed: (32, 7), vLLM allocates (32, 8)",
        ),
        (damaged(lambda t, p: {"weight_packed": t[f"{p}weight_packed"].float()}), "vLLM allocates torch.int32"),
        (damaged(lambda t, p: {"g_idx": t[f"{p}weight_shape"] + 1}), "down_proj.g_idx: vLLM has no place for it"),
    ):
        assert status == 1 and "WRONG" in out and part in out, out
    for wrong, part in ((tmp_path / "nowhere", "no source archive"), (tmp_path, "has no vllm/")):
        status, _, err = run_script(check_vllm, wrong, exports["llama"])
        assert status == 2 and part in err[0], err
    status, _, err = run_script(check_vllm, vllm, tmp_path / "saved" / "llama")
    assert status == 2 and "no export in compressed-tensors" in err[0], err
