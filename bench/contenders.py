"""What `python -m bench.linears` times on a layer: the op, PyTorch's own products, and the kernels of others where they are installed.

The adapters to others' kernels give them random numbers in the shapes that they take: good for a time, not for a result.  They were
written from the interfaces as published and have not been run yet; one that fails is reported as missing, with what it said.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from bench import cublaslt, timing
from bench.timing import Missing, enough_copies, random_matrix
from bench.tune import candidates, equal, packed_copies, random_weight, run
from kernels import cuda


class Contender(NamedTuple):
    """make(rows, columns, device) -> calls(tokens) -> [call], one for each copy of the weight.  Both raise Missing.

    What one call computes, in words; what it has to move: bits of a weight, bytes of each number in and out; which ceiling its
    operations have; whether a CUDA graph can capture it.
    """

    make: Callable
    computes: str
    weight_bits: int
    in_bytes: int
    out_bytes: int
    operations: str
    graph: bool = True


def copies(device, tensor):
    """Enough copies of a weight that none is in the cache when its turn comes."""
    return [tensor.clone() for _ in range(enough_copies(device, tensor.nbytes))]


# ---------------------------------------------------------------------------
# Ours


def w4a8(rows, columns, device, together=True):
    """together: one sequence of all tokens, which has one scale; else a sequence of one token each, as a batch that is decoded."""
    weights = packed_copies(rows, columns, device)

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float16, device).unsqueeze(0 if together else 1)
        if device.type == "cuda":
            check_result(cuda.library(device), x, weights[0])
        return [partial(kernels.w4a8_linear, x, weight) for weight in weights]

    return calls


def check_result(library, x, weight):
    """Raises Missing where the kernel that runs makes another result than the plainest one: what is wrong is not timed."""
    plainest = next(candidates(library, x.shape[0] * x.shape[1], weight.rows, weight.columns, weight.groupsize))
    if not equal(kernels.w4a8_linear(x, weight), run(library, x, weight, *plainest), weight):
        raise Missing("makes another result than {}/{}: see bench.check".format(*plainest))


def w4a8_product(rows, columns, device):
    """The product alone, of codes that were found before: what the op does behind its quantization."""
    if device.type != "cuda":
        raise Missing("is a step of the CUDA kernels")
    weights, library = packed_copies(rows, columns, device), cuda.library(device)

    def calls(tokens):
        config, parts = cuda.dispatch(device, tokens, rows, columns, columns)
        if config == "decode_fused":
            raise Missing("decode_fused quantizes as it multiplies")
        x, y = random_matrix(tokens, columns, torch.float16, device)[None], torch.empty(1, tokens, rows, dtype=torch.float16, device=device)
        workspace = functools.cache(partial(torch.empty, dtype=torch.uint8, device=device))

        def run(weight, steps):
            stream = torch.cuda.current_stream(device).cuda_stream
            cuda.launch(library, x, y, weight, (8, False, False), None, config, parts, stream, workspace, kernels.NOTHING, steps)

        run(weights[0], cuda.QUANTIZE)
        return [partial(run, weight, cuda.MULTIPLY) for weight in weights]

    return calls


def producer_of(what, columns, device):
    """The kernels.Producer that is called so, with a weight of ones, in float16."""
    return kernels.Producer(torch.ones(columns, dtype=torch.float16, device=device) if what == "norm" else None, 1e-5, what == "gate")


def quantization(what, columns, device):
    """The first step of the op alone, per token, with the norm or the gate in front of it, if any."""
    if device.type != "cuda":
        raise Missing("is a step of the CUDA kernels")
    weight, library, producer = random_weight(128, columns, device=device), cuda.library(device), producer_of(what, columns, device)

    def calls(tokens):
        config = "decode" if tokens <= 16 else "128x64"  # each has its layout of codes
        x = random_matrix(tokens, 2 * columns if what == "gate" else columns, torch.float16, device)[None]
        y = torch.empty(1, tokens, 128, dtype=torch.float16, device=device)
        workspace = functools.cache(partial(torch.empty, dtype=torch.uint8, device=device))

        def run():
            stream = torch.cuda.current_stream(device).cuda_stream
            cuda.launch(library, x, y, weight, (8, True, False), None, config, 1, stream, workspace, producer, cuda.QUANTIZE)

        return [run]

    return calls


# ---------------------------------------------------------------------------
# PyTorch


def norm_alone(columns, device):
    """PyTorch's own RMSNorm, one kernel, of float16."""
    weight = torch.ones(columns, dtype=torch.float16, device=device)
    return lambda tokens: [partial(F.rms_norm, random_matrix(tokens, columns, torch.float16, device), (columns,), weight, 1e-5)]


