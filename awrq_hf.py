"""transformers loads a folder that --save wrote, once this file is imported; it lies in a checkout of this program.

import awrq_hf
model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)

python -c "import awrq_hf, lm_eval.__main__ as m; m.cli_evaluate()" run --model hf --model_args pretrained=FOLDER --tasks copa

Its logits are those of formats.whole.load in the same dtype, to the last bit; on a CPU computed on dequantized numbers, on a GPU in
integers, unless the configuration that is loaded with says otherwise:

config = AutoConfig.from_pretrained(FOLDER); config.quantization_config["arithmetic"] = "integers"; from_pretrained(FOLDER, config=config)
"""

from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import kernels
from families import FAMILIES
from formats.checkpoint import FORMAT, INDEX, computes_integers, frozen, origin
from formats.codes import PARTS, packed_shapes, unpacked_linear
from formats.whole import chosen, saves_itself
from quant import Batch, QuantLinear, from_int, use_integers
from recipe import ARITHMETICS, Recipe, UsageError


@register_quantization_config("awrq")
class AwrqConfig(QuantizationConfigMixin):
    """The quantization_config of a folder of ours.  arithmetic: of ARITHMETICS; about: what else stands there."""

    def __init__(self, recipe=None, format=FORMAT, arithmetic="auto", **about):
        self.quant_method, self.arithmetic, self.format = "awrq", arithmetic, format
        self.recipe, self.about = recipe or {}, {key: value for key, value in about.items() if key != "quant_method"}
        if arithmetic not in ARITHMETICS:
            raise UsageError(f"arithmetic {arithmetic}: must be {', '.join(ARITHMETICS)}")
        if format not in range(1, FORMAT + 1):
            raise UsageError(f"this folder has format {format}, this version reads up to {FORMAT}; update the code")

    def to_dict(self):
        return {"quant_method": "awrq", "format": self.format, "recipe": self.recipe} | self.about


class Stored(nn.Module):
    """A linear (R, C) as it lies on disk, until all tensors are there."""

    def __init__(self, linear, recipe, divided):
        """linear: the nn.Linear that it stands for; divided: whether there is an in_scale."""
        super().__init__()
        self.R, self.C = linear.weight.shape
        self.dtype = linear.weight.dtype
        for part, (shape, dtype) in packed_shapes((self.R, self.C), recipe).items():
            self.register_parameter(part, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.bias = linear.bias
        self.in_scale = nn.Parameter(torch.empty(self.C, dtype=torch.float32), requires_grad=False) if divided else None

    def restored(self, recipe, batch):
        """The frozen QuantLinear that computes it, and its codes (R, C) uint8 with their Grid, on the CPU."""
        packed = {part: getattr(self, part).data.cpu() for part in PARTS}
        codes = unpacked_linear({f"it.{part}": t for part, t in packed.items()}, "it", (self.R, self.C), recipe)
        bias = None if self.bias is None else self.bias.data.cpu()
        linear = QuantLinear(SimpleNamespace(weight=torch.empty(0, dtype=self.dtype), bias=bias), batch)
        linear.weight.data = from_int(*codes)
        in_scale = None if self.in_scale is None else self.in_scale.data.cpu()
        return frozen(linear, packed, in_scale, recipe), codes


@register_quantizer("awrq")
class AwrqQuantizer(HfQuantizer):
    """Puts Stored in the place of the quantized linears of a model before its tensors are read, and what computes them there afterwards."""

    requires_calibration = True  # transformers cannot make such a model
    is_trainable = False

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        try:
            self.recipe = Recipe(**quantization_config.recipe)
        except TypeError as e:
            raise UsageError(f"its config.json is damaged, or of another version of the code ({e})") from e

    def is_serializable(self):
        return True

    def update_attn_implementation(self, config):
        """The first thing that is asked after the quantizer is there, and before files are looked for: ours have names of their own."""
        if config.model_type not in FAMILIES:
            raise UsageError(f"a model of the {config.model_type} family; supported: {', '.join(FAMILIES)}")
        self.family, config.transformers_weights = FAMILIES[config.model_type], INDEX
        dtype = PreTrainedConfig.get_config_dict(config._name_or_path)[0].get("dtype")  # of the file: config has what is asked for
        self.stored_dtype = dtype and getattr(torch, dtype)
        return config

    def _blocks(self, model):
        """Of each block (its name, the block, {name in it: module} of the quantized linears)."""
        names = [name for group in self.family.groups for name in group.linears]
        for i, block in enumerate(model.get_submodule(self.family.blocks)):
            yield f"{self.family.blocks}.{i}", block, {name: block.get_submodule(name) for name in names}

    def _process_model_before_weight_loading(self, model, checkpoint_files=(), **kwargs):
        divided = set()
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as f:
                divided |= {name.removesuffix(".in_scale") for name in f.keys() if name.endswith(".in_scale")}  # noqa: SIM118  not a dict
        for prefix, block, linears in self._blocks(model):
            for name, linear in linears.items():
                block.set_submodule(name, Stored(linear, self.recipe, f"{prefix}.{name}" in divided))

    def _process_model_after_weight_loading(self, model, **kwargs):
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UsageError("AWRQ linears stay on the device that computes them, so no part can be offloaded; give another device_map")
        batch = Batch()
        for _, block, linears in self._blocks(model):
            self._restore(block, linears, model.config, batch)
        batch.attach(model)
        model.batch = batch
        return saves_itself(model, self.recipe, origin(self.quantization_config.about), self.stored_dtype)

    def _restore(self, block, stored, config, batch):
        """Put what computes them in the place of the Stored linears of a block, {name: Stored}, on the device where their codes are."""
        device = next(iter(stored.values())).codes.device
        made = {name: linear.restored(self.recipe, batch) for name, linear in stored.items()}
        linears, codes = ({name: pair[k] for name, pair in made.items()} for k in (0, 1))
        for name, linear in linears.items():
            block.set_submodule(name, linear)
        if computes_integers(self.recipe) and chosen(self.quantization_config.arithmetic, device) == "integers":
            use_integers(block, self.family, config, codes, kernels.select("auto", device, self.recipe.groupsize)[0])
        block.register_forward_pre_hook(batch.observe, with_kwargs=True)
        block.to(device)
