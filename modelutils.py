"""Walking a decoder block by block: which linears read what, what a method needs, capture, smoothing, rounding, propagation."""

import argparse
import logging
import math
import os
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_kernels_available

import awrq
import gptq
import quant
from kernels.timing import release
from quant import CLIPS, GRIDS, TARGETS, Batch, Grid, IntLinear, Means, QuantLinear, Recipe, from_int
from smoothquant import AbsMax, fold, search_scale, smooth_scale

# ---------------------------------------------------------------------------
# The two tables


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, and the module of the block that it comes from."""

    producer: str  # takes 1/s of a smoothing scale
    linears: tuple[str, ...]
    exact: Callable = lambda config: True  # whether 1/s can go into the producer without changing the function
    rows: Callable = lambda config: None  # (C,): the row of the producer that each column of the input comes from, if not its own


@dataclass(frozen=True)
class Family:
    script: str  # the one that takes it
    blocks: str  # the list of decoder blocks
    after: tuple[str, ...]  # from the last block's output to the logits; a module that a model lacks is skipped
    groups: tuple[Group, ...]  # in the order of execution
    flat: tuple[str, ...] = ()  # linears that read (B * T, C)


def opt_pre_norm(config):
    """OPT-350m normalises after the residual sum: its norms feed the residual too, and can absorb nothing."""
    return config.do_layer_norm_before and config.layer_norm_elementwise_affine


def value_rows(config):
    """The row of v_proj that each column of o_proj reads: with grouped-query attention, query heads in a row share a head of values."""
    heads, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * head_dim).view(heads, 1, head_dim).expand(-1, shared, -1).flatten()


LLAMA = Family(  # an RMSNorm feeds nothing else, v is linear, and up is multiplied by the gate after it: every fold is exact
    script="main.py",
    blocks="model.layers",
    after=("model.norm", "lm_head"),
    groups=(
        Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group("self_attn.v_proj", ("self_attn.o_proj",), rows=value_rows),
        Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Group("mlp.up_proj", ("mlp.down_proj",)),
    ),
)

FAMILIES = {  # by config.model_type
    "llama": LLAMA,  # LLaMA 1, 2 and 3
    "mistral": LLAMA,
    "qwen2": LLAMA,  # biases on q, k, v
    "qwen3": LLAMA,  # norms on q and k, after their linears
    "opt": Family(
        script="opt.py",
        blocks="model.decoder.layers",
        after=("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"),
        groups=(
            Group("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), opt_pre_norm),
            Group("self_attn.v_proj", ("self_attn.out_proj",)),
            Group("final_layer_norm", ("fc1",), opt_pre_norm),
            Group("fc1", ("fc2",), lambda config: config.activation_function == "relu"),  # relu(s x) = s relu(x)
        ),
        flat=("fc1", "fc2"),
    ),
}

NEVER, OPTIONAL, ALWAYS = (False,), (False, True), (True,)


@dataclass(frozen=True)
class Method:
    """What a method is.  weights(W, stats, recipe, name) -> codes, Grid; stats: what it must see first; acts, smooth: what it allows.

    stream: the weights and stats that take their place with a target from the full-precision stream, if others do.
    """

    weights: Callable | None = None
    stats: type | None = None
    acts: tuple[bool, ...] = NEVER
    smooth: tuple[bool, ...] = NEVER
    stream: tuple[Callable, type] | None = None

    def fitted_to(self, target):
        """The method for a target, "layer" or "stream"."""
        return self if target == "layer" or not self.stream else replace(self, weights=self.stream[0], stats=self.stream[1])


METHODS = {
    "full": Method(),
    "act_only": Method(acts=ALWAYS, smooth=OPTIONAL),
    "rtn": Method(quant.rtn, acts=ALWAYS),
    "smoothquant": Method(quant.rtn, acts=ALWAYS, smooth=ALWAYS),
    "gptq": Method(gptq.quantize, gptq.Hessian, acts=OPTIONAL, smooth=OPTIONAL, stream=(awrq.quantize, awrq.Drift)),
    "awrq": Method(awrq.quantize, awrq.Moments, acts=ALWAYS, smooth=OPTIONAL),
}

# ---------------------------------------------------------------------------
# Loading


def load_config(name, script=None):
    """The configuration of a local folder or hub model.

    Raises OSError if there is none, ValueError if its family is not in the table, is another script's (None: any) or cannot be walked.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as e:  # transformers raises whatever its validators do
        if os.path.isfile(os.path.join(name, "config.json")):
            raise OSError(f"{name}: its config.json is not one that transformers {transformers.__version__} takes ({_reason(e)})") from e
        if isinstance(e.__cause__, GatedRepoError):
            raise OSError(f"{name} is gated: ask for access at https://huggingface.co/{name}, then `hf auth login`") from e
        raise OSError(
            f"{name}: no model there: neither a local folder with a config.json nor a hub model that can be reached"
            f" ({_reason(e)}); a private model needs `hf auth login`"
        ) from e
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} is of the {config.model_type} family; supported: {', '.join(FAMILIES)}")
    if script not in (None, FAMILIES[config.model_type].script):
        raise ValueError(f"{name} is of the {config.model_type} family: run it with {FAMILIES[config.model_type].script}")
    check_one_attention(config)
    return config