def gate_alone(columns, device):
    """silu(gate) * up of float16, two kernels, as transformers calls them."""

    def run(gate, up):
        return F.silu(gate) * up

    return lambda tokens: [partial(run, *random_matrix(tokens, 2 * columns, torch.float16, device).chunk(2, -1))]


def full(dtype, rows, columns, device):
    """Without a bias, as LLaMA has none: cuBLAS is asked for the product alone, which it may do faster than with one."""
    weights = copies(device, random_matrix(rows, columns, dtype, device))

    def calls(tokens):
        x = random_matrix(tokens, columns, dtype, device)
        return [partial(F.linear, x, weight) for weight in weights]

    return calls


def full_best(rows, columns, device):
    """The same in float16, by the fastest of cuBLASLt's algorithms for each number of tokens."""
    library, weights = cublaslt.library(device), copies(device, random_matrix(rows, columns, torch.float16, device))
    workspace = torch.empty(cublaslt.WORKSPACE, dtype=torch.uint8, device=device)

    def calls(tokens):
        x, y = random_matrix(tokens, columns, torch.float16, device), torch.empty(tokens, rows, dtype=torch.float16, device=device)
        return cublaslt.best(cublaslt.Product(library, tokens, rows, columns), x, weights, y, workspace)

    return calls


def int8_product(rows, columns, device):
    weights = copies(device, random_matrix(rows, columns, torch.int8, device))

    def calls(tokens):
        if tokens <= 16:
            raise Missing("torch._int_mm takes more than 16 tokens")
        x = random_matrix(tokens, columns, torch.int8, device)
        return [timing.int8_product(x, weight) for weight in weights]

    return calls


def fp8_product(rows, columns, device):
    """PyTorch's product of 8-bit floats, which cuBLASLt computes, of codes that were found before, with one scale for each side."""
    if not timing.has_fp8(device):
        raise Missing("needs an NVIDIA GPU of compute capability 8.9 or newer")
    weights = copies(device, random_matrix(rows, columns, torch.float8_e4m3fn, device))

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float8_e4m3fn, device)
        return [timing.fp8_product(x, weight) for weight in weights]

    return calls


