"""This package's speed inside models that exist already: `accelerate` and `restore`."""

from dinov2_fast.integrations.accelerate import Report, Row, accelerate, accelerated, restore

__all__ = ["Report", "Row", "accelerate", "accelerated", "restore"]
