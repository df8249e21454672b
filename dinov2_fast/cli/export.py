"""``dinov2-fast export``: a model as a file for onnxruntime, TensorRT and others, or for torch.export."""

from __future__ import annotations

import argparse
import sys

from dinov2_fast.cli import options
from dinov2_fast.cli.process import OK, SOME_FAILED

HELP = "write a model as ONNX or torch.export"
DESCRIPTION = """\
Writes a model as a graph of standard operators that runs without this package:
an ONNX file for onnxruntime and others, or a torch.export program (.pt2). It
takes batches of any size, and images of any height and width that are multiples
of 14 and at least 28 pixels; --batch-size and --size fix them. The input,
pixel_values (batch, 3, height, width), must be scaled and normalised as the
image processor does it.

The file is run (an ONNX file in onnxruntime) and its outputs are compared with
the model's, on the images of --check or on noise. A file that computes
something else is not kept.
"""
EPILOG = """\
examples:
  dinov2-fast export --model dinov2_vits14 --out vits14.onnx --check photos/
  dinov2-fast export --model dinov2_vitb14_reg --out vitb14.onnx --outputs cls --dtype fp16
  dinov2-fast export --model dinov2_vits14 --out vits14_518.onnx --size 518 --batch-size 1
  dinov2-fast export --model dinov2_vits14 --out vits14.pt2 --format torch-export

ONNX needs the packages onnx and onnxscript, and onnxruntime for the check:
pip install onnx onnxscript onnxruntime

Exit codes: 0 all good, 1 not possible (nothing written), 2 wrong usage, 3 done,
but some images of --check cannot be read and were left out.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    options.add_model(parser, required=True)
    parser.add_argument("--out", dest="path", required=True, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    graph = parser.add_argument_group("the graph")
    graph.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="(default: onnx)")
    graph.add_argument(
        "--outputs",
        type=options.names,
        metavar="NAME,...",
        help="cls, patch_mean, patches, registers, and logits where the checkpoint has a classifier "
        "(default: cls,patches, and logits where there is a classifier)",
    )
    graph.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="dtype of weights, input and outputs; bf16 for torch-export only (default: fp32)",
    )
    graph.add_argument(
        "--opset", type=options.at_least(1), metavar="N", help="version of ONNX's operators, 18 or newer (default: 20)"
    )
    options.add_size(graph, help="fix the size in pixels, a multiple of 14; such a graph contains no float64")
    graph.add_argument("--batch-size", type=options.at_least(1), metavar="N", help="fix the number of images")
    parser.add_argument(
        "--check",
        dest="images",
        nargs="+",
        metavar="PATH",
        help="images to compare on, or where they are; all run in one batch",
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints how far the file is from the model; 0, or 3 if images to check had to be left out."""
    from dinov2_fast.export import METADATA, export_checkpoint

    done = export_checkpoint(**options.keywords(args))
    if done.failures:
        print(f"Left out:\n{done.failures}", file=sys.stderr)
    if done.unused_classifier:
        print(done.unused_classifier, file=sys.stderr)
    for file in done.files:
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    if not done.differences:
        print("Not checked: onnxruntime is not installed (pip install onnxruntime).", file=sys.stderr)
        return OK
    print(f"\nDifference from the model, on {'images' if args.images else 'noise'}:")
    print(f"  {'output':12} {'shape':18} {'relative':>9} {'worst':>9}")
    for each in done.differences:
        shape = " x ".join(map(str, each.shape))
        print(f"  {each.output:12} {shape:18} {each.relative:9.1e} {each.worst:9.1e}")
    print(f"\nModel, weights, mean and std are stored in the file as JSON, under {METADATA!r}.")
    return SOME_FAILED if done.failures else OK
