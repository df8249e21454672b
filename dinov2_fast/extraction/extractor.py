"""`Extractor`: features of batches that are dictionaries, as Ray Data, Spark and data loaders provide them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.data.batches import make_batch
from dinov2_fast.data.decoding import Decoded, decode_bytes
from dinov2_fast.data.files import ImageError, reason
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS, check_pixels
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.compute import DEFAULT, Outputs
from dinov2_fast.inference.loading import load_model, processor_for

COLUMNS = ("image", "bytes")


class Extractor:
    """A function from a batch of images to the same batch with their features, cheap to send to other processes.

    It holds only settings until its first call, which loads the model in the calling process. A pickle holds only the
    settings, also after the model was loaded. A model that was given as an object is one of the settings.

    ::

        dataset.map_batches(dinov2_fast.Extractor, fn_constructor_args=("dinov2_vitb14",), batch_size=256)

    Args:
        model, weights, position_interpolation, features, dtype, device, precision, engine: see
            :func:`dinov2_fast.extract`. A model object ignores `weights` and the other settings of loading.
        size: pixels, an int or (height, width), multiples of 14; the centre of images is cut out. By default the size
            of the processor.
        processor: by default the one beside the model in a folder, or that of the checkpoints (224 x 224).
        column: the column of the images; by default "image", or "bytes" if there is no "image".
        batch_size: the most images in one forward pass; halved for good if memory runs out.
        max_pixels: larger images, as bytes or as PIL images, get an error before they are decoded. There is no limit of
            time: for untrusted images :func:`dinov2_fast.extract` is safer.

    Raises:
        InvalidValueError: two settings that exclude each other.
    """

    def __init__(
        self,
        model: Any = "dinov2_vits14",
        *,
        weights: str | Path | None = None,
        position_interpolation: str | None = None,
        size: int | tuple[int, int] | None = None,
        processor: Dinov2ImageProcessor | None = None,
        features: Sequence[str] = DEFAULT,
        dtype: str = "auto",
        device: str | None = None,
        precision: str = "auto",
        engine: bool = True,
        column: str | None = None,
        batch_size: int = 256,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if size is not None and processor is not None:
            raise InvalidValueError("Give size or processor, not both.")
        if batch_size < 1:
            raise InvalidValueError(f"batch_size must be at least 1, got {batch_size}.")
        self._model = model
        self._loading: dict[str, Any] = {"weights": weights, "position_interpolation": position_interpolation}
        self._loading |= {"device": device, "precision": precision, "engine": engine}
        self._processor = Dinov2ImageProcessor.for_size(size) if size is not None else processor
        self._features, self._dtype = tuple(features), dtype
        self._column, self._batch_size, self._max_pixels = column, batch_size, max_pixels
        self._loaded: Outputs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    @property
    def outputs(self) -> Outputs:
        """Model, preprocessing and features; the first access loads them, with the errors of `dinov2_fast.extract`."""
        if self._loaded is None:
            processor, model = self._processor or processor_for(self._model), self._model
            if isinstance(model, (str, Path)):
                model = load_model(model, processor, **self._loading)
            self._loaded = Outputs(model, processor, self._features, self._dtype)
        return self._loaded

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the features of each image.

        Args:
            batch: columns of the same length. The column of the images holds the bytes of files, or what
                :class:`dinov2_fast.Dinov2ImageProcessor` takes: arrays (height, width, 3) or PIL images. It may be one
                array (batch, height, width, 3).

        Returns:
            The other columns unchanged; each feature, an array (batch, …), NaN for an image with an error; and
            ``error``, (batch,), with the reason or None.

        Raises:
            KeyError: there is no column of images.
            InvalidValueError: columns that differ in length, or that have the name of a feature or "error".
        """
        name = self._name_of_images(batch)
        outputs, images = self.outputs, batch[name]
        taken = [key for key in (*(f.name for f in outputs.features), "error") if key in batch and key != name]
        if taken:
            raise InvalidValueError(
                f"The batch has columns called {', '.join(taken)}, which the features and their errors are called too: "
                "rename or drop these columns first."
            )
        lengths = {key: len(column) for key, column in batch.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidValueError(f"The columns differ in length: {lengths}.")
        decoded = [self._decode(image, outputs) for image in images]
        errors: list[str | None] = []
        parts: dict[str, list[NDArray[Any]]] = {f.name: [np.empty((0, *f.shape), f.dtype)] for f in outputs.features}
        while len(errors) < len(decoded):
            following = decoded[len(errors) : len(errors) + self._batch_size]
            pending = outputs.start(make_batch(following, outputs.decoder), self._batch_size)
            self._batch_size, (done, values) = pending.size, pending.result()
            errors += [image.error for image in done]
            for key, value in values.items():
                parts[key].append(value)
        found = {key: column for key, column in batch.items() if key != name}
        failed = np.array([error is not None for error in errors], bool)
        for key, arrays in parts.items():
            found[key] = np.concatenate(arrays)
            found[key][failed] = np.nan
        return {**found, "error": np.array(errors, object)}

    def _name_of_images(self, batch: Mapping[str, Any]) -> str:
        wanted = COLUMNS if self._column is None else (self._column,)
        name = next((name for name in wanted if name in batch), None)
        if name is None:
            raise KeyError(
                f"the batch has no column {' or '.join(wanted)}, but {', '.join(batch) or 'none'}: give column="
            )
        return name

    def _decode(self, image: Any, outputs: Outputs) -> Decoded:
        if isinstance(image, (bytes, bytearray, memoryview)):
            return decode_bytes(bytes(image), outputs.decoder, self._max_pixels)
        try:
            if isinstance(image, Image.Image):
                check_pixels(image, self._max_pixels)
            return Decoded(pixels=outputs.decoder(image, return_tensors=None).pixel_values[0])
        except ImageError as error:
            return Decoded(error=str(error))
        except Exception as error:  # an unexpected error fails this image, not the batch
            return Decoded(error=f"cannot be processed: {reason(error)}")
