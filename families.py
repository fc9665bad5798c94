"""The table of families: where the blocks of a model are, what their linears read, and who writes the residual stream.

`python -m bench.family FOLDER` checks a row against transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, and the module of the block that it comes from."""

    producer: str  # takes 1/s of a smoothing scale; "": the input is the residual stream itself
    linears: tuple[str, ...]
    exact: Callable = lambda config: True  # whether 1/s can go into the producer without changing the function
    rows: Callable = lambda config: None  # (C,): the row of the producer that each column of the input comes from, if not its own


@dataclass(frozen=True)
class Residual:
    """Who reads and who writes the residual stream, so that it can be rotated: see rotate.py."""

    embeddings: tuple[str, ...]  # modules whose rows are added up to the stream
    final_norm: str
    head: str
    norms: tuple[str, ...]  # of a block: producers of the groups that read the stream
    writers: tuple[str, ...]  # linears of a block that add to it, each to what the norm of its place reads; see read_before
    values: tuple[str, str]  # the linear that makes the values, alone or among others, and the one that reads them after attention
    centered: bool = False  # whether the norms subtract the mean
    obstacle: Callable = lambda config: None  # why the stream is not a plain sum that can be rotated, or given back to

    def read_before(self, config):
        """{writer: the norm that reads the stream which it adds to}.  Of two that add to the same side by side, the first only."""
        pairs = list(zip(self.writers, self.norms, strict=True))
        return dict(pairs[:1] if getattr(config, "use_parallel_residual", False) else pairs)


@dataclass(frozen=True)
class Family:
    """What one script knows of a model: where its decoder blocks are, and which linears of a block read the same input."""

    script: str  # the one that takes it
    blocks: str  # the list of decoder blocks
    groups: tuple[Group, ...]  # in the order of execution
    residual: Residual
    flat: tuple[str, ...] = ()  # linears that read (B * T, C)
    norm_offset: float = 0  # norms multiply by their weight plus this
    rms_norms: tuple[str, ...] = ()  # those that only their group reads, x / rms(x) in float32, cast, and then times the weight
    mlp: str = ""  # the module that computes down_proj(act(gate_proj(x)) * up_proj(x)), act being the configuration's hidden_act
    obstacle: Callable = lambda config: None  # why a model cannot be quantized block by block


def opt_pre_norm(config):
    """OPT-350m normalises after the residual sum: its norms feed the residual too, and can absorb nothing."""
    return config.do_layer_norm_before and config.layer_norm_elementwise_affine


def opt_obstacle(config):
    """What a rotation of OPT's stream would change."""
    if not config.do_layer_norm_before or getattr(config, "_remove_final_layer_norm", False):
        return "this model normalizes after the residual sum"
    if config.word_embed_proj_dim != config.hidden_size:
        return "this model projects its embedding"
    return None


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def value_rows(config):
    """The row of v_proj that each column of o_proj reads: with grouped-query attention, query heads in a row share a head of values."""
    heads, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    return torch.arange(heads * head_dim(config)).view(heads, 1, head_dim(config)).expand(-1, shared, -1).flatten()


def fused_value_rows(config):
    """The same of a qkv_proj: its rows are all queries, then all keys, then all values."""
    return value_rows(config) + (config.num_attention_heads + config.num_key_value_heads) * head_dim(config)


def fused_up_rows(config):
    """The row of a gate_up_proj that each column of down_proj reads: gates come first."""
    return torch.arange(config.intermediate_size) + config.intermediate_size


def interleaved_value_rows(config):
    """The row of a query_key_value that each column of the output linear reads: every head has its query, its key and its value."""
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return torch.arange(3 * heads * d).view(heads, 3, d)[:, 2].flatten()


def shares_norms(config):
    return "its attention and its MLP share a norm (use_parallel_residual)" if config.use_parallel_residual else None


def never(config):
    return False


