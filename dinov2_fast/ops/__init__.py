"""The ops of the model. The file of an op says what it computes, and lists the implementations that compute it.

A new op needs a file here, from top to bottom: its formula and the shapes, one public function whose options select the
forms, the torch reference, the registration of its kernel with torch (:mod:`dinov2_fast.ops._registry`), and the table
of its implementations (:class:`dinov2_fast.ops.dispatch.Op`). Its kernel is `kernels/<op>.py` or `csrc/<op>.cu`, its
tests are `tests/ops/test_<op>.py`, and `bench/workloads.py` has its sizes.
"""

from dinov2_fast.ops.activation import activation
from dinov2_fast.ops.attention import attention, attention_probabilities
from dinov2_fast.ops.attention_pool import attention_pool
from dinov2_fast.ops.dispatch import apply_environment, set_backend, use_backend
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.ops.linear import linear
from dinov2_fast.ops.patches import patches
from dinov2_fast.ops.prototype_loss import prototype_loss
from dinov2_fast.ops.residual import add_residual, gather_rows
from dinov2_fast.ops.sinkhorn import sinkhorn

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
    "prototype_loss",
    "set_backend",
    "sinkhorn",
    "use_backend",
]
