"""``dinov2-fast show``: PNGs of what a model finds in images, and of the curves of a pretraining run."""

from __future__ import annotations

import argparse
import sys

from dinov2_fast.cli import options
from dinov2_fast.cli.process import OK, SOME_FAILED

KINDS = {
    "pca": "colours of the patch features",
    "attention": "attention maps of the CLS token",
    "neighbours": "nearest neighbours",
}
HELP = "draw PCA colours, attention maps and nearest neighbours, or the curves of a pretraining run"
DESCRIPTION = """\
Draws PNGs of what a model finds in images:

  pca.png         each image beside the first three principal components of
                  its patch features, as red, green and blue. All images share
                  the PCA of a block, so equal features have equal colours.
  attention.png   the attention of the CLS token to the patches, for each head
  neighbours.png  each image and those nearest to it, by the cosine of their
                  CLS tokens

By default every possible sheet is drawn; with --basis or --save-basis, only the
PCA. Each PATH is an image, or a folder, glob, list, archive or URL of images, as
for `dinov2-fast extract`; --model runs on them. Or PATH is one folder that
`dinov2-fast extract` wrote. This needs no model: the neighbours are those of the
stored features, and the PCA is drawn if patches were stored.

To give the images of a later run the same colours, save the PCA with
--save-basis, and draw the later run with --basis.

With random weights the sheets say so, in their titles and in their names.

If PATH is the folder of a run of `dinov2-fast pretrain`, finished or not, its
losses, rates and speed are drawn as curves.png. This needs matplotlib.
"""
EPILOG = """\
examples:
  dinov2-fast show photos/ --model dinov2_vits14 --out sheets/
  dinov2-fast show photos/ --model dinov2_vits14_reg --pca --foreground --out sheets/
  dinov2-fast show cat.jpg --model dinov2_vits14 --attention --layer 5,11 --head 0,3 --out sheets/
  dinov2-fast show features/ --neighbours --count 8 --out sheets/
  dinov2-fast show photos/ --model dinov2_vits14 --save-basis colours.safetensors --out sheets/
  dinov2-fast show cat.jpg --model dinov2_vits14 --basis colours.safetensors --out cat/
  dinov2-fast show runs/a --out curves/

Exit codes: 0 all good (images of stored features that cannot be read any more
are grey), 1 not possible, 2 wrong usage, 3 some images could not be read and
are left out, 130 interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="images, or where they are; or one folder of features, or of a run"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="output folder; sheets of the same names are replaced"
    )
    what = parser.add_argument_group("what to draw")
    for kind, help in KINDS.items():
        what.add_argument(f"--{kind}", dest="kinds", action="append_const", const=kind, default=[], help=help)
    what.add_argument(
        "--foreground",
        action="store_true",
        help="draw the PCA of the foreground only, on black, as in the DINOv2 paper",
    )
    basis = what.add_mutually_exclusive_group()
    basis.add_argument(
        "--save-basis", metavar="FILE", help="draw the PCA, and save it to a new file (safetensors) for --basis"
    )
    basis.add_argument(
        "--basis", metavar="FILE", help="draw the PCA in the colours of the run that wrote FILE with --save-basis"
    )
    what.add_argument(
        "--layer",
        dest="blocks",
        type=options.indices,
        default=(-1,),
        metavar="N,N|all",
        help="blocks for the PCA and attention of images; 0 is the first (default: the last)",
    )
    what.add_argument(
        "--head",
        dest="heads",
        type=options.indices,
        metavar="N,N|all",
        help="heads for the attention maps; 0 is the first (default: all)",
    )
    what.add_argument(
        "--count", type=options.at_least(1), default=5, metavar="N", help="neighbours of an image (default: 5)"
    )
    what.add_argument(
        "--limit",
        type=options.at_least(1),
        default=24,
        metavar="N",
        help="draw the first N images only; in a folder of features, neighbours are still found among all images "
        "(default: 24)",
    )
    model = parser.add_argument_group("the model, for images")
    options.add_model(model)
    options.add_size(model, default=518)
    options.add_device(model)
    options.add_stride(model)


def run(args: argparse.Namespace) -> int:
    """Draws and prints the names of the files; 0, or 3 if images had to be left out."""
    from dinov2_fast.visualize.show import show

    def announce(count: int) -> None:
        size = f"{args.size[0]} x {args.size[1]}"
        print(f"Running {args.model} on {count} image(s) of {size} ...", file=sys.stderr)

    done = show(**options.keywords(args), announce=announce)
    if done.is_limited:
        print(f"The first {args.limit} images are shown; --limit sets how many.", file=sys.stderr)
    if done.left_out:
        print(f"Left out:\n{done.left_out}", file=sys.stderr)
    if done.unreadable:
        print(f"These images cannot be read any more and are grey:\n{done.unreadable}", file=sys.stderr)
    for kind, path in done.files.items():
        print(f"{kind + ':':12}{path}")
    return SOME_FAILED if done.left_out else OK
