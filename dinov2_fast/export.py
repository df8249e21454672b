"""`export`: a backbone as an ONNX or torch.export file, compared with the model before it takes its place.

The graph takes `pixel_values` (batch, 3, height, width), scaled and normalised as the image processor does, and gives
the outputs asked for, in its own dtype:

==========  =======================  ==================================================
cls         (batch, dim)             class token after the final norm
patch_mean  (batch, dim)             mean of the patch tokens after the final norm
patches     (batch, patches, dim)    patch tokens after the final norm
registers   (batch, registers, dim)  register tokens after the final norm
logits      (batch, classes)         of a classifier, where one is given
==========  =======================  ==================================================
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dinov2_fast import __version__
from dinov2_fast.errors import Dinov2FastError, InvalidTypeError, InvalidValueError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._backends import is_installed
from dinov2_fast.ops.dispatch import BackendError

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPSET = 20  # the first with Gelu as one operator
LOWEST_OPSET = 18  # torch's exporter has nothing older
INPUT = "pixel_values"
METADATA = "dinov2_fast"  # key of the JSON object in the file
ONE_FILE_BYTES = 1_900_000_000  # a protobuf ends at 2 GB; larger weights go into a second file
# Of the relative L2 difference from the model. Rounding stays far below (a ViT-S: fp32 1e-6, fp16 1e-3, bf16 1e-2);
# a lost bias or a wrong operator lies far above.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}

OUTPUTS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "cls": lambda features: features["x_norm_clstoken"],
    "patch_mean": lambda features: features["x_norm_patchtokens"].mean(dim=1),
    "patches": lambda features: features["x_norm_patchtokens"],
    "registers": lambda features: features["x_norm_regtokens"],
}
LOGITS = "logits"


class ExportError(Dinov2FastError, RuntimeError):
    """The model cannot be exported this way, or the file does not compute what the model does."""


@dataclass(frozen=True)
class Difference:
    """How far one output of the file is from the model's, for one batch: relative in L2, and the worst element."""

    output: str
    shape: tuple[int, ...]
    relative: float
    worst: float


@dataclass(frozen=True)
class Exported:
    """The files written, the graph's file first, and how far they are from the model (empty: no runtime to check)."""

    files: tuple[Path, ...]
    differences: tuple[Difference, ...]


