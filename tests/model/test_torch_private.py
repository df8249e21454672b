"""What torch_private promises of each private name of torch; a version that broke one fails here first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from dinov2_fast import torch_private

X = torch.linspace(-2, 2, 12).view(3, 4)


def _seen_by(trace: str) -> list[bool]:
    """What `is_traced`, `is_jit_traced` and `is_fx_traced` say inside a tool of torch."""
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen[:] = [torch_private.is_traced(), torch_private.is_jit_traced(), torch_private.is_fx_traced()]
            return x + 1

    if trace == "jit":
        torch.jit.trace(Asks(), X, check_trace=False)
    elif trace == "fx":
        torch.fx.symbolic_trace(Asks())
    else:
        Asks()(X)
    return seen


def test_tracing_is_noticed() -> None:
    assert _seen_by("nothing") == [False, False, False]
    assert _seen_by("jit") == [True, True, False]
    assert _seen_by("fx") == [True, False, True]
    compiled = torch.compile(lambda x: x + torch_private.is_traced(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X + 1)


def test_dispatch_modes_are_noticed() -> None:
    assert not torch_private.is_in_dispatch_mode()
    assert not torch_private.is_fake_mode_active()
    with torch_private.TorchDispatchMode():
        assert torch_private.is_in_dispatch_mode()
        assert not torch_private.is_fake_mode_active()
    with torch_private.FakeTensorMode():
        assert torch_private.is_fake_mode_active()
        assert torch_private.is_fake(torch.empty(1))
    assert not torch_private.is_fake(X)


def test_a_constant_is_computed_once_where_code_is_compiled() -> None:
    calls = []

    @torch_private.constant_when_traced
    def constant() -> int:
        calls.append(1)
        torch._dynamo.graph_break()  # which `fullgraph` would refuse if this were traced
        return 5

    compiled = torch.compile(lambda x: x + constant(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X + 5)
    assert torch.equal(compiled(X), X + 5)
    assert len(calls) == 1


def test_autograd_and_autocast_step_aside() -> None:
    x = X.clone().requires_grad_()
    with torch_private.below_autograd():
        assert not torch.ops.aten.exp(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(X, X).dtype == torch.bfloat16
        with torch_private.without_autocast("AutocastCPU")():
            assert F.linear(X, X).dtype == torch.float32


def test_tangents_are_noticed() -> None:
    assert not torch_private.has_tangent(X)
    with forward_ad.dual_level():
        assert not torch_private.has_tangent(X)
        assert torch_private.has_tangent(forward_ad.make_dual(X, X))


def test_global_hooks_are_noticed() -> None:
    assert not torch_private.has_any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert torch_private.has_any_global_hook()
    handle.remove()


def test_the_precision_of_matrix_products_is_torch_s() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert torch_private.matmul_precision() == matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before


def test_kernels_of_operators_are_found() -> None:
    assert torch_private.has_kernel("aten::_softmax", "cpu")
    assert not torch_private.has_kernel("aten::_softmax", "fpga")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_onednn_linear_equals_torch(activation: str) -> None:
    expected = F.linear(X, X, X[0, :3])
    expected = F.gelu(expected) if activation == "gelu" else expected
    for weight in (X, torch_private.onednn_pack(X)):
        torch.testing.assert_close(torch_private.onednn_linear(X, weight, X[0, :3].contiguous(), activation), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_function_fused_by_onednn_equals_the_function() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1) / 8.0).softmax(-1) @ v

    fused = torch_private.fused_by_onednn(attention, *torch.zeros(3, 1, 2, 20, 64))
    assert fused is not None, "this torch has no oneDNN Graph: attention is slower on a CPU with AVX-512"
    for tokens in (20, 21):
        operands = torch.randn(3, 1, 2, tokens, 64)
        torch.testing.assert_close(fused(*operands), attention(*operands))
    assert torch_private.fused_by_onednn(lambda x: x.cumsum(0), X) is None
    assert not torch._C._jit_llga_enabled()


def test_tensors_that_are_more_than_their_memory_are_noticed() -> None:
    plain: list[bool] = []
    torch.func.vmap(lambda x: plain.append(torch_private.is_plain(x)) or x)(X)
    with forward_ad.dual_level():
        plain.append(torch_private.is_plain(forward_ad.make_dual(X, X)))
    assert plain == [False, False]
    assert torch_private.is_plain(X)
    assert not torch_private.is_plain(nn.Parameter(X))


def test_gelu_linear_equals_torch() -> None:
    expected = F.gelu(F.linear(X, X, X[0, :3]))
    torch.testing.assert_close(torch_private.gelu_linear(X, X, X[0, :3]), expected, atol=1e-3, rtol=0)


def test_softmax_backward_equals_autograd() -> None:
    x = X.clone().requires_grad_()
    p = x.softmax(-1)
    (expected,) = torch.autograd.grad(p, x, X)
    torch.testing.assert_close(torch_private.softmax_backward(X, p.detach()), expected)


def test_pytrees_keep_their_structure() -> None:
    leaves, spec = torch_private.pytree.tree_flatten({"a": [X], "b": (1, X)})
    assert [type(leaf) for leaf in leaves] == [Tensor, int, Tensor]
    assert torch_private.pytree.tree_unflatten(leaves, spec) == {"a": [X], "b": (1, X)}
    doubled = torch_private.pytree.tree_map_only(Tensor, lambda x: 2 * x, [X, 1])
    assert torch.equal(doubled[0], 2 * X)
