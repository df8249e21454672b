"""Turns a model's parameters into the tensors of the inference engine: computed in fp64, rounded once.

    gamma * (x @ W^T + b)  =  x @ (gamma W)^T + gamma b        LayerScale disappears into the linear before it
    rows 2j, 2j + 1        =  gate j, value j                  a SwiGLU's packed linear, where a kernel wants it so
    x @ W^T + b            =  x @ W^T, and b later             of the linears that add to the stream, see `Layout`
    (n * w + c) @ W^T + b  =  n @ (W diag(w))^T + W c + b      a norm's weight and bias, in the linear that reads it

What is folded no longer has a module of its own, so only modules whose computation is known are taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import isroutine
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.layers import LayerNorm, LayerScale, is_watched
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
    weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype, *, padded_to: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias with which the rows of uint8 images give what the convolution gives for normalised images.

        weight * (x / 255 - mean) / std = folded * (x - 128) + folded * (128 - 255 mean),    folded = weight / (255 std)

    Computed in fp64; the weight is rounded once, and the constant is taken from the rounded weight: an image in the
    colour of the mean then gives the bias alone, as it does for normalised images. On photographs that is the better
    choice, on noise the exact weight would be. (Measured with random weights in bf16, relative error of the embedding:
    1.74e-3 against 1.79e-3 on two photographs, 1.66e-3 against 1.62e-3 on noise; images normalised in bf16 2.6e-3 and
    2.4e-3; rows of 0..255 without the shift, with the constant of the exact weight, 2.7e-3 and 3.3e-3.)

    Args:
        weight: (hidden, channels, patch, patch) of the convolution, in fp32: before any rounding.
        bias: (hidden,) or None.
        mean, std: (channels,), for values in 0..1.
        dtype: of the weight that is returned.
        padded_to: columns of the result, the rest being zeros; default channels * patch * patch.

    Returns:
        The weight (hidden, padded_to) in `dtype`, for ``F.linear``, and the bias (hidden,) in fp32 (fp64 if `dtype`
        is), so that it can still be added to position embeddings before it is rounded.
    """
    mean, std = (values.double()[:, None, None] for values in (mean, std))
    folded = (weight.double() / (255 * std)).to(dtype)
    constant = (folded.double() * (UINT8_SHIFT - 255 * mean)).sum((1, 2, 3))
    if bias is not None:
        constant += bias.double()
    rows = folded.flatten(1)
    padding = 0 if padded_to is None else padded_to - rows.shape[1]
    return F.pad(rows, (0, padding)), constant.to(torch.promote_types(dtype, torch.float32))


def expect(module: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
    """`module`, if it is exactly one of `kinds`: a subclass or a wrapper may compute something else.

    Raises:
        TypeError: it is not.
    """
    if type(module) not in kinds:
        raise InvalidTypeError(
            f"{name} is a {type(module).__name__}; the engine can fold {' or '.join(kind.__name__ for kind in kinds)} "
            "only. Merge what was added to the model into its weights first, or use the model itself."
        )
    return module


def refuse_edits(model: nn.Module) -> None:
    """Raises `TypeError` if hooks, or methods set on an instance, change what some module computes.

    A backbone may have an `interpolate_pos_encoding` of its own: the engine calls it.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        if is_watched(module):
            raise InvalidTypeError(
                f"{where} has a hook or its own forward, which the engine would pass over; remove it first."
            )
        replaced = set(replaced_methods(module)) - {"interpolate_pos_encoding"}
        if replaced:
            raise InvalidTypeError(
                f"{where} has a {min(replaced)} of its own, set on the instance, which the engine would pass over; "
                "remove it first, or use the model itself."
            )


def replaced_methods(module: nn.Module) -> list[str]:
    """The methods in whose place the instance has an attribute."""
    return [name for name, value in vars(module).items() if not _is_own(value, getattr(type(module), name, None))]


def _is_own(value: Any, defined: Any) -> bool:
    """Whether an attribute is none that replaces what its class has `defined`: no method, or the method bound."""
    return not isroutine(defined) or getattr(value, "__func__", None) is defined


def refuse_tensors(model: nn.Module) -> None:
    """Raises `TypeError` if a parameter or buffer is of a class of its own (quantised, sharded) or has no values."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise InvalidTypeError(
                f"{name} is a {type(tensor).__name__}; the engine can fold plain tensors only. Give the model as it "
                "was before it was quantised or sharded, or use the model itself."
            )
        if tensor.is_meta:
            raise InvalidTypeError(
                f"{name} is on the meta device, where tensors have no values, so there is nothing to fold: load the "
                "weights first, with load_state_dict(..., assign=True) or after to_empty."
            )


