"""The graph of a model: traced by torch.export, and written as ONNX."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dinov2_fast.export.settings import INPUT, LOGITS, METADATA, OPSET, OUTPUTS, ExportError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops.dispatch import BackendError

ONE_FILE_BYTES = 1_900_000_000  # a protobuf ends at 2 GB; larger weights go into a second file


class GraphModule(nn.Module):
    """The model and a copy of the classifier in its dtype, as a module from images to a tuple of outputs."""

    def __init__(self, model: DinoVisionTransformer, outputs: Sequence[str], classifier: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)
        self.classifier = copy.deepcopy(classifier).to(model.pos_embed).requires_grad_(False) if classifier else None
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(pixel_values)
        return tuple(self._output(name, features) for name in self.outputs)

    def _output(self, name: str, features: Any) -> Tensor:
        if self.classifier is None or name != LOGITS:
            return OUTPUTS[name](features)
        inputs = OUTPUTS["cls"](features)
        if self.classifier.in_features > inputs.shape[-1]:
            inputs = torch.cat([inputs, OUTPUTS["patch_mean"](features)], dim=-1)
        logits: Tensor = self.classifier(inputs)
        return logits


class _FixedSize(DinoVisionTransformer):
    """A model for one image size, whose position table has been resampled to that size."""

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        return self.pos_embed.to(x.dtype)


def copy_for_export(
    model: DinoVisionTransformer, dtype: torch.dtype, size: tuple[int, int] | None
) -> DinoVisionTransformer:
    """A copy on the CPU in `dtype`; if `size` is given, with the position table of that size."""
    copied = copy.deepcopy(model).to("cpu", dtype)
    if size is not None:
        with torch.no_grad():
            table = model.interpolate_pos_encoding(torch.empty(0), *size)
        copied.__class__ = _FixedSize
        copied.pos_embed = nn.Parameter(table.to("cpu", dtype))
    return copied.requires_grad_(False)


def trace(module: GraphModule, batch_size: int | None, size: tuple[int, int] | None) -> ExportedProgram:
    """The graph of the module; batch and image size stay free unless they are given."""
    model = module.model
    patch, parameter = model.patch_size, model.pos_embed
    height, width = size or (5 * patch, 4 * patch)
    example = torch.zeros(batch_size or 2, model.patch_embed.in_chans, height, width, dtype=parameter.dtype)
    free: dict[int, Any] = {} if batch_size else {0: Dim("batch", min=1)}
    if size is None:  # torch.export treats a size of one as a constant, so one patch a side is left out
        free |= {2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes={INPUT: free})
    except BackendError as error:
        raise ExportError(
            f"Exported graphs contain torch's own operators, not kernels: unset the backend. {error}"
        ) from error
    except Exception as error:
        raise ExportError(f"torch cannot export this model: {type(error).__name__}: {error}") from error


def write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], opset: int, metadata: str) -> None:
    """Writes the graph as ONNX, with the weights in a second file where they are too large for one."""
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
            f"torch's exporter cannot write opset {opset}: leave it out for {OPSET}, or choose a lower one."
        )
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in graph.graph if node.domain} | set(map(str, graph.functions))
    )
    if foreign:
        raise ExportError(f"The graph would contain operators that are not in the ONNX standard: {', '.join(foreign)}.")
    _name_dimensions(graph.graph.inputs[0].shape, ("batch", "channels", "height", "width"))
    for name, value in zip(outputs, graph.graph.outputs, strict=True):
        _name_dimensions(value.shape, ("batch", name, "hidden"))
    graph.metadata_props[METADATA] = metadata
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    onnx.save(path, external_data=weights > ONE_FILE_BYTES)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences what a package logs, such as the traceback of an opset that it does not have."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name_dimensions(shape: Any, names: Sequence[str]) -> None:
    """Names the free dimensions, in place of torch's symbols."""
    for axis, side in enumerate(shape):
        if not isinstance(side, int):
            shape[axis] = names[axis]
