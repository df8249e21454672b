"""Backbones as ONNX and torch.export files."""

from dinov2_fast.export.check import Difference
from dinov2_fast.export.checkpoint import CheckpointExport, export_checkpoint
from dinov2_fast.export.settings import INPUT, METADATA, ExportError
from dinov2_fast.export.write import Exported, export

__all__ = [
    "INPUT",
    "METADATA",
    "CheckpointExport",
    "Difference",
    "ExportError",
    "Exported",
    "export",
    "export_checkpoint",
]
