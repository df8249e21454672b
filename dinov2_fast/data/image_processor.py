"""Images to pixel values: the preprocessing of the DINOv2 checkpoints, on PIL and numpy.

The steps are those of the checkpoints' ``preprocessor_config.json`` (a ``BitImageProcessor``), in this order: convert
to RGB, resize the shortest edge to 256 (bicubic), crop the central 224 x 224, scale by 1/255, normalize with the
ImageNet mean and standard deviation. Settings have transformers' names. The results equal those of its PIL processor,
except for 16-bit images, and for transparent ones since transformers 5.23 (:mod:`.rgb`).

- Images become RGB as :mod:`.rgb` describes. The alpha channel of arrays and tensors is dropped; floats lie in 0 to 255
  if `do_rescale`, in 0 to 1 if not.
- Resizing works on 8 bits. Floats in 0 to 1 are truncated to 8 bits, as in transformers; floats in 0 to 255 are
  rounded.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.data.rgb import DATA_FORMATS, channels_last, parse_colour, to_rgb
from dinov2_fast.errors import InvalidTypeError, InvalidValueError

CONFIG_NAME = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH_SIZE = 14
MAX_RESIZED_PIXELS = 50_000_000

# The values of transformers' BitImageProcessor for settings that a file lacks.
_FILE_DEFAULTS: dict[str, Any] = {
    "size": 224,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_FILE_TYPES = ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil", "BitFeatureExtractor")
_UNUSED = ("do_pad", "pad_size", "disable_grouping")  # settings of transformers; None and False are accepted

Pixels = NDArray[Any]  # (height, width, 3), or (3, height, width) as output; uint8 or float32


class BatchFeature(dict[str, Any]):
    """The result of the processor, as in transformers: ``pixel_values`` by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a BatchFeature has {', '.join(self)}, not {name!r}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """A copy in which ``Tensor.to(device, dtype)`` has moved the tensors; arrays cannot be moved."""
        return BatchFeature({name: value.to(*args, **kwargs) for name, value in self.items()})


