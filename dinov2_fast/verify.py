"""`verify`: compares two checkpoints, or a checkpoint and another implementation, by their weights and on images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.convert import find_named, huggingface_model, summary_of
from dinov2_fast.data.batches import Failures, readable_batches
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.loading import find_device
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import POSITION_INTERPOLATIONS
from dinov2_fast.weights.architecture import plan_weights, read_architecture
from dinov2_fast.weights.compare import FeatureDifference, Tokens, WeightDifference, compare_features, compare_weights
from dinov2_fast.weights.convert import convert_state_dict
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import load
from dinov2_fast.weights.sources import Checkpoint

LIBRARIES = ("transformers", "timm")
BATCH_SIZE = 8

ModelTokens = Callable[[Tensor], Tokens]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        a, b: what was compared: the file and its sizes, or the library and its model.
        device: where both ran.
        weights: how the tensors differ; None where B is another implementation.
        features: how the tokens differ; None where they could not be compared.
        error: why they could not be compared.
        failures: images that cannot be read and were left out.
        position_interpolation: A's.
        agreeing: another position interpolation with which A agrees with B within the tolerance, and the worst
            difference then; None where the features agree anyway, or with no other.
    """

    a: str
    b: str
    device: torch.device
    weights: WeightDifference | None
    features: FeatureDifference | None
    error: InvalidValueError | None
    failures: Failures
    position_interpolation: str
    agreeing: tuple[str, float] | None = None


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
        WeightsError: a checkpoint cannot be had.
        ValueError: no images, a device or interpolation that does not exist, or a library that is not installed.
    """
    place = find_device(device)
    images = _Images(paths, Dinov2ImageProcessor.for_size(size), place)
    checkpoint, other = find_named(a), None if _is_library(b) else find_named(b)
    model = _load(checkpoint, position_interpolation, place)
    weights = None
    if other is None:
        b_tokens, description = _load_from_library(b, checkpoint, place)
    else:
        weights = compare_weights(*(plan_weights(open_weights(each.weights)) for each in (checkpoint, other)))
        b_tokens, description = _tokens_of(_load(other, position_interpolation, place)), _description(other)
    features, error, agreeing = None, None, None
    try:
        features = compare_features(_tokens_of(model), b_tokens, images)
    except InvalidValueError as reason:
        error = reason
    failures, own = images.failures, model.position_interpolation
    if features is not None and not features.worst <= tolerance:  # NaN is no agreement
        agreeing = _agreeing_interpolation(model, b_tokens, images, tolerance)
    return Verification(_description(checkpoint), description, place, weights, features, error, failures, own, agreeing)


class _Images:
    """Batches of pixel values (batch, 3, height, width), read again in each iteration.

    Attributes:
        failures: images that could not be read in the last iteration.
    """

    def __init__(
        self, paths: Iterable[str | os.PathLike[str]], processor: Dinov2ImageProcessor, device: torch.device
    ) -> None:
        self.sources, self.processor, self.device = list(require_images(paths)), processor, device
        self.failures = Failures()

    def __iter__(self) -> Iterator[Tensor]:
        self.failures = Failures()
        for _, pixels in readable_batches(self.sources, self.processor, self.failures, batch_size=BATCH_SIZE):
            yield pixels.to(self.device)


def _load(checkpoint: Checkpoint, position_interpolation: str | None, device: torch.device) -> DinoVisionTransformer:
    where = checkpoint.config.parent if checkpoint.config else checkpoint.weights
    return load(where, device=device, dtype="float32", position_interpolation=position_interpolation)


def _tokens_of(model: DinoVisionTransformer) -> ModelTokens:
    def tokens(pixels: Tensor) -> Tokens:
        features = model.forward_features(pixels)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]

    return tokens


def _description(checkpoint: Checkpoint) -> str:
    state_dict = open_weights(checkpoint.weights)
    architecture = read_architecture(state_dict, checkpoint.config)
    return f"{checkpoint.weights}\n   {summary_of(plan_weights(state_dict), architecture)}"


def _agreeing_interpolation(
    model: DinoVisionTransformer, b_tokens: ModelTokens, images: _Images, tolerance: float
) -> tuple[str, float] | None:
    """A way of resampling positions with which the model agrees with B, other than its own; it is left set."""
    own = model.position_interpolation
    for name in POSITION_INTERPOLATIONS:
        if name != own:
            model.position_interpolation = name
            worst = compare_features(_tokens_of(model), b_tokens, images).worst
            if worst <= tolerance:
                return name, worst
    return None


def _is_library(name: str) -> bool:
    """Whether `name` is ``transformers`` or ``timm``, with or without a model after a colon."""
    return name.partition(":")[0] in LIBRARIES


def _load_from_library(name: str, checkpoint: Checkpoint, device: torch.device) -> tuple[ModelTokens, str]:
    """The tokens of another library's model, in fp32 and eval mode, and what model it is in words."""
    library, _, model = name.partition(":")
    try:
        return (_transformers if library == "transformers" else _timm)(model, checkpoint, device)
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"{error.name} is not installed: pip install {library}.") from error


def _transformers(name: str, checkpoint: Checkpoint, device: torch.device) -> tuple[ModelTokens, str]:
    import transformers

    model: Any
    if name:
        model = transformers.AutoModel.from_pretrained(name)
    else:
        with tempfile.TemporaryDirectory() as folder:
            huggingface_model(checkpoint).save_pretrained(folder)
            model = transformers.AutoModel.from_pretrained(folder)
    model = model.eval().float().to(device)
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)

    def tokens(pixels: Tensor) -> Tokens:
        output = model(pixels).last_hidden_state
        return output[:, 0], output[:, first_patch:]

    return tokens, _in_words("transformers", transformers.__version__, model, name)


def _timm(name: str, checkpoint: Checkpoint, device: torch.device) -> tuple[ModelTokens, str]:
    import timm

    model: Any = timm.create_model(name, pretrained=True, dynamic_img_size=True) if name else _timm_with(checkpoint)
    model = model.eval().float().to(device)

    def tokens(pixels: Tensor) -> Tokens:
        output = model.forward_features(pixels)
        return output[:, 0], output[:, model.num_prefix_tokens :]

    return tokens, _in_words("timm", timm.__version__, model, name)


def _timm_with(checkpoint: Checkpoint) -> Any:
    """timm's model of the sizes of a checkpoint, with its weights."""
    import timm

    state_dict = open_weights(checkpoint.weights)
    sizes = read_architecture(state_dict, checkpoint.config)
    weights = convert_state_dict(state_dict, to="timm")
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


def _in_words(library: str, version: str, model: Any, name: str) -> str:
    return f"{library} {version}, {type(model).__name__}, {name or 'with the weights of A'}"
