"""`accelerate` makes existing models of transformers, timm and torch.hub compute with this package's code."""

from dinov2_fast.integrations.accelerate import AccelerationReport, accelerate, acceleration_report, unaccelerate

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "unaccelerate"]