def tinygemm(rows, columns, device, group=128):
    """PyTorch's own product of bfloat16 with 4-bit weights, which torchao uses."""
    if device.type != "cuda":
        raise Missing("needs an NVIDIA GPU")
    if columns % 128 or rows % 8:
        raise Missing("takes columns in multiples of 128, rows in multiples of 8")
    q = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
    weights = copies(device, torch.ops.aten._convert_weight_to_int4pack(q, 8))
    scale_zero = torch.rand(columns // group, rows, 2, device=device).to(torch.bfloat16)

    def calls(tokens):
        if tokens > 64:
            raise Missing("is made for few tokens, takes 20 times as long as float16 for many")
        x = random_matrix(tokens, columns, torch.bfloat16, device)
        return [partial(torch.ops.aten._weight_int4pack_mm, x, weight, group, scale_zero) for weight in weights]

    return calls


# ---------------------------------------------------------------------------
# Others


def installed(name, device):
    """The module.  Raises Missing."""
    if device.type != "cuda":
        raise Missing("needs an NVIDIA GPU")
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Missing(f"{name.partition('.')[0]} is not installed") from e


def marlin_weights(rows, columns, device):
    """Random words in the shape of Marlin's packed 4-bit weights, and scales of whole rows."""
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (columns // 16, 2 * rows), dtype=torch.int32, device=device)
    return copies(device, words), torch.rand(1, rows, device=device).to(torch.float16)


def marlin(rows, columns, device):
    module = installed("marlin", device)
    if rows % 256 or columns % 128:
        raise Missing("takes rows in multiples of 256, columns in multiples of 128")
    weights, scale = marlin_weights(rows, columns, device)
    workspace = torch.zeros(rows // 128 * 16, dtype=torch.int32, device=device)

    def calls(tokens):
        x, y = random_matrix(tokens, columns, torch.float16, device), torch.empty(tokens, rows, dtype=torch.float16, device=device)
        return [partial(module.mul, x, weight, y, scale, workspace) for weight in weights]

    return calls


def vllm_marlin(rows, columns, device):
    ops, types = installed("vllm._custom_ops", device), installed("vllm.scalar_type", device).scalar_types
    if not hasattr(ops, "marlin_gemm"):
        raise Missing("this vllm has no marlin_gemm")
    weights, scale = marlin_weights(rows, columns, device)
    workspace = torch.zeros(torch.cuda.get_device_properties(device).multi_processor_count, dtype=torch.int32, device=device)

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float16, device)
        sizes = {"size_m": tokens, "size_n": rows, "size_k": columns}
        nothing = dict.fromkeys(("c", "b_bias", "a_scales", "global_scale", "b_zeros", "g_idx", "perm"))
        fixed = nothing | sizes | {"a": x, "b_scales": scale, "workspace": workspace, "b_q_type": types.uint4b8, "use_fp32_reduce": True}
        return [partial(ops.marlin_gemm, b_q_weight=weight, **fixed) for weight in weights]

    return calls


def vllm_machete(rows, columns, device):
    """vLLM's 4-bit product for Hopper, a scale per row."""
    ops, types = installed("vllm._custom_ops", device), installed("vllm.scalar_type", device).scalar_types
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise Missing("runs on compute capability 9.0 alone")
    if not hasattr(ops, "machete_mm"):
        raise Missing("this vllm has no machete_mm")
    if rows % 128 or columns % 64:
        raise Missing("takes rows in multiples of 128, columns in multiples of 64")
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, columns // 8), dtype=torch.int32, device=device).T  # (C / 8, R), by columns
    weights = copies(device, ops.machete_prepack_B(words, torch.float16, types.uint4b8, torch.float16))
    fixed = {"b_type": types.uint4b8, "b_group_scales": torch.rand(1, rows, device=device).to(torch.float16), "b_group_size": -1}

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float16, device)
        return [partial(ops.machete_mm, a=x, b_q=weight, **fixed) for weight in weights]

    return calls


def humming(inputs, rows, columns, device):
    """Humming's layer of 4-bit weights, a scale per row; inputs: a type of its own, to which it quantizes each token, or float16."""
    layers = installed("humming.layer", device)
    how = {"weight_config": {"dtype": "int4"}, "input_config": {"dtype": inputs}, "torch_dtype": torch.float16}
    layer = layers.HummingLayer(shape_n=rows, shape_k=columns, **how).to(device)
    layer.load_from_unquantized(random_matrix(rows, columns, torch.float16, device))
    layer.transform()
    all_layers = [layer, *(copy.deepcopy(layer) for _ in range(enough_copies(device, rows * columns // 2) - 1))]

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float16, device)
        return [partial(layer, x) for layer in all_layers]

    return calls


def vllm_w8a8(rows, columns, device):
    """int8 on both sides, a scale per token that is found first, and one per row."""
    ops = installed("vllm._custom_ops", device)
    weights = copies(device, random_matrix(rows, columns, torch.int8, device))
    scale = torch.rand(rows, 1, device=device)

    def calls(tokens):
        x = random_matrix(tokens, columns, torch.float16, device)

        def run(weight):
            q, x_scale, _ = ops.scaled_int8_quant(x)
            return ops.cutlass_scaled_mm(q, weight.T, scale_a=x_scale, scale_b=scale, out_dtype=torch.float16)

        return [partial(run, weight) for weight in weights]

    return calls


def qserve(rows, columns, device):
    gemm = installed("omniserve_backend.qgemm_w4a8_per_chn", device)
    weights = copies(device, torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, device=device))
    scale, scaled_zero = (torch.rand(rows, device=device).to(torch.float16) for _ in range(2))

    def calls(tokens):
        x, y = random_matrix(tokens, columns, torch.int8, device), torch.empty(tokens, rows, dtype=torch.float16, device=device)
        x_scale, x_sum = (torch.rand(tokens, device=device).to(torch.float16) for _ in range(2))
        return [partial(gemm.gemm_forward_cuda, x, weight, scale, x_scale, scaled_zero, x_sum, y) for weight in weights]

    return calls


def torchao(rows, columns, device):
    ops = installed("torchao.ops", device)
    if not hasattr(ops, "rowwise_scaled_linear_cutlass_s8s4"):
        raise Missing("this torchao has no rowwise_scaled_linear_cutlass_s8s4, which left it in 2026")
    weights = copies(device, torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, device=device))
    scale = torch.rand(rows, device=device).to(torch.float16)

    def calls(tokens):
        x, x_scale = random_matrix(tokens, columns, torch.int8, device), torch.rand(tokens, device=device).to(torch.float16)
        return [partial(ops.rowwise_scaled_linear_cutlass_s8s4, x, x_scale, weight, scale) for weight in weights]

    return calls


FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16)}
OURS = {  # and PyTorch's
    "w4a8": Contender(w4a8, "quantization, product, bias", 4, 2, 2, "int8"),
    "w4a8 batch": Contender(partial(w4a8, together=False), "quantization, product, bias, of sequences of one token", 4, 2, 2, "int8"),
    "w4a8 product": Contender(w4a8_product, "product, bias", 4, 1, 2, "int8"),
    **{name: Contender(partial(full, dtype), "product", 16, 2, 2, name) for name, dtype in FLOATS.items()},
    "cuBLASLt best": Contender(
        full_best, f"product, the fastest algorithm, at most {cublaslt.WORKSPACE >> 20} MiB of workspace", 16, 2, 2, "float16"
    ),
    "int8 product": Contender(int8_product, "product, int32 out", 8, 1, 4, "int8"),
    "fp8 product": Contender(fp8_product, "product", 8, 1, 2, "int8"),
    "tinygemm W4A16": Contender(tinygemm, "product", 4, 2, 2, "bfloat16"),
}
OTHERS = {
    "Marlin W4A16": Contender(marlin, "product", 4, 2, 2, "float16"),
    "vLLM Marlin W4A16": Contender(vllm_marlin, "product", 4, 2, 2, "float16"),
    "vLLM Machete W4A16": Contender(vllm_machete, "product", 4, 2, 2, "float16"),
    "Humming W4A16": Contender(partial(humming, "float16"), "product", 4, 2, 2, "float16"),
    "Humming W4A8": Contender(partial(humming, "int8"), "quantization, product", 4, 2, 2, "int8"),
    "vLLM W8A8": Contender(vllm_w8a8, "quantization, product", 8, 2, 2, "int8"),
    "QServe W4A8 product": Contender(qserve, "product", 4, 1, 2, "int8", graph=False),  # it launches on the default stream
    "torchao W4A8 product": Contender(torchao, "product", 4, 1, 2, "int8"),
}
CONTENDERS = OURS | OTHERS
QUANTIZERS = {  # make(columns, device) -> calls(tokens)
    "quantization": partial(quantization, ""),
    "norm, quantization": partial(quantization, "norm"),
    "gate, quantization": partial(quantization, "gate"),
    "norm": norm_alone,
    "gate": gate_alone,
}
