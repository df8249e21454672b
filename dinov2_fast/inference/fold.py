"""Folds a model's parameters into the tensors of the engine: computed in fp64, rounded once.

gamma * (x @ W^T + b)  =  x @ (gamma W)^T + gamma b        LayerScale, into the linear before it
rows 2j, 2j + 1        =  gate j, value j                  a SwiGLU's packed linear, for kernels that want it so
x @ W^T + b            =  x @ W^T, and b later             linears that add to the stream, see `LinearLayout`
(n * w + c) @ W^T + b  =  n @ (W diag(w))^T + W c + b      a norm's weight and bias, into the linear that reads it
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.inference.checks import expect
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.layers import LayerNorm, LayerScale
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_peers import allow_prepacking
from dinov2_fast.ops.dispatch import BackendError, BoundOp, current_setting
from dinov2_fast.ops.layer_norm import LAYER_NORM
from dinov2_fast.ops.linear import LINEAR, interleave, sample_inputs
from dinov2_fast.ops.patches import UINT8_SHIFT
from dinov2_fast.torch_private import FakeTensorMode


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` (fp64) in `dtype`, contiguous and without a gradient."""
    return exact.detach().to(dtype).contiguous()


def fold_normalization(
    weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype, padded_to: int
) -> tuple[Tensor, Tensor]:
    """Folds the normalisation of uint8 images into the weight and bias of the patch embedding.

        weight * (x / 255 - mean) / std = folded * (x - 128) + folded * (128 - 255 mean),    folded = weight / (255 std)

    Computed in fp64. The weight is rounded once, and the constant is computed from the rounded weight, so that an image
    of the mean colour gives exactly the bias, as it does after normalisation. Measured with random weights in bf16, as
    the relative error of the embedding on two photographs and on noise:

    - the constant from the rounded weight, as here: 1.74e-3 and 1.66e-3
    - the constant from the exact weight: 1.79e-3 and 1.62e-3
    - the same without the shift by 128: 2.7e-3 and 3.3e-3
    - images that are normalised in bf16: 2.6e-3 and 2.4e-3

    The convolution's weight is (hidden, channels, patch, patch), in fp32 or fp64; `mean` and `std` are (channels,), for
    values in 0 to 1. The result is the weight (hidden, padded_to) in `dtype`, filled up with zeros, for ``F.linear`` of
    rows x - 128, and the bias (hidden,). The bias is in fp32 (in fp64 if `dtype` is), since position embeddings are
    added to it before it is rounded.
    """
    mean, std = (values.double()[:, None, None] for values in (mean, std))
    folded = (weight.double() / (255 * std)).to(dtype)
    constant = (folded.double() * (UINT8_SHIFT - 255 * mean)).sum((1, 2, 3))
    if bias is not None:
        constant += bias.double()
    rows = folded.flatten(1)
    return F.pad(rows, (0, padded_to - rows.shape[1])), constant.to(torch.promote_types(dtype, torch.float32))


def clone_without_tensors(module: nn.Module, kind: type[nn.Module] | None = None) -> Any:
    """A module in eval mode with copies of the plain attributes of `module`.

    It has no parameters, buffers, submodules or hooks. Its class is `kind`, by default that of `module`.
    """
    made = (kind or type(module)).__new__(kind or type(module))
    nn.Module.__init__(made)
    skipped = {*vars(made), "_compiled_call_impl"}  # the last would run the original
    plain = {key: value for key, value in vars(module).items() if key not in skipped}
    made.__dict__.update(copy.deepcopy(plain, {id(module): made}), training=False)  # bound methods get `made`
    return made


