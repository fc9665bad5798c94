"""Make the demo from nothing: the world's text and tasks, and for OPT and for LLaMA a tokenizer and a tiny trained model.

Usage: python demo/train.py, or for a trial run python demo/train.py --steps 20 --out /tmp/demo
No network; about half an hour on two CPU cores, one model on each.
"""

import argparse
import math
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo import world

SEQLEN, BATCH, N_STEPS, LR = 256, 8, 4000, 2e-3
N_STORIES = 80_000  # of the training text: about as many tokens as N_STEPS batches hold, so that nearly every window is new
MAX_VOCAB = 1024  # the tokenizer stops earlier, when every word of the world is one token
JOINTS = ["\n\n", "\n", " "]  # between stories, so that no way of joining the lines of a corpus is foreign
N_OUTLIERS, FACTORS = 4, (8, 16)  # channels per site, and the factors that they draw from

# the special tokens in the order of their ids, the one that opens a text, and the shape of the model
SHAPE = dict(hidden_size=128, num_hidden_layers=4, max_position_embeddings=SEQLEN, eos_token_id=2, tie_word_embeddings=True)
OPT = dict(ffn_dim=512, num_attention_heads=4, word_embed_proj_dim=128, dropout=0.0, init_std=0.05, bos_token_id=2, pad_token_id=1)
LLAMA = dict(intermediate_size=344, num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, initializer_range=0.05, bos_token_id=1)
FAMILIES = {
    "opt": (["<s>", "<pad>", "</s>", "<unk>"], "</s>", OPTConfig(**SHAPE, **OPT)),
    "llama": (["<unk>", "<s>", "</s>"], "<s>", LlamaConfig(**SHAPE, **LLAMA)),
}

# where outliers are planted in a block: a norm, or a linear before a ReLU or a product, and the linears that read its channels
SITES = {
    "opt": (
        ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("final_layer_norm", ("fc1",)),
        ("fc1", ("fc2",)),
    ),
    "llama": (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ),
}


# ------------------------------------------------------------------------------------------------------------------------------------------
# tokenizer and text


def train_tokenizer(family, stories):
    """A byte-level BPE that opens every text with the family's own token, as the real ones do."""
    specials, bos, _ = FAMILIES[family]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(stories, trainer)
    special_tokens = [(bos, bpe.token_to_id(bos))]
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special_tokens)
    names = dict(bos_token=bos, eos_token="</s>", unk_token="<unk>", pad_token="<pad>" if "<pad>" in specials else None)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names, clean_up_tokenization_spaces=False)


def to_tokens(tokenizer, stories, seed):
    """Stories as one stream of ids (N,) and the positions (n,) where a chunk of 8 of them begins."""
    rng, stories = Random(seed), list(stories)
    chunks = []
    for i in range(0, len(stories), 8):
        joint = rng.choice(JOINTS)
        chunks.append(joint.join(stories[i : i + 8]) + joint)
    ids = [torch.tensor(ids) for ids in tokenizer(chunks, add_special_tokens=False, verbose=False).input_ids]
    return torch.cat(ids), torch.tensor([0] + [len(i) for i in ids[:-1]]).cumsum(0)


