"""The op residual: adding a branch for all images or for a subset, and gathering the subset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.devices import (
    DEVICE,
    each_backend,
    gradients,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INDICES = [[2], [3, 0], [1, 3, 0, 2], []]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _stream(dtype: torch.dtype, hidden: int = 64, images: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    gamma = torch.rand(hidden).to(DEVICE, dtype)
    return random(images, 9, hidden, dtype=dtype), random(images, 9, hidden, dtype=dtype), gamma


def _index(*images: int) -> Tensor:
    return torch.tensor(images, device=DEVICE, dtype=torch.int64)


def _drop_scale(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.0, 1.5, 1.5, 0.0], dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("hidden", [64, 383, 1536])
@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize("with_drop_scale", [True, False])
@each_dtype
@each_backend
def test_add_obeys_the_rule(
    backend: str, dtype: torch.dtype, with_drop_scale: bool, with_gamma: bool, hidden: int
) -> None:
    residual, branch, gamma = _stream(dtype, hidden)
    gamma = gamma if with_gamma else None
    drop_scale = _drop_scale(dtype) if with_drop_scale else None
    before = residual.clone()
    plain = branch if gamma is None else branch * gamma
    plain = residual + (plain if drop_scale is None else plain * drop_scale[:, None, None])
    with poisoned_memory():
        out = ops.add_residual(residual, branch, gamma, drop_scale, backend=backend)
    reference.assert_obeys_rule(out, reference.add_residual(residual, branch, gamma, drop_scale), plain)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize("index", INDICES, ids=str)
@each_dtype
@each_backend
def test_add_on_a_subset_obeys_the_rule_and_leaves_other_images(
    backend: str, dtype: torch.dtype, index: list[int], with_gamma: bool
) -> None:
    residual, branch, gamma = _stream(dtype)
    gamma = gamma if with_gamma else None
    rows, part, scale = _index(*index), branch[: len(index)], 4 / 3
    before = residual.clone()
    with poisoned_memory():
        out = ops.add_residual(residual, part, gamma, index=rows, scale=scale, backend=backend)
    plain = residual.clone()
    plain[rows] += (part if gamma is None else part * gamma) * scale
    ref = reference.scatter_add_residual(residual, rows, part, gamma, scale)
    reference.assert_obeys_rule(out, ref, plain)
    others = [i for i in range(4) if i not in index]
    assert torch.equal(out[others], residual[others])
    assert torch.equal(residual, before)


@pytest.mark.sanitize
@each_backend
def test_nan_stays_in_its_image_and_an_image_without_branch_is_untouched(backend: str) -> None:
    residual, branch, gamma = _stream(torch.float32)
    branch[1, 2, 3] = float("nan")
    out = ops.add_residual(residual, branch, gamma, backend=backend)
    assert out.isnan().sum() == 1
    residual[3] = -0.0
    out = ops.add_residual(residual, branch[:2], gamma, index=_index(0, 2), scale=2.0, backend=backend)
    assert out[2].isnan().sum() == 1
    assert out[[0, 1, 3]].isfinite().all()
    assert out[3].signbit().all()


@each_dtype
@each_backend
def test_gather_takes_the_images_in_order(backend: str, dtype: torch.dtype) -> None:
    x, y = random(4, 9, 33, dtype=dtype), random(2, 1, 33, dtype=dtype)
    with poisoned_memory():
        assert torch.equal(ops.gather_rows([x], [_index(3, 1)], backend=backend), torch.cat([x[3], x[1]]))
        out = ops.gather_rows([x, y, x], [_index(2), _index(1), _index(0, 3)], backend=backend)
    assert torch.equal(out, torch.cat([x[2], y[1], x[0], x[3]]))
    assert ops.gather_rows([x], [_index()], backend=backend).shape == (0, 33)


def _functions(backend: str) -> dict[str, Any]:
    index, drop_scale = _index(2, 0), _drop_scale(torch.float64)
    return {
        "add": lambda r, o, g: ops.add_residual(r, o, g, drop_scale.to(o.dtype), backend=backend),
        "add_gamma": lambda r, o, g: ops.add_residual(r, o, g, backend=backend),
        "add_plain": lambda r, o, g: ops.add_residual(r * g.sum(), o, backend=backend),
        "subset": lambda r, o, g: ops.add_residual(r, o[:2], g, index=index, scale=4 / 3, backend=backend),
        "subset_plain": lambda r, o, g: ops.add_residual(r * g, o[1:3], index=index, scale=1.5, backend=backend),
        "gather": lambda r, o, g: ops.gather_rows([r * o * g], [index], backend=backend),
        "gather_list": lambda r, o, g: ops.gather_rows([r * g, o[:3, 1:]], [index, index[1:]], backend=backend),
    }


@pytest.mark.parametrize("name", _functions("torch"))
@each_dtype
@each_backend
def test_gradients_obey_the_rule(backend: str, dtype: torch.dtype, name: str) -> None:
    inputs = _stream(dtype, 383)
    with poisoned_memory():
        ours = gradients(_functions(backend)[name], inputs)
    plain = gradients(_functions("torch")[name], inputs)
    exact = gradients(_functions("torch")[name], [x.double() for x in inputs])
    for gradient, ref, usual in zip(ours, exact, plain, strict=True):
        reference.assert_obeys_rule(gradient, ref, usual)


@pytest.mark.parametrize("name", _functions("torch"))
@each_backend
def test_gradients_equal_finite_differences_in_fp64(backend: str, name: str) -> None:
    inputs = tuple(x[..., :3].detach() for x in _stream(torch.float64))
    inputs = tuple(x.narrow(-2, 0, 2) if x.ndim == 3 else x for x in inputs)
    inputs = tuple(x.contiguous().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(_functions(backend)[name], inputs)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns": lambda x: x[..., ::2],
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@each_backend
def test_strided_input_gives_what_a_copy_gives(backend: str, make) -> None:
    x, branch = make(random(4, 6, 64)), make(random(4, 6, 64))
    gamma, index = torch.rand(x.shape[-1], device=DEVICE), _index(3, 1)

    def results(copy: bool) -> list[Tensor]:
        a, b = (x.contiguous(), branch.contiguous()) if copy else (x, branch)
        added = ops.add_residual(a, b, gamma, backend=backend)
        gathered = ops.gather_rows([a], [index], backend=backend)
        return [added, gathered, ops.add_residual(a, b[:2], gamma, index=index, scale=2.0, backend=backend)]

    for strided, copied in zip(results(copy=False), results(copy=True), strict=True):
        assert torch.equal(strided, copied)


@each_backend
def test_autocast_keeps_the_stream_in_fp32(backend: str) -> None:
    residual, branch, gamma = _stream(torch.float32)
    index = _index(1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        added = ops.add_residual(residual, branch.bfloat16(), gamma, backend=backend)
        part = branch[:1].bfloat16()
        on_subset = ops.add_residual(residual, part, gamma, index=index, scale=4.0, backend=backend)
    assert added.dtype == on_subset.dtype == torch.float32


# Registration with torch


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_registered_ops_pass_opcheck(requires_grad: bool, strided: bool) -> None:
    x = random(9, 4, 64).transpose(0, 1) if strided else random(4, 9, 64)
    gamma = random(64).requires_grad_(requires_grad)
    x.requires_grad_(requires_grad)
    index, library = _index(2, 0), torch.ops.dinov2_fast
    opcheck(library.add_residual.default, (x, x.detach(), gamma, None, None, 1.0))
    opcheck(library.add_residual.default, (x, x.detach()[:2], gamma, None, index, 2.0))
    opcheck(library.gather_rows.default, ([x], [index]))
    opcheck(library.gather_rows.default, ([x, x.detach()], [index, index]))
    if not requires_grad:
        opcheck(library.add_residual_backward.default, (x, x, gamma, None, None, 1.0))
        opcheck(library.add_residual_backward.default, (x, x, None, _drop_scale(x.dtype), None, 1.0))
        opcheck(library.add_residual_backward.default, (x, x[:2], gamma, None, index, 2.0))
        opcheck(library.gather_rows_backward.default, (x[:2], index, 4))


@runs_triton
@pytest.mark.parametrize("name", _functions("torch"))
def test_compiled_as_one_graph_with_gradients(name: str) -> None:
    inputs, function = _stream(torch.float32), _functions("triton")[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def test_options_that_do_not_go_together_are_an_error() -> None:
    x = random(4, 3, 8)
    with pytest.raises(ValueError, match="scale with index only"):
        ops.add_residual(x, x, scale=2.0)
    with pytest.raises(ValueError, match="drop_scale without index only"):
        ops.add_residual(x, x[:1], None, x[:, 0, 0], index=_index(0))


@runs_triton
def test_refusals_say_why() -> None:
    x = random(2, 3, 8).int()
    with pytest.raises(BackendError, match=r"takes fp16, bf16, fp32 and fp64, got torch\.int32"):
        ops.add_residual(x, x, backend="triton")
    for other in (x.double(), x.float()[..., :4]):
        with pytest.raises(BackendError, match="batches of one dtype and one hidden size"):
            ops.gather_rows([x.float(), other], [_index(0)] * 2, backend="triton")
    x = random(4, 3, 8)
    with pytest.raises(BackendError, match=r"takes branch of shape \(4, 3, 8\), got \(2, 3, 8\)"):
        ops.add_residual(x, x[:2], backend="triton")
    with pytest.raises(BackendError, match=r"takes branch of shape \(2, 3, 8\), got \(1, 3, 8\)"):
        ops.add_residual(x, x[:1], index=_index(0, 1), backend="triton")
    with pytest.raises(BackendError, match=r"takes gamma of shape \(8,\), got \(1,\)"):
        ops.add_residual(x, x[:1], x[0, 0, :1], index=_index(0), backend="triton")
    with pytest.raises(BackendError, match=r"takes drop_scale of shape \(4,\), got \(1,\)"):
        ops.add_residual(x, x, None, x[0, 0, :1], backend="triton")
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda")
        scale = torch.ones(2, device="cuda", requires_grad=True)
        with pytest.raises(BackendError, match="no gradient for drop_scale"):
            ops.add_residual(x, x, None, scale, backend="triton")
