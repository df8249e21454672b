"""Folding into the engine's weights is exact, and parts of a model that cannot be folded are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dinov2_fast import optimize_for_inference
from dinov2_fast.inference.fold import fold_exactly, fold_linear
from dinov2_fast.layers import LayerNorm
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops import _linear_peers
from dinov2_fast.ops.dispatch import use_backend
from tests.helpers.huggingface_peers import our_class, small_config
from tests.helpers.small_models import small

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_scale_is_folded_exactly_and_rounded_once(dtype: torch.dtype) -> None:
    linear, gamma = nn.Linear(96, 64), torch.randn(64)
    folded = fold_linear(linear, "proj", dtype, gamma)
    assert torch.equal(folded.weight, (linear.weight.double() * gamma.double()[:, None]).to(dtype))
    assert torch.equal(folded.bias, (linear.bias.double() * gamma.double()).to(dtype))
    assert torch.equal(fold_linear(linear, "proj", dtype).weight, linear.weight.to(dtype))
    assert fold_linear(nn.Linear(96, 64, bias=False), "proj", dtype, gamma).bias is None


@torch.no_grad()
def test_a_norm_is_folded_exactly() -> None:
    linear, norm = nn.Linear(96, 64), nn.LayerNorm(96)
    norm.weight.normal_()
    norm.bias.normal_()
    weight, bias = fold_exactly(linear, "qkv", interleaved=True, norm=norm)
    shift = linear.weight.double() @ norm.bias.double()
    order = torch.arange(64).view(2, 32).T.flatten()  # 0, 32, 1, 33, ...
    assert torch.equal(weight, (linear.weight.double() * norm.weight.double())[order])
    assert torch.equal(bias, (linear.bias.double() + shift)[order])
    linear.bias = None
    assert torch.equal(fold_exactly(linear, "qkv", norm=norm)[1], shift)


@torch.no_grad()
def test_folded_linears_compute_what_the_model_s_do() -> None:
    model = small(ffn_layer="swiglu")
    block, folded = model.blocks[1], optimize_for_inference(model, "fp32").blocks[1]
    assert torch.equal(folded.attn.qkv.weight, block.attn.qkv.weight)
    assert torch.equal(folded.mlp.up.weight, block.mlp.w12.weight)
    torch.testing.assert_close(folded.mlp.down.weight, block.ls2.gamma[:, None] * block.mlp.w3.weight)
    torch.testing.assert_close(folded.attn.proj.bias, block.ls1.gamma * block.attn.proj.bias)


@torch.no_grad()
def test_a_model_in_bf16_is_folded_from_its_bf16_weights() -> None:
    model = small().bfloat16()
    engine = optimize_for_inference(model, "fp32")
    assert "folded in fp64 from bf16" in str(engine)
    x = torch.randn(1, 3, 28, 42)
    torch.testing.assert_close(engine(x), model.float()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
def test_a_part_that_is_moved_or_replicated_chooses_its_backend_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes in fp32 but not in fp64."""
    monkeypatch.setattr(_linear_peers, "ONEDNN_MIN_PRODUCTS", 1)  # smaller products are left to torch
    folded, x = fold_linear(nn.Linear(8, 8), "fc1", torch.float32), torch.randn(3, 8)
    with torch.no_grad(), use_backend("linear=onednn"):
        y = folded(x)
        replica = folded._replicate_for_data_parallel()
        replica._buffers = {name: tensor.double() for name, tensor in folded._buffers.items()}
        torch.testing.assert_close(replica(x.double()).float(), y)
        assert torch.equal(folded(x), y)
        torch.testing.assert_close(folded.double()(x.double()).float(), y)


