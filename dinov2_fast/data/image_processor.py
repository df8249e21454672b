"""Images to pixel values: the preprocessing of the DINOv2 checkpoints, on PIL and numpy.

The steps are those of the checkpoints' ``preprocessor_config.json`` (a ``BitImageProcessor``), in this order: convert
to RGB, resize the shortest edge to 256 (bicubic), crop the central 224 x 224, scale by 1/255, normalise with the
ImageNet mean and standard deviation. Setting names are transformers', and the results equal its PIL processor's.

What is decided once, here:

- Alpha is dropped, not composited, as ``Image.convert("RGB")`` does in the reference's, timm's and transformers'
  pipelines (in transformers until 5.17 at least). `background="white"` puts white behind, as transformers 5.23 does.
  Palettes are resolved, grey is repeated, CMYK is converted by Pillow without a colour profile.
- 16-bit grey is scaled to 8 bits (65535 becomes 255). Pillow's own conversion clips everything above 255 to white.
- Arrays and tensors are (H, W) grey, (H, W, C) or (C, H, W) with 1, 3 or 4 channels (alpha is dropped), or a batch of
  the latter two; where both readings fit, channels come first. They hold uint8, uint16 (scaled as 16-bit grey), or
  floats: 0 to 255 if `do_rescale`, 0 to 1 if not. A float image in 0 to 255 whose largest value is at most 1 is
  refused, because it was almost surely scaled already.
- Resizing works on 8 bits. Floats in 0 to 1 are cut to 8 bits (as transformers does), floats in 0 to 255 rounded.
- NaN, infinite and out-of-range values are refused.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError

CONFIG_NAME = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH_SIZE = 14
MAX_RESIZED_PIXELS = 50_000_000

# What transformers' BitImageProcessor takes for a setting that its file leaves out.
_FILE_DEFAULTS: dict[str, Any] = {
    "size": 224,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_FILE_TYPES = ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil", "BitFeatureExtractor")
_DATA_FORMATS = ("channels_first", "channels_last", None)
_SWITCHED_OFF = ("do_pad", "pad_size", "disable_grouping")  # of transformers: None and False are what happens here

Pixels = NDArray[Any]  # (height, width, 3), uint8 or float32


class ImageBatch(dict[str, Any]):
    """What the processor returns: ``pixel_values`` by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an ImageBatch has {', '.join(self)}, not {name!r}") from None

    def to(self, *args: Any, **kwargs: Any) -> ImageBatch:
        """The batch with its tensors moved by ``Tensor.to(device, dtype)``; arrays cannot be moved."""
        return ImageBatch({name: value.to(*args, **kwargs) for name, value in self.items()})


