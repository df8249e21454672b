"""The ops of the model. Each file says what its op computes, and lists the implementations that compute it."""

from dinov2_fast.ops.activation import activation
from dinov2_fast.ops.attention import attention, attention_probabilities
from dinov2_fast.ops.attention_pool import attention_pool
from dinov2_fast.ops.dispatch import apply_environment, set_backend, use_backend
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.ops.linear import linear
from dinov2_fast.ops.patches import patches
from dinov2_fast.ops.residual import add_residual, gather_rows

apply_environment()

__all__ = [
    "activation",
    "add_residual",
    "attention",
    "attention_pool",
    "attention_probabilities",
    "gather_rows",
    "layer_norm",
    "linear",
    "patches",
    "set_backend",
    "use_backend",
]