def check_one_attention(config):
    """Raises ValueError if blocks get different masks: those of the first are recorded and replayed for all."""
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1:
        raise ValueError(f"this {config.model_type} model has blocks of {' and '.join(kinds)}; only one kind per model is supported")


def load_tokenizer(name):
    """The model's own tokenizer.  If its configuration asks for a first token (OPT's </s>), it adds it, whatever file it was read from."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # transformers raises whatever its backends do
        raise OSError(f"{name}: no usable tokenizer there ({_reason(e)}); save it into the model's folder") from e
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one where it finds no files
        raise OSError(f"{name}: no tokenizer there, or one without a vocabulary; save it into the model's folder")
    if get_tokenizer_config(name).get("add_bos_token") and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    return tokenizer


def check_vocabulary(config, texts):
    """Raises ValueError if a text, ids (N,) or (n, T) or None, has a token that the model does not know."""
    largest = max((int(ids.max()) for ids in texts if ids is not None), default=0)
    if largest >= config.vocab_size:
        raise ValueError(f"the tokenizer gives token {largest}, the model knows {config.vocab_size}: they do not belong together")


def run_dtype(dtype, device):
    """What a --dtype means on a device: "auto", which is the checkpoint's, is float32 on a CPU."""
    return "float32" if dtype == "auto" and torch.device(device).type == "cpu" else dtype


def load_model(name, dtype="auto", device="cpu"):
    """The model in host memory and evaluation mode, from safetensors only; dtype: see run_dtype.

    Raises OSError if there are no such weights, ValueError if one is missing or of another shape than the configuration says,
    FloatingPointError if one is NaN or Inf, with its name.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=run_dtype(dtype, device), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as e:
        raise OSError(
            f"{name}: no loadable *.safetensors weights there ({_reason(e)}); pickled weights are not read,"
            " convert them with save_pretrained() of transformers"
        ) from e
    for what, keys in (("missing", found["missing_keys"]), ("of another shape than config.json says", found["mismatched_keys"])):
        if keys:  # transformers has drawn them at random
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise ValueError(f"{name}: the weight {first} is {what} ({len(keys)} such); save the model again")
    for key, p in tqdm(model.state_dict().items(), desc="checking weights", unit="tensor", leave=False):
        if p.is_floating_point() and not p.isfinite().all():
            raise FloatingPointError(f"{name}: NaN or Inf in the weight {key}")
    return model.eval()


def _reason(error):
    """The first line of an error's message, and those that it announces with a colon."""
    return " ".join(re.match(r"(.*:\n)*.*", str(error).strip())[0].split()).rstrip(".")


# ---------------------------------------------------------------------------
# Running blocks


class Clock:
    """Seconds by activity: `with clock("solving"): ...` adds to clock.seconds["solving"], after the device has finished."""

    def __init__(self, device):
        self.device, self.seconds = torch.device(device), defaultdict(float)

    @contextmanager
    def __call__(self, activity):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[activity] += time.perf_counter() - start


