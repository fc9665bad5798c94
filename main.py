"""Quantize a LLaMA, Mistral or Qwen model block by block and evaluate it.

python main.py meta-llama/Llama-2-7b --eval wikitext2 --wbits 4 --act_bits 8 --method awrq --smooth --alpha 0.50 --min 0.01
"""

import argparse

from checkpoint import open_model, prepare, quantize
from datautils import load_text
from evalutils import evaluate, plan, publish, report
from modelutils import Clock, Parser, add_args, check_vocabulary


def main(args):
    # ---- What can be wrong is found before any long work ----
    config, recipe, tokenizer, calibration = prepare(args, "main.py")
    corpora = plan(args)
    clock = Clock(args.device)
    with clock("text"):
        ids, texts, protocol = load_text(recipe, corpora, tokenizer, args.data_dir, calibration)
    check_vocabulary(config, [ids, *texts.values()])

    # ---- Model ----
    with clock("loading"):
        model = open_model(args, recipe)
    layers = quantize(args, model, tokenizer, ids, recipe, protocol["calibration"], clock)

    # ---- Numbers ----
    results = evaluate(args, recipe, model, texts, clock)
    publish(args, report(args, recipe, model, protocol, results, layers, clock))


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_args(parser, smallest_scale=0.01, corpora="")
    return parser


if __name__ == "__main__":
    parser().run(main)