class Dinov2ImageProcessor:
    """Turns images into the float32 pixel values (batch, 3, height, width) that DINOv2 expects.

    Args:
        do_convert_rgb: convert PIL images of every mode, and grey arrays, to RGB; otherwise they must be RGB.
        do_resize, size, resample: `size` is the length of the shortest edge (an int or ``{"shortest_edge": n}``), or
            the exact ``{"height": h, "width": w}`` (also ``(h, w)``), where the aspect ratio is not kept. `resample` is
            a ``PIL.Image.Resampling`` (3 is bicubic).
        do_center_crop, crop_size: the central ``{"height": h, "width": w}`` (also ``(h, w)``, or an int for a square);
            smaller images are padded with black.
        do_rescale, rescale_factor: multiply by `rescale_factor`.
        do_normalize, image_mean, image_std: subtract and divide, one number or one for each channel.
        background: a colour, by a name or code that Pillow knows, that is put behind what is transparent; by default
            alpha is dropped, and what is transparent has whatever colour its pixels hold, often black.

    Raises:
        ValueError: a setting that makes no sense.
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
        self.resample = int(Image.Resampling(resample))
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
            _rgb(background)

    @classmethod
    def for_size(cls, size: int | tuple[int, int], *, crop: bool = True, **settings: Any) -> Dinov2ImageProcessor:
        """A processor whose every output has exactly this size: pixels, an int for a square or (height, width).

        With `crop` the shortest edge becomes the longer side of `size` and the centre is cut out: nothing is distorted,
        the rest is lost. Without, the whole image is squeezed into `size`. `settings` are the constructor's others.

        Raises:
            ValueError: a side that is not a positive multiple of 14; the message names the nearest ones.
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
    ) -> ImageBatch:
        """Processes one image, a list of them (sizes may differ), or a batch array.

        Args:
            images: PIL images, numpy arrays or torch tensors, see the module's description for shapes and ranges.
            return_tensors: ``"pt"`` (torch) or ``"np"``: one (batch, 3, height, width) float32; None: a list of arrays
                (3, height, width), which may differ in size.
            input_data_format: ``"channels_first"`` or ``"channels_last"`` for arrays, where guessing is not wanted.
            data_format: ``"channels_last"`` for outputs (height, width, 3).
            device: where the tensors go; the processing itself is the CPU's.
            overrides: settings of the constructor, for this call.

        Raises:
            TypeError: an unknown setting, or something that is not an image.
            ValueError: an empty list, a wrong rank, channel count, dtype or range, outputs that differ in size, or a
                device for what is no tensor.
        """
        if return_tensors not in ("pt", "np", None):
            raise InvalidValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}.')
        if data_format not in _DATA_FORMATS:
            raise InvalidValueError(f'data_format must be "channels_first" or "channels_last", got {data_format!r}.')
        if device is not None and return_tensors != "pt":
            raise InvalidValueError('Only tensors have a device; ask for return_tensors="pt".')
        processor = self._with(overrides)
        pixel_values = [processor._process(image, input_data_format) for image in _flat_list(images)]
        if data_format == "channels_last":
            pixel_values = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in pixel_values]
        if return_tensors is None:
            return ImageBatch(pixel_values=pixel_values)
        batch = _stack(pixel_values)
        if return_tensors == "np":
            return ImageBatch(pixel_values=batch)
        import torch

        return ImageBatch(pixel_values=torch.from_numpy(batch).to(device))

    preprocess = __call__

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every output, or None where it depends on the image."""
        exact = self.crop_size if self.do_center_crop else self.size if self.do_resize else {}
        return (exact["height"], exact["width"]) if "height" in exact else None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {name: copy.copy(getattr(self, name)) for name in _SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``; `background`, unknown to transformers, only where it is set."""
        settings = self.settings()
        if self.background is None:
            del settings["background"]
        return {"image_processor_type": "BitImageProcessor", **settings}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def save_pretrained(self, save_directory: str | Path, *, safe_serialization: bool = True) -> Path:
        """Writes ``preprocessor_config.json``, which transformers' ``AutoImageProcessor`` reads; returns its path.

        `safe_serialization` is accepted because pipelines of transformers 4 pass it; there are no weights to write.
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

        A setting that the file leaves out has the value that transformers gives it, which is not DINOv2's.

        Args:
            pretrained_model_name_or_path: the file, folder or repository.
            revision, cache_dir, token: of the hub: branch, tag or commit; the folder to keep files in; the access.
            local_files_only: do not touch the network.
            subfolder: of the folder or repository.
            use_fast, backend, trust_remote_code: accepted as transformers does; there is one implementation, whose
                results are those of transformers' PIL backend.
            overrides: settings of the constructor that replace the file's.

        Raises:
            WeightsError: no such file or repository, or it cannot be reached.
            ValueError: not a file of this kind of processor.
            TypeError: an unknown setting in `overrides`.
        """
        # Imports torch, which the settings alone do without.
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
            if name not in _SETTINGS and (name not in _SWITCHED_OFF or value):
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
        array = _channels_last(_to_numpy(image), data_format)
        if array.dtype == np.uint16:
            array = _to_8_bits(array)
        if array.dtype != np.uint8:
            array = _checked_floats(array, 255 if self.do_rescale else 1)
        if array.shape[2] == 4:
            if not self.do_convert_rgb:
                raise InvalidValueError("The image has 4 channels, not 3; set do_convert_rgb=True to drop alpha.")
            if self.background is not None:
                raise InvalidValueError(
                    "A background is put behind PIL images alone; convert the array with Image.fromarray."
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
                f"An image of {pixels.shape[1]} x {pixels.shape[0]} pixels is too long and narrow: resized it would "
                f"have {width} x {height}."
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


_SETTINGS = tuple(name for name in inspect.signature(Dinov2ImageProcessor.__init__).parameters if name != "self")


def to_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """The image in mode RGB: alpha dropped, palette resolved, grey repeated, 16-bit grey scaled to 8 bits.

    With a colour as `background`, what is transparent is composited on it instead.

    Raises:
        ValueError: floating-point or 32-bit integer pixels, which have no agreed range, or a mode Pillow cannot
            convert.
    """
    if image.mode == "F":
        raise InvalidValueError("An image of floating-point pixels has no agreed range; convert it to 8 bits first.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InvalidValueError(
                "An image of 32-bit integers has no agreed range; convert it to 8 or 16 bits first."
            )
        return Image.fromarray(_to_8_bits(values)).convert("RGB")
    if background is not None and image.has_transparency_data:
        behind = Image.new("RGBA", image.size, _rgb(background))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _rgb(colour: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise InvalidValueError(f"background must be a colour such as white or #ffffff, got {colour!r}.") from None


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """0 to 65535 as 0 to 255, rounded."""
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


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
        raise InvalidValueError(f"{name} must be made of positive whole numbers, got {value!r}.")
    return sizes


def _channel_setting(name: str, value: float | Sequence[float]) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 3
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise InvalidValueError(f"{name} must be one finite number or three (red, green, blue), got {value!r}.")
    return values


def _flat_list(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        if not images:
            raise InvalidValueError("The list of images is empty.")
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 and len(images) else [images]


def _to_numpy(image: Any) -> NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise InvalidTypeError(
            f"An image must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}."
        )
    return image


def _channels_last(array: NDArray[Any], data_format: str | None) -> NDArray[Any]:
    """(height, width, channels) with 1, 3 or 4 channels."""
    if array.ndim not in (2, 3) or not array.size:
        raise InvalidValueError(
            f"An image must be (H, W), (H, W, C) or (C, H, W) and not empty, got shape {array.shape}."
        )
    if array.ndim == 2:
        return array[:, :, None]
    if data_format not in _DATA_FORMATS:
        raise InvalidValueError(f'input_data_format must be "channels_first" or "channels_last", got {data_format!r}.')
    for channels in ((1, 3), (4,)):  # four is the less likely reading, so it comes second
        if data_format != "channels_last" and array.shape[0] in channels:
            return array.transpose(1, 2, 0)
        if data_format != "channels_first" and array.shape[2] in channels:
            return array
    raise InvalidValueError(f"An image must have 1, 3 or 4 channels, first or last, got shape {array.shape}.")


def _checked_floats(array: NDArray[Any], top: int) -> NDArray[np.float32]:
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidValueError(
            f"Images hold uint8 or floating-point values, got {array.dtype}; convert them to uint8."
        )
    low, high = float(array.min()), float(array.max())  # NaN carries through both
    if not (low >= 0 and high <= top):
        other = "" if top == 255 else " (do_rescale=False)"
        raise InvalidValueError(f"A float image must lie between 0 and {top}{other}, got values from {low} to {high}.")
    if top == 255 and 0 < high <= 1:
        raise InvalidValueError(
            f"A float image with values from {low} to {high} looks scaled already; pass do_rescale=False for 0 to 1, "
            "or uint8."
        )
    return array.astype(np.float32)


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


def _stack(pixel_values: list[Pixels]) -> NDArray[Any]:
    sizes = sorted({p.shape[1:] for p in pixel_values})
    if len(sizes) > 1:
        some = ", ".join(f"{h} x {w}" for h, w in sizes[:3])
        raise InvalidValueError(
            f"The images come out in {len(sizes)} sizes ({some}) and do not fit one batch; crop them to one size "
            "(do_center_crop), resize to an exact height and width, or ask for a list (return_tensors=None)."
        )
    return np.stack(pixel_values)