def default_walk_batch(config, seqlen, device):
    """Sequences to run together: 8192 tokens on a GPU (fewer if their widest activations exceed a tenth of its memory), 2048 on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width = max(config.hidden_size, getattr(config, "ffn_dim", 0), getattr(config, "intermediate_size", 0), config.vocab_size)
    return max(1, min(8192 if device.type == "cuda" else 2048, int(memory / 10 / (8 * width))) // seqlen)


def decoder_blocks(model):
    """The list of decoder blocks (nn.ModuleList)."""
    return model.get_submodule(FAMILIES[model.config.model_type].blocks)


@contextmanager
def shortened(model, n):
    """Shorten the model to its first n blocks; the others stay where they are."""
    path, _, name = FAMILIES[model.config.model_type].blocks.rpartition(".")
    parent, blocks = model.get_submodule(path), decoder_blocks(model)
    setattr(parent, name, blocks[:n])
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@torch.no_grad()
def record_inputs(model, batches, device):
    """What enters the first block.  batches: iterable of (B, T) token ids.

    Returns ([(B, T, D) on the device], {(B, T): the block's keyword arguments}).  The arguments (masks, positions, rotary tables) are
    opaque: they are recorded and replayed as they are, so transformers may rename them.  Raises ValueError if blocks get different ones.
    """
    check_one_attention(model.config)
    inputs, kwargs = [], {}

    def record(block, args, kw):
        inputs.append(args[0])
        kwargs[args[0].shape[:2]] = kw

    with shortened(model, 1):
        model.to(device)
        handle = decoder_blocks(model)[0].register_forward_pre_hook(record, with_kwargs=True)
        for ids in batches:
            model.base_model(ids.to(device), use_cache=False)  # a cache would travel in kwargs and grow with every replay
        handle.remove()
        model.to("cpu")
    return inputs, kwargs


def run_block(block, x, kwargs, name):
    """x (B, T, D) through a block.  Raises FloatingPointError, naming the layer, if NaN or Inf comes out."""
    kwargs = kwargs[x.shape[:2]]
    out = block(x, **kwargs)
    out = out if torch.is_tensor(out) else out[0]  # newer transformers return the tensor, older ones a tuple
    if not out.isfinite().all():
        raise FloatingPointError(f"{name}: NaN or Inf in the output of {_first_nonfinite(block, x, kwargs)}")
    return out


def _first_nonfinite(block, x, kwargs):
    """Name of the first submodule, in the order of execution, whose output is not finite."""
    found = []

    def check(module, args, out, name):
        out = out if torch.is_tensor(out) else out[0]
        if not out.isfinite().all():
            found.append(name)

    for name, module in block.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: check(m, args, out, name))
    block(x, **kwargs)
    return found[0] or "the block"


def walk(model, device, desc):
    """Each decoder block in turn, on the device while it is worked on; with a progress bar."""
    for i, block in enumerate(tqdm(decoder_blocks(model), desc=desc, unit="block", leave=False)):
        yield i, block.to(device)
        block.to("cpu")


@contextmanager
def padded(model, real):
    """Tell the quantized linears of a model which tokens of its next batches are no padding: real (B, T) bool, or None for all."""
    batches = {module.batch for module in model.modules() if isinstance(module, QuantLinear | IntLinear)}
    for batch in batches:
        batch.real = None if real is None or real.all() else real
    try:
        yield
    finally:
        for batch in batches:
            batch.real = None


@contextmanager
def placed(model, device, memory=None):
    """The whole model on the device, ready for model(ids), and back in host memory afterwards.

    memory: bytes that it may take there; by default three quarters of what is free on a GPU, and no limit on a CPU.  Blocks beyond that
    stay in host memory, and each is copied to the device for the time that it runs.
    """
    release(torch.device(device))  # or it would not count as free
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] * 3 // 4 if torch.device(device).type == "cuda" else math.inf
    blocks = decoder_blocks(model)
    with shortened(model, 0):
        fit = (memory - _bytes(model)) / _bytes(blocks[0])
    fit = len(blocks) if fit >= len(blocks) else max(0, int(fit) - 1)  # one place is for those that pass through
    with shortened(model, fit):
        model.to(device)
    handles, drops = [], []
    for block in blocks[fit:]:
        fetch, drop = _visits(block, device)
        handles += block.register_forward_pre_hook(fetch), block.register_forward_hook(drop)
        drops.append(drop)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for drop in drops:
            drop()
        model.to("cpu")


def _tensors(module):
    return *module.parameters(), *module.buffers()


def _bytes(module):
    return sum(tensor.nbytes for tensor in _tensors(module))


def _visits(block, device):
    """Two hooks: one copies the tensors of a block to the device, the other puts those in host memory back in their place."""
    home = [(tensor, tensor.data) for tensor in _tensors(block)]

    def fetch(*_):
        for tensor, data in home:
            tensor.data = data.to(device)

    def drop(*_):
        for tensor, data in home:
            tensor.data = data

    return fetch, drop


def propagate(block, x, kwargs, name):
    """Replace the inputs of a block, a list of (B, T, D), by its outputs, one by one."""
    for k, h in enumerate(x):
        x[k] = run_block(block, h, kwargs, name)


@contextmanager
def repeated(block, part):
    """While it lasts, a part of a block, the name of a submodule, runs once for each input of the block; its outputs stay in host memory.

    It is for a part that is finished, of a block that runs over the same inputs again because its other parts are not.
    """
    module, kept, now = block.get_submodule(part), {}, None
    forward = module.forward

    def note(block, args):
        nonlocal now
        now = id(args[0])  # the inputs of a block live as long as it is worked on

    def once(*args, **kwargs):
        if now in kept:
            out, device, rest = kept[now]
            return out.to(device), *rest
        out, *rest = forward(*args, **kwargs)
        kept[now] = out.cpu(), out.device, rest
        return out, *rest

    module.forward, handle = once, block.register_forward_pre_hook(note)
    try:
        yield
    finally:
        del module.forward
        handle.remove()


class Seen(Exception):
    """Raised in a block that has shown all that was asked for: what is left of it need not run."""


def observe(block, x, kwargs, name, observers, stream=None, rest=True):
    """Run the block over all its inputs.  observers, {QuantLinear: (objects with .add, ...)}, see what their linear reads: (B, T, C).

    stream: a Stream inside the block; observers then see targets too.  rest: whether what follows the last observed linear runs as well.
    """
    *_, last = observers

    def show(linear, args):
        x = linear.smoothed(args[0])
        seen = (x,) if stream is None else (x, stream.target(linear, x))
        for observer in observers[linear]:
            observer.add(*seen)
        if linear is last and not rest:
            raise Seen

    handles = [linear.register_forward_pre_hook(show) for linear in observers]
    for k, h in enumerate(x):
        if stream is not None:
            stream.run(k, h.device, kwargs, name, set(observers))
        with suppress(Seen):
            run_block(block, h, kwargs, name)
    for handle in handles:
        handle.remove()


class Stream:
    """The calibration sequences in the unquantized model, walked beside those in the quantized one: x, a list of (B, T, D) in host memory.

    mix: its share in the targets.  On the device are one unquantized block, and what the linears of a batch read in it.
    """

    def __init__(self, x, mix):
        self.x, self.mix = [h.cpu() for h in x], mix

    @contextmanager
    def inside(self, block, linears):
        """While it lasts, targets of some linears of a block, {name: QuantLinear}, can be had; nothing in the block is rounded yet."""
        self.block, self.done = deepcopy(block), 0
        self.reads = {linear: [] for linear in linears.values()}
        for name, linear in linears.items():
            self.block.get_submodule(name).register_forward_pre_hook(partial(self.keep, linear))
        try:
            yield
        finally:
            del self.block, self.reads

    def keep(self, linear, twin, args):
        read = twin.smoothed(args[0])
        self.reads[linear].append(read if linear in self.now else read.cpu())

    def run(self, k, device, kwargs, name, now):
        """Batch k through the unquantized block, the first time.  now: linears that need it at once; the others' stays in host memory."""
        if k == self.done:
            self.now, self.done = now, k + 1
            self.x[k] = run_block(self.block, self.x[k].to(device), kwargs, name).cpu()

    def target(self, linear, x):
        """What a linear that reads x (B, T, C) in the quantized model should be fitted to, float32.  Once a batch, in their order."""
        return torch.lerp(x.float(), self.reads[linear].pop(0).to(x.device, torch.float32), self.mix)


# ---------------------------------------------------------------------------
# Quantizing


@dataclass(frozen=True)
class Layer:
    """A quantized linear and its output_error."""

    block: int
    name: str
    error: float


SEARCHED = 8  # sequences that a search for alpha looks at


class FirstSequences:
    """The input of a linear in the first n calibration sequences, or as many as there are: x (B, T, C)."""

    def __init__(self, n):
        self.n, self.x = n, None

    def add(self, x, target=None):
        """x (B, T, C)"""
        if self.x is None or len(self.x) < self.n:
            self.x = (x if self.x is None else torch.cat((self.x, x)))[: self.n].clone()


def output_error(W, x, linear, shift=0):
    """sum |W x - Q xq - shift|^2 / sum |W x|^2 for x (T, C), W (R, C) and the quantized linear that replaces W; 0 if W x is all zero.

    shift (R,): what was added to the bias.
    """
    y = x.float() @ W.T
    xq = quant.fake_quant_act(x[None], linear.act_bits, linear.per_token)[0]
    lost, whole = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (y - shift - xq.float() @ linear.weight.float().T, y))
    return (lost / whole) ** 2 if whole else 0.0


def replace_linears(block, groups, batch):
    """Put a QuantLinear in place of every linear of the groups: {name: QuantLinear}."""
    linears = {}
    for name in (name for group in groups for name in group.linears):
        path, _, attribute = name.rpartition(".")
        linears[name] = QuantLinear(block.get_submodule(name), batch)
        setattr(block.get_submodule(path), attribute, linears[name])
    block.register_forward_pre_hook(batch.observe, with_kwargs=True)
    return linears


def smooth_block(block, groups, linears, config, recipe, seen):
    """Smooth every group of a block.  All scales come from the original block, before any fold.

    seen: {Group: AbsMax}, or {Group: FirstSequences} to search alpha on, if the recipe says so.
    """
    scales = {}
    for group in groups:
        weights = [linears[name].weight for name in group.linears]
        if recipe.smooth_search:
            scales[group] = search_scale(seen.pop(group).x, weights, recipe, group.rows(config))
        else:
            scales[group] = smooth_scale(seen[group].max, weights, recipe.alpha, recipe.min)
    for group, s in scales.items():
        if (s == 1).all():  # the search found none worth it: nothing to divide by at run time either
            continue
        producer = block.get_submodule(group.producer) if group.exact(config) else None
        fold(s, [linears[name] for name in group.linears], producer, group.rows(config))


def round_group(linears, method, stats, recipe, name):
    """Round linears that read the same input as one matrix, their rows stacked: [(codes, Grid)] of each."""
    rows = [len(linear.weight) for linear in linears]
    q, grid = method.weights(torch.cat([linear.weight for linear in linears]), stats, recipe, name)
    grids = [
        Grid(scale, zero, grid.bits, grid.groupsize) for scale, zero in zip(grid.scale.split(rows), grid.zero.split(rows), strict=True)
    ]
    return list(zip(q.split(rows), grids, strict=True))


def finish_group(i, group, linears, method, stats, means, sample, recipe, clock):
    """Round the linears of a group of block i, and quantize their inputs from now on: [Layer] and {name: (codes, Grid)}.

    stats, means: what the group was seen to read, or None where that is not needed; sample: a sequence of it, for the errors.
    """
    names, codes, layers = group.linears, {}, []
    originals = [linears[n].weight.data for n in names]
    if method.weights:
        with clock("solving"):
            rounded = round_group([linears[n] for n in names], method, stats, recipe, f"block {i} {'/'.join(names)}")
        codes = dict(zip(names, rounded, strict=True))
    for n, W in zip(names, originals, strict=True):
        shift = 0
        if n in codes:
            linears[n].weight.data = from_int(*codes[n])
        if means and linears[n].bias is not None:
            shift = means.correction(W, linears[n].weight)
            linears[n].bias += shift
        linears[n].settle(recipe.act_bits, recipe.act_pertoken)
        layers.append(Layer(i, n, output_error(W, sample.x[0], linears[n], shift)))
    return layers, codes


def finished_part(groups, step):
    """The name of the submodule, attention mostly, whose last groups are those of a step, if others come after it; "" if there is none."""
    part, *later = (group.linears[0].rpartition(".")[0] for group in groups[groups.index(step[-1]) :])
    return part if later and part not in later else ""


@torch.no_grad()
def quantize_block(i, block, x, kwargs, config, recipe, batch, clock, stream=None):
    """Quantize decoder block i in place and replace its inputs x, [(B, T, D)], by its outputs: [Layer] and {name: (codes, Grid)}."""
    name, layers, codes, device = f"block {i}", [], {}, x[0].device
    groups, method = FAMILIES[config.model_type].groups, METHODS[recipe.method].fitted_to(recipe.target)
    linears = replace_linears(block, groups, batch)
    first = {group: linears[group.linears[0]] for group in groups}  # reads what the whole group reads
    width = {group: linear.weight.shape[1] for group, linear in first.items()}
    biased = {group for group in groups if any(linears[n].bias is not None for n in group.linears)}
    if recipe.smooth:
        with clock("smoothing"):
            few = x[: -(-SEARCHED // len(x[0]))] if recipe.smooth_search else x
            seen = {g: FirstSequences(SEARCHED) if recipe.smooth_search else AbsMax(width[g], device) for g in groups}
            observe(block, few, kwargs, name, {first[g]: (seen[g],) for g in groups})
            smooth_block(block, groups, linears, config, recipe, seen)
    steps = [(group,) for group in groups] if recipe.true_sequential else [groups]
    with ExitStack() as stack:
        if stream:
            stack.enter_context(stream.inside(block, {group.linears[0]: first[group] for group in groups}))
        for step in steps:
            with clock("statistics"):
                sample = {g: FirstSequences(1) for g in step}
                stats = {g: method.stats(width[g], recipe, device) for g in step} if method.stats else {}
                means = {g: Means(width[g], recipe, device) for g in step if recipe.bias_correction and g in biased}
                kinds = (sample, stats, means)
                # no name for the observers: statistics must not outlive their group
                observe(block, x, kwargs, name, {first[g]: [k[g] for k in kinds if g in k] for g in step}, stream, step is groups)
            for g in step:
                done = finish_group(i, g, linears, method, stats.pop(g, None), means.get(g), sample[g], recipe, clock)
                layers += done[0]
                codes |= done[1]
            if finished := finished_part(groups, step):
                stack.enter_context(repeated(block, finished))
        with clock("propagation"):
            propagate(block, x, kwargs, name)
    return layers, codes


def quantize_or_restore(i, block, x, kwargs, config, recipe, batch, clock, store, stream):
    """quantize_block, but if the store has block i, what that gave when it was quantized."""
    inputs = [*x, *stream.x] if stream else x
    if store and i < store.finished:
        done = store.restore(i, block, FAMILIES[config.model_type].groups, batch, inputs)
        x[:] = inputs[: len(x)]
        if stream:
            stream.x[:] = inputs[len(x) :]
        return done
    layers, codes = quantize_block(i, block, x, kwargs, config, recipe, batch, clock, stream)
    if store:
        store.keep(i, block, layers, codes, [*x, *stream.x] if stream else x)
    return layers, codes


def quantize_blocks(model, ids, recipe, device="cpu", walk_batch=1, clock=None, store=None):
    """Quantize the decoder blocks of a model in place, one on the device at a time, first to last.

    ids (n, T): calibration sequences.  The inputs of a block come from the quantized blocks before it.  Yields for each block [Layer] and
    {name: (codes (R, C) uint8, Grid)}, which is empty if weights are not rounded.  store: a checkpoint.Store, which keeps finished blocks
    and gives back those that it has.  Raises FloatingPointError, naming block and layer, where NaN or Inf turns up.
    """
    clock, batch = clock or Clock(device), Batch()
    if METHODS[recipe.method].stats is None and not recipe.smooth and not recipe.bias_correction:
        ids = ids[:1]  # nothing to learn from the others: the first is for the errors
    with clock("capture"):
        x, kwargs = record_inputs(model, ids.split(walk_batch), device)
    stream = Stream(x, recipe.target_mix) if recipe.target == "stream" else None
    for i, block in walk(model, device, f"quantizing ({recipe.method})"):
        # no name for it: it must not outlive its block
        yield quantize_or_restore(i, block, x, kwargs, model.config, recipe, batch, clock, store, stream)


def quantize(model, ids, recipe, device, walk_batch, clock, store=None, writers=()):
    """quantize_blocks to the end, printing the output error of every linear as blocks are finished: [Layer] of the whole model.

    writers: checkpoint.Writers, which get every block.
    """

    def write(block):
        for writer in writers:
            with clock("writing"):
                writer.add(block[0][0].block, block[1])
        return block[0]

    layers = []
    if recipe.method == "full":
        return layers
    for done in map(write, quantize_blocks(model, ids, recipe, device, walk_batch, clock, store)):
        tqdm.write(
            f"block {done[0].block}: output errors  " + "  ".join(f"{layer.name.rpartition('.')[2]} {layer.error:.1e}" for layer in done)
        )
        layers += done
    return layers


# ---------------------------------------------------------------------------
# Command line shared by the scripts


PRESETS = {  # defaults that take the place of the published ones; single flags override them
    "paper": {},
    "plus": {
        "grid": "reformulated",
        "clip": "hessian",
        "actorder": True,
        "true_sequential": True,
        "target": "stream",
        "bias_correction": True,
        "smooth": True,
        "smooth_search": True,
    },
}
DTYPES = ("auto", "float16", "bfloat16", "float32")


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2 for anything wrong with the input."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def parse_args(self, args=None):
        """As usual, and `changed`: the flags that differ from their defaults, {name: value}.  A --preset has defaults of its own."""
        preset = PRESETS[getattr(super().parse_args(args), "preset", "paper")]
        args = super().parse_args(args, argparse.Namespace(**preset))
        args.changed = {flag: value for flag, value in vars(args).items() if value != preset.get(flag, self.get_default(flag))}
        return args

    def run(self, main):
        """main(args); what it raises about bad input, or about NaN met on the way, becomes such a line."""
        if is_kernels_available():
            self.error(
                "Hugging Face's `kernels` is installed: transformers would take our folder of that name for it; pip uninstall kernels"
            )
        transformers.logging.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", DeprecationWarning)  # those of libraries are not the user's business
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            main(self.parse_args())
        except (ValueError, OSError, FloatingPointError) as e:
            self.error(e)


def device(name):
    """torch.device of --device, which must be there."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{name}: PyTorch finds no such device here ({_reason(e)}); use cpu") from e


def positive(number):
    """A whole number of at least 1."""
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return int(number)


def whole(number):
    """A whole number of at least 0."""
    if int(number) < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 0")
    return int(number)


def batch_size(number):
    """A whole number of at least 1, or "auto"."""
    return number if number == "auto" else positive(number)


def share(number):
    """A number of items, or a share of them between 0 and 1."""
    value = float(number)
    if not (0 < value < 1 or value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{number}: must be a whole number of items, or a share between 0 and 1")
    return value if value < 1 else int(value)


SWITCH = argparse.BooleanOptionalAction  # a preset can switch it on, --no-... off again


def add_args(parser, smallest_scale, corpora):
    """The flags of both scripts.  smallest_scale: the default of --min, which the paper sets per family; corpora: that of --eval."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="hub name or local folder with config.json, tokenizer, *.safetensors; --load needs none"
    )

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default="full", help="how to quantize (default %(default)s: not at all)")
    method.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="paper: as published (default); plus: what was found best; single flags override it",
    )
    method.add_argument("--wbits", type=int, default=16, metavar="BITS", help="weight bits, 2 to 8; 16 = not quantized (default)")
    method.add_argument("--act_bits", type=int, default=8, metavar="BITS", help="activation bits, 4 to 8 (default 8); 16 = not quantized")
    method.add_argument("--act_quant", action="store_true", help="gptq: quantize activations too (the other methods' is implied)")
    method.add_argument("--act_pertoken", action=SWITCH, default=False, help="one activation scale per token instead of per sequence")
    method.add_argument("--groupsize", type=int, default=-1, metavar="COLUMNS", help="columns per weight scale; -1 = whole row (default)")
    method.add_argument("--sym", action="store_true", help="symmetric weight grid (default asymmetric)")
    method.add_argument(
        "--clip",
        choices=CLIPS,
        default="none",
        help="shrink each weight range to what costs least: mse, by the weights' own errors; hessian, by those of outputs (default none)",
    )
    method.add_argument(
        "--bias_correction", action=SWITCH, default=False, help="where there is a bias, take the mean error of the output into it"
    )

    smooth = parser.add_argument_group("smoothing")
    smooth.add_argument("--smooth", action=SWITCH, help="smooth activations first (default: only smoothquant does)")
    smooth.add_argument("--alpha", type=float, default=0.5, help="share of the difficulty moved to the weights, 0 to 1 (default 0.5)")
    smooth.add_argument(
        "--min",
        type=float,
        default=smallest_scale,
        help="smallest smoothing scale (default %(default)s; opt.py 0.1, main.py 0.01, as in the paper)",
    )

    smooth.add_argument(
        "--smooth_search",
        action=SWITCH,
        default=False,
        help="for each group of linears the alpha near --alpha with the least output error on a sample",
    )

    solver = parser.add_argument_group("solver (gptq, awrq)")
    solver.add_argument("--percdamp", type=float, default=0.01, help="damping, as a share of the mean Hessian diagonal (default 0.01)")
    solver.add_argument(
        "--blocksize", type=int, default=1, metavar="COLUMNS", help="columns rounded jointly (default 1; -1 = 1 %% of a row)"
    )
    solver.add_argument(
        "--actorder", action=SWITCH, default=False, help="round the columns with the largest inputs first; groups stay in place"
    )
    solver.add_argument(
        "--true-sequential", action=SWITCH, default=False, help="let each group of linears see the ones before it quantized"
    )
    solver.add_argument(
        "--grid",
        choices=GRIDS,
        default="weight",
        help="find the ranges of rows in the weight, as published (default), or in its reformulation, which is what is rounded",
    )
    solver.add_argument(
        "--target",
        choices=TARGETS,
        default="layer",
        help="fit outputs to those of a layer's own input (default), or to the unquantized model's too, which runs beside: stream",
    )
    solver.add_argument(
        "--target_mix", type=float, default=0.5, metavar="BETA", help="share of the unquantized model in the target, 0 to 1 (default 0.5)"
    )

    data = parser.add_argument_group("data")
    data.add_argument("--calib_data", default="c4", metavar="CORPUS", help="c4 (default), wikitext2, ptb, or a folder of --data_dir")
    data.add_argument("--nsamples", type=int, default=128, metavar="N", help="calibration sequences (default 128)")
    data.add_argument("--seqlen", type=int, metavar="TOKENS", help="tokens per sequence (default: the model's context, at most 2048)")
    data.add_argument("--seed", type=int, default=0, help="seed of the calibration draw (default 0)")
    data.add_argument("--data_dir", metavar="FOLDER", help="local corpora, NAME/SPLIT.txt|jsonl|jsonl.gz; nothing is then downloaded")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--eval",
        default=corpora,
        metavar="CORPORA",
        help=f"perplexity on these, comma list: wikitext2, ptb, c4, ptb-new, c4-new, folders of --data_dir (default {corpora or 'none'})",
    )
    evaluation.add_argument(
        "--new-eval", action="store_true", help="ptb-new for ptb and c4-new for c4: GPTQ's later protocols, not the paper's"
    )

    tasks = parser.add_argument_group("tasks (lm-evaluation-harness)")
    tasks.add_argument("--tasks", metavar="NAMES", help="comma list, wildcards or YAML files of lm-eval; storycloze is storycloze_2018")
    tasks.add_argument("--num_fewshot", type=whole, metavar="N", help="examples before each item (default: as the task says, else 0)")
    tasks.add_argument(
        "--batch_size", type=batch_size, default=1, metavar="N", help="items run together, or auto (default 1); changes no result"
    )
    tasks.add_argument("--limit", type=share, metavar="N", help="items per task, the first ones; below 1 a share of them (default: all)")
    tasks.add_argument("--skip_missing", action="store_true", help="leave out tasks whose data is not there")
    tasks.add_argument("--table_results", action="store_true", help="print the tasks as a Markdown table (default: as JSON)")
    tasks.add_argument("--compare_full", action="store_true", help="evaluate the unquantized model too, corpora and tasks, in the same run")

    packed = parser.add_argument_group("packed checkpoints")
    packed.add_argument("--save", metavar="FOLDER", help="write the quantized model, its codes packed, into a new folder")
    packed.add_argument("--load", metavar="FOLDER", help="evaluate what --save wrote, in place of quantizing")
    packed.add_argument("--checkpoint_dir", metavar="FOLDER", help="keep finished blocks there, and go on after the last one it has")
    packed.add_argument(
        "--export", nargs=2, metavar=("FORMAT", "FOLDER"), help="write the model for others into a new folder; FORMAT: compressed-tensors"
    )
    packed.add_argument(
        "--kernel",
        choices=("auto", "cuda", "torch"),
        default="auto",
        help="with --load: what computes integers; auto (default): cuda on a GPU if its kernels can be built, else torch",
    )
    packed.add_argument(
        "--benchmark", type=positive, metavar="TOKENS", help="decode so many tokens of the first corpus one by one: milliseconds per token"
    )
    packed.add_argument(
        "--benchmark_prefill",
        type=positive,
        metavar="TOKENS",
        help="read so many tokens of the first corpus at once, as a prompt: milliseconds",
    )
    packed.add_argument("--check", action="store_true", help="with --benchmark: their perplexity too")

    run = parser.add_argument_group("run")
    gpu = torch.cuda.is_available()
    run.add_argument("--device", type=device, default="cuda" if gpu else "cpu", help="cuda, cuda:N or cpu (default: a GPU if there is one)")
    run.add_argument("--dtype", choices=DTYPES, default="auto", help="auto = the checkpoint's, but float32 on a CPU (default)")
    run.add_argument(
        "--walk_batch", type=positive, metavar="N", help="sequences run together (default: from the memory); changes no result"
    )
    run.add_argument("--output_path", metavar="FILE", help="write results and their whole protocol to this JSON")


