"""Perplexity of a model that llm-compressor quantizes, on the windows of our own results, as JSONs that scripts/table.py sets beside them.

    python scripts/compare_llmcompressor.py models/smollm2 --data_dir DATA --how spinquant --out out/real/smollm2

Weights asymmetric per output channel, activations asymmetric per token, the head unquantized; all else is at llm-compressor's defaults.
The texts are those of scripts/real.sh.  It needs llmcompressor 0.14.0.1, which is not in requirements.txt, as it asks for other versions:
install it, with tqdm and accelerate, into an environment of its own.  A cell whose JSON is there is skipped.
"""

import argparse
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datautils import calibration, check_corpora, eval_tokens
from modelutils import load_config, load_tokenizer
from recipe import Recipe, UsageError
from run.flags import Parser, listed, positive, window_range
from run.report import SCHEMA
from runtime import commit, hardware, versions, write_json

TRANSFORMS = {"gptq": "GPTQ", "smoothquant": "SmoothQuant + GPTQ", "spinquant": "SpinQuant + GPTQ"}


def transforms(how):
    """What llm-compressor does before it rounds: a list of its modifiers.

    "hadamard" refuses widths that have no Hadamard matrix in its table, "random-matrix" is not orthogonal (release 0.14.0.1).
    """
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return {
        "gptq": lambda: [],
        "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.5)],
        "spinquant": lambda: [SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")],
    }[how]()


def rounding(wbits, act_bits):
    """GPTQ per output channel with activations per token, as a list of modifiers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=wbits, type="int", symmetric=False, strategy="channel"),
        input_activations=QuantizationArgs(num_bits=act_bits, type="int", symmetric=False, strategy="token", dynamic=True),
    )
    return [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]


def apply(name, steps, ids):
    """The model after llm-compressor's steps, calibrated on windows (n, T), in memory."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False).eval()
    windows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=model,
        dataset=windows,
        recipe=steps,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        processor=load_tokenizer(name),
    )
    return model


@torch.no_grad()
def perplexity(model, ids, seqlen, desc):
    """What evaluation.perplexity computes, of a model whose linears are another program's: one window at a time, by its own forward."""
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    losses = [F.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:]).double() for w in tqdm(windows, desc=desc, leave=False)]
    return {"ppl": torch.stack(losses).mean().exp().item(), "windows": len(windows), "seqlen": seqlen, "tokens": windows.numel()}


def cell(args, how, seed, tokenizer, texts, code):
    """One result, in the schema of opt.py and main.py.  texts: {corpus: (ids, protocol)}; code: the commit when the script began."""
    import llmcompressor

    ids, used = calibration(args.calib_data, tokenizer, args.nsamples, args.seqlen, seed, args.data_dir)

    def measured(steps):
        torch.manual_seed(seed)  # of the random Hadamard matrix
        model = apply(args.model, steps, ids)
        return {name: perplexity(model, tokens, args.seqlen, name) for name, (tokens, _) in texts.items()}

    before = measured(transforms(how)) if transforms(how) else {}
    recipe = Recipe(wbits=args.wbits, act_bits=args.act_bits, act_pertoken=True, nsamples=args.nsamples, seqlen=args.seqlen, seed=seed)
    return {
        "schema": SCHEMA,
        "model": args.model,
        "model_type": load_config(args.model).model_type,
        "recipe": asdict(recipe) | {"method": f"llm-compressor {TRANSFORMS[how]}", "calib_data": args.calib_data},
        "protocol": {"calibration": used, "evaluation": {name: how for name, (_, how) in texts.items()}, "tasks": {}, "dtype": "float32"},
        "results": {"perplexity": measured(transforms(how) + rounding(args.wbits, args.act_bits)), "tasks": {}},
        "transformed": before,  # before any rounding: its rotations are not exact
        "full": None,
        "seconds": {},
        "versions": versions() | {"llmcompressor": llmcompressor.__version__},
        "commit": code,
        "hardware": hardware(torch.device("cpu")),
    }


def main(args):
    code = commit()  # read first: the checkout may change meanwhile
    try:
        import llmcompressor  # noqa: F401
    except ImportError as e:
        raise UsageError(f"llmcompressor cannot be imported ({e}); install 0.14.0.1 into an environment of its own") from e
    corpora = listed(args.eval)
    check_corpora(args.calib_data, corpora, args.data_dir)
    tokenizer = load_tokenizer(args.model)
    texts = {name: eval_tokens(name, tokenizer, args.seqlen, args.data_dir, args.eval_windows) for name in corpora}
    for how in args.how:
        for seed in range(args.seeds):
            file = Path(args.out, f"llmcompressor-{how}-w{args.wbits}a{args.act_bits}-{seed}.json")
            if file.exists():
                print(f"{file}: done before")
                continue
            found = cell(args, how, seed, tokenizer, texts, code)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
            before = ", ".join(f"{name} {row['ppl']:.4f}" for name, row in found["transformed"].items())
            after = ", ".join(f"{name} {row['ppl']:.4f}" for name, row in found["results"]["perplexity"].items())
            print(f"{TRANSFORMS[how]}, seed {seed}: {after}" + f" (transformed, before rounding: {before})" * bool(before), flush=True)


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    parser.add_argument("--data_dir", metavar="FOLDER", required=True, help="of the texts")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="gets llmcompressor-HOW-wWaA-SEED.json")
    parser.add_argument("--how", nargs="+", choices=TRANSFORMS, default=list(TRANSFORMS), help="what comes before rounding (default: each)")
    parser.add_argument("--wbits", type=positive, default=4, metavar="BITS", help="weight bits (default %(default)s)")
    parser.add_argument("--act_bits", type=positive, default=8, metavar="BITS", help="activation bits (default %(default)s)")
    parser.add_argument("--calib_data", default="c4-joined", metavar="CORPUS", help="calibration text (default %(default)s)")
    parser.add_argument("--eval", default="wikitext2,c4-joined", metavar="CORPORA", help="evaluation texts (default %(default)s)")
    parser.add_argument("--eval_windows", type=window_range, default=(0, 24), metavar="N", help="of each, as main.py's (default 24)")
    parser.add_argument("--nsamples", type=positive, default=64, metavar="N", help="calibration windows (default %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=512, metavar="TOKENS", help="tokens of each (default %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs, with the seeds from 0 on (default %(default)s)")
    return parser


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser().run(main)
