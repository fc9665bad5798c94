"""Does llama.cpp compute what we do of an export to GGUF?  Perplexity of the same windows, ours and its, the original's too, and a text.

CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36      # ten minutes of a processor
python scripts/check_llamacpp.py models/smollm2-w4a8 models/smollm2-gguf --original SmolLM2-135M-Instruct.Q4_1.gguf --data_dir DIR

LOADED is what --save wrote, EXPORTED what --export gguf wrote of it.  Ours is computed with quantized weights and unquantized activations:
llama.cpp rounds activations to 8 bits for every 32 columns, so finely that it costs less than 1 %.  Tokens are LOADED's own, in both.
Exit status 1 if the perplexities of a corpus differ by more than that, or if llama.cpp does not read the text as the same tokens.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from datautils import eval_tokens
from evaluation.perplexity import perplexity
from formats.checkpoint import load_packed_config, open_checkpoint
from formats.llamacpp import FILE
from formats.whole import load
from modelutils import load_tokenizer
from recipe import UsageError
from run.flags import Parser, listed, positive
from run.report import table
from runtime import first_lines

SAME = 0.01  # largest relative difference of two perplexities
PROMPT = "The capital of France is"
NEW = 24  # tokens to generate


def without_activations(folder):
    """The Decoder of a folder that --save wrote, dequantized, its activations as they are."""
    decoder = open_checkpoint(folder, "float32", arithmetic="dequantized")
    decoder.source.recipe = replace(decoder.source.recipe, act_bits=16)
    return decoder


def open_gguf(path, context):
    """A llama_cpp.Llama of a file, on the CPU.  Raises UsageError if the package or the file is not there, or if llama.cpp refuses it."""
    try:
        from llama_cpp import Llama
    except ImportError as e:
        raise UsageError(f"llama-cpp-python is not here ({e}): `python {sys.argv[0]} --help` says how to install it") from e
    try:
        threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}  # more would wait for each other
        return Llama(str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, seed=0, **threads)
    except ValueError as e:
        raise UsageError(f"{path}: llama.cpp does not open it ({first_lines(e)}); give what --export gguf wrote, or the original") from e


def perplexity_of(llama, ids, seqlen):
    """Perplexity of a llama_cpp.Llama on ids (N,), as evaluation.perplexity has it."""
    losses = []
    for window in ids.view(-1, seqlen):
        llama.reset()
        llama.eval(window.tolist())
        logits = torch.from_numpy(llama.scores[:seqlen])
        losses.append(F.cross_entropy(logits[:-1], window[1:]).double())
    return math.exp(torch.stack(losses).mean())


def generated(llama, prompt):
    """What llama.cpp makes of tokens, greedily: its tokens."""
    llama.reset()
    found = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == NEW:
            return found
    return found


def main(args):
    if args.seqlen < 2:
        raise UsageError(f"--seqlen {args.seqlen}: a window of one token predicts none; give 2 or more")
    _, about = load_packed_config(args.loaded)
    tokenizer, recipe = load_tokenizer(args.loaded), about["recipe"]
    files = {"llama.cpp, export": Path(args.exported, FILE)} | ({"llama.cpp, original": args.original} if args.original else {})
    llamas = {label: open_gguf(path, args.seqlen) for label, path in files.items()}
    texts = {name: eval_tokens(name, tokenizer, args.seqlen, args.data_dir)[0][: args.windows * args.seqlen] for name in listed(args.eval)}
    quantized, decoder = open_checkpoint(args.loaded, "float32", arithmetic="dequantized"), without_activations(args.loaded)
    rows, good = [], True
    for name, ids in texts.items():
        ids = ids[: len(ids) // args.seqlen * args.seqlen]
        ours = perplexity(decoder, ids, args.seqlen)["ppl"]
        theirs = {label: perplexity_of(llama, ids, args.seqlen) for label, llama in llamas.items()}
        off = theirs["llama.cpp, export"] / ours - 1
        good &= abs(off) <= SAME
        numbers = (perplexity(quantized, ids, args.seqlen)["ppl"], ours, *theirs.values())
        rows.append((name, len(ids) // args.seqlen, *(f"{ppl:.4f}" for ppl in numbers), f"{off:+.2%}"))
    bits, weights = f"W{recipe.wbits}A{recipe.act_bits}", f"W{recipe.wbits}A16"
    print(table(("corpus", "windows", f"ours, {bits}", f"ours, {weights}", *llamas, f"export over {weights}"), rows))
    prompt = tokenizer(PROMPT)["input_ids"]
    read = llamas["llama.cpp, export"].tokenize(PROMPT.encode(), add_bos=False, special=False)
    if read != tokenizer(PROMPT, add_special_tokens=False)["input_ids"]:
        print(f"llama.cpp reads {PROMPT!r} as the tokens {read}")
        good = False
    model = load(args.loaded, "float32")
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
    for label, tokens in {f"ours, {bits}": ours, **{k: generated(v, prompt) for k, v in llamas.items()}}.items():
        print(f"{label}: {PROMPT}{tokenizer.decode(tokens)!r}")
    print(f"within {SAME:.0%} of ours" if good else "NOT what we compute")
    sys.exit(0 if good else 1)


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaded", metavar="LOADED", help="folder that --save wrote")
    parser.add_argument("exported", metavar="EXPORTED", help="folder that --export gguf wrote from it")
    parser.add_argument("--original", metavar="FILE", help="the GGUF file of --gguf_like, to compare with")
    parser.add_argument("--eval", default="wikitext2,c4-joined", metavar="CORPORA", help="as for main.py (default %(default)s)")
    parser.add_argument("--data_dir", metavar="FOLDER", help="as for main.py")
    parser.add_argument("--windows", type=positive, default=12, metavar="N", help="the first ones of each corpus (default %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=512, metavar="TOKENS", help="of a window (default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