def prepare(args, script):
    """What a script needs to know of its model before it loads any weights: configuration, recipe, tokenizer.

    Raises what load_config, make_recipe and load_tokenizer raise.  Fills in args.walk_batch.
    """
    if args.model is None:
        raise ValueError("give MODEL, or --load FOLDER")
    config = load_config(args.model, script)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{args.model} is quantized already; give the original, or --load for what --save wrote")
    recipe = make_recipe(args, config.max_position_embeddings)
    args.walk_batch = args.walk_batch or default_walk_batch(config, recipe.seqlen, args.device)
    return config, recipe, load_tokenizer(args.model)


def make_recipe(args, context):
    """The recipe that the command line asks for, with what its method implies.  context: the longest sequence that the model takes.

    Raises ValueError for a setting out of range, or one that the method cannot use.
    """
    method = METHODS[args.method]
    acts = args.act_quant if args.act_quant in method.acts else method.acts[0]
    smooth = args.smooth if args.smooth in method.smooth else method.smooth[0]
    settings = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    for usable, what, flags in (
        (method.weights, "quantize weights", ("wbits", "groupsize", "sym", "blocksize", "clip", "bias_correction")),
        (method.stats, "compensate errors", ("percdamp", "actorder", "true_sequential", "grid", "target")),
        (method.stats or args.clip != "hessian", "compensate errors", ("clip",)),
        (method.stats and args.target == "stream", "use a mix" + " without --target stream" * bool(method.stats), ("target_mix",)),
        (True in method.smooth or not args.smooth, "smooth", ("smooth",)),
        (False in method.smooth or args.smooth is not False, "go without smoothing", ("smooth",)),
        (smooth, "smooth" + " without --smooth" * (True in method.smooth), ("alpha", "min", "smooth_search")),
        (True in method.acts, "quantize activations", ("act_quant",)),
        (acts, "quantize activations" + " without --act_quant" * (True in method.acts), ("act_bits", "act_pertoken")),
    ):
        for flag in flags if not usable else ():
            value = args.changed.get(flag)
            if value is not None and (flag, value) != ("act_bits", 16):  # 16 bits are what it does
                shown = flag.replace("true_", "true-")
                shown = {True: f"--{shown}", False: f"--no-{shown}"}.get(value, f"--{shown} {value}")
                raise ValueError(f"{shown}: --method {args.method} does not {what}")
            if flag in PRESETS[args.preset]:  # what a method cannot use of a preset, it goes without
                settings[flag] = getattr(Recipe, flag)
    if method.weights and args.wbits == 16:
        raise ValueError(f"--method {args.method} quantizes weights: give --wbits, 2 to 8")
    seqlen = min(2048, context) if args.seqlen is None else args.seqlen
    if seqlen > context:
        raise ValueError(f"--seqlen {seqlen}: the model's context is {context} tokens")
    return Recipe(**settings | {"act_bits": args.act_bits if acts else 16, "smooth": smooth, "seqlen": seqlen})
