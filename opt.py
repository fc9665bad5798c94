"""Quantize an OPT model block by block and print its perplexity on WikiText2, PTB and C4.

python opt.py facebook/opt-125m --method full
python opt.py facebook/opt-125m --calib_data c4 --wbits 4 --act_bits 8 --method awrq --smooth --alpha 0.50 --min 0.10
python opt.py demo/opt --data_dir demo/data --calib_data world --eval world --wbits 4 --method awrq
"""

import argparse

from datautils import calibration, check_corpora, eval_tokens
from evalutils import check_writable, describe, perplexity, report, table, write_json
from modelutils import (
    Clock,
    Parser,
    add_args,
    check_vocabulary,
    default_walk_batch,
    load_config,
    load_model,
    load_tokenizer,
    make_recipe,
    quantize,
)

NEW_EVAL = {"ptb": "ptb-new", "c4": "c4-new"}


def main(args):
    # ---- What can be wrong is found before any long work ----
    config = load_config(args.model, ("opt",))
    recipe = make_recipe(args, config.max_position_embeddings)
    tokenizer = load_tokenizer(args.model)
    corpora = [NEW_EVAL.get(name, name) if args.new_eval else name for name in dict.fromkeys(args.eval.split(","))]
    calibrates = recipe.method != "full"
    check_corpora(recipe.calib_data if calibrates else None, corpora, args.data_dir)
    check_writable(args.output_path)

    # ---- Text ----
    clock = Clock(args.device)
    ids = used = None
    with clock("calibration"):
        if calibrates:
            ids, used = calibration(recipe.calib_data, tokenizer, recipe.nsamples, recipe.seqlen, recipe.seed, args.data_dir)
    with clock("evaluation"):
        texts = {name: eval_tokens(name, tokenizer, recipe.seqlen, args.data_dir) for name in corpora}
    check_vocabulary(config, [tokens for tokens, _ in texts.values()] + [ids] * calibrates)

    # ---- Model ----
    with clock("loading"):
        model = load_model(args.model, args.dtype, args.device)
    walk_batch = args.walk_batch or default_walk_batch(config, recipe.seqlen, args.device)
    layers = quantize(model, ids, recipe, args.device, walk_batch, clock) if calibrates else []

    # ---- Numbers ----
    results = {}
    for name, (tokens, _) in texts.items():
        with clock("evaluation"):
            results[name] = perplexity(model, tokens, recipe.seqlen, args.device, walk_batch, name)
    protocol = {"calibration": used, "evaluation": {name: how for name, (_, how) in texts.items()}, "walk_batch": walk_batch}
    run = report(args, recipe, model, protocol, {"perplexity": results}, layers, clock)
    print(
        table(
            ("corpus", "perplexity", "windows", "tokens each"),
            [(n, f"{r['ppl']:.4f}", r["windows"], r["seqlen"]) for n, r in results.items()],
        )
    )
    print(describe(run))
    if args.output_path:
        write_json(args.output_path, run)


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_args(parser, smallest_scale=0.1)
    corpora = parser.add_argument_group("evaluation")
    corpora.add_argument(
        "--eval", default="wikitext2,ptb,c4", help="corpora, comma list; also ptb-new, c4-new, folders of --data_dir (default %(default)s)"
    )
    corpora.add_argument(
        "--new-eval", action="store_true", help="ptb-new for ptb and c4-new for c4: GPTQ's later protocols, not the paper's"
    )
    return parser


if __name__ == "__main__":
    parser().run(main)
