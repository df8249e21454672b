"""The inference engine: a model folded into fewer and larger steps, with the same methods and outputs."""

from dinov2_fast.inference.engine import Engine
from dinov2_fast.inference.optimize import optimize_for_inference

__all__ = ["Engine", "optimize_for_inference"]
