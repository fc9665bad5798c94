"""What does a setting cost when the model runs?  Bytes of the checkpoint and operations for each token, counted, not timed.

    python -m bench.cost models/smollm2                a folder or a name on the hub; of the weights only the headers are read

What is not quantized has 16 bits.  Multiply-adds are those of the linears; attention is the same everywhere.  A number is quantized once
for all linears that read it.  Divisions are by smoothing scales that no weight before could take.
"""

import argparse
import math
from dataclasses import asdict, replace

from formats.codes import packed_shapes
from modelutils import open_decoder
from recipe import PRESETS, Recipe
from run.flags import Parser
from run.report import table

HALF = 2  # bytes
AWRQ = Recipe(method="awrq", wbits=4)
SETTINGS = {
    "awrq": AWRQ,
    "awrq, smoothed": replace(AWRQ, smooth=True),
    "awrq, a scale per token": replace(AWRQ, act_pertoken=True),
    **{f"awrq --preset {name}": Recipe(**asdict(AWRQ) | PRESETS[name]) for name in ("plus", "serve")},
}
COLUMNS = ("MB", "of them not quantized", "integer multiply-adds", "others", "numbers quantized", "divisions")


def cost(decoder, recipe=None):
    """COLUMNS of a Decoder that is quantized with a recipe, (6,), bytes in the first two; None: not quantized."""
    shapes = {name: t.shape for name, t in decoder.skeleton.state_dict().items() if name not in decoder.source.tied}
    linears = [shape for name, shape in shapes.items() if name.endswith(tuple(f".{linear}.weight" for linear in decoder.linears))]
    products = sum(map(math.prod, linears))
    head = decoder.skeleton.get_output_embeddings().weight.numel()
    rest = HALF * (sum(map(math.prod, shapes.values())) - products)
    if recipe is None:
        return HALF * products + rest, HALF * products + rest, 0, products + head, 0, 0
    norms = decoder.family.residual.norms
    if recipe.rotate and decoder.source.tied:
        rest += HALF * head  # which is a matrix of its own then
    packed = sum(math.prod(shape) * dtype.itemsize for linear in linears for shape, dtype in packed_shapes(linear, recipe).values())
    quantized = divided = 0
    for group in decoder.family.groups:
        columns = len(decoder) * decoder.empty_block(0).get_submodule(group.linears[0]).weight.shape[1]
        quantized += columns
        if recipe.smooth and not group.exact(decoder.config) and not (recipe.rotate and group.producer in norms):
            divided += columns
            packed += 4 * columns * len(group.linears)
    return packed + rest, rest, products, head, quantized, divided


def main(args):
    decoder, rows = open_decoder(args.model), {}
    rows["16 bits"] = cost(decoder)
    for name, recipe in SETTINGS.items():
        reason = decoder.family.residual.obstacle(decoder.config) if recipe.rotate else None
        rows[name + " --no-rotate" * bool(reason)] = cost(decoder, replace(recipe, rotate=False) if reason else recipe)
    cells = [(name, *(f"{size / 1e6:.1f}" for size in row[:2]), *(f"{count:,}" for count in row[2:])) for name, row in rows.items()]
    print(table((f"{args.model}, W4A8", *COLUMNS), cells))


def parser():
    parser = Parser("python -m bench.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or name on the hub")
    return parser


if __name__ == "__main__":
    parser().run(main)
