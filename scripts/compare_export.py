"""Does an exported checkpoint answer tasks as the one that it was made from?  Item by item, on a CPU, batch 1.

python scripts/compare_export.py models/llama-w4a8 models/llama-ct --tasks copa,piqa --data_dir DIR --limit 100

float32: ours as `main.py --load` has it, against `lm_eval --model hf`.  The one adds up integers, the other dequantized numbers, so that
their sums differ in the last bits.  An activation that is nearly a tie can then go to the next code, and what follows is rounded anew.  An
item whose answer differs must be a near tie: the scores of its two best choices are closer than such rounding moves them.  How far that is,
is measured without the export, on our model alone: RUNS times with its token embeddings changed by 1e-6 of themselves.  The bound is the
most that this changes the difference of two scores, over all items of a task.  The export being one more such run, the chance that any of
its items moves farther is 1 / (RUNS + 1).

float64: with 29 more bits nothing is nearly a tie, and both must give the same log-likelihoods, to 1e-9.  Ours are then those of the
fake-quantized model, with the quantizer of tests/reference.py.  This takes minutes; --no-float64 leaves it out.

Exit status 1 if an answer differs that is no near tie, or a log-likelihood in float64.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import quant
from evaluation.zeroshot import QuantizedLM, leaves, load_tasks, task_manager
from formats.checkpoint import open_checkpoint
from formats.whole import load
from modelutils import load_tokenizer
from run.flags import Parser, positive, share
from run.report import table
from tests import reference

METRICS = ("acc", "acc_norm")  # by log-likelihood, by that per character


def answers(lm, tasks, limit):
    """{(task, item): {"lls": (choices,) float64, metric: 0 or 1}}"""
    found = lm_eval.simple_evaluate(lm, tasks=tasks, limit=limit, log_samples=True, task_manager=task_manager(False), batch_size=1)
    return {
        (task, item["doc_id"]): {"lls": torch.tensor([score for score, _ in item["filtered_resps"]], dtype=torch.float64)}
        | {metric: item[metric] for metric in METRICS if metric in item}
        for task, items in found["samples"].items()
        for item in items
    }


def perturbed(model, tokenizer, tasks, limit, seed):
    """Answers of our model with its token embeddings changed by 1e-6 of themselves."""
    embedding = model.get_input_embeddings()
    noise = 1 + 1e-6 * torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(seed))
    handle = embedding.register_forward_hook(lambda module, args, out: out * noise[args[0]])
    found = answers(QuantizedLM(model, tokenizer), tasks, limit)
    handle.remove()
    return found


def fake_quantized(folder):
    """The model of a checkpoint of ours, dequantized, its activations rounded in floating point."""
    decoder = open_checkpoint(folder, "float32")
    decoder.source.kernel = None
    return decoder.materialize(torch.device("cpu"))


def moved(a, b):
    """How much the difference of two scores changes, at most, from a (choices,) to b (choices,)."""
    return ((a - b).max() - (a - b).min()).item()


def gap(scores):
    """Between the best of (choices,) and the next."""
    first, second = scores.topk(2).values.tolist()
    return first - second


def scores(run, task, metric):
    """{item: (choices,)} whose largest is the answer that the metric looks at; of one task."""
    found = {item: answer["lls"] for (name, item), answer in run.items() if name == task.config.task}
    if metric == "acc":
        return found
    return {
        item: lls / torch.tensor([float(len(choice)) for choice in task.doc_to_choice(task.eval_docs[item])]) for item, lls in found.items()
    }


def compare(task, metric, ours, theirs, others):
    """A row of the table, and [(item, its gap, the bound)] of the answers that differ.  others: perturbed runs of ours."""
    name, mine = task.config.task, scores(ours, task, metric)
    bound = max(moved(other[item], mine[item]) for other in (scores(run, task, metric) for run in others) for item in mine)

    def differ(run):
        return [item for item in mine if ours[name, item][metric] != run[name, item][metric]]

    accuracies = (sum(run[name, item][metric] for item in mine) / len(mine) for run in (ours, theirs))
    near = sum(gap(s) <= bound for s in mine.values())
    perturbed = sum(len(differ(run)) for run in others) / len(others)
    row = (name, metric, *(f"{a:.4f}" for a in accuracies), len(mine), len(differ(theirs)), f"{perturbed:.1f}", near, f"{bound:.2g}")
    return row, [(item, gap(mine[item]), bound) for item in differ(theirs)]


def compare_all(tasks, ours, theirs, others):
    """Print the table and every answer that differs: whether all of those are near ties."""
    rows, lines, good = [], [], True
    for task in leaves(tasks):
        for metric in (metric for metric in METRICS if metric in next(a for (name, _), a in ours.items() if name == task.config.task)):
            row, differing = compare(task, metric, ours, theirs, others)
            rows.append(row)
            for item, difference, bound in differing:
                near = difference <= bound
                good &= near
                verdict = "a near tie" if near else "NO NEAR TIE"
                lines.append(f"{task.config.task}, {metric}, item {item}: gap {difference:.2g}, bound {bound:.2g}: {verdict}")
    print(table(("task", "metric", "ours", "export", "items", "differ", "differ when perturbed", "near ties", "bound"), rows))
    print("\n".join(lines or ["no answer differs"]))
    return good


def compare_exactly(a, b):
    off = max((a[key]["lls"] - b[key]["lls"]).abs().max().item() for key in a)
    print(f"float64: {sum(len(item['lls']) for item in a.values())} log-likelihoods differ by {off:.1e} at most")
    return off <= 1e-9


@torch.no_grad()
def main(args):
    tasks, tokenizer = load_tasks(args.tasks.split(","), args.data_dir), load_tokenizer(args.loaded)
    model = load(args.loaded, arithmetic="integers")
    export = HFLM(pretrained=args.exported, dtype="float32", device="cpu", batch_size=1)
    ours, theirs = answers(QuantizedLM(model, tokenizer), tasks, args.limit), answers(export, tasks, args.limit)
    others = [perturbed(model, tokenizer, tasks, args.limit, seed) for seed in range(args.runs)]
    good = compare_all(tasks, ours, theirs, others)
    if args.float64:
        with patch.object(quant, "fake_quant_act", reference.fake_quant_act):
            ours = answers(QuantizedLM(fake_quantized(args.loaded).double(), tokenizer), tasks, args.limit)
        export.model.double()
        good &= compare_exactly(ours, answers(export, tasks, args.limit))
    sys.exit(0 if good else 1)


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaded", metavar="LOADED", help="folder that --save wrote")
    parser.add_argument("exported", metavar="EXPORTED", help="folder that --export compressed-tensors wrote from it")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="as for main.py")
    parser.add_argument("--data_dir", metavar="FOLDER", help="as for main.py")
    parser.add_argument("--limit", type=share, metavar="N", help="items per task, the first ones (default: all)")
    parser.add_argument("--runs", type=positive, default=8, metavar="N", help="perturbed runs (default %(default)s)")
    parser.add_argument("--float64", action=argparse.BooleanOptionalAction, default=True, help="compare in float64 too")
    return parser


if __name__ == "__main__":
    parser().run(main)
