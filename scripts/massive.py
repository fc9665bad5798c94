"""Which tokens of a model are massive: the largest |input| of the last linear of every block, token by token, as a picture and a table.

python scripts/massive.py MODEL --data_dir DIR [--text wikitext2-validation] [--seqlen 512] [--out massive.png]

Sun et al., "Massive Activations in Large Language Models" (2024): a few values, of the first token mostly, are hundreds of times as
large as all others.  One scale per sequence then rounds every other token to nothing.  docs/plus.md says what to do about it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

from datautils import eval_tokens
from modelutils import load_tokenizer, open_decoder
from run.flags import Parser, positive
from run.report import table
from runtime import Place, find_device

SHOWN = 64  # tokens in the picture


@torch.no_grad()
def largest_inputs(decoder, ids, device):
    """max |x| of what the last linear of each block reads, (blocks, T), and the channel that it is in, for ids (1, T)."""
    sequences, found = decoder.embed([ids], Place(device, "device")), []
    for i, block in decoder.visits(device, "reading"):
        hook = block.get_submodule(decoder.linears[-1]).register_forward_pre_hook(
            lambda linear, args: found.append(args[0].view(ids.shape[1], -1).abs().float().cpu().max(1))
        )
        sequences.propagate(block, f"block {i}")
        hook.remove()
    return torch.stack([values for values, _ in found]), torch.stack([channels for _, channels in found])


def rows(values, channels):
    """[block, largest, its token, its channel, median token] of every block."""
    tokens = values.argmax(1)
    return [
        [i, f"{v[t]:.1f}", int(t), int(c[t]), f"{v.median():.1f}"] for i, (v, c, t) in enumerate(zip(values, channels, tokens, strict=True))
    ]


def draw(values, title, file):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2), constrained_layout=True)
    image = left.imshow(values[:, :SHOWN], aspect="auto", norm=LogNorm(), cmap="viridis", origin="lower")
    left.set(xlabel="token", ylabel="block", title="largest |input| of the block's last linear")
    figure.colorbar(image, ax=left)
    right.semilogy(values.amax(1), color="#d55e00", label="largest token")
    right.semilogy(values.median(1).values, color="#0072b2", label="median token")
    right.set(xlabel="block")
    right.legend(loc="upper center")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(args):
    device = find_device(args.device)
    decoder = open_decoder(args.model, "auto", device)
    ids, _ = eval_tokens(args.text, load_tokenizer(args.model), args.seqlen, args.data_dir, (0, 1))
    values, channels = largest_inputs(decoder, ids[None], device)
    print(table(["block", "largest", "token", "channel", "median token"], rows(values, channels)))
    draw(values, f"{Path(args.model).name}, first {args.seqlen} tokens of {args.text}", args.out)
    print(args.out)


def parser():
    parser = Parser("python scripts/massive.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    parser.add_argument("--text", default="wikitext2", metavar="CORPUS", help="(default %(default)s)")
    parser.add_argument("--data_dir", metavar="DIR", help="local text; the hub is then not asked")
    parser.add_argument("--seqlen", type=positive, default=512, metavar="TOKENS", help="(default %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:N or cpu (default: a GPU if there is one)")
    parser.add_argument("--out", default="massive.png", metavar="FILE", help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    parser().run(main)
