"""The ops of the model. Each file says what its op computes, and lists the implementations that compute it."""

from dinov2_fast import backends
from dinov2_fast.backends import use_backend
from dinov2_fast.ops.activation import gelu, swiglu
from dinov2_fast.ops.attention import attention, attention_probabilities, attention_varlen
from dinov2_fast.ops.layer_norm import add_layer_norm, layer_norm
from dinov2_fast.ops.residual import add_residual, gather_rows, scatter_add_residual

backends.apply_environment()

__all__ = [
    "add_layer_norm",
    "add_residual",
    "attention",
    "attention_probabilities",
    "attention_varlen",
    "gather_rows",
    "gelu",
    "layer_norm",
    "scatter_add_residual",
    "swiglu",
    "use_backend",
]
