"""``dinov2-fast verify``: two checkpoints, or a checkpoint and another implementation, on images."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from dinov2_fast.cli import options
from dinov2_fast.cli.convert import describe, find
from dinov2_fast.cli.extract import SOME_FAILED
from dinov2_fast.cli.peers import is_peer, load_peer
from dinov2_fast.data.failures import Failures
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

    from dinov2_fast.weights.compare import FeatureDifference, Tokens, WeightDifference
    from dinov2_fast.weights.sources import Checkpoint

SAME, DIFFERENT = 0, 1
TOLERANCE = 1e-3
ROUNDING = 1e-4  # what fp32 reaches when the same sums are taken in another order
BATCH = 8
DESCRIPTION = """\
Compares two DINOv2 checkpoints, in whatever layouts, or a checkpoint and
another implementation: the weights, and what each makes of your images.

A and B are checkpoint files, folders, hub ids, or names such as dinov2_vits14.
B may be `transformers` or `timm` instead: that library's own model with the
weights of A. With `transformers:MODEL` and `timm:MODEL` the library loads
MODEL itself.

Both run in fp32 on the same pixels. Differences of features are in standard
deviations of B's, so they mean the same for every model.
"""
EPILOG = """\
examples:
  dinov2-fast verify original.pth converted.safetensors photos/
  dinov2-fast verify dinov2_vits14 transformers photos/
  dinov2-fast verify my-finetuned/ facebook/dinov2-base photo.jpg --size 518

