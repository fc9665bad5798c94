"""Quantize an OPT model block by block and print its perplexity on WikiText2, PTB and C4.

python opt.py facebook/opt-125m --method full
python opt.py facebook/opt-125m --calib_data c4 --wbits 4 --act_bits 8 --method awrq --smooth --alpha 0.50 --min 0.10
python opt.py demo/opt --data_dir demo/data --calib_data world --eval world --wbits 4 --method awrq
"""

import argparse
from functools import partial

from checkpoint import open_full, open_model, prepare, quantize
from datautils import load_text
from evalutils import evaluate, plan, publish, report
from modelutils import Clock, Parser, add_args, check_vocabulary


def main(args):
    # ---- What can be wrong is found before any long work ----
    config, recipe, tokenizer, calibration = prepare(args, "opt.py")
    corpora, tasks = plan(args, config, tokenizer)
    clock = Clock(args.device)
    ids, texts, protocol = load_text(recipe, corpora, tokenizer, args.data_dir, clock, calibration)
    check_vocabulary(config, [ids, *texts.values()])

    # ---- Model ----
    with clock("loading"):
        model = open_model(args, recipe)
    measure = partial(evaluate, args, recipe, tokenizer=tokenizer, texts=texts, tasks=tasks, clock=clock)
    full = measure(open_full(args, model)) if args.compare_full else None
    layers = quantize(args, model, tokenizer, ids, recipe, protocol["calibration"], clock)

    # ---- Numbers ----
    publish(args, report(args, recipe, model, protocol, tasks, measure(model), full, layers, clock))


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_args(parser, smallest_scale=0.1, corpora="wikitext2,ptb,c4")
    return parser


if __name__ == "__main__":
    parser().run(main)
