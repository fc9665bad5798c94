"""Decoder models: configuration and tokenizer, and a decoder whose blocks come from a source, one at a time."""

import json
import os
from contextlib import ExitStack, suppress
from copy import copy, deepcopy
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import GatedRepoError
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from families import FAMILIES
from formats.original import Original, assign
from formats.shards import Tensors, find_weights
from quant import Batch
from recipe import UsageError
from runtime import find_place, first_lines, free_memory, release, total_memory, trim, write_json

# ---------------------------------------------------------------------------
# Configuration and tokenizer

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # what configurations call their number
# What a fine-tuning run may have left in config.json, as this program needs it.
RUN_SETTINGS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True, "use_cache": True}


def load_config(name, script=None):
    """The configuration of a local folder or hub model.

    Raises UsageError if there is none, or if its family is not in the table, is another script's (None: any) or cannot be quantized.
    """
    if has_file(name, "adapter_config.json"):
        raise UsageError(f"{name}: is or has an adapter (adapter_config.json); merge it into its model first, and remove that file")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **RUN_SETTINGS)
        config._attn_implementation = "sdpa"  # not flash_attention_2, which a configuration can ask for too
    except Exception as e:  # transformers raises whatever its validators do
        check_no_code(name, e, "model_type")
        if os.path.isfile(os.path.join(name, "config.json")):
            raise UsageError(
                f"{name}: its config.json is not one that transformers {transformers.__version__} takes ({first_lines(e)})"
            ) from e
        if isinstance(e.__cause__, GatedRepoError):
            raise UsageError(f"{name} is gated: ask for access at https://huggingface.co/{name}, then `hf auth login`") from e
        raise UsageError(
            f"{name}: no model there: neither a local folder with a config.json nor a hub model that can be reached"
            f" ({first_lines(e)}); a private model needs `hf auth login`"
        ) from e
    check_family(config, name, script)
    if not AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa:
        config._attn_implementation = "eager"  # Gemma 2, which bounds its attention weights
    return config


def has_file(name, file):
    """The place of a file of a local folder or hub model, or None if it has none, or cannot be asked: then the next step says why."""
    with suppress(OSError):
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def check_family(config, name, script):
    """Raises UsageError for a model that is not in the table of families, or is another script's (None: any)."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        experts = next((n for count in EXPERTS if (n := getattr(config, count, None))), None)
        mixture = f", a mixture of {experts} experts, whose weights would stay unquantized" if experts else ""
        raise UsageError(f"{name} is of the {config.model_type} family{mixture}; supported: {', '.join(FAMILIES)}")
    if script not in (None, family.script):
        raise UsageError(f"{name} is of the {config.model_type} family: run it with {family.script}")
    if reason := family.obstacle(config):
        raise UsageError(f"{name}: this {config.model_type} model cannot be quantized block by block: {reason}")


def check_no_code(name, error, what):
    """Raises UsageError if transformers failed because it may not run what a model's author wrote; `what` asked for it."""
    if "custom code" in str(error):
        raise UsageError(
            f"{name}: transformers {transformers.__version__} has no class of its own for its {what}, and code that comes with a model is"
            " never run here; convert the model to a class of transformers"
        ) from error