Exit codes: 0 the same within the tolerance, 1 different (or not comparable:
the reason is on stderr), 2 wrong usage, 3 the same, but some images cannot be
read and were left out.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "verify",
        help="compare two checkpoints, or one and another implementation",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a checkpoint")
    parser.add_argument("b", metavar="B", help="a checkpoint, transformers[:MODEL] or timm[:MODEL]")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or folders to search for images")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of one element, in standard deviations, that counts as the same "
        f"(default: {TOLERANCE:g}; rounding in fp32 stays below {ROUNDING:g} as a rule)",
    )
    options.add_images_and_device(parser, default_size=224)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compares; 0 or 3 if the features are the same within the tolerance, else 1."""
    from dinov2_fast.data.sources import find_images
    from dinov2_fast.inference.loading import find_device
    from dinov2_fast.weights.compare import compare_features

    if not any(True for _ in find_images(args.paths)):
        raise InvalidValueError(f"There are no images in {', '.join(map(repr, args.paths))}.")
    device = find_device(args.device)
    images = _Images(args.paths, args.size, device)
    checkpoint, other = find(args.a), None if is_peer(args.b) else find(args.b)
    print(f"A: {_describe(checkpoint)}")
    model = _load(checkpoint, args.position_interpolation, device)
    if other is None:
        peer = load_peer(args.b, checkpoint, device)
        print(f"B: {peer.description}")
        b = peer.tokens
    else:
        print(f"B: {_describe(other)}\nWeights: {in_words(_compare_weights(checkpoint, other))}")
        b = _tokens(_load(other, args.position_interpolation, device))
    difference = compare_features(_tokens(model), b, images)
    print(f"\n{_table(difference, args.size, device)}\n\n{_verdict(difference, args.tolerance)}")
    if images.failures:
        print(f"\nLeft out:\n{images.failures}", file=sys.stderr)
    if difference.worst <= args.tolerance:
        return SOME_FAILED if images.failures else SAME
    _explain(model, b, images, args.tolerance)
    return DIFFERENT


class _Images:
    """Batches of pixel values (batch, 3, height, width), read anew each time they are gone through.

    Attributes:
        failures: of the last time, images that cannot be read and are left out.
    """

    def __init__(self, paths: list[str], size: tuple[int, int], device: Any) -> None:
        self.paths, self.size, self.device, self.failures = paths, size, device, Failures()

    def __iter__(self) -> Iterator[Tensor]:
        import numpy as np
        import torch

        from dinov2_fast.data.decoding import decode
        from dinov2_fast.data.image_processor import Dinov2ImageProcessor
        from dinov2_fast.data.sources import find_images

        processor = Dinov2ImageProcessor.for_size(self.size)
        images, self.failures, found = find_images(self.paths), Failures(), False
        while batch := list(islice(images, BATCH)):
            pixels = []
            for image in batch:
                decoded = decode(image, processor)
                if decoded.pixels is not None:
                    pixels.append(decoded.pixels)
                else:
                    self.failures.add(image.path, decoded.error or "")
            if pixels:
                found = True
                yield torch.from_numpy(np.stack(pixels)).to(self.device)
        if not found:
            raise InvalidValueError(f"None of the images can be read:\n{self.failures}")


def in_words(weights: WeightDifference) -> str:
    """What differs between two sets of weights."""
    parts = []
    if weights.misshapen:
        parts.append(f"of other shapes: {_some(weights.misshapen)}")
    for side, keys in (("A", weights.only_in_a), ("B", weights.only_in_b)):
        if keys:
            parts.append(f"only in {side}: {_some(keys)}")
    if weights.rounded is not None:
        fine, dtype = weights.rounded
        coarse = "B" if fine == "a" else "A"
        parts.append(f"{coarse} has the values of {fine.upper()} rounded to {dtype}")
    elif weights.different == ("mask_token",):
        parts.append("the same but for the mask token, which plays no part unless patches are masked")
    elif weights.different:
        parts.append(
            f"{len(weights.different)} of {weights.compared} tensors differ ({_some(weights.different)}), the most by "
            f"{weights.worst:.3g} in {weights.worst_key}"
        )
    if not weights.different and not weights.misshapen:
        parts.append(f"{weights.compared} tensors are the same, bit for bit")
    return "; ".join(parts)


def _verdict(difference: FeatureDifference, tolerance: float) -> str:
    worst = difference.worst
    if worst == 0:
        return "The features are the same, bit for bit."
    if math.isnan(worst):
        return "DIFFERENT: there are features that are no numbers (NaN)."
    if worst > tolerance:
        return f"DIFFERENT: the worst difference is {worst:.2g}, the tolerance {tolerance:g}."
    if worst <= ROUNDING:
        return f"The features are the same up to rounding: the worst difference is {worst:.2g}."
    return f"The features are the same within the tolerance of {tolerance:g}: the worst difference is {worst:.2g}."


def _explain(model: Any, b: Any, images: _Images, tolerance: float) -> None:
    """Says so if A with another way of resampling positions agrees with B."""
    from dinov2_fast.position_embeddings import POSITION_INTERPOLATIONS
    from dinov2_fast.weights.compare import compare_features

    own = model.position_interpolation
    for position_interpolation in POSITION_INTERPOLATIONS:
        if position_interpolation == own:
            continue
        model.position_interpolation = position_interpolation
        worst = compare_features(_tokens(model), b, images).worst
        if worst <= tolerance:
            print(
                f"Position resampling differs, and nothing else: A resamples positions as {own!r}, and with "
                f"--position-interpolation {position_interpolation}\nit agrees with B (worst difference {worst:.2g})."
            )
            return


def _table(difference: FeatureDifference, size: tuple[int, int], device: Any) -> str:
    lines = [
        f"{difference.images} image(s) of {size[0]} x {size[1]}, fp32, {device}; differences in "
        "standard deviations of B",
        f"{'':14}{'worst':>10}{'mean':>10}{'cosine: smallest':>19}{'mean':>10}{'deviation':>11}",
    ]
    for name, tokens in (("CLS token", difference.cls), ("patch tokens", difference.patches)):
        lines.append(
            f"{name:14}{tokens.worst:>10.2g}{tokens.mean:>10.2g}{tokens.cosine_worst:>19.6f}{tokens.cosine_mean:>10.6f}"
            f"{tokens.std:>11.3g}"
        )
    return "\n".join(lines)


def _tokens(model: Any) -> Any:
    """What `compare_features` calls, for a model of this package."""

    def tokens(pixels: Tensor) -> Tokens:
        features = model.forward_features(pixels)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]

    return tokens


def _compare_weights(a: Checkpoint, b: Checkpoint) -> WeightDifference:
    from dinov2_fast.weights.architecture import plan_weights
    from dinov2_fast.weights.compare import compare_weights
    from dinov2_fast.weights.files import open_weights

    return compare_weights(plan_weights(open_weights(a.weights)), plan_weights(open_weights(b.weights)))


def _describe(checkpoint: Checkpoint) -> str:
    from dinov2_fast.weights.architecture import plan_weights, read_architecture
    from dinov2_fast.weights.files import open_weights

    state_dict = open_weights(checkpoint.weights)
    architecture = read_architecture(state_dict, checkpoint.config)
    return f"{checkpoint.weights}\n   {describe(plan_weights(state_dict), architecture)}"


def _load(checkpoint: Checkpoint, position_interpolation: str | None, device: Any) -> Any:
    import dinov2_fast

    where = checkpoint.config.parent if checkpoint.config else checkpoint.weights
    return dinov2_fast.load(where, device=device, dtype="float32", position_interpolation=position_interpolation)


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