def export(
    model: DinoVisionTransformer,
    path: str | os.PathLike[str],
    *,
    classifier: nn.Linear | None = None,
    format: str = "onnx",
    outputs: Sequence[str] = ("cls", "patches"),
    dtype: str = "fp32",
    opset: int | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    images: Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the model to `path`. The file is there only if it computes what the model does.

    Any batch size and any height and width of two patches or more run, unless they are fixed. With a fixed size the
    positions are resampled beforehand, and the graph holds no float64, which some runtimes lack.

    Args:
        model: in eval mode; it stays as it is.
        path: ends in ``.onnx`` or ``.pt2``. Weights above 1.9 GB go into a second file, ``PATH.data``.
        classifier: for the output "logits": a linear layer on the CLS token, or on it and the mean of the patch tokens,
            as :class:`dinov2_fast.Dinov2ForImageClassification` has it.
        format: "onnx" holds operators of the standard alone (domain ""), "torch-export" those of aten alone.
        outputs: names, in the order wanted; see the module's description.
        dtype: of weights, input and outputs, "fp32", "fp16" or, for "torch-export", "bf16".
        opset: of ONNX, 18 or newer; default 20.
        batch_size: fixes the number of images.
        size: fixes (height, width) in pixels.
        images: batches (images, 3, height, width) in fp32 to compare file and model with, default noise of two
            sizes. With a fixed batch size they run in batches of it, the last filled up. ONNX needs onnxruntime for it.
        metadata: what to store as JSON in the file besides outputs, dtype, position interpolation and version.
        overwrite: replace what is there.

    Raises:
        TypeError: not a `DinoVisionTransformer`.
        ValueError: a setting that does not exist or does not go with the model or another one.
        FileExistsError: `path` exists and `overwrite` is not set.
        ExportError: torch cannot export the model, a package is missing, `path` cannot be written, or the file computes
            something else.
    """
    _check_model(model)
    _check_settings(model, format, outputs, dtype, opset, batch_size, size)
    _check_classifier(model, classifier, outputs)
    path = Path(path)
    _check_path(path, format, overwrite)
    _check_packages(format, images)
    batches = _noise(model, size) if images is None else images
    _check_images(model, batches, size)
    about = {"outputs": list(outputs), "dtype": dtype, "position_interpolation": model.position_interpolation}
    text = json.dumps({**(metadata or {}), **about, "version": __version__})
    program = _trace(_Images(_prepared(model, DTYPES[dtype], size), outputs, classifier), batch_size, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        if format == "onnx":
            _write_onnx(program, written, outputs, opset or OPSET, text)
        else:
            torch.export.save(program, written, extra_files={METADATA: text})
        del program
        run = _runner(written, format)
        exact = _Images(_exact(model), outputs, classifier)
        differences = _compare(run, exact, batches, dtype, batch_size) if run else ()
        return Exported(_move(written, path), differences)


class _Images(nn.Module):
    """The model, with a copy of the classifier in its dtype, as a function of images alone, with a tuple of outputs."""

    def __init__(self, model: DinoVisionTransformer, outputs: Sequence[str], classifier: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)
        self.classifier = copy.deepcopy(classifier).to(model.pos_embed).requires_grad_(False) if classifier else None
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(pixel_values)
        return tuple(self._output(name, features) for name in self.outputs)

    def _output(self, name: str, features: dict[str, Any]) -> Tensor:
        if self.classifier is None or name != LOGITS:
            return OUTPUTS[name](features)
        inputs = OUTPUTS["cls"](features)
        if self.classifier.in_features > inputs.shape[-1]:
            inputs = torch.cat([inputs, OUTPUTS["patch_mean"](features)], dim=-1)
        logits: Tensor = self.classifier(inputs)
        return logits


class _FixedSize(DinoVisionTransformer):
    """A model whose position table is already that of its only size."""

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        return self.pos_embed.to(x.dtype)


def _check_model(model: Any) -> None:
    if not isinstance(model, DinoVisionTransformer):
        raise InvalidTypeError(
            f"A {type(model).__name__} cannot be exported, only a DinoVisionTransformer: load its weights with "
            "dinov2_fast.load, which reads every layout. An engine's is the model that it was made of."
        )
    if model.training:
        raise InvalidValueError("The model is in training mode; call model.eval() first.")


def _check_settings(
    model: DinoVisionTransformer,
    format: str,
    outputs: Sequence[str],
    dtype: str,
    opset: int | None,
    batch_size: int | None,
    size: tuple[int, int] | None,
) -> None:
    for name, value, choices in (("format", format, ENDINGS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise InvalidValueError(f"There is no {name} {value!r}; choose one of {', '.join(choices)}.")
    known = (*OUTPUTS, LOGITS)
    if not outputs or len(set(outputs) & set(known)) < len(outputs):
        raise InvalidValueError(
            f"outputs are some of {', '.join(known)}, each once; got {', '.join(outputs) or 'none'}."
        )
    if "registers" in outputs and not model.num_register_tokens:
        raise InvalidValueError("This model has no registers: leave them out of the outputs.")
    if format == "onnx" and dtype == "bf16":
        raise InvalidValueError(
            "bf16 cannot be exported to ONNX here: onnxruntime computes it on no CPU, so the file could not be "
            "checked. Use fp32 or fp16, or the format torch-export."
        )
    if format != "onnx" and opset is not None:
        raise InvalidValueError("Only ONNX has opsets: leave opset out, or use the format onnx.")
    if opset is not None and opset < LOWEST_OPSET:
        raise InvalidValueError(f"opset {opset} is too old: torch's exporter writes {LOWEST_OPSET} and newer.")
    if batch_size is not None and batch_size < 1:
        raise InvalidValueError(f"batch_size must be at least 1, or None for any; got {batch_size}.")
    if size is not None and any(side < 1 or side % model.patch_size for side in size):
        raise InvalidValueError(
            f"size must be multiples of the patch size {model.patch_size}, got {size[0]} x {size[1]}."
        )


def _check_classifier(model: DinoVisionTransformer, classifier: nn.Linear | None, outputs: Sequence[str]) -> None:
    if LOGITS in outputs and classifier is None:
        raise InvalidValueError("There is no classifier for the output logits: give one, or leave logits out.")
    if classifier is not None and classifier.in_features not in (model.embed_dim, 2 * model.embed_dim):
        raise InvalidValueError(
            f"The classifier takes {classifier.in_features} features. Those can be exported that take the model's "
            f"{model.embed_dim} of the CLS token, or {2 * model.embed_dim} of it and the mean of the patches."
        )


def _check_path(path: Path, format: str, overwrite: bool) -> None:
    if path.suffix != ENDINGS[format]:
        raise InvalidValueError(f"A file of the format {format} ends in {ENDINGS[format]}, {str(path)!r} does not.")
    for file in (path, _data_of(path)) if format == "onnx" else (path,):
        if file.is_dir() or (file.exists() and not overwrite):
            raise FileExistsError(
                f"{str(file)!r} exists already; choose another name, or replace it with --overwrite (overwrite=True)."
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ExportError(f"{str(path)!r} cannot be written: {str(folder)!r} is no folder in which you may write.")


def _check_packages(format: str, images: Sequence[Tensor] | None) -> None:
    needed = ["onnx", "onnxscript"] + ["onnxruntime"] * (images is not None)
    missing = [name for name in needed if format == "onnx" and not is_installed(name)]
    if missing:
        raise ExportError(
            f"Missing: {', '.join(missing)}. ONNX files are written with onnx and onnxscript, and compared in "
            "onnxruntime: pip install onnx onnxscript onnxruntime"
        )


def _check_images(model: DinoVisionTransformer, batches: Sequence[Tensor], size: tuple[int, int] | None) -> None:
    channels, patch = model.patch_embed.in_chans, model.patch_size
    if not batches:
        raise InvalidValueError("There is no image to compare on; leave images out to compare on noise.")
    for batch in batches:
        sides = tuple(batch.shape[2:])
        right = sides == size if size else all(side > 0 and side % patch == 0 for side in sides)
        if batch.ndim != 4 or not len(batch) or batch.shape[1] != channels or not right:
            wanted = f"{size[0]}, {size[1]}" if size else f"multiple of {patch}, multiple of {patch}"
            raise InvalidValueError(f"images must be batches (images, {channels}, {wanted}), got {tuple(batch.shape)}.")


def _exact(model: DinoVisionTransformer) -> DinoVisionTransformer:
    """What the file is compared with: the model, in fp32 if its own dtype has fewer bits."""
    return copy.deepcopy(model).float() if model.pos_embed.dtype.itemsize < 4 else model


def _data_of(path: Path) -> Path:
    """The second file, of weights that are too large for the first."""
    return path.with_name(f"{path.name}.data")


def _prepared(model: DinoVisionTransformer, dtype: torch.dtype, size: tuple[int, int] | None) -> DinoVisionTransformer:
    """A copy on the CPU in `dtype`, for one size alone if that is given."""
    copied = copy.deepcopy(model).to("cpu", dtype)
    if size is not None:
        with torch.no_grad():
            table = model.interpolate_pos_encoding(torch.empty(0), *size)
        copied.__class__ = _FixedSize
        copied.pos_embed = nn.Parameter(table.to("cpu", dtype))
    return copied.requires_grad_(False)


def _trace(images: _Images, batch_size: int | None, size: tuple[int, int] | None) -> ExportedProgram:
    """The graph, for every batch and size that is not fixed."""
    model = images.model
    patch, parameter = model.patch_size, model.pos_embed
    height, width = size or (5 * patch, 4 * patch)
    example = torch.zeros(batch_size or 2, model.patch_embed.in_chans, height, width, dtype=parameter.dtype)
    free: dict[int, Any] = {} if batch_size else {0: Dim("batch", min=1)}
    if size is None:  # torch.export takes a size of one for a constant, so one patch a side is left out
        free |= {2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    try:
        with torch.no_grad():
            return torch.export.export(images, (example,), dynamic_shapes={INPUT: free})
    except BackendError as error:
        raise ExportError(
            f"Exported graphs hold torch's own operators, not kernels: unset the backend. {error}"
        ) from error
    except Exception as error:
        raise ExportError(f"torch cannot export this model: {type(error).__name__}: {error}") from error


def _write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], opset: int, metadata: str) -> None:
    try:
        with warnings.catch_warnings(), _quiet("onnxscript"):
            warnings.simplefilter("ignore")  # about the exporter's own code
            onnx: Any = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=list(outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch cannot write this model as ONNX: {type(error).__name__}: {error}") from error
    graph = onnx.model
    if graph.opset_imports.get("") != opset:
        raise ExportError(
            f"torch's exporter cannot write opset {opset}: leave it out for {OPSET}, or choose one of a lower number."
        )
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in graph.graph if node.domain} | set(map(str, graph.functions))
    )
    if foreign:
        raise ExportError(f"The graph would hold operators that are not of the ONNX standard: {', '.join(foreign)}.")
    _name_dimensions(graph.graph.inputs[0].shape, ("batch", "channels", "height", "width"))
    for name, value in zip(outputs, graph.graph.outputs, strict=True):
        _name_dimensions(value.shape, ("batch", name, "hidden"))
    graph.metadata_props[METADATA] = metadata
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    onnx.save(path, external_data=weights > ONE_FILE_BYTES)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what a package logs, such as the traceback of an opset that it does not have."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name_dimensions(shape: Any, names: Sequence[str]) -> None:
    """Gives the sizes that are free names for readers, in place of torch's symbols."""
    for axis, side in enumerate(shape):
        if not isinstance(side, int):
            shape[axis] = names[axis]


def _runner(path: Path, format: str) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """What runs the file; None without onnxruntime."""
    if format != "onnx":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's reader, about its own buffers
            module = torch.export.load(path).module()
        return lambda pixels: module(pixels)
    if not is_installed("onnxruntime"):
        return None
    onnxruntime: Any = importlib.import_module("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot read the file: {error}") from error
    return lambda pixels: [torch.from_numpy(output) for output in session.run(None, {INPUT: pixels.numpy()})]


def _noise(model: DinoVisionTransformer, size: tuple[int, int] | None) -> list[Tensor]:
    """Images to compare with, of the fixed size or of two others."""
    patch, generator = model.patch_size, torch.Generator().manual_seed(0)
    sizes = [size] if size else [(16 * patch, 16 * patch), (11 * patch, 14 * patch)]
    channels = model.patch_embed.in_chans
    return [torch.randn(count, channels, *sides, generator=generator) for count, sides in enumerate(sizes, start=1)]


def _compare(
    run: Callable[[Tensor], Sequence[Tensor]],
    model: _Images,
    batches: Sequence[Tensor],
    dtype: str,
    batch_size: int | None,
) -> tuple[Difference, ...]:
    place = next(model.parameters())
    found = []
    for pixels in batches:
        with torch.no_grad():
            expected = model(pixels.to(place))
            ours = _run_all(run, pixels.to(DTYPES[dtype]), batch_size or len(pixels))
        for name, one, other in zip(model.outputs, ours, expected, strict=True):
            found.append(_difference(name, one.double(), other.double().cpu()))
    wrong = [each for each in found if not each.relative <= TOLERANCES[dtype]]  # NaN is wrong as well
    if wrong:
        worst = wrong[0]
        raise ExportError(
            f"The file does not compute what the model does: {worst.output} {worst.shape} differs by "
            f"{worst.relative:.1e} (relative; {dtype} allows {TOLERANCES[dtype]:.0e}). Nothing was written."
        )
    return tuple(found)


def _run_all(run: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor, batch_size: int) -> list[Tensor]:
    """The outputs for all images, which run in batches of one size; the first images fill up the last."""
    starts = range(0, len(pixels), batch_size)
    parts = [run(pixels[torch.arange(start, start + batch_size) % len(pixels)]) for start in starts]
    wholes = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    filled = len(parts) * batch_size - len(pixels)
    return [whole[: len(whole) - filled] for whole in wholes]


def _difference(name: str, ours: Tensor, expected: Tensor) -> Difference:
    if ours.shape != expected.shape:
        raise ExportError(f"The file gives {name} {tuple(ours.shape)}, the model {tuple(expected.shape)}.")
    error = ours - expected
    relative = float(error.norm() / expected.norm())
    return Difference(name, tuple(ours.shape), relative, float(error.abs().max()))


def _move(written: Path, path: Path) -> tuple[Path, ...]:
    """Puts the files in their place, the graph's last, as it is what a reader looks for."""
    names = sorted((file.name for file in written.parent.iterdir()), reverse=True)  # PATH.data, PATH
    for name in names:
        os.replace(written.with_name(name), path.with_name(name))
    return tuple(path.with_name(name) for name in reversed(names))