def clone_with_buffers(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` in eval mode, with buffers in place of parameters and floating-point tensors in `dtype`."""
    made = clone_without_tensors(module)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            tensor = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        made.register_buffer(name, tensor)
    for name, child in module._modules.items():
        made.add_module(name, None if child is None else clone_with_buffers(child, dtype))
    return made


class FoldedModule(nn.Module):
    """A part of the engine. Its owner may compute with its tensors without calling it.

    For speed a call of the engine reads submodules and tensors from `_modules` and `_buffers` and calls `forward`
    itself: `nn.Module.__getattr__` and `nn.Module.__call__` take half a microsecond each.
    """

    _modules: Any
    _buffers: Any

    def bind(self) -> None:
        """Makes each of its ops choose an implementation at the next call. Needed when tensors moved or changed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.bind()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.bind()
        return replica

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `TypeError`: the hook would not run."""
        raise InvalidTypeError(
            f"A hook on a {type(self).__name__} of the engine would not run in every call: register it on the model "
            "and call the model, or take get_intermediate_layers, attention_maps or qkv_features of the engine."
        )

    register_forward_pre_hook = register_forward_hook


class FoldedLinear(FoldedModule):
    """A linear whose weight (out_features, in_features) and bias (out_features,) or None are buffers.

    With `interleaved` the rows are in the order of `ops.linear.interleave`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved = interleaved
        if interleaved:  # marks the order in the state dict, so that a linear of the other order refuses to load it
            self.register_buffer("interleaved_rows", torch.empty(0))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.bind()

    def bind(self) -> None:
        self._bound = {epilogue: BoundOp(LINEAR, epilogue) for epilogue in LINEAR.sample_inputs}
        allow_prepacking(self.weight)

    def _run(self, epilogue: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = self._buffers  # faster than the attributes, see FoldedModule
        arguments = tensors["weight"], tensors["bias"], epilogue, residual, 1.0, None, None, 1.0, self.interleaved
        return self._bound[epilogue](x, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self._run("none", x)

    def gelu(self, x: Tensor) -> Tensor:
        return self._run("gelu", x)

    def swiglu(self, x: Tensor) -> Tensor:
        return self._run("swiglu", x)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        self._run("residual", x, stream)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {self.weight.dtype}"


def fold_exactly(
    linear: Any, name: str, gamma: Tensor | None = None, norm: Any = None, interleaved: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias (or None) of a linear in fp64, with the operations around it folded in.

    These are the LayerScale behind it, of factors `gamma` (out_features,), and the weight and bias of the `norm` before
    it. With `interleaved`, gate and value rows alternate in the result. Error messages call the linear `name`.
    """
    expect(linear, name, nn.Linear)
    weight, bias = linear.weight.double(), None if linear.bias is None else linear.bias.double()
    if norm is not None:
        shift = weight @ norm.bias.double()
        weight, bias = weight * norm.weight.double(), shift if bias is None else bias + shift
    if gamma is not None:
        weight = weight * gamma.double()[:, None]
        bias = None if bias is None else bias * gamma.double()
    if interleaved:
        weight, bias = interleave(weight), None if bias is None else interleave(bias)
    return weight, bias


def fold_linear(
    linear: Any, name: str, dtype: torch.dtype, gamma: Tensor | None = None, interleaved: bool = False
) -> FoldedLinear:
    """`fold_exactly`, rounded to `dtype`."""
    weight, bias = fold_exactly(linear, name, gamma, interleaved=interleaved)
    return FoldedLinear(rounded(weight, dtype), None if bias is None else rounded(bias, dtype), interleaved)


class FoldedNorm(FoldedModule):
    """A layer norm of the residual stream, with a result in `plan.dtype`. Weight and bias have the stream's dtype."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: Any, name: str, plan: EnginePlan) -> None:
        super().__init__()
        expect(norm, name, LayerNorm, nn.LayerNorm)
        for part in ("weight", "bias"):
            if getattr(norm, part) is None:
                raise InvalidTypeError(
                    f"{name} has no {part}; the engine can fold norms that have a weight and a bias. Give it a weight "
                    "of ones and a bias of zeros, or use the model itself."
                )
        self.eps: float = norm.eps
        self.dtype = plan.dtype
        self.register_buffer("weight", rounded(norm.weight.double(), plan.residual_dtype))
        self.register_buffer("bias", rounded(norm.bias.double(), plan.residual_dtype))
        self.bind()

    def bind(self) -> None:
        self._bound = BoundOp(LAYER_NORM, "plain")

    def _run(self, x: Tensor, deferred: Tensor | None, scale: float | None = None) -> Tensor:
        tensors = self._buffers
        return self._bound(x, tensors["weight"], tensors["bias"], self.eps, None, None, None, deferred, scale)

    def forward(self, x: Tensor, deferred: Tensor | None = None) -> Tensor:
        """The norm of `x` (..., hidden), or of `x` + `deferred` (hidden,)."""
        return self._run(x, deferred).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def gamma_of(layer_scale: nn.Module, name: str) -> Tensor | None:
    """The factors of a LayerScale; None for an identity in its place."""
    return getattr(expect(layer_scale, name, LayerScale, nn.Identity), "gamma", None)


class LinearLayout(NamedTuple):
    """How the linears of the blocks hold weights and biases, which depends on the backends that are chosen for them."""

    interleaved: bool  # the gate and value rows of a SwiGLU alternate (`ops.linear.interleave`)
    # Linears that add to the residual stream have no bias. The norms that read the stream add the sum of those so far.
    defers_bias: bool


def layouts_for(plan: EnginePlan, device: torch.device, gated: bool) -> dict[torch.dtype, LinearLayout]:
    """The layouts for the backends that are chosen now, by the dtype of operands; `gated` models have SwiGLU."""
    dtypes = (plan.dtype, E4M3) if plan.e4m3 else (plan.dtype,)
    return {dtype: layout_for(device, dtype, plan.residual_dtype, gated) for dtype in dtypes}


def layout_for(device: torch.device, dtype: torch.dtype, residual_dtype: torch.dtype, gated: bool) -> LinearLayout:
    """The layout for the backends that are chosen now, for linears of operands in `dtype`."""
    with FakeTensorMode(), torch.no_grad():
        *swiglu, _ = sample_inputs("swiglu", device, dtype)
        x, weight, _, form, residual, *rest = sample_inputs("residual", device, dtype)
        bias, rest = residual.new_empty(len(weight)), [form, residual.to(residual_dtype), *rest]
        return LinearLayout(
            interleaved=gated and _chosen_refuses("swiglu", (*swiglu, None), (*swiglu, False)),
            defers_bias=_chosen_refuses("residual", (x, weight, None, *rest), (x, weight, bias, *rest)),
        )


def _chosen_refuses(form: str, given: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether the implementation of `linear` that is chosen for the arguments `given` refuses the arguments `asked`."""
    try:
        chosen, *_ = LINEAR.select(form, given, current_setting())
    except BackendError:  # the first call will raise it
        return False
    return chosen.refuses is not None and chosen.refuses(*asked) is not None
