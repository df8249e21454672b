"""The op attention_pool, and the attention of the CLS token that the engine computes with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.block import Block
from dinov2_fast.inference.block import cls_attention
from dinov2_fast.ops.attention_pool import attention_pool, attention_pool_torch
from dinov2_fast.ops.dispatch import BackendError, use_backend
from tests import reference
from tests.helpers.devices import (
    DEVICE,
    each_backend,
    fakes_cuda,
    on_gpu,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EPS = 1e-6
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _arguments(
    dtype: torch.dtype, batch: int = 2, seq_len: int = 37, num_heads: int = 2, hidden: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x, absorbed, weight, bias, eps; the scores have a standard deviation of about 2."""
    x = random(batch, seq_len, hidden, dtype=dtype, scale=3, shift=1)
    absorbed = random(batch, num_heads, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    return x, absorbed, torch.rand(hidden).add(0.5).to(DEVICE, dtype), random(hidden, dtype=dtype), EPS


def _assert_obeys_rule(pooled: Tensor, arguments: tuple[Any, ...]) -> None:
    reference.assert_obeys_rule(pooled, reference.attention_pool(*arguments), attention_pool_torch(*arguments))


@pytest.mark.parametrize("seq_len", [1, 5, 257, 261])
@each_dtype
@each_backend
def test_obeys_the_rule(backend: str, dtype: torch.dtype, seq_len: int) -> None:
    arguments = _arguments(dtype, seq_len=seq_len)
    with poisoned_memory():
        pooled = attention_pool(*arguments, backend=backend)
    assert pooled.is_contiguous()
    _assert_obeys_rule(pooled, arguments)


@pytest.mark.parametrize(
    ("num_heads", "hidden"), [(1, 1), (3, 57), (6, 384), (12, 768), (16, 1024), (24, 1536), (32, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_sizes_of_the_backbones_and_odd_ones(backend: str, dtype: torch.dtype, num_heads: int, hidden: int) -> None:
    arguments = _arguments(dtype, 1, 35, num_heads, hidden)
    with poisoned_memory():
        pooled = attention_pool(*arguments, backend=backend)
    _assert_obeys_rule(pooled, arguments)


@each_backend
def test_the_tokens_of_a_518_pixel_image_obey_the_rule(backend: str) -> None:
    arguments = _arguments(torch.float32, 1, 1370)
    _assert_obeys_rule(attention_pool(*arguments, backend=backend), arguments)


@each_backend
def test_many_images_obey_the_rule(backend: str) -> None:
    """So many images that the kernels choose wide blocks."""
    arguments = _arguments(torch.float16, 600 if DEVICE == "cuda" else 5, 5, 6, 384)
    with poisoned_memory():
        pooled = attention_pool(*arguments, backend=backend)
    _assert_obeys_rule(pooled, arguments)


@each_dtype
@each_backend
def test_a_sharp_softmax_and_rows_of_other_sizes_obey_the_rule(backend: str, dtype: torch.dtype) -> None:
    x, absorbed, *rest = _arguments(dtype)
    x[0, 3] /= 1000
    x[1, 5:] += 50  # tokens with a large mean
    absorbed[0] *= 20  # one token gets nearly all the weight
    pooled = attention_pool(x, absorbed, *rest, backend=backend)
    ref, plain = reference.attention_pool(x, absorbed, *rest), attention_pool_torch(x, absorbed, *rest)
    for image in range(2):
        for head in range(2):
            row = image, head
            reference.assert_obeys_rule(pooled[row], ref[row], plain[row])


@each_backend
def test_equal_scores_give_the_mean_of_the_norm(backend: str) -> None:
    x, absorbed, weight, bias, eps = _arguments(torch.float64, seq_len=70)
    pooled = attention_pool(x, torch.zeros_like(absorbed), weight, bias, eps, backend=backend)
    expected = reference.layer_norm(x, weight, bias, eps).mean(1, keepdim=True).expand_as(pooled)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "offset": lambda x: x[1:, 1:],
    "columns": lambda x: x[..., ::2],
    "misaligned": lambda x: x.flatten()[1:1281].view(5, 4, 64),
}


@pytest.mark.parametrize("layout", STRIDES)
@each_backend
def test_strided_input_gives_what_a_copy_gives(backend: str, layout: str) -> None:
    x = STRIDES[layout](random(4, 6, 64))
    batch, _, hidden = x.shape
    absorbed, (weight, bias) = random(batch, hidden, 3).mT, random(2, 2 * hidden)[:, ::2]
    pooled = attention_pool(x, absorbed, weight, bias, EPS, backend=backend)
    copies = (t.clone(memory_format=torch.contiguous_format) for t in (x, absorbed, weight, bias))
    expected = attention_pool(*copies, EPS, backend=backend)
    # torch's matrix products depend on the strides, and narrower loads assign other elements to the threads.
    if backend == "torch" or layout == "misaligned":
        torch.testing.assert_close(pooled, expected)
    else:
        assert torch.equal(pooled, expected)


@pytest.mark.sanitize
@each_backend
def test_nan_stays_in_its_image(backend: str) -> None:
    arguments = _arguments(torch.float32, batch=4)
    x = arguments[0]
    x[1, 36, 3], x[2, 0, 63] = float("nan"), float("inf")
    pooled = attention_pool(*arguments, backend=backend)
    assert pooled[0].isfinite().all()
    assert pooled[1:3].isnan().all()
    assert pooled[3].isfinite().all()


@each_backend
def test_huge_values_and_constant_rows_obey_the_rule(backend: str) -> None:
    x, absorbed, weight, bias, eps = _arguments(torch.float16)
    huge = x.sign() * 6e4
    constant = torch.full_like(x, 7.0)
    for arguments in ((huge, absorbed, weight, bias, eps), (constant, absorbed, weight, bias, eps)):
        _assert_obeys_rule(attention_pool(*arguments, backend=backend), arguments)


@each_backend
def test_no_image_and_no_head_give_an_empty_result(backend: str) -> None:
    x, absorbed, *rest = _arguments(torch.float32)
    assert attention_pool(x[:0], absorbed[:0], *rest, backend=backend).shape == (0, 2, 64)
    assert attention_pool(x, absorbed[:, :0], *rest, backend=backend).shape == (2, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_autocast_gives_the_dtype_torch_gives(backend: str, dtype: torch.dtype) -> None:
    arguments = _arguments(dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        pooled = attention_pool(*arguments, backend=backend)
        assert pooled.dtype == attention_pool_torch(*arguments).dtype
    torch.testing.assert_close(pooled.float(), attention_pool_torch(*arguments).float(), atol=0.05, rtol=0)


# The attention of the CLS token


def _block(num_heads: int, hidden: int, qkv_bias: bool = True) -> Block:
    block = Block(hidden, num_heads, qkv_bias=qkv_bias, init_values=0.5).to(DEVICE, torch.float64).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1.0))
    return block.requires_grad_(False)


def _cls_attention(block: Block, x: Tensor, backend: str) -> Tensor:
    with use_backend(f"attention_pool={backend}", strict=True):
        return cls_attention(x, block.norm1, block.attn)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("num_heads", "hidden", "seq_len"), [(2, 64, 1), (2, 64, 50), (3, 48, 17)])
@each_backend
def test_cls_attention_is_the_first_row_of_attention(
    backend: str, num_heads: int, hidden: int, seq_len: int, qkv_bias: bool
) -> None:
    block = _block(num_heads, hidden, qkv_bias)
    x = random(3, seq_len, hidden, dtype=torch.float64, scale=2, shift=0.5)
    expected = ops.attention(block.attn.project_qkv(block.norm1(x)), backend="torch")[:, 0].flatten(1)
    out = _cls_attention(block, x, backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@each_backend
def test_a_block_of_one_row_is_the_first_row_of_the_block(backend: str) -> None:
    block = _block(4, 64)
    x = random(2, 30, 64, dtype=torch.float64)
    cls = x[:, 0] + block.ls1(block.attn.proj(_cls_attention(block, x, backend)))
    cls = cls + block.ls2(block.mlp(block.norm2(cls)))
    torch.testing.assert_close(cls, block(x)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_cls_attention_is_as_near_as_attention(backend: str, dtype: torch.dtype) -> None:
    block = _block(2, 64)
    x = random(16, 261, 64, dtype=dtype)  # so many that the largest error is hardly a matter of chance
    block = block.to(dtype)
    plain = ops.attention(block.attn.project_qkv(block.norm1(x)), backend="torch")[:, 0].flatten(1)
    out = _cls_attention(block, x, backend)
    block = block.double()
    exact = ops.attention(block.attn.project_qkv(block.norm1(x.double())), backend="torch")[:, 0].flatten(1)
    reference.assert_obeys_rule(out, exact, plain)


# Refusals


def test_shapes_that_do_not_fit_are_an_error() -> None:
    x, absorbed, *rest = _arguments(torch.float32)
    for wrong in (absorbed[:1], absorbed[..., :8], absorbed[0]):
        with pytest.raises(ValueError, match=r"x \(batch, seq_len, hidden\) and absorbed \(batch, num_heads, hidden\)"):
            attention_pool(x, wrong, *rest)
    with pytest.raises(ValueError, match="at least one token"):
        attention_pool(x[:, :0], absorbed, *rest)


@fakes_cuda
@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_is_for_inference_only(backend: str | None) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 64, device="cuda")
        weight = torch.empty(64, device="cuda", requires_grad=True)
        with pytest.raises(BackendError, match="is for inference only, and gradients are recorded"):
            attention_pool(x, x[:, :2], weight, weight, EPS, backend=backend)
        with torch.no_grad():
            assert attention_pool(x, x[:, :2], weight, weight, EPS, backend="torch").shape == (2, 2, 64)


@runs_triton
def test_refusals_say_why() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 40, 8, device="cuda")
        with pytest.raises(BackendError, match="takes at most 32 heads, got 33"):
            attention_pool(x, x[:, :33], x[0, 0], x[0, 0], EPS, backend="triton")
        x = x.to(torch.float8_e4m3fn)
        with pytest.raises(BackendError, match=r"no backend 'triton' for torch\.float8_e4m3fn. It has: torch"):
            attention_pool(x, x[:, :6], x[0, 0], x[0, 0], EPS, backend="triton")


# Registration with torch


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_ops_pass_opcheck(dtype: torch.dtype, strided: bool) -> None:
    x, absorbed, *rest = _arguments(dtype, seq_len=9)
    if strided:
        x, absorbed = x[:, ::2], absorbed.transpose(0, 1)
    opcheck(torch.ops.dinov2_fast.attention_pool.default, (x, absorbed, *rest))


@each_backend
def test_compiled_as_one_graph_and_in_inference_mode(backend: str) -> None:
    block = _block(2, 64).float()

    def run(x: Tensor) -> Tensor:
        return _cls_attention(block, x, backend)

    x = random(2, 9, 64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.gpu_large
@on_gpu
def test_more_than_2_to_the_31_elements() -> None:
    x, absorbed, *rest = _arguments(torch.bfloat16, 1, 257, 6, 384)
    x, absorbed = (t.expand(22000, -1, -1).contiguous() for t in (x, absorbed))
    assert x.numel() > 2**31
    pooled = attention_pool(x, absorbed, *rest, backend="triton")
    assert torch.equal(pooled[-1], pooled[0])
    _assert_obeys_rule(pooled[-1:], (x[-1:], absorbed[-1:], *rest))