def load_tokenizer(name):
    """The model's own tokenizer.  If its configuration asks for a first token (OPT's </s>), it adds it, whatever file it was read from."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        known = tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as e:  # transformers raises whatever its backends do
        check_no_code(name, e, "tokenizer_class")
        raise UsageError(f"{name}: no usable tokenizer there ({first_lines(e)}); save it into the model's folder") from e
    if not known:  # transformers makes an empty one where it finds no files
        raise UsageError(f"{name}: no tokenizer there, or one without a vocabulary; save it into the model's folder")
    if get_tokenizer_config(name).get("add_bos_token") and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write a tokenizer so that load_tokenizer gives the same; transformers leaves out that it adds a first token."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "add_bos_token", False):
        path = Path(folder, "tokenizer_config.json")
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": True})


def check_vocabulary(config, texts):
    """Raises UsageError if a text, ids (N,) or (n, T) or None, has a token that the model does not know."""
    largest = max((int(ids.max()) for ids in texts if ids is not None), default=0)
    if largest >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {largest}, the model knows {config.vocab_size}: they do not belong together")


# ---------------------------------------------------------------------------
# The inputs of a block


class Sequences:
    """The inputs of a block, batch by batch: hidden states (B, T, D), kept in a Place, and the other arguments.

    The arguments (masks, positions, rotary tables) are opaque: recorded once for each block and (B, T), and replayed as they are.  Blocks
    of one kind get the same tensors, so they take no memory of their own.
    """

    def __init__(self, place):
        self.place, self.x, self.arguments = place, [], {}  # arguments: {(name of the block, (B, T)): {...}}
        self.now = None  # the current batch
        self.weights = None  # {linear: (n, T)}: how much the tokens of all batches count in its statistics; None: alike

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        """Batch k, on the device."""
        return self.x[k].to(self.place.device)

    def __setitem__(self, k, x):
        self.x[k] = self.place.put(x)

    def record(self, i, x, **arguments):
        """Stands in for block i: keeps what it would have read, of block 0, and its other arguments."""
        if i == 0:
            self.x.append(self.place.put(x))
        self.arguments[f"block {i}", tuple(x.shape[:2])] = arguments
        return x

    def run(self, block, k, name):
        """The output of a block for batch k, (B, T, D).  Raises FloatingPointError, naming the layer, if NaN or Inf comes out.

        name: the block's, as "block 3".
        """
        self.now, x = k, self[k]
        return run_block(block, x, self.arguments[name, tuple(x.shape[:2])], name)

    def propagate(self, block, name):
        """Replace the inputs of a block by its outputs, batch by batch."""
        for k in range(len(self)):
            self[k] = self.run(block, k, name)


def run_block(block, x, arguments, name):
    """x (B, T, D) through a block.  Raises FloatingPointError, naming the layer, if NaN or Inf comes out."""
    out = block(x, **arguments)
    out = out if torch.is_tensor(out) else out[0]  # newer transformers return the tensor, older ones a tuple
    if not out.isfinite().all():
        raise FloatingPointError(f"{name}: NaN or Inf in the output of {_first_nonfinite(block, x, arguments)}{way_out(out.dtype)}")
    return out


def way_out(dtype):
    """What a message about NaN or Inf in tensors of a dtype ends with."""
    return "; float16 ends at 65504: try --dtype bfloat16 or float32" if dtype == torch.float16 else ""


def _first_nonfinite(block, x, arguments):
    """Name of the first submodule, in the order of execution, whose output is not finite.  The submodules lose their hooks."""
    found = []
    for module in block.modules():
        if module is not block:  # what watches them must not see the same inputs twice
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    def check(name):
        def hook(module, args, out):
            out = out if torch.is_tensor(out) else out[0]
            if not out.isfinite().all():
                found.append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            hooks.callback(module.register_forward_hook(check(name)).remove)
        block(x, **arguments)
    return found[0] if found and found[0] else "the block"


def sequences_place(config, dtype, tokens, device, streams=1):
    """A Place for the hidden states of so many tokens, `streams` times.  Raises UsageError if there is none with room."""
    return find_place(streams * tokens * config.hidden_size * dtype.itemsize, device)


def default_walk_batch(config, seqlen, device, most=None):
    """Sequences to run together: 8192 tokens on a GPU (fewer if their widest activations exceed a tenth of its memory), 2048 on a CPU.

    most: so many sequences at most.
    """
    width = max(config.hidden_size, getattr(config, "ffn_dim", 0), getattr(config, "intermediate_size", 0), config.vocab_size)
    tokens = min(8192 if device.type == "cuda" else 2048, int(total_memory(device) / 10 / (8 * width)))
    return max(1, min(tokens // seqlen, most or tokens))


# ---------------------------------------------------------------------------
# The decoder


def _prefix(config):
    """What the names of the tensors of all blocks begin with."""
    return f"{FAMILIES[config.model_type].blocks}."


def skeleton(config, dtype):
    """The model of a configuration, in evaluation mode, its parameters on the meta device; dtype: a torch.dtype."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False).eval().requires_grad_(False)


