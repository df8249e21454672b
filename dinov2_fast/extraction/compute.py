"""Which features of an image are taken from the model, and computing them for a batch.

=============  ======================  ===============================================================================
cls            (dim,)                  class token after the final norm
patch_mean     (dim,)                  mean of the patch tokens after the final norm, without registers
patches        (patches, dim)          patch tokens after the final norm, rows of the image from the top
registers      (registers, dim)        register tokens after the final norm
cls@K          as without K            the first three after block K (0 is the first), the final norm applied, as
patch_mean@K                           ``get_intermediate_layers(n=[K])`` gives them
patches@K
=============  ======================  ===============================================================================
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.schema import Feature
from dinov2_fast.inference import Engine

DEFAULT = ("cls", "patch_mean")
KINDS = ("cls", "patch_mean", "patches", "registers")
DTYPES = {"fp32": "float32", "fp16": "float16"}


class Outputs:
    """The features `names` of a model for images that a processor prepares.

    Args:
        model: a :class:`dinov2_fast.DinoVisionTransformer` in eval mode, or an engine made of one.
        processor: its outputs must have one size, a multiple of the patch.
        names: see the module's description.
        dtype: "fp32" or "fp16"; "auto" is fp32 for single vectors and fp16 for tokens.

    Attributes:
        features: name, shape and dtype of each.
        decoder: the processor for images that `start` takes: the given one, or without rescaling and normalisation
            where the model does both.

    Raises:
        ValueError: a model in training mode, a processor that does not fit it, or features that it does not have.
    """

    def __init__(
        self, model: Any, processor: Dinov2ImageProcessor, names: Sequence[str] = DEFAULT, dtype: str = "auto"
    ) -> None:
        _check(model, processor)
        if dtype not in ("auto", *DTYPES):
            raise InvalidValueError(f"There is no dtype {dtype!r} for features; choose auto, {' or '.join(DTYPES)}.")
        self.model = model
        self.takes_uint8 = _normalizes(model, processor)
        self.decoder = without_normalization(processor) if self.takes_uint8 else processor
        self._wanted = [_Wanted.named(name, model) for name in dict.fromkeys(names)]
        if not self._wanted:
            raise InvalidValueError(f"No features were asked for; there are {', '.join(KINDS)}.")
        self.features = [wanted.feature(model, processor, dtype) for wanted in self._wanted]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        device: torch.device = place_of(self.model).device
        return device

    def start(self, pixels: NDArray[Any]) -> Running:
        """Begins to compute the features of a batch (images, 3, height, width); on a GPU it does not wait.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """
        batch = torch.from_numpy(pixels)
        watch = _Stopwatch(self.device)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        if not isinstance(self.model, Engine):
            batch = batch.to(place_of(self.model).dtype)
        with torch.inference_mode():
            found = self._compute(batch)
            stored = [found[f.name].to(getattr(torch, f.dtype)) for f in self.features]
            finite = torch.stack([tensor.flatten(1).isfinite().all(dim=1) for tensor in stored]).all(dim=0)
            arrays = [_to_host(tensor) for tensor in (*stored, finite)]
        watch.stop()
        return Running([f.name for f in self.features], arrays, watch)

    def _compute(self, batch: Tensor) -> dict[str, Tensor]:
        """The wanted features, on the device."""
        places = {wanted.layer for wanted in self._wanted}
        tokens: dict[int | None, dict[str, Tensor]] = {}
        if places != {None}:
            last = self.model.n_blocks - 1
            layers = sorted({last if place is None else place for place in places})
            outputs = self.model.get_intermediate_layers(batch, n=layers, return_class_token=True)
            for layer, (patches, cls) in zip(layers, outputs, strict=True):
                tokens[layer] = {"patches": patches, "cls": cls}
            if None in places:
                tokens[None] = tokens[last]
        if places == {None} or any(wanted.kind == "registers" for wanted in self._wanted):
            output = self.model.forward_features(batch)
            tokens[None] = {kind: output[key] for kind, key in _KEYS.items() if key in output}
        return {wanted.name: wanted.of(tokens[wanted.layer]) for wanted in self._wanted}


class Running:
    """Features that are being computed."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Tensor], watch: _Stopwatch) -> None:
        self._names, self._arrays, self._watch = names, arrays, watch

    def result(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], float]:
        """Each feature (images, …), which images have finite ones, and the seconds that the device took."""
        seconds = self._watch.seconds()
        *features, finite = (tensor.numpy() for tensor in self._arrays)
        return dict(zip(self._names, features, strict=True)), finite, seconds


