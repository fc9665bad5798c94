"""Perplexity of a model that llm-compressor quantizes, weights per output channel, activations per token, to set beside ours.

    python scripts/compare_llmcompressor.py MODEL --data_dir out/ablation-text/stories --seqlen 512 --wbits 3 --smooth

The texts are those of scripts/ablation.sh: calibration windows from `choose`, perplexity of `report`; ours is its cell plus-pertoken.  It
needs llmcompressor 0.14.0.1, which is not in requirements.txt, as it asks for other versions: install it into an environment of its own.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from table import counted

from datautils import calibration, eval_tokens
from evaluation.perplexity import perplexity
from modelutils import load_tokenizer
from recipe import UsageError
from run.flags import Parser, positive


def quantized(name, ids, wbits, smooth):
    """The model, quantized in memory by GPTQ on windows (n, T), smoothed before if asked for; all else are llm-compressor's defaults."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False).eval()
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=wbits, type="int", symmetric=False, strategy="channel"),
        input_activations=QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="token", dynamic=True),
    )
    steps = [SmoothQuantModifier(smoothing_strength=0.5)] * smooth + [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
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


def main(args):
    try:
        import llmcompressor
    except ImportError as e:
        raise UsageError(f"llmcompressor cannot be imported ({e}); install 0.14.0.1 into an environment of its own") from e
    tokenizer = load_tokenizer(args.model)
    text, _ = eval_tokens("report", tokenizer, args.seqlen, args.data_dir)
    found = []
    for seed in range(args.seeds):
        ids, _ = calibration("choose", tokenizer, args.nsamples, args.seqlen, seed, args.data_dir)
        model = quantized(args.model, ids, args.wbits, args.smooth)
        found.append(perplexity(model, text, args.seqlen)["ppl"])
        print(f"seed {seed}: {found[-1]:.4f}", flush=True)
    what = "SmoothQuant + GPTQ" if args.smooth else "GPTQ"
    print(f"llm-compressor {llmcompressor.__version__}, {what}, W{args.wbits}A8 per token: {counted(found)}")


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    parser.add_argument("--data_dir", metavar="FOLDER", required=True, help="of the texts `choose` and `report`")
    parser.add_argument("--wbits", type=positive, default=4, metavar="BITS", help="weight bits (default %(default)s)")
    parser.add_argument("--smooth", action="store_true", help="SmoothQuant of strength 0.5 first")
    parser.add_argument("--nsamples", type=positive, default=64, metavar="N", help="calibration windows (default %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=512, metavar="TOKENS", help="tokens of each (default %(default)s)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs, with the seeds from 0 on (default %(default)s)")
    return parser


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser().run(main)
