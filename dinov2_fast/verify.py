"""`verify`: compares two checkpoints, or a checkpoint and another implementation, by their weights and on images."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.convert import find_named, huggingface_model, open_checkpoint, summary_of
from dinov2_fast.data.batches import Failures, readable_batches
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.loading import find_device
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import POSITION_INTERPOLATIONS
from dinov2_fast.weights.compare import FeatureDifference, Tokens, WeightDifference, compare_features, compare_weights
from dinov2_fast.weights.convert import convert_state_dict
from dinov2_fast.weights.load import load
from dinov2_fast.weights.sources import Checkpoint

LIBRARIES = ("transformers", "timm")
BATCH_SIZE = 8

ModelTokens = Callable[[Tensor], Tokens]


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    a: str  # the file and its sizes
    b: str  # the same, or the library and its model
    device: torch.device
    weights: WeightDifference | None  # None where B is another implementation
    features: FeatureDifference | None  # None where they could not be compared
    error: InvalidValueError | None  # why they could not be compared
    failures: Failures  # images that cannot be read and were left out
    position_interpolation: str  # A's
    # If the features differ: another interpolation with which A agrees with B, and the worst difference then.
    agreeing: tuple[str, float] | None


def verify(
    a: str,
    b: str,
    paths: Iterable[str | os.PathLike[str]],
    *,
    tolerance: float,
    size: int | tuple[int, int] = 224,
    position_interpolation: str | None = None,
    device: str | None = None,
) -> Verification:
    """Compares A and B, both in fp32 on the same pixels.

    Args:
        a: a checkpoint: one of the eight names, a file, a folder or a hub id.
        b: a checkpoint; or "transformers" or "timm" for that library's model with the weights of A; or
            "transformers:MODEL" or "timm:MODEL" for a model that the library loads itself.
        paths: images, see :mod:`dinov2_fast.data.sources`.
        tolerance: the largest difference of one element, in standard deviations of B's, that counts as the same.
        size: of the images in pixels.
        position_interpolation: how the models of this package resample positions.
        device: by default a GPU where there is one.

    Raises:
        WeightsError: a checkpoint cannot be found or read, or transformers has no such model.
        ValueError: no images, a device or interpolation that does not exist, or a library that is not installed.
        FileNotFoundError: one of `paths` does not exist.
    """
    place = find_device(device)
    processor, sources = Dinov2ImageProcessor.for_size(size), list(require_images(paths))

    def pixels(failures: Failures) -> Iterator[Tensor]:
        for _, batch in readable_batches(sources, processor, failures, batch_size=BATCH_SIZE):
            yield batch.to(place)

    checkpoint, other = find_named(a), None if b.partition(":")[0] in LIBRARIES else find_named(b)
    model = _load(checkpoint, position_interpolation, place)
    weights = None
    if other is None:
        b_tokens, description = _load_from_library(b, checkpoint, place)
    else:
        weights = compare_weights(*(open_checkpoint(each)[0] for each in (checkpoint, other)))
        b_tokens, description = _tokens_of(_load(other, position_interpolation, place)), _description(other)
    own, failures = model.position_interpolation, Failures()
    features, error, agreeing = None, None, None
    try:
        features = compare_features(_tokens_of(model), b_tokens, pixels(failures))
    except InvalidValueError as reason:
        error = reason
    if features is not None and not features.worst <= tolerance:  # NaN counts as a difference
        agreeing = _agreeing_interpolation(model, b_tokens, pixels, tolerance)
    return Verification(_description(checkpoint), description, place, weights, features, error, failures, own, agreeing)


def _load(checkpoint: Checkpoint, position_interpolation: str | None, device: torch.device) -> DinoVisionTransformer:
    where = checkpoint.config.parent if checkpoint.config else checkpoint.weights
    return load(where, device=device, dtype="float32", position_interpolation=position_interpolation)


def _tokens_of(model: DinoVisionTransformer) -> ModelTokens:
    def tokens(pixels: Tensor) -> Tokens:
        features = model.forward_features(pixels)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]

    return tokens


def _description(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.weights}\n   {summary_of(*open_checkpoint(checkpoint))}"


def _agreeing_interpolation(
    model: DinoVisionTransformer,
    b_tokens: ModelTokens,
    pixels: Callable[[Failures], Iterator[Tensor]],
    tolerance: float,
) -> tuple[str, float] | None:
    """A way of resampling positions with which the model agrees with B, other than its own; it is left set."""
    own = model.position_interpolation
    for name in POSITION_INTERPOLATIONS:
        if name != own:
            model.position_interpolation = name
            worst = compare_features(_tokens_of(model), b_tokens, pixels(Failures())).worst
            if worst <= tolerance:
                return name, worst
    return None


def _load_from_library(name: str, checkpoint: Checkpoint, device: torch.device) -> tuple[ModelTokens, str]:
    """The tokens of another library's model, in fp32 and eval mode, and what model it is in words."""
    name, _, model_name = name.partition(":")
    try:
        library = importlib.import_module(name)
        load_from = _load_timm if name == "timm" else _load_transformers
        model = load_from(model_name, checkpoint).eval().float().to(device)
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"{error.name} is not installed: pip install {name}.") from error

    def tokens(pixels: Tensor) -> Tokens:
        if name == "timm":
            output, first_patch = model.forward_features(pixels), model.num_prefix_tokens
        else:
            output = model(pixels).last_hidden_state
            first_patch = 1 + getattr(model.config, "num_register_tokens", 0)
        return output[:, 0], output[:, first_patch:]

    described = f"{name} {library.__version__}, {type(model).__name__}, {model_name or 'with the weights of A'}"
    return tokens, described


def _load_transformers(name: str, checkpoint: Checkpoint) -> Any:
    """transformers' model of that name; without a name, the model of a checkpoint."""
    import transformers

    if name:
        return transformers.AutoModel.from_pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        huggingface_model(checkpoint).save_pretrained(folder)
        return transformers.AutoModel.from_pretrained(folder)


def _load_timm(name: str, checkpoint: Checkpoint) -> Any:
    """timm's model of that name; without a name, one of the sizes of a checkpoint, with its weights."""
    import timm

    if name:
        return timm.create_model(name, pretrained=True, dynamic_img_size=True)
    plan, sizes = open_checkpoint(checkpoint)
    weights = convert_state_dict(plan.source, to="timm")
    gated, registers = sizes["ffn_layer"] == "swiglufused", sizes["num_register_tokens"]
    first_linear = weights["blocks.0.mlp.fc1.weight"].shape[0]  # of both halves of a gated network
    model = timm.create_model(
        f"vit_{'giant' if gated else 'small'}_patch14{'_reg4' if registers else ''}_dinov2",
        dynamic_img_size=True,
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        mlp_ratio=first_linear / sizes["embed_dim"],
        reg_tokens=registers,
    )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in model.state_dict()})
    return model