class _Scaled(nn.Linear):
    """A linear that computes more than its base class, like an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hook(model: Any) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, output: output * 2)


def _own_forward(model: Any) -> None:
    model.blocks[2].norm1.forward = lambda x: x


def _set(path: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, make(model.get_submodule(path)))

    return change


UNKNOWN = {
    "hook": (_hook, "blocks.1 has a hook or its own forward"),
    "forward": (_own_forward, "blocks.2.norm1 has a hook or its own forward"),
    "linear": (_set("blocks.0.attn.qkv", lambda _: _Scaled(32, 96)), "blocks.0.attn.qkv is a _Scaled"),
    "parametrization": (
        lambda model: parametrizations.weight_norm(model.blocks[0].mlp.fc1),
        "blocks.0.mlp.fc1 is a ParametrizedLinear",
    ),
    "activation": (
        _set("blocks.1.mlp.act", lambda _: nn.ReLU()),
        "blocks.1.mlp.act is a ReLU; the engine can fold GELU",
    ),
    "norm": (_set("blocks.1.norm2", lambda _: nn.Identity()), "blocks.1.norm2 is a Identity"),
    "mlp": (_set("blocks.1.mlp", lambda _: nn.Identity()), "blocks.1.mlp is a Identity"),
    "block": (_set("blocks.2", nn.Sequential), "blocks.2 is a Sequential"),
    "other patches": (
        _set("patch_embed.proj", lambda _: nn.Conv2d(3, 32, 7, 14)),
        r"patch_embed.proj is Conv2d\(3, 32, .* for patches of \(14, 14\); .* a kernel of one square patch",
    ),
    "norm of patches": (_set("patch_embed.norm", lambda _: LayerNorm(32)), "patch_embed.norm is a LayerNorm"),
}


@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_parts_that_may_compute_something_else_are_refused(change: Callable[[Any], None], message: str) -> None:
    model = small()
    change(model)
    with pytest.raises(TypeError, match=message):
        optimize_for_inference(model)


class _Quantised(Tensor):
    """A tensor subclass with few operations, like those of torchao."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.mul, Tensor.double):
            raise NotImplementedError(f"unimplemented operator {func}")
        return super().__torch_function__(func, types, args, kwargs)


def _quantise(model: Any, path: str) -> None:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    quantised = getattr(module, name).detach().as_subclass(_Quantised)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(quantised, requires_grad=False))


@pytest.mark.parametrize("path", ["blocks.1.mlp.fc1.weight", "norm.weight", "cls_token"])
def test_tensors_of_other_classes_are_refused_at_the_start_and_later(path: str) -> None:
    model, x = small(), torch.zeros(1, 3, 28, 28)
    engine = optimize_for_inference(model)
    _quantise(model, path)
    for fold in (lambda: optimize_for_inference(model), lambda: engine(x)):
        with pytest.raises(TypeError, match=f"{path} is a _Quantised; the engine can fold plain tensors only. Give"):
            fold()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_norms_without_weight_or_bias_are_refused(name: str) -> None:
    model = small()
    setattr(model.blocks[1].norm2, name, None)
    with pytest.raises(TypeError, match=f"blocks.1.norm2 has no {name}; .* Give it a weight of ones"):
        optimize_for_inference(model)


class _Other(DinoVisionTransformer):
    pass


def test_models_of_other_classes_are_refused() -> None:
    others = [nn.Linear(2, 2), _Other(depth=0), torch.compile(small())]
    for model, name in zip(others, ("Linear", "_Other", "OptimizedModule"), strict=True):
        with pytest.raises(TypeError, match=f"takes a model of this package, one of .*; got {name}. For a compiled or"):
            optimize_for_inference(model.eval())
    config = our_class("Dinov2", "Config")(**small_config(hidden_act="relu"))
    with pytest.raises(TypeError, match=r"blocks.0.mlp.act is a ReLU"):
        optimize_for_inference(our_class("Dinov2", "Model")(config).eval())


@torch.no_grad()
def test_a_model_compiled_in_place_is_not_run_by_its_engine() -> None:
    model, x = small(), torch.randn(1, 3, 28, 28)
    expected = model(x)
    model.compile(backend=lambda graph, inputs: pytest.fail("the model ran"))
    torch.testing.assert_close(optimize_for_inference(model)(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_replaced_parts_of_known_classes_are_followed() -> None:
    model, x = small(), torch.randn(1, 3, 28, 42)
    model.norm = nn.Identity()
    model.head = nn.Sequential(nn.LayerNorm(32), nn.BatchNorm1d(32).eval())
    model.interpolate_pos_encoding = lambda x, w, h: torch.full((1, 1, 32), 0.5)
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x), atol=1e-5, rtol=1e-5)
    model.interpolate_pos_encoding = MethodType(lambda self, x, w, h: 2 * self.pos_embed[:, :1], model)
    engine = optimize_for_inference(model)
    torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)
    assert engine.interpolate_pos_encoding.__self__ is engine.folded, "it holds no copy of the model"
