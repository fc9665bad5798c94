"""Quantize a LLaMA, Mistral or Qwen model block by block and evaluate zero-shot tasks of lm-evaluation-harness.

python main.py meta-llama/Llama-2-7b --tasks piqa,arc_easy,boolq,copa --table_results --method full
python main.py meta-llama/Llama-2-7b --calib_data c4 --tasks piqa,copa --table_results --wbits 4 --act_bits 8 --method awrq --smooth
python main.py demo/llama --data_dir demo/data --calib_data world --eval world --tasks demo/tasks/world_deed.yaml --wbits 4 --method awrq
"""

import argparse
from functools import partial

from checkpoint import open_full, open_model, prepare, quantize
from datautils import load_text
from evalutils import evaluate, plan, publish, report
from modelutils import Clock, Parser, add_args, check_vocabulary


def main(args):
    # ---- What can be wrong is found before any long work ----
    config, recipe, tokenizer, calibration = prepare(args, "main.py")
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
    add_args(parser, smallest_scale=0.01, corpora="")
    return parser


if __name__ == "__main__":
    parser().run(main)
