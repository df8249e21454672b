"""``dinov2-fast export``: a model as a file for onnxruntime, TensorRT and others, or for torch.export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.cli.exit_codes import SOME_FAILED
from dinov2_fast.cli.options import at_least, names, size
from dinov2_fast.data.failures import Failures
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

DESCRIPTION = """\
Writes a model as a graph of standard operators that runs without this package:
an ONNX file for onnxruntime and what else reads ONNX, or a torch.export
program (.pt2). It takes images of any size, a multiple of 14 and at least
28 pixels a side, in batches of any size, unless --size and --batch-size fix
them. The input, pixel_values (batch, 3, height, width), is scaled and
normalised as the image processor does it.

Before the file takes its place it is run, an ONNX file in onnxruntime, and its
outputs are compared with the model's: on the images of --check, otherwise on
noise. A file that computes something else is not kept.
"""
EPILOG = """\
examples:
  dinov2-fast export --model dinov2_vits14 --out vits14.onnx --check photos/
  dinov2-fast export --model dinov2_vitb14_reg --out vitb14.onnx --outputs cls --dtype fp16
  dinov2-fast export --model dinov2_vits14 --out vits14_518.onnx --size 518 --batch-size 1
  dinov2-fast export --model dinov2_vits14 --out vits14.pt2 --format torch-export

ONNX needs the packages onnx and onnxscript, and onnxruntime for the check:
pip install onnx onnxscript onnxruntime

Exit codes: 0 all good, 1 not possible (nothing written), 2 wrong usage, 3 all
good, but some images of --check cannot be read and were left out.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "export",
        help="write a model as ONNX or torch.export",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    parser.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    parser.add_argument(
        "--position-interpolation",
        choices=("offset", "size", "antialias"),
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    graph = parser.add_argument_group("the graph")
    graph.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="(default: onnx)")
    graph.add_argument(
        "--outputs",
        type=names,
        metavar="NAME,...",
        help="of cls, patch_mean, patches, registers, and logits where the checkpoint has a classifier, in this order "
        "(default: cls,patches, and logits where there are)",
    )
    graph.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of weights, input and outputs; bf16 for torch-export only (default: fp32)",
    )
    graph.add_argument("--opset", type=at_least(1), metavar="N", help="of ONNX, 18 or newer (default: 20)")
    graph.add_argument(
        "--size",
        type=size,
        metavar="N|HxW",
        help="fix the size in pixels, a multiple of 14; such a graph holds no float64",
    )
    graph.add_argument("--batch-size", type=at_least(1), metavar="N", help="fix the number of images")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="images, or folders of them, to compare on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports and prints how far the file is from the model; 0, or 3 if images to check had to be left out."""
    failures = Failures()
    batches = _images(args.check, args.size, failures) if args.check else None
    if failures:
        print(f"Left out:\n{failures}", file=sys.stderr)

    import dinov2_fast
    from dinov2_fast.export import METADATA, export

    model = dinov2_fast.load(
        args.model, weights=args.weights, dtype="float32", position_interpolation=args.position_interpolation
    )
    classifier = _classifier(model)
    processor = Dinov2ImageProcessor()
    exported = export(
        model,
        args.out,
        classifier=classifier,
        format=args.format,
        outputs=args.outputs or ("cls", "patches", *["logits"] * (classifier is not None)),
        dtype=args.dtype,
        opset=args.opset,
        batch_size=args.batch_size,
        size=args.size,
        images=batches,
        metadata={
            "model": args.model,
            "weights": model.loaded_from,
            "mean": processor.image_mean,
            "std": processor.image_std,
        },
        overwrite=args.overwrite,
    )
    for file in exported.files:
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    if not exported.differences:
        print("Not checked: onnxruntime is not installed (pip install onnxruntime).", file=sys.stderr)
        return 0
    print(f"\nDifference from the model, on {'images' if batches else 'noise'}:")
    print(f"  {'output':12} {'shape':18} {'relative':>9} {'worst':>9}")
    for each in exported.differences:
        shape = " x ".join(map(str, each.shape))
        print(f"  {each.output:12} {shape:18} {each.relative:9.1e} {each.worst:9.1e}")
    print(f"\nModel, weights, mean and std are stored in the file as JSON, under {METADATA!r}.")
    return SOME_FAILED if failures else 0


def _classifier(model: Any) -> nn.Linear | None:
    """The classifier beside the model in its checkpoint; says on stderr why one that is there cannot be exported."""
    from torch import nn

    from dinov2_fast.weights.architecture import plan_weights, read_tensor
    from dinov2_fast.weights.files import open_weights
    from dinov2_fast.weights.load import HEADS

    if model.loaded_from.startswith("random:"):
        return None
    plan = plan_weights(open_weights(Path(model.loaded_from)))
    prefix = next((prefix for prefix in HEADS if f"{prefix}weight" in plan.recipes), None)
    if prefix is None:
        return None
    parameters = {name: read_tensor(plan, key) for name in ("weight", "bias") if (key := prefix + name) in plan.recipes}
    classes, inputs = parameters["weight"].shape
    if inputs not in (model.embed_dim, 2 * model.embed_dim):
        print(
            f"The classifier in {model.loaded_from} is left out: it takes {inputs} features, and what can be exported "
            f"takes {model.embed_dim}, of the CLS token, or {2 * model.embed_dim}, with the mean of the patches.",
            file=sys.stderr,
        )
        return None
    classifier = nn.Linear(inputs, classes, bias="bias" in parameters)
    classifier.load_state_dict(parameters)
    return classifier


def _images(paths: list[str], size: tuple[int, int] | None, failures: Failures) -> list[Tensor]:
    """The images in one batch of the fixed size; otherwise of 224 x 224, and once more the first, of another size.

    Those that cannot be read go to `failures`.

    Raises:
        ValueError: there are none, or none can be read.
    """
    from dinov2_fast.data.files import ImageError
    from dinov2_fast.data.images import read_image
    from dinov2_fast.data.sources import list_images

    images = []
    for path in list_images(paths):
        try:
            images.append(read_image(path))
        except ImageError as error:
            failures.add(path, str(error))
    if failures and not images:
        raise InvalidValueError(f"None of the images can be read:\n{failures}")
    if not images:
        raise InvalidValueError(f"There are no images in {', '.join(map(repr, paths))}.")
    sizes = [(size, images)] if size else [((224, 224), images), ((154, 280), images[:1])]
    return [Dinov2ImageProcessor.for_size(sides)(some).pixel_values for sides, some in sizes]