def batch(tokens, starts, bos, generator, echo):
    """(BATCH, SEQLEN) windows: half begin with a chunk (half of these after the token that opens a text), half anywhere.

    With `echo` a quarter of the windows say the first half twice, which teaches attention to look up and copy ten times sooner.
    """
    first = torch.randint(len(tokens) - SEQLEN, (BATCH,), generator=generator)
    first[: BATCH // 2] = starts[torch.randint(len(starts) - 8, (BATCH // 2,), generator=generator)]
    ids = tokens[first[:, None] + torch.arange(SEQLEN)]
    n_bos = BATCH // 4
    ids[:n_bos, 1:], ids[:n_bos, 0] = ids[:n_bos, :-1].clone(), bos
    if echo:
        ids[-n_bos:, SEQLEN // 2 :] = ids[-n_bos:, : SEQLEN // 2].clone()
    return ids


# ------------------------------------------------------------------------------------------------------------------------------------------
# training


def loss_of(model, ids):
    """Mean next-token loss of windows (B, T), in nats."""
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model, tokenizer):
    """Mean loss over the windows of test.txt, its stories joined by blank lines."""
    stories = islice(world.stories(world.SEED, held_out=True), world.N_TEST)
    ids = tokenizer("\n\n".join(stories), return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(BATCH)) / len(windows)


def train(family, n_steps, out):
    """Train one family and save it under `out`.  Returns the lines of its log."""
    torch.set_num_threads(1)
    torch.manual_seed(world.SEED)
    start, lines = time.time(), []

    def log(line):
        lines.append(f"{family}: {line}")
        print(lines[-1], flush=True)

    stories = list(islice(world.stories(world.SEED), max(world.N_TRAIN, N_STORIES * n_steps // N_STEPS)))
    tokenizer = train_tokenizer(family, stories[: 10 * world.N_TRAIN])
    tokens, starts = to_tokens(tokenizer, stories, world.SEED)
    config = FAMILIES[family][2]
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    log(f"{len(stories):,} stories, {len(tokens):,} tokens; {n_steps} steps of {BATCH} x {SEQLEN}")

    matrices, vectors = [[p for p in model.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    warmup = max(1, n_steps // 20)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (1 + math.cos(math.pi * i / n_steps)) / 2))
    generator = torch.Generator().manual_seed(world.SEED)
    losses = []
    for step in range(1, n_steps + 1):
        loss = loss_of(model, batch(tokens, starts, tokenizer.bos_token_id, generator, echo=step < n_steps // 2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == n_steps:
            held_out = f", held-out loss {held_out_loss(model, tokenizer):.4f}" if step % 500 == 0 or step == n_steps else ""
            log(f"step {step}, loss {fmean(losses[-100:]):.4f}{held_out}, {time.time() - start:.0f} s")

    log(f"rounded to FP16, held-out loss {held_out_loss(to_half(model).float(), tokenizer):.4f}")
    log(f"outliers planted, held-out loss {held_out_loss(plant(model.half()).float(), tokenizer):.4f}")
    folder = Path(out, family)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # the class by the name that older transformers know too
    config.write_text(config.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    return lines


# ------------------------------------------------------------------------------------------------------------------------------------------
# outlier channels, as large models have them


def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


@torch.no_grad()
def to_half(model):
    """Round to FP16.  What a division by the largest factor would push out of FP16's normal range becomes 0, so that planting is exact."""
    for p in blocks_of(model.half()).parameters():
        if p.ndim == 2:
            p[p.abs() < max(FACTORS) * torch.finfo(torch.float16).tiny] = 0
    return model


@torch.no_grad()
def plant(model, inverse=False):
    """Multiply a few channels at every site by powers of two and divide the columns that read them: the same function, bit for bit."""
    rng = Random(world.SEED)
    for block in blocks_of(model):
        for producer, consumers in SITES[model.config.model_type]:
            producer, consumers = block.get_submodule(producer), [block.get_submodule(name) for name in consumers]
            channels = rng.sample(range(len(producer.weight)), N_OUTLIERS)
            factors = torch.tensor(rng.choices(FACTORS, k=N_OUTLIERS)).to(producer.weight)
            factors = 1 / factors if inverse else factors
            for p in producer.parameters():  # rows and bias of a linear, weight and bias of a norm
                p[channels] *= factors.view(-1, *[1] * (p.ndim - 1))
            for consumer in consumers:
                consumer.weight[:, channels] /= factors
    return model


def main(args):
    world.write(args.out)
    versions = f"python {platform.python_version()}" + "".join(f", {m.__name__} {m.__version__}" for m in (torch, transformers, tokenizers))
    with ProcessPoolExecutor(len(FAMILIES), mp_context=get_context("spawn")) as pool:
        logs = pool.map(train, FAMILIES, [args.steps] * len(FAMILIES), [args.out] * len(FAMILIES))
    Path(args.out, "train.log").write_text("\n".join([versions] + [line for lines in logs for line in lines]) + "\n", encoding="utf-8")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder to write to")
    parser.add_argument("--steps", type=int, default=N_STEPS, help="optimizer steps per model")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
