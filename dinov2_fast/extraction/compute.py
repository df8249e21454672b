"""The features of a model for images, and computing them batch by batch.

=============  ======================  ===============================================================================
cls            (dim,)                  class token after the final norm
patch_mean     (dim,)                  mean of the patch tokens after the final norm, without registers
patches        (patches, dim)          patch tokens after the final norm, row by row from the top of the image
registers      (registers, dim)        register tokens after the final norm
cls@K          as without K            the first three after block K (0 is the first), with the final norm applied, as
patch_mean@K                           ``get_intermediate_layers(n=[K])`` gives them
patches@K
=============  ======================  ===============================================================================
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_fast.data.batches import ImageBatch, read_batches, run_in_parts
from dinov2_fast.data.decoding import Decoded
from dinov2_fast.data.image_processor import Dinov2ImageProcessor, fixed_output_size
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.schema import Feature
from dinov2_fast.inference import Engine

DEFAULT = ("cls", "patch_mean")
KINDS = ("cls", "patch_mean", "patches", "registers")
DTYPES = {"fp32": "float32", "fp16": "float16"}


class Outputs:
    """Chosen features of a model, for images that a processor prepares.

    Args:
        model: a :class:`dinov2_fast.DinoVisionTransformer` in eval mode, or an engine made of one.
        processor: its outputs must have one size, a multiple of the patch size.
        names: of the features, from the table above.
        dtype: "fp32" or "fp16"; "auto" is fp32 for single vectors and fp16 for tokens.

    Attributes:
        features: name, shape and dtype of each.
        decoder: the processor that prepares images for `start`: the given one, or one without rescaling and
            normalization if the model does both.

    Raises:
        InvalidValueError: a model in training mode, a processor that does not fit it, or features that it lacks.
    """

    def __init__(
        self, model: Any, processor: Dinov2ImageProcessor, names: Sequence[str] = DEFAULT, dtype: str = "auto"
    ) -> None:
        check_features(names, dtype)
        _check(model, processor)
        self.model = model
        self.decoder = without_normalization(processor) if _normalizes(model, processor) else processor
        self._wanted = [_Wanted.named(name, model) for name in dict.fromkeys(names)]
        self.features = [wanted.feature(model, processor, dtype) for wanted in self._wanted]

    def start(self, batch: ImageBatch, size: int) -> Pending:
        """Begins to compute the features of a batch that `decoder` has prepared; on a GPU this does not wait for them.

        One forward pass has at most `size` images, and fewer if memory runs out; see `run_in_parts`.
        """
        parts, size = run_in_parts(self._start, batch.pixels, size)
        return Pending(self.features, batch, parts, size)

    def run(
        self, sources: Iterable[ImageSource], *, batch_size: int = 32, **decoding: Any
    ) -> Generator[tuple[list[Decoded], dict[str, NDArray[Any]]], None, None]:
        """The images and their features, as `Pending.result` returns them, batch by batch; see `read_batches`."""
        size = batch_size
        with closing(read_batches(sources, self.decoder, batch_size=batch_size, **decoding)) as batches:
            for batch in batches:
                pending = self.start(batch, size)
                size = pending.size
                yield pending.result()

    def _start(self, pixels: Tensor) -> tuple[list[Tensor], _Stopwatch]:
        """The features of (images, 3, height, width) and whether each image's are finite, on their way to the host."""
        tensor = tensor_of(self.model)
        stopwatch = _Stopwatch(tensor.device)
        if tensor.device.type == "cuda":
            pixels = pixels.pin_memory().to(tensor.device, non_blocking=True)
        if not isinstance(self.model, Engine):
            pixels = pixels.to(tensor.dtype)
        with torch.inference_mode():
            found = self._compute(pixels)
            stored = [found[f.name].to(getattr(torch, f.dtype)) for f in self.features]
            finite = torch.stack([tensor.flatten(1).isfinite().all(dim=1) for tensor in stored]).all(dim=0)
            arrays = [_to_host(tensor) for tensor in (*stored, finite)]
        stopwatch.stop()
        return arrays, stopwatch

    def _compute(self, pixels: Tensor) -> dict[str, Tensor]:
        """The wanted features, on the device."""
        layers = {wanted.layer for wanted in self._wanted}
        tokens: dict[int | None, dict[str, Tensor]] = {}
        if layers != {None}:
            last = self.model.n_blocks - 1
            indices = sorted({last if layer is None else layer for layer in layers})
            outputs = self.model.get_intermediate_layers(pixels, n=indices, return_class_token=True)
            for index, (patches, cls) in zip(indices, outputs, strict=True):
                tokens[index] = {"patches": patches, "cls": cls}
            if None in layers:
                tokens[None] = tokens[last]
        if layers == {None} or any(wanted.kind == "registers" for wanted in self._wanted):
            # Beside features of inner blocks this is a second pass: get_intermediate_layers returns no registers.
            output = self.model.forward_features(pixels)
            tokens[None] = {kind: output[key] for kind, key in _KEYS.items() if key in output}
        return {wanted.name: wanted.of(tokens[wanted.layer]) for wanted in self._wanted}