def hollow(module: nn.Module, kind: type[nn.Module] | None = None) -> Any:
    """A module of class `kind` (default: the same) in eval mode with copies of the plain attributes of `module`.

    It has no parameters, buffers, submodules or hooks.
    """
    made = (kind or type(module)).__new__(kind or type(module))
    nn.Module.__init__(made)
    plain = {key: value for key, value in vars(module).items() if key not in vars(made)}
    plain.pop("_compiled_call_impl", None)  # would run the original
    made.__dict__.update(copy.deepcopy(plain), training=False)
    return made


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` in eval mode with its floating-point tensors in `dtype` and its parameters as buffers."""
    made = hollow(module)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        made.register_buffer(name, None if tensor is None else _frozen_tensor(tensor, dtype))
    for name, child in module._modules.items():
        made.add_module(name, None if child is None else frozen(child, dtype))
    return made


def _frozen_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


class Layout(NamedTuple):
    """What the linears want that the present setting of backends chooses.

    With `interleaved`, gate and value rows of a SwiGLU in turn (`ops.linear.interleave`). With `defers_bias`, linears
    that add to the residual stream have no bias: the norms that read the stream add the biases so far.
    """

    interleaved: bool
    defers_bias: bool


def layout_for(device: torch.device, dtype: torch.dtype, stream: torch.dtype, gated: bool) -> Layout:
    """The layout for linears of operands in `dtype`, a residual stream in `stream` and, if `gated`, SwiGLU."""
    with FakeTensorMode(), torch.no_grad():
        *swiglu, _ = sample_inputs("swiglu", device, dtype)
        x, weight, _, form, residual, *rest = sample_inputs("residual", device, dtype)
        bias, residual = residual.new_empty(len(weight)), residual.to(stream)
        return Layout(
            gated and _refused("swiglu", (*swiglu, None), (*swiglu, False)),
            _refused("residual", (x, weight, None, form, residual, *rest), (x, weight, bias, form, residual, *rest)),
        )


def _refused(form: str, given: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether the implementation of `linear` that is chosen for the arguments `given` refuses those `asked` about."""
    try:
        chosen, *_ = LINEAR.select(form, given, current_setting())
    except BackendError:  # which the first call will raise
        return False
    return chosen.refuses is not None and chosen.refuses(*asked) is not None


class FoldedModule(nn.Module):
    """A part of the engine, with which its owner computes without always calling it.

    A call of the engine reads parts and tensors from the two dictionaries and calls `forward` itself, since
    `nn.Module.__getattr__` and `nn.Module.__call__` take the host half a microsecond each time.
    """

    _modules: Any
    _buffers: Any

    def bind(self) -> None:
        """Lets each op that it runs choose its implementation at the next call; once more where it was moved."""

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
    """A linear whose weight (out_features, in_features) and bias (or None) are buffers.

    With `interleaved` the rows are in the order that `Layout` calls so.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved = interleaved
        if interleaved:  # a mark in the state dict, which a linear of the other order does not load
            self.register_buffer("interleaved_rows", torch.empty(0))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.bind()

    def bind(self) -> None:
        self._bound = {epilogue: BoundOp(LINEAR, epilogue) for epilogue in LINEAR.sample_inputs}
        allow_prepacking(self.weight)

    def _run(self, epilogue: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = self._buffers  # attributes of a module are slow to read
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
    linear: Any,
    name: str,
    gamma: Tensor | None = None,
    norm: Any = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Folds what stands around an `nn.Linear` into its weight and bias, which are returned in fp64.

    Args:
        linear: the model's.
        name: of it, for errors.
        gamma: LayerScale, (out_features,), or None.
        norm: the layer norm whose weight and bias it takes over, or None.
        interleaved: put gate and value rows in turn.
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
    linear: Any,
    name: str,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
    interleaved: bool = False,
) -> FoldedLinear:
    """`fold_exactly`, rounded to `dtype`."""
    weight, bias = fold_exactly(linear, name, gamma, interleaved=interleaved)
    return FoldedLinear(rounded(weight, dtype), None if bias is None else rounded(bias, dtype), interleaved)


class FoldedNorm(FoldedModule):
    """A layer norm of the residual stream, in the dtype of the linears that read it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: Any, name: str, dtype: torch.dtype, stream: torch.dtype) -> None:
        super().__init__()
        expect(norm, name, LayerNorm, nn.LayerNorm)
        for part in ("weight", "bias"):
            if getattr(norm, part) is None:
                raise InvalidTypeError(
                    f"{name} has no {part}; the engine can fold norms that have a weight and a bias. Give it a weight "
                    "of ones and a bias of zeros, or use the model itself."
                )
        self.eps: float = norm.eps
        self.dtype = dtype
        self.register_buffer("weight", rounded(norm.weight.double(), stream))
        self.register_buffer("bias", rounded(norm.bias.double(), stream))
        self.bind()

    def bind(self) -> None:
        self._bound = BoundOp(LAYER_NORM, "plain")

    def _run(self, x: Tensor, deferred: Tensor | None, scale: float | None = None) -> Tensor:
        tensors = self._buffers
        return self._bound(x, tensors["weight"], tensors["bias"], self.eps, None, None, None, deferred, scale)

    def forward(self, x: Tensor, deferred: Tensor | None = None) -> Tensor:
        """The norm of `x`, or with `deferred` (hidden,) of their sum."""
        return self._run(x, deferred).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def gamma_of(layer_scale: nn.Module, name: str) -> Tensor | None:
    """LayerScale's factors, None where there is no LayerScale."""
    return getattr(expect(layer_scale, name, LayerScale, nn.Identity), "gamma", None)
