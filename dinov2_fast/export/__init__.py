"""Backbones as ONNX and torch.export files."""

from dinov2_fast.export.check import Difference
from dinov2_fast.export.settings import INPUT, METADATA, ExportError
from dinov2_fast.export.write import Exported, export, export_checkpoint

__all__ = ["INPUT", "METADATA", "Difference", "ExportError", "Exported", "export", "export_checkpoint"]