class Pending:
    """A batch whose features are being computed. It ran in parts of at most `size` images."""

    def __init__(
        self, features: Sequence[Feature], batch: ImageBatch, parts: list[tuple[list[Tensor], _Stopwatch]], size: int
    ) -> None:
        self.size = size
        self._features, self._images, self._rows, self._parts = features, batch.images, batch.rows, parts

    def result(self) -> tuple[list[Decoded], dict[str, NDArray[Any]]]:
        """Waits for the device. Returns the images, with an error where a feature is not finite, and the features.

        The features are arrays (images, …) by name. Their values are not to be used where there is an error.
        """
        images = list(self._images)
        found = {f.name: np.zeros((len(images), *f.shape), f.dtype) for f in self._features}
        fp16 = any(feature.dtype == "float16" for feature in self._features)
        error = f"the model's features contain NaN or infinity{', or are too large for fp16' * fp16}"
        first = 0
        for arrays, stopwatch in self._parts:
            stopwatch.seconds()  # waits
            *values, finite = (array.numpy() for array in arrays)
            rows = self._rows[first : first + len(finite)]
            for feature, value in zip(self._features, values, strict=True):
                found[feature.name][rows] = value
            for row in np.array(rows)[~finite]:
                images[row] = replace(images[row], error=error)
            first += len(finite)
        return images, found

    def seconds(self) -> float:
        """How long the device has worked; waits for it."""
        return sum(stopwatch.seconds() for _, stopwatch in self._parts)


@dataclass(frozen=True)
class _Wanted:
    """One feature: its kind, and the block after which it is taken (None: the last)."""

    name: str
    kind: str
    layer: int | None

    @classmethod
    def named(cls, name: str, model: Any) -> _Wanted:
        kind, at, layer = name.partition("@")
        if kind == "registers" and not model.num_register_tokens:
            raise InvalidValueError("The model has no registers. Models whose names end in _reg have them.")
        if at and int(layer) >= model.n_blocks:
            raise InvalidValueError(f"{name!r}: there is no block {layer}; the blocks are 0 to {model.n_blocks - 1}.")
        return cls(f"{kind}@{int(layer)}" if at else kind, kind, int(layer) if at else None)

    def feature(self, model: Any, processor: Dinov2ImageProcessor, dtype: str) -> Feature:
        """Its name, shape and dtype in a shard."""
        shape: tuple[int, ...] = (model.embed_dim,)
        if self.kind == "patches":
            rows, columns = model.patch_grid(*fixed_output_size(processor))
            shape = (rows * columns, *shape)
        if self.kind == "registers":
            shape = (model.num_register_tokens, *shape)
        auto = "fp32" if len(shape) == 1 else "fp16"
        return Feature(self.name, shape, DTYPES[auto if dtype == "auto" else dtype])

    def of(self, tokens: dict[str, Tensor]) -> Tensor:
        """The feature, from the tokens after its block."""
        return tokens["patches"].float().mean(dim=1) if self.kind == "patch_mean" else tokens[self.kind]


_KEYS = {"cls": "x_norm_clstoken", "patches": "x_norm_patchtokens", "registers": "x_norm_regtokens"}


class _Stopwatch:
    """Measures the time from its creation to `stop`; on a GPU, the time of the work that was queued in between."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record(torch.cuda.current_stream(device))
        self._device, self._begin, self._end = device, time.perf_counter(), 0.0

    def stop(self) -> None:
        """Ends the measurement."""
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """The time; waits until a GPU has done the work."""
        if not self._events:
            return self._end - self._begin
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is complete once the stream has reached it."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def check_features(names: Sequence[str], dtype: str) -> None:
    """Refuses what no model has: a name or a dtype that does not exist, or no name at all."""
    if dtype not in ("auto", *DTYPES):
        raise InvalidValueError(f"There is no dtype {dtype!r} for features; choose auto, {' or '.join(DTYPES)}.")
    if not names:
        raise InvalidValueError(f"No features were asked for; there are {', '.join(KINDS)}.")
    for name in names:
        kind, at, layer = name.partition("@")
        if kind not in KINDS or (at and (kind == "registers" or not layer.isdecimal())):
            with_layer = ", ".join(f"{kind}@K" for kind in KINDS if kind != "registers")
            raise InvalidValueError(f"There is no feature {name!r}; there are {', '.join(KINDS)}, and {with_layer}.")


def _check(model: Any, processor: Dinov2ImageProcessor) -> None:
    if model.training:
        raise InvalidValueError("The model is in training mode; call model.eval() first.")
    size = fixed_output_size(processor)
    if any(side % model.patch_size for side in size):
        raise InvalidValueError(
            f"The processor's output is {size[0]} x {size[1]}, not a multiple of the patch size {model.patch_size}."
        )


def _normalizes(model: Any, processor: Dinov2ImageProcessor) -> bool:
    """Whether the model takes uint8 images and does the processor's last steps: scaling by 1/255, normalization."""
    if not isinstance(model, Engine) or not processor.do_rescale or not processor.do_normalize:
        return False
    settings = processor.rescale_factor, tuple(processor.image_mean), tuple(processor.image_std)
    return settings == (1 / 255, tuple(model.plan.mean), tuple(model.plan.std))


def without_normalization(processor: Dinov2ImageProcessor) -> Dinov2ImageProcessor:
    """The processor without its last two steps, rescaling and normalization."""
    return Dinov2ImageProcessor(**{**processor.settings(), "do_rescale": False, "do_normalize": False})


def tensor_of(model: Any) -> Any:
    """An object with the device and the dtype of the model: a parameter, or the engine itself."""
    return model if isinstance(model, Engine) else next(model.parameters())