@dataclass(frozen=True)
class _Wanted:
    """One feature: its kind, and after which block (None: at the end)."""

    name: str
    kind: str
    layer: int | None

    @classmethod
    def named(cls, name: str, model: Any) -> _Wanted:
        kind, at, layer = name.partition("@")
        if kind not in KINDS or (at and (kind == "registers" or not layer.isdecimal())):
            with_layer = ", ".join(f"{kind}@K" for kind in KINDS if kind != "registers")
            raise InvalidValueError(f"There is no feature {name!r}; there are {', '.join(KINDS)}, and {with_layer}.")
        if kind == "registers" and not model.num_register_tokens:
            raise InvalidValueError("The model has no registers; those whose names end in _reg have.")
        if at and int(layer) >= model.n_blocks:
            raise InvalidValueError(f"{name!r}: there is no block {layer}; the blocks are 0 to {model.n_blocks - 1}.")
        return cls(f"{kind}@{int(layer)}" if at else kind, kind, int(layer) if at else None)

    def feature(self, model: Any, processor: Dinov2ImageProcessor, dtype: str) -> Feature:
        """How it is stored."""
        height, width = processor.output_size or (0, 0)
        shape: tuple[int, ...] = (model.embed_dim,)
        if self.kind == "patches":
            rows, columns = model.patch_grid(height, width)
            shape = (rows * columns, *shape)
        if self.kind == "registers":
            shape = (model.num_register_tokens, *shape)
        auto = "fp32" if len(shape) == 1 else "fp16"
        return Feature(self.name, shape, DTYPES[auto if dtype == "auto" else dtype])

    def of(self, tokens: dict[str, Tensor]) -> Tensor:
        """Taken from the tokens after its block."""
        return tokens["patches"].float().mean(dim=1) if self.kind == "patch_mean" else tokens[self.kind]


_KEYS = {"cls": "x_norm_clstoken", "patches": "x_norm_patchtokens", "registers": "x_norm_regtokens"}


class _Stopwatch:
    """The seconds between its making and `stop`, as the device counts them."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record(torch.cuda.current_stream(device))
        self._device, self._begin, self._end = device, time.perf_counter(), 0.0

    def stop(self) -> None:
        """Ends the time."""
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """Waits until the device is there."""
        if not self._events:
            return self._end - self._begin
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is there once the stream has come so far."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _check(model: Any, processor: Dinov2ImageProcessor) -> None:
    if model.training:
        raise InvalidValueError("The model is in training mode; call model.eval() first.")
    size = processor.output_size
    if size is None:
        raise InvalidValueError(
            "The processor's outputs differ in size; set do_center_crop, or an exact height and width."
        )
    if any(side % model.patch_size for side in size):
        raise InvalidValueError(
            f"The processor's output is {size[0]} x {size[1]}, not a multiple of the patch size {model.patch_size}."
        )


def _normalizes(model: Any, processor: Dinov2ImageProcessor) -> bool:
    """Whether the model does to uint8 images what the processor does last: scaling by 1/255 and normalisation."""
    if not isinstance(model, Engine) or not processor.do_rescale or not processor.do_normalize:
        return False
    settings = processor.rescale_factor, tuple(processor.image_mean), tuple(processor.image_std)
    return settings == (1 / 255, tuple(model.plan.mean), tuple(model.plan.std))


def without_normalization(processor: Dinov2ImageProcessor) -> Dinov2ImageProcessor:
    """The processor without its last two steps."""
    return Dinov2ImageProcessor(**{**processor.settings(), "do_rescale": False, "do_normalize": False})


def place_of(model: Any) -> Any:
    """What has the device and the dtype of the model: a parameter, or the engine itself."""
    return model if isinstance(model, Engine) else next(model.parameters())
