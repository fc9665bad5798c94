"""Whole decoder blocks and models of random weights, W4A8 beside FP16: what `python -m bench.linears --block` times.

The blocks are transformers' own, attention included, the same on both sides; only the linears differ, and on both sides those that read the
same input are one: q/k/v, and gate/up.  LLaMA's norms and gates are part of quantization in W4A8; in FP16 its norms are PyTorch's, of one
kernel each.  All blocks of a model have the same weights, each in memory of its own.
"""

import copy
import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

import kernels
from bench import shapes
from bench.timing import best_time, both_ways, reason, watched
from bench.tune import random_weight
from families import FAMILIES
from quant import defer_producers, producer_of, put_together
from runtime import release

PREFILL, CONTEXT, BATCH = (512, 1024, 2048, 4096, 8192), (1024, 2048), (1, 2, 4, 8, 16, 32, 64)
CPU_PREFILL, CPU_CONTEXT, CPU_BATCH = (32,), (16,), (1, 2)
TOGETHER = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))  # in the order of execution
SHARE = 0.7  # of the memory that is free goes to the FP16 model's blocks; the rest is for caches and activations
FEW = 4  # blocks that are timed one by one
CONTENDERS = ("float16", "w4a8")

# ---------------------------------------------------------------------------
# Models


class IntegerLinear(nn.Module):
    """The op as a module.  batch: the sequences that run, as OPT flattens (B, T, C) before fc1."""

    batch, in_scale = 1, None

    def __init__(self, weight):
        super().__init__()
        self.weight, self.norm, self.gated = weight, None, False

    def forward(self, x):
        y = kernels.w4a8_linear(x.reshape(self.batch, -1, x.shape[-1]), self.weight, producer=producer_of(self))
        return y.view(*x.shape[:-1], -1)


def fuse(block):
    """Make those linears of a block one that read the same input.  The block computes what it did."""
    for names in TOGETHER:
        linears = [linear for name in names for found, linear in block.named_modules() if found == name]
        if not linears:
            continue
        first = linears[0]
        whole = nn.Linear(1, 1, bias=first.bias is not None, device="meta")
        whole.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if first.bias is not None:
            whole.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        whole.out_features, whole.in_features = whole.weight.shape
        put_together(block, names, whole, [len(linear.weight) for linear in linears])


def quantize(block, family, config):
    """Put random W4A8 linears in the place of all linears of a block: so small that no sum over many blocks leaves float16.

    Norms and gates are part of their quantization, as they are in a packed checkpoint.
    """
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = random_weight(*linear.weight.shape, device=linear.weight.device)
            block.set_submodule(name, IntegerLinear(weight._replace(scale=weight.scale / 10, bias=weight.bias / 100)))
    defer_producers(block, family, config)


def fuse_norms(block, family):
    """Put PyTorch's RMSNorm in the place of a family's, which takes six kernels: they are no gain of W4A8."""
    for name in family.rms_norms:
        norm = block.get_submodule(name)
        fused = nn.RMSNorm(len(norm.weight), norm.variance_epsilon, device="meta")
        fused.weight = norm.weight
        block.set_submodule(name, fused)


FAMILY_SIZES = {  # what only a family's configuration has, or names so
    "llama": lambda m: {"intermediate_size": m.mlp, "num_key_value_heads": m.kv_heads},
    "opt": lambda m: {"ffn_dim": m.mlp, "word_embed_proj_dim": m.hidden},
}


def configuration(name, positions):
    """transformers' configuration of a model, for sequences of so many tokens."""
    m = shapes.model(name)
    sizes = {"hidden_size": m.hidden, "num_attention_heads": m.heads, "num_hidden_layers": 1, "vocab_size": m.vocab}
    return AutoConfig.for_model(m.family, **sizes, **FAMILY_SIZES[m.family](m), max_position_embeddings=positions)


def build(name, n, contender, device, positions):
    """A causal language model of n blocks, float16 on the device, in evaluation mode; its linears are float16 or W4A8."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(name, positions), dtype=torch.float16).eval().requires_grad_(False)
    blocks = layers_of(model)
    fuse(blocks[0])
    if contender == "w4a8":
        quantize(blocks[0], FAMILIES[model.config.model_type], model.config)
    else:
        fuse_norms(blocks[0], FAMILIES[model.config.model_type])
    for i in range(1, n):
        blocks.append(copy.deepcopy(blocks[0]))
        blocks[i].self_attn.layer_idx = i
    model.config.num_hidden_layers = n
    return model


def layers_of(model):
    """The list of decoder blocks."""
    return model.get_decoder().layers


def fitting(name, device, most=None):
    """How many FP16 blocks of a model fit, of those that it has."""
    blocks = min(shapes.model(name).blocks, most or math.inf)
    if device.type != "cuda":
        return blocks
    release(device)
    size = sum(rows * columns * 2 for rows, columns in shapes.block_linears(name))
    return max(1, min(blocks, int(SHARE * torch.cuda.mem_get_info(device)[0] / size)))


class FullLayer(StaticLayer):
    """A layer's cache of random keys and values whose last place every new token takes, so that a step can be timed again and again."""

    is_compileable = False  # or transformers makes a mask, with which PyTorch's fastest attention cannot run; the token sees all places

    def get_seq_length(self, *_):
        return self.max_cache_len - 1

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.keys.normal_()
        self.values.normal_()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values