def obstacle(reason):
    return lambda config: reason


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
AFTER_NORM = "what attention and MLP add to the stream goes through a norm of its own"
LLAMA = Family(  # an RMSNorm feeds nothing else, v is linear, and up is multiplied by the gate after it: every fold is exact
    script="main.py",
    blocks="model.layers",
    groups=(
        Group("input_layernorm", QKV),
        Group("self_attn.v_proj", ("self_attn.o_proj",), rows=value_rows),
        Group("post_attention_layernorm", GATE_UP),
        Group("mlp.up_proj", ("mlp.down_proj",)),
    ),
    residual=Residual(
        embeddings=("model.embed_tokens",),
        final_norm="model.norm",
        head="lm_head",
        norms=("input_layernorm", "post_attention_layernorm"),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        values=("self_attn.v_proj", "self_attn.o_proj"),
    ),
    rms_norms=("input_layernorm", "post_attention_layernorm"),
    mlp="mlp",
)
GEMMA = replace(LLAMA, norm_offset=1, rms_norms=(), mlp="")
GEMMA2 = replace(  # and Gemma 3
    GEMMA,
    groups=(*LLAMA.groups[:2], Group("pre_feedforward_layernorm", GATE_UP), LLAMA.groups[3]),
    residual=replace(LLAMA.residual, norms=("input_layernorm", "pre_feedforward_layernorm"), obstacle=obstacle(AFTER_NORM)),
)
OLMO2 = replace(
    LLAMA,
    rms_norms=(),
    groups=(Group("", QKV, never), LLAMA.groups[1], Group("", GATE_UP, never), LLAMA.groups[3]),
    residual=replace(LLAMA.residual, norms=(), obstacle=obstacle(AFTER_NORM)),
)
PHI3 = replace(
    LLAMA,
    mlp="",  # which has gate and up as one linear
    groups=(
        Group("input_layernorm", ("self_attn.qkv_proj",)),
        Group("self_attn.qkv_proj", ("self_attn.o_proj",), rows=fused_value_rows),
        Group("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Group("mlp.gate_up_proj", ("mlp.down_proj",), rows=fused_up_rows),
    ),
    residual=replace(LLAMA.residual, values=("self_attn.qkv_proj", "self_attn.o_proj")),
)
GPT_NEOX = Family(
    script="main.py",
    blocks="gpt_neox.layers",
    groups=(
        Group("input_layernorm", ("attention.query_key_value",)),
        Group("attention.query_key_value", ("attention.dense",), rows=interleaved_value_rows),
        Group("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        Group("mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), never),  # a GELU is between them
    ),
    residual=Residual(
        embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        norms=("input_layernorm", "post_attention_layernorm"),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        values=("attention.query_key_value", "attention.dense"),
        centered=True,
    ),
)
OPT = Family(
    script="opt.py",
    blocks="model.decoder.layers",
    groups=(
        Group("self_attn_layer_norm", QKV, opt_pre_norm),
        Group("self_attn.v_proj", ("self_attn.out_proj",)),
        Group("final_layer_norm", ("fc1",), opt_pre_norm),
        Group("fc1", ("fc2",), lambda config: config.activation_function == "relu"),  # relu(s x) = s relu(x)
    ),
    residual=Residual(
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        writers=("self_attn.out_proj", "fc2"),
        values=("self_attn.v_proj", "self_attn.out_proj"),
        centered=True,
        obstacle=opt_obstacle,
    ),
    flat=("fc1", "fc2"),
)

FAMILIES = {  # by config.model_type
    "llama": LLAMA,  # LLaMA 1, 2 and 3
    "mistral": LLAMA,
    "qwen2": LLAMA,  # biases on q, k, v
    "qwen3": LLAMA,  # norms on q and k, after their linears
    "smollm3": LLAMA,  # blocks without rotary positions among them
    "granite": LLAMA,  # scalars on embedding, attention, what blocks add, and logits
    "stablelm": replace(LLAMA, residual=replace(LLAMA.residual, centered=True), rms_norms=(), obstacle=shares_norms),
    "olmo2": OLMO2,
    "phi3": PHI3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt_neox": GPT_NEOX,  # Pythia too
    "opt": OPT,
}
