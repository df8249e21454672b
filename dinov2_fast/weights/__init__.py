"""Weights: finding, opening and loading checkpoints of any origin and layout."""

from dinov2_fast.layouts import convert_state_dict
from dinov2_fast.weights.errors import WeightsError
from dinov2_fast.weights.load import load

__all__ = ["WeightsError", "convert_state_dict", "load"]