class Dinov2ImageProcessor:
    """Turns images into pixel values (batch, 3, height, width), by default the float32 values that DINOv2 expects.

    Args:
        do_convert_rgb: convert PIL images, and arrays with 1 or 4 channels, to RGB; otherwise they must be RGB.
        do_resize, size, resample: `size` is the length of the shortest edge (an int or ``{"shortest_edge": n}``), or
            the exact ``{"height": h, "width": w}`` (also ``(h, w)``), which does not keep the aspect ratio. `resample`
            is a ``PIL.Image.Resampling`` (3 is bicubic).
        do_center_crop, crop_size: the central ``{"height": h, "width": w}`` (also ``(h, w)``, or an int for a square);
            smaller images are padded with black.
        do_rescale, rescale_factor: multiply by `rescale_factor`.
        do_normalize, image_mean, image_std: subtract and divide, by one number or by one for each channel.
        background: a colour, as a name or code that Pillow knows, behind transparent pixels. By default alpha is
            dropped, and transparent pixels show the colour that they hold, often black.

    Raises:
        InvalidValueError: a setting has a value that cannot be used.
    """

    def __init__(
        self,
        *,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: int | Sequence[int] | dict[str, int] = 256,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: int | Sequence[int] | dict[str, int] = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = IMAGENET_MEAN,
        image_std: float | Sequence[float] = IMAGENET_STD,
        background: str | None = None,
    ) -> None:
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = _size_setting("size", size, square=False)
        if resample not in list(Image.Resampling):
            raise InvalidValueError(f"resample: {resample!r} is not a valid Resampling of Pillow.")
        self.resample = int(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _size_setting("crop_size", crop_size, square=True)
        self.do_rescale = do_rescale
        self.rescale_factor = float(rescale_factor)
        self.do_normalize = do_normalize
        self.image_mean = _channel_setting("image_mean", image_mean)
        self.image_std = _channel_setting("image_std", image_std)
        if 0.0 in self.image_std:
            raise InvalidValueError("image_std must not contain 0: pixels are divided by it.")
        self.background = background
        if background is not None:
            parse_colour(background)

    @classmethod
    def for_size(cls, size: int | tuple[int, int], *, crop: bool = True, **settings: Any) -> Dinov2ImageProcessor:
        """A processor whose outputs all have this size in pixels, an int for a square or (height, width).

        With `crop` the shortest edge becomes the longer side of `size` and the centre is cut out: nothing is distorted,
        the rest is lost. Without it, the whole image is squeezed into `size`. `settings` go to the constructor.

        Raises:
            InvalidValueError: a side is not a positive multiple of 14; the message names the nearest ones.
        """
        height, width = size if isinstance(size, Sequence) else (size, size)
        for side in (height, width):
            if side < PATCH_SIZE or side % PATCH_SIZE:
                below = max(side // PATCH_SIZE, 1) * PATCH_SIZE
                nearest = f"{below} or {below + PATCH_SIZE}" if side > PATCH_SIZE else str(PATCH_SIZE)
                raise InvalidValueError(f"{side} is not a multiple of the patch size {PATCH_SIZE}; nearest: {nearest}.")
        exact = {"height": height, "width": width}
        return cls(size=max(height, width) if crop else exact, do_center_crop=crop, crop_size=exact, **settings)

    def __call__(
        self,
        images: Any,
        return_tensors: str | None = "pt",
        *,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: Any = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Processes one image, a list or tuple of them (sizes may differ), or a batch array.

        Args:
            images: PIL images, numpy arrays or torch tensors; :mod:`.rgb` describes shapes and ranges.
            return_tensors: ``"pt"`` for a torch tensor or ``"np"`` for an array (batch, 3, height, width). It is
                float32, or uint8 if images of 8 bits are neither rescaled nor normalized. None gives a list of arrays
                (3, height, width), which may differ in size.
            input_data_format: ``"channels_first"`` or ``"channels_last"`` for arrays; by default it is guessed.
            data_format: ``"channels_last"`` for outputs (height, width, 3).
            device: where the tensors go; the CPU processes the images.
            overrides: settings of the constructor, for this call.

        Raises:
            InvalidTypeError: an unknown setting, or something that is not an image.
            InvalidValueError: an empty list, a wrong rank, channel count, dtype or range, outputs that differ in size,
                or a device for arrays.
        """
        if return_tensors not in ("pt", "np", None):
            raise InvalidValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}.')
        if data_format not in DATA_FORMATS:
            raise InvalidValueError(f'data_format must be "channels_first" or "channels_last", got {data_format!r}.')
        if device is not None and return_tensors != "pt":
            raise InvalidValueError('Only tensors have a device; ask for return_tensors="pt".')
        processor = self._with(overrides)
        pixel_values = [processor._process(image, input_data_format) for image in _flat_list(images)]
        if data_format == "channels_last":
            pixel_values = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in pixel_values]
        if return_tensors is None:
            return BatchFeature(pixel_values=pixel_values)
        batch = _stack(pixel_values, data_format)
        if return_tensors == "np":
            return BatchFeature(pixel_values=batch)
        import torch

        return BatchFeature(pixel_values=torch.from_numpy(batch).to(device))

    preprocess = __call__

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every output, or None if the size depends on the image."""
        exact = self.crop_size if self.do_center_crop else self.size if self.do_resize else {}
        return (exact["height"], exact["width"]) if "height" in exact else None

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(3, height, width) of every output; an InvalidValueError if they differ in size."""
        return 3, *fixed_output_size(self)

    @property
    def output_dtype(self) -> np.dtype[Any]:
        """The dtype of the outputs for images of 8 bits."""
        return np.dtype(np.float32 if self.do_rescale or self.do_normalize else np.uint8)

    def prepare(self, image: Image.Image, number: int = 0) -> NDArray[Any]:
        """The output for one image, for :mod:`dinov2_fast.data.workers`. The number of the task has no effect."""
        pixels: NDArray[Any] = self(image, return_tensors=None).pixel_values[0]
        return pixels

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {name: copy.copy(getattr(self, name)) for name in _SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``; `background`, unknown to transformers, only if it is set."""
        settings = self.settings()
        if self.background is None:
            del settings["background"]
        return {"image_processor_type": "BitImageProcessor", **settings}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def save_pretrained(self, save_directory: str | Path, *, safe_serialization: bool = True) -> Path:
        """Writes ``preprocessor_config.json``, which transformers' ``AutoImageProcessor`` reads, and returns its path.

        `safe_serialization` has no effect; pipelines of transformers 4 pass it.
        """
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        use_fast: bool | None = None,
        backend: str | None = None,
        trust_remote_code: bool | None = None,
        **overrides: Any,
    ) -> Dinov2ImageProcessor:
        """Reads the settings from a file, a folder or a repository of the Hugging Face hub.

        A setting that the file lacks gets transformers' default, which is not DINOv2's.

        Args:
            revision, cache_dir, token: for the hub: branch, tag or commit; where files are kept; the access token.
            local_files_only: do not use the network.
            subfolder: of the folder or repository.
            use_fast, backend, trust_remote_code: no effect; transformers has them. The results are those of its PIL
                backend.
            overrides: settings of the constructor that replace those of the file.

        Raises:
            WeightsError: there is no such file or repository, or it cannot be reached.
            InvalidValueError: the file is not of this kind of processor.
            InvalidTypeError: an unknown setting in `overrides`.
        """
        # imports torch, which settings do not need
        from dinov2_fast.weights.sources import SourceOptions, find_config

        options = SourceOptions(revision, local_files_only, cache_dir, token, subfolder)
        path = find_config(str(pretrained_model_name_or_path), options, CONFIG_NAME)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(found, dict):
            raise InvalidValueError(f"{path} does not hold the settings of an image processor.")
        kind = found.get("image_processor_type", found.get("feature_extractor_type", _FILE_TYPES[0]))
        if kind not in _FILE_TYPES or found.get("do_pad"):
            what = f"a {kind}" if kind not in _FILE_TYPES else "a processor that pads (do_pad)"
            raise InvalidValueError(f"{path} describes {what}; DINOv2 checkpoints have a plain {_FILE_TYPES[0]}.")
        given = {name: found[name] for name in _SETTINGS if found.get(name) is not None}
        return cls(**{**_FILE_DEFAULTS, **given})._with(overrides)

    def _with(self, overrides: dict[str, Any]) -> Dinov2ImageProcessor:
        for name, value in overrides.items():
            if name not in _SETTINGS and (name not in _UNUSED or value):
                near = difflib.get_close_matches(name, _SETTINGS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_SETTINGS)}."
                raise InvalidTypeError(f"The image processor has no setting {name!r}; {hint}")
        given = {name: value for name, value in overrides.items() if name in _SETTINGS and value is not None}
        return type(self)(**{**self.settings(), **given}) if given else self

    def _process(self, image: Any, data_format: str | None) -> Pixels:
        pixels = self._pixels(image, data_format)  # (height, width, 3)
        if self.do_resize:
            pixels = self._resize(pixels)
        if self.do_center_crop:
            pixels = _center_crop(pixels, self.crop_size["height"], self.crop_size["width"])
        if self.do_rescale:
            pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
            pixels = (pixels.astype(np.float32) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pixels(self, image: Any, data_format: str | None) -> Pixels:
        if isinstance(image, Image.Image):
            if not self.do_convert_rgb and image.mode != "RGB":
                raise InvalidValueError(f"The image's mode is {image.mode}, not RGB; set do_convert_rgb=True.")
            if not (image.width and image.height):
                raise InvalidValueError(f"An image of {image.width} x {image.height} has no pixels; leave it out.")
            return np.asarray(to_rgb(image, self.background))
        array = channels_last(image, data_format, 255 if self.do_rescale else 1)
        if array.shape[2] == 4:
            if not self.do_convert_rgb:
                raise InvalidValueError("The image has 4 channels, not 3; set do_convert_rgb=True to drop alpha.")
            if self.background is not None:
                raise InvalidValueError(
                    "Only PIL images can have a background; convert the array with Image.fromarray."
                )
            array = array[:, :, :3]
        if array.shape[2] == 1:
            if not self.do_convert_rgb:
                raise InvalidValueError("The image has one channel, not 3; set do_convert_rgb=True.")
            array = np.repeat(array, 3, axis=2)
        return array

    def _resize(self, pixels: Pixels) -> Pixels:
        height, width = self._resized_size(*pixels.shape[:2])
        if height * width > MAX_RESIZED_PIXELS:
            raise InvalidValueError(
                f"Resizing this image of {pixels.shape[1]} x {pixels.shape[0]} pixels would give {width} x {height}, "
                f"more than {MAX_RESIZED_PIXELS} pixels. Choose a smaller size, or leave the image out."
            )
        unit_range = pixels.dtype != np.uint8 and not self.do_rescale
        if unit_range:
            pixels = (pixels.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
        elif pixels.dtype != np.uint8:
            pixels = np.rint(pixels).astype(np.uint8)
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling(self.resample)))
        return (resized * (1 / 255)).astype(np.float32) if unit_range else resized

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        short, long = sorted((height, width))
        edge = self.size["shortest_edge"]
        other = int(edge * long / short)
        return (other, edge) if width <= height else (edge, other)


def fixed_output_size(processor: Dinov2ImageProcessor) -> tuple[int, int]:
    """(height, width) of all outputs of a processor; an InvalidValueError if they differ in size."""
    if processor.output_size is None:
        raise InvalidValueError(
            "The processor's outputs differ in size; set do_center_crop, or an exact height and width."
        )
    return processor.output_size


_SETTINGS = tuple(name for name in inspect.signature(Dinov2ImageProcessor.__init__).parameters if name != "self")


def _size_setting(name: str, value: Any, *, square: bool) -> dict[str, int]:
    """A size as a dict of positive ints, with the keys shortest_edge, or height and width."""
    if isinstance(value, dict):
        sizes = dict(value)
    elif isinstance(value, Sequence) and len(value) == 2:
        sizes = {"height": value[0], "width": value[1]}
    else:
        sizes = {"height": value, "width": value} if square else {"shortest_edge": value}
    if set(sizes) != {"height", "width"} and (square or set(sizes) != {"shortest_edge"}):
        also = "" if square else " or shortest_edge"
        raise InvalidValueError(f"{name} must have the keys height and width{also}, got {value!r}.")
    if not all(isinstance(side, int) and side > 0 for side in sizes.values()):
        raise InvalidValueError(f"{name} must be one or two (height, width) positive whole numbers, got {value!r}.")
    return sizes


def _channel_setting(name: str, value: float | Sequence[float]) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 3
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise InvalidValueError(f"{name} must be one finite number or three (red, green, blue), got {value!r}.")
    return values


def _center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """The central (height, width), padded with zeros where the image is smaller."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    cropped = np.zeros((height, width, 3), pixels.dtype)
    inside = pixels[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    down, right = max(-top, 0), max(-left, 0)
    cropped[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return cropped


def _stack(pixel_values: list[Pixels], data_format: str | None) -> NDArray[Any]:
    sizes = sorted({p.shape[:2] if data_format == "channels_last" else p.shape[1:] for p in pixel_values})
    if len(sizes) > 1:
        some = ", ".join(f"{h} x {w}" for h, w in sizes[:3])
        raise InvalidValueError(
            f"The images come out in {len(sizes)} sizes ({some}) and do not fit one batch; crop them to one size "
            "(do_center_crop), resize to an exact height and width, or ask for a list (return_tensors=None)."
        )
    return np.stack(pixel_values)


def _flat_list(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        if not images:
            raise InvalidValueError("The list of images is empty.")
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 and len(images) else [images]
