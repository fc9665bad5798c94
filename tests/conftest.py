"""What the tests share: tiny random models of every family, a toy tokenizer and a folder of tiny corpora.  No test reaches the network."""

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from copy import deepcopy
from functools import partial

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # what a lost process makes torch print is tested in no test
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before anything imports the hub's client

import emulation
import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from families import FAMILIES
from formats.checkpoint import Store
from modelutils import decoder_of
from processes import World
from recipe import Recipe
from rotate import rotated
from run import cli
from run.pipeline import with_seqlen
from run.quantize import Layer, quantize_blocks
from run.report import report
from runtime import Clock

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(96))]
CONTEXT = 64

# By model_type: the settings of a model of two blocks, its variants, the linears of a block that read one input, in the order of execution,
# and those that must keep `in_scale` in a variant, because no weight before them can absorb a smoothing scale.
# Families without a row are in test_families.py.
QKV, OUT, FC1, FC2 = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
O_PROJ, GATE_UP, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": len(WORDS),
}
LLAMA = {
    "settings": SIZES | {"intermediate_size": 64, "num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 2},
    "groups": (QKV, O_PROJ, GATE_UP, DOWN),
    "absorb": {"self_attn.v_proj": O_PROJ, "mlp.up_proj": DOWN},
}
GROUPED = {"num_key_value_heads": 2}
TINY = {
    "opt": {
        "settings": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "variants": {
            "pre-norm": {},
            "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},  # as OPT-350m, with project_in and project_out
            "gelu": {"activation_function": "gelu"},  # as Galactica
            "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        },
        "groups": (QKV, OUT, FC1, FC2),
        "absorb": {"self_attn.v_proj": OUT, "fc1": FC2},  # rows of these take 1/s of the smoothing scale of those, unless those keep it
        "in_scale": {"pre-norm": (), "post-norm": QKV + FC1, "gelu": FC2, "bare": QKV + FC1},
    },
    "llama": LLAMA
    | {
        "variants": {
            "plain": {},  # as LLaMA 1
            "grouped": GROUPED | {"attention_bias": True, "mlp_bias": True},  # several query heads read one head of keys and values
            "llama3": GROUPED
            | {
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        },
    },
    "mistral": LLAMA
    | {"variants": {"sliding": GROUPED | {"sliding_window": 12}, "wide": GROUPED | {"head_dim": 16, "sliding_window": None}}},
    "qwen2": LLAMA
    | {"variants": {"grouped": GROUPED, "sliding": GROUPED | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0}}},
    "qwen3": LLAMA | {"variants": {"wide": {"num_key_value_heads": 1, "head_dim": 16}}},
}
for row in TINY.values():
    row.setdefault("in_scale", dict.fromkeys(row["variants"], ()))
VARIANTS = [(family, variant) for family in TINY for variant in TINY[family]["variants"]]
FIRST_VARIANTS = [(family, next(iter(TINY[family]["variants"]))) for family in TINY]


def tiny_model(family="opt", variant="pre-norm", seed=0, **settings):
    """Two blocks, float32, in evaluation mode; random biases and norms too, and outlier channels as smoothing is made for."""
    config = AutoConfig.for_model(family, **TINY[family]["settings"] | TINY[family]["variants"][variant] | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g))
            if name.endswith("norm.weight"):
                p.mul_(0.2).add_(1)
                p[torch.randperm(len(p), generator=g)[:2]] *= 8
            elif "embed" in name or p.dim() == 1:
                p.mul_(0.3)
            else:
                p.mul_(p.shape[1] ** -0.5)
    return model


def token_ids(n, T, seed=0):
    """(n, T) int64: random words."""
    return torch.randint(4, len(WORDS), (n, T), generator=torch.Generator().manual_seed(seed))


def toy_tokenizer(words=WORDS):
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def save_model(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or toy_tokenizer()).save_pretrained(folder)
    return folder


CPU = torch.device("cpu")


def quantize(model, ids, recipe, walk_batch=1, store=None):
    """Quantize a transformers model, rotated if the recipe says so: the quantized one, whole, the Store of its blocks, and [Layer]."""
    if store is None:
        decoder = decoder_of(model)
        store = Store(rotated(decoder, recipe.seed) if recipe.rotate else decoder, recipe)
    layers = [layer for block in quantize_blocks(store.original, ids, recipe, store, walk_batch=walk_batch) for layer in block]
    return store.decoder().materialize(CPU), store, layers


def in_child(action):
    """Run action() in a fork of this process: what os.waitpid says of it."""
    return forked([action])[0]


def in_fork(action):
    """The exit status of action(), in a process that has no other threads."""
    tqdm.set_lock(threading.RLock())  # its own: one that is killed while it writes would never give back what it shares with its parent
    try:
        torch.set_num_threads(1)
        action()
    except SystemExit as e:
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(actions, seconds=120):
    """Run every action() in a fork of this process, side by side: [what os.waitpid says of it].  SIGALRM ends what takes too long."""
    children = []
    for action in actions:
        child = os.fork()
        if not child:
            signal.alarm(seconds)
            os._exit(in_fork(action))
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def in_world(size, action, folder, device=CPU):
    """[action(world) of each of `size` processes]: anything that torch.save and torch.load take."""
    folder.mkdir()

    def work(rank):
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
        torch.save(action(World(rank, size, device)), folder / f"{rank}.pt")
        dist.barrier()

    assert forked([partial(work, rank) for rank in range(size)]) == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


class FinishedBlocks(Store):
    """A store that keeps blocks as they were finished, unpacked."""

    def put(self, i, made, layers, streams):
        self.blocks[i] = deepcopy(made)

    def model(self, model):
        """A copy of a transformers model with these blocks."""
        model = deepcopy(model)
        for i, made in self.blocks.items():
            decoder_blocks(model)[i] = made.block
        return model


def decoder_blocks(model):
    """The list of decoder blocks of a transformers model."""
    return model.get_submodule(FAMILIES[model.config.model_type].blocks)


def recipe_of(script, line, context=2048):
    """The recipe that a command line of a script, such as opt, asks for, of a model with that context."""
    run = cli.parse(cli.make_parser(*script.main.args, **script.main.keywords), ["MODEL", *line.split()])
    return with_seqlen(run.recipe, run.seqlen or min(2048, context), context)


@pytest.fixture(scope="session", autouse=True)
def no_report_of_the_machine():
    """After every evaluation lm-eval asks pip and the system what is installed: a second, and no part of a result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
        yield


@pytest.fixture(params=VARIANTS, ids="-".join)
def model(request):
    """A tiny model of every family and variant; `groups`, `absorb`, `keeps_in_scale` say what the tables of this file say about it."""
    family, variant = request.param
    model = tiny_model(family, variant)
    model.groups, model.absorb, model.keeps_in_scale = (
        TINY[family]["groups"],
        TINY[family]["absorb"],
        set(TINY[family]["in_scale"][variant]),
    )
    return model


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory):
    """Folder of a tiny pre-norm OPT, with its tokenizer.  Copy it before you change it."""
    return save_model(tmp_path_factory.mktemp("tiny") / "opt", tiny_model())


BAR = re.compile(r"\d+%\||\d+/\d+ \[|\?*[a-z]+/s[\],]|\d+[a-z]+ \[\d\d:\d\d")  # of a progress bar


def messages(err):
    """The lines of stderr, without progress bars, which go back to the line's start."""
    lines = [line.split("\r")[-1].strip() for line in err.split("\n")]
    return [line for line in lines if line and not BAR.search(line)]


@pytest.fixture
def run_script(monkeypatch, capfd):
    """run_script(module, *arguments) -> (exit status, stdout, lines of stderr), in this process: an import takes seconds."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    verbosity = transformers.logging.get_verbosity()

    def run(module, *arguments):
        argv = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        capfd.readouterr()
        status = 0
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                module.parser().run(module.main) if hasattr(module, "parser") else module.main(argv)
            except SystemExit as e:
                status = e.code or 0
        out, err = capfd.readouterr()
        return status, out, messages(err)

    yield run
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A --data_dir of random words: wikitext2, ptb and c4 in their layouts, the folder `own`, `one`, which has a single
    split, and `fields`, whose texts are called body."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("corpora")

    def line(n):
        return " ".join(rng.choice(WORDS[4:]) for _ in range(n))

    every = ("train", "validation", "test")
    for name, splits, lines, words in (
        ("wikitext2", every, 30, 20),
        ("ptb", every, 30, 20),
        ("own", ("train", "test"), 30, 20),
        ("one", ("validation",), 30, 20),
        ("short", ("train", "test"), 1, 10),
    ):
        (folder / name).mkdir()
        for split in splits:
            (folder / name / f"{split}.txt").write_text("".join(f" {line(words)}\n" for _ in range(lines)))
    (folder / "fields").mkdir()
    (folder / "fields/test.json").write_text(json.dumps([{"body": line(20)} for _ in range(30)]))
    (folder / "c4").mkdir()
    for split in ("train", "validation"):
        (folder / "c4" / f"{split}.jsonl").write_text("".join(json.dumps({"text": line(60)}) + "\n" for _ in range(20)))
    return folder


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library of the CUDA kernels, for the emulator.  Its tests are one xdist_group, as it takes seconds to compile."""
    if not shutil.which("g++"):
        pytest.skip("no g++, which compiles the kernels for the emulator")
    return emulation.compile_kernels(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def blank():
    """A report of opt.py, of which `results` makes others."""
    calibration = {"corpus": "c4", "split": "train", "source": "hub", "rule": "random", "nsamples": 128, "seqlen": 2048, "seed": 0}
    protocol = {"calibration": calibration, "evaluation": {}}
    found = {"model": "", "protocol": protocol | {"tasks": {}}, "walk_batch": 1, "results": {"perplexity": {}, "tasks": {}}, "full": None}
    found |= {"tuning": [], "failed": {}, "commit": None}
    found["layers"] = [Layer(0, "fc1", 0.5)]
    return report(Recipe(), decoder_of(tiny_model().half()), found, Clock(CPU))


@pytest.fixture
def results(blank, tmp_path):
    """Call it to write a result: results(file, model, {corpus: ppl}, recipe settings..., edit=function of the report)."""

    def write(file, model, ppl, edit=lambda run: None, seqlen=2048, **settings):
        run = deepcopy(blank) | {"model": model}
        run["recipe"] |= settings
        if run["recipe"]["method"] == "full":
            run["protocol"]["calibration"] = None
        for corpus, value in ppl.items():
            how = {"corpus": corpus, "split": "test", "source": "hub", "rule": "joined", "seqlen": seqlen, "n_tokens": 9000}
            run["protocol"]["evaluation"][corpus] = how
            run["results"]["perplexity"][corpus] = {"ppl": value, "windows": 4, "seqlen": seqlen, "tokens": 8192}
        edit(run)
        path = tmp_path / "opt" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))

    return write