def run_dtype(config, dtype, device):
    """The torch.dtype that a --dtype means for a model on a device: "auto" is the checkpoint's, but float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else config.dtype or torch.float32
    return getattr(torch, dtype)


def open_decoder(name, dtype="auto", device="cpu", config=None, rest_dtype="auto"):
    """The decoder of a local folder or hub model, whose weights are found and checked by their headers; no block is read yet.

    config: what load_config gave, if it is there; rest_dtype: in which the tensors that are not quantized are stored ("auto": the
    checkpoint's, whatever is computed in).  Raises UsageError for weights that are missing, damaged, or do not fit config.json.
    """
    config = config or load_config(name)
    try:
        empty = skeleton(config, run_dtype(config, dtype, torch.device(device)))
    except Exception as e:  # torch and transformers raise whatever a wrong number leads to
        raise UsageError(f"{name}: no model can be made of its config.json ({type(e).__name__}: {first_lines(e)}); correct it") from e
    if not config.num_hidden_layers:
        raise UsageError(f"{name}: its config.json says num_hidden_layers 0; correct it")
    if file := has_file(name, "generation_config.json"):  # of a model that has none, transformers made one from config.json
        try:
            empty.generation_config = GenerationConfig.from_pretrained(name)
        except Exception as e:
            raise UsageError(f"{file}: not a generation_config.json ({first_lines(e)}); correct it or take it away") from e
    kept = config.dtype if rest_dtype == "auto" else getattr(torch, rest_dtype)
    return Decoder(empty, Original(empty, find_weights(name), _prefix(config), name), kept)


def decoder_of(model):
    """The decoder of a transformers model in memory, whose tensors it reads as they are when it needs them."""
    empty = skeleton(model.config, model.dtype)
    empty.generation_config = model.generation_config
    return Decoder(empty, Original(empty, Tensors(model.state_dict()), _prefix(model.config), "the model"))


def stand_in(block, forward):
    """A module without tensors that runs `forward` in a block's place; its attributes, which a model may look at, are the block's."""
    module = copy(block)
    module._modules, module._parameters, module._buffers = {}, {}, {}
    module.forward = forward
    return module


class Decoder:
    """A causal language model: its skeleton on the meta device, and the source of its tensors (see formats.original), quantized or not.

    No more than one block is in memory at a time, and embedding and head only while they are needed, unless it is materialized as a whole.
    """

    def __init__(self, skeleton, source, stored_dtype=None):
        """stored_dtype: what the checkpoint's tensors are, and are saved in where that changes no value (None: as the skeleton's)."""
        self.skeleton, self.source, self.batch, self.stored_dtype = skeleton, source, Batch(), stored_dtype or skeleton.dtype
        self.config, self.dtype, self.family = skeleton.config, skeleton.dtype, FAMILIES[skeleton.config.model_type]

    def __len__(self):
        """The number of blocks."""
        return len(self._blocks)

    @property
    def _blocks(self):
        return self.skeleton.get_submodule(self.family.blocks)

    @property
    def linears(self):
        """Names of the linears of a block that are quantized."""
        return [name for group in self.family.groups for name in group.linears]

    def empty_block(self, i):
        """Block i on the meta device, to be filled."""
        return deepcopy(self._blocks[i], {id(self.config): self.config})

    def block(self, i):
        """Block i in host memory."""
        return self.source.build(self.empty_block(i), self.source.read(i), self.batch)

    def visits(self, device, desc, first=0, backwards=False):
        """(i, block on the device) from block `first` on, or back to it, with a progress bar; emptied when the next one is asked for."""
        order = range(first, len(self))
        for i in tqdm(order[::-1] if backwards else order, desc=desc, unit="block", leave=False, initial=first, total=len(self)):
            block = self.block(i).to(device)
            yield i, block
            block.to("meta")
            trim()

    @torch.no_grad()
    def embed(self, batches, place):
        """What enters the first block: Sequences, kept in `place`.  batches: iterable of (B, T) token ids."""
        sequences = Sequences(place)
        blocks = [stand_in(block, partial(sequences.record, i)) for i, block in enumerate(self._blocks)]
        model = self._ends(blocks, place.device, self.skeleton.get_output_embeddings())
        for ids in batches:
            model.base_model(ids.to(place.device), use_cache=False)  # a cache would travel in the arguments and grow with every replay
        return sequences

    @torch.no_grad()
    def logits(self, sequences):
        """What the model makes of the last block's output: yields (B, T, V), batch by batch, by the class's own forward."""
        head = self.head(sequences.place.device)
        for k in range(len(sequences)):
            yield head(sequences[k])

    def head(self, device):
        """What comes after the blocks, as a module: h (B, T, D) -> logits (B, T, V)."""
        return Head(self, device)

    def _ends(self, blocks, device, unused):
        """The model on a device, with others in place of its blocks, and without one of its modules."""
        return self._fill(self._copy(blocks, unused)).to(device)

    def materialize(self, device, memory=None):
        """The whole model on the device, ready for model(ids).

        memory: bytes that it may take there; by default three quarters of what is free on a GPU, and no limit on a CPU.  Blocks beyond
        that stay in host memory as the source has them, packed if it is quantized, and each is made on the device for the time that it
        runs; model.visiting is their number.  model.batch tells quantized linears what is padding: see quant.Batch.
        """
        release(device)  # or it would not count as free
        if memory is None:
            memory = free_memory(device) * 3 // 4 if device.type == "cuda" else float("inf")
        model = self._fill(self._copy([])).to(device)
        fit = (memory - _bytes(model)) / _bytes(self.block(0))
        fit = len(self) if fit >= len(self) else max(0, int(fit) - 1)  # one place is for those that pass through
        blocks = [self.block(i).to(device) for i in tqdm(range(fit), desc="loading", unit="block", leave=False)]
        blocks += [self._visitor(i, device) for i in range(fit, len(self))]
        model.get_submodule(self.family.blocks).extend(blocks)
        model.batch, model.visiting = self.batch, len(self) - fit
        self.batch.attach(model)
        return model

    def _visitor(self, i, device):
        """A stand-in for block i, of which host memory has what is stored."""
        stored = self.source.read(i)

        def forward(*args, **kwargs):
            return self.source.build(self.empty_block(i), stored, self.batch).to(device)(*args, **kwargs)

        block = stand_in(self._blocks[i], forward)
        block.stored = stored
        return block

    def _copy(self, blocks, *without):
        """A copy of the skeleton with other blocks, and without some of its modules."""
        replaced = {self._blocks: nn.ModuleList(blocks)} | {module: nn.Identity() for module in without}
        return deepcopy(self.skeleton, {id(old): new for old, new in replaced.items()} | {id(self.config): self.config})

    def _fill(self, model):
        """Give a copy of the skeleton its tensors outside the blocks."""
        names, tied = list(model.state_dict()), self.source.tied
        found = self.source.rest({tied.get(name, name) for name in names})
        assign(model, {name: found[tied.get(name, name)] for name in names})
        for target, source in tied.items():
            if target in names and source in names:
                path, _, attribute = target.rpartition(".")
                setattr(model.get_submodule(path), attribute, model.get_parameter(source))
        return model


class Head(nn.Module):
    """What a model makes of the last block's output, by the class's own forward: h (B, T, D) -> logits (B, T, V)."""

    def __init__(self, decoder, device):
        super().__init__()
        unused = decoder.skeleton.get_input_embeddings()
        self.width, self.given = unused.embedding_dim, (given := {})
        self.model = decoder._ends([stand_in(decoder._blocks[0], lambda *_, **__: given.pop("h"))], device, unused)

    def forward(self, h):
        self.given["h"] = h  # not an attribute that the stand-in reads: a module in a circle stays in memory
        nothing = h.new_zeros(*h.shape[:2], self.width)  # what would enter the first block: its place is the last one's output
        return self.model(inputs_embeds=nothing, use_cache=False).logits


def _bytes(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