# ---------------------------------------------------------------------------
# Steps: what is run, and through how many tokens it goes


def prefill_step(model, batch, tokens, device):
    """A call that reads a prompt into a cache: (B, tokens) -> logits of its last token.

    Without a cache, transformers looks for several texts in a row, and takes another attention, with a mask, while a graph is captured.
    """
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
    return partial(model, ids, use_cache=True, logits_to_keep=1)


def decode_step(model, batch, context, device):
    """A call that decodes one token, the last of `context`: (B, 1) -> logits.  Its cache is full."""
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    positions = torch.full((1, 1), context - 1, device=device)
    cache = Cache(layers=[FullLayer(max_cache_len=context) for _ in layers_of(model)])
    return partial(model, ids, position_ids=positions, past_key_values=cache, use_cache=True)


STEPS = {"prefill": prefill_step, "decode": decode_step}


@contextmanager
def shortened(model):
    """The model with a few blocks: more than the L2 cache holds, while caches of long contexts fit the memory."""
    layers = layers_of(model)
    model.get_decoder().layers = layers[:FEW]
    try:
        yield
    finally:
        model.get_decoder().layers = layers


def block_calls(model, step):
    """[call of one decoder block], all blocks of the model in turn, each on the input that the first has in a step.

    Without the cache that a prompt is read into: every call would add to it, and so be slower than the one before.
    """
    seen = []
    handle = layers_of(model)[0].register_forward_pre_hook(lambda block, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    step()
    handle.remove()
    ((args, kwargs),) = seen
    if isinstance(kwargs.get("past_key_values"), DynamicCache):
        kwargs["past_key_values"] = None
    return [partial(block, *args, **kwargs) for block in layers_of(model)]


@torch.no_grad()
def bench_cell(model, phase, batch, tokens, device):
    """The times of a model and of one block, with the memory of the former: part of a cell."""
    cell = {"whole": None, "block": None, "tokens_per_second": None, "peak_bytes": None, "finite": None, "reason": None}
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.batch = batch
    try:
        with shortened(model):
            cell["block"] = both_ways(block_calls(model, STEPS[phase](model, batch, tokens, device)), device)
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = STEPS[phase](model, batch, tokens, device)
        cell["finite"] = bool(step().logits.isfinite().all())
        if device.type == "cuda":
            cell["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        cell["whole"] = both_ways([step], device, least=1)
    except torch.OutOfMemoryError:
        return cell | {"reason": "out of memory"}
    except RuntimeError as e:  # of CUDA, mostly: the other cells are still worth having, as far as there are any
        return cell | {"reason": reason(e)}
    cell["reason"] = cell["whole"]["reason"] or cell["block"]["reason"] or (None if cell["finite"] else "NaN or Inf in the logits")
    time = best_time(cell["whole"])
    if time:
        cell["tokens_per_second"] = batch * (tokens if phase == "prefill" else 1) / (time["median"] * 1e-6)
    return cell


def wanted(prefill, context, batch, device):
    """[(phase, sequences, tokens)] to time; None: what is usual on the device."""
    gpu = device.type == "cuda"
    prefill = prefill or (PREFILL if gpu else CPU_PREFILL)
    context, batch = context or (CONTEXT if gpu else CPU_CONTEXT), batch or (BATCH if gpu else CPU_BATCH)
    return [("prefill", 1, tokens) for tokens in prefill] + [("decode", b, tokens) for tokens in context for b in batch]


def bench_blocks(models, cells, most, device, report, save):
    """Fill in a report: prefill of one prompt and decoding of batches, each model in FP16 and W4A8.  cells: of wanted."""
    report["models"] = []
    for name in models:
        n, positions, seen = fitting(name, device, most), max(tokens for _, _, tokens in cells), {}
        for contender in CONTENDERS:
            model = build(name, n, contender, device, positions)
            with watched(device) as seen[contender]:
                for phase, b, tokens in cells:
                    where = {"model": name, "phase": phase, "batch": b, "tokens": tokens, "contender": contender}
                    report["cells"].append(where | bench_cell(model, phase, b, tokens, device))
                    print(line(report["cells"][-1]), flush=True)
                    save()
            attention = model.config._attn_implementation
            del model
            release(device)  # what is free decides how many blocks the next one has
        report["models"].append({"name": name, "blocks": n, "of": shapes.model(name).blocks, "attention": attention, "clocks": seen})
        save()


def line(cell):
    where = f"{cell['model']:12} {cell['phase']:8} batch {cell['batch']:3}  {cell['tokens']:5} tokens  {cell['contender']:8}"
    if cell["tokens_per_second"] is None:
        return f"{where} {cell['reason']}"
    whole, block = (best_time(cell[part]) for part in ("whole", "block"))
    shown = f"a block {block['median'] / 1000:8.3f} ms" if block else cell["reason"]
    return f"{where} {whole['median'] / 1000:9.3f} ms, {shown}, {cell['tokens_per_second']:10.1f} tokens/s"
