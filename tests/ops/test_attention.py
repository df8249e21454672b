"""The op attention on batches of images, and its registration with torch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2_fast import ops
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.attention_cases import (
    STRIDES,
    assert_gradient_obeys_the_rule,
    assert_one_token_passes_its_gradient_to_its_value,
    each_dtype,
    exact_gradient,
    plain_attention,
    plain_scores,
    random_qkv,
)
from tests.helpers.devices import (
    DEVICE,
    each_backend,
    fakes_cuda,
    gradients,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

torch_attention = partial(ops.attention, backend="torch")

# One key; tails of each width, with and without whole tiles; no tail; one to three tiles of queries of either size.
SEQ_LENS = [1, 16, 17, 63, 64, 65, 127, 128, 129, 257, 261]


@pytest.mark.parametrize("seq_len", SEQ_LENS)
@each_dtype
@each_backend
def test_attention_obeys_the_rule(backend: str, dtype: torch.dtype, seq_len: int) -> None:
    qkv = random_qkv(1, seq_len, dtype=dtype) if seq_len > 100 else random_qkv(2, seq_len, dtype=dtype)
    with poisoned_memory():
        out = ops.attention(qkv, backend=backend)
    assert out.is_contiguous()
    reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("seq_len", [49, 65])
@each_dtype
@each_backend
def test_other_head_dims_obey_the_rule(backend: str, dtype: torch.dtype, seq_len: int, head_dim: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, head_dim=head_dim, dtype=dtype)
    with poisoned_memory():
        out = ops.attention(qkv, backend=backend)
        ours = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0]
    reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))
    plain, exact = gradients(torch_attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    assert_gradient_obeys_the_rule(ours, exact, plain)


@pytest.mark.parametrize("seq_len", [1370, 2000])
@each_backend
def test_long_sequences_obey_the_rule(backend: str, seq_len: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, dtype=torch.float16)
    out = ops.attention(qkv, backend=backend)
    reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))


def test_fp64_equals_the_formula() -> None:
    qkv = random_qkv(2, 9, dtype=torch.float64)
    torch.testing.assert_close(ops.attention(qkv), reference.attention(qkv), atol=1e-13, rtol=0)


@pytest.mark.parametrize("seq_len", [16, 17, 63, 64, 65, 129, 257])
@each_dtype
@each_backend
def test_gradients_obey_the_rule(backend: str, dtype: torch.dtype, seq_len: int) -> None:
    qkv = random_qkv(1, seq_len, heads=2 if seq_len < 100 else 1, dtype=dtype)
    with poisoned_memory():
        ours = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0]
    assert ours.is_contiguous() or backend == "torch"
    plain, exact = gradients(torch_attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    assert_gradient_obeys_the_rule(ours, exact, plain)


@each_dtype
@each_backend
def test_one_token_passes_its_gradient_to_its_value(backend: str, dtype: torch.dtype) -> None:
    assert_one_token_passes_its_gradient_to_its_value(partial(ops.attention, backend=backend), dtype)


@runs_triton
@pytest.mark.parametrize("seq_len", [5, 64, 65])
def test_lse_obeys_the_rule(seq_len: int) -> None:
    qkv = random_qkv(2, seq_len)
    with poisoned_memory():
        _, lse = torch.ops.dinov2_fast.attention(qkv, None, None, None)
    ref, plain = reference.attention_lse(qkv), plain_scores(qkv).logsumexp(-1)
    reference.assert_obeys_rule(lse, ref / math.log(2), plain / math.log(2))  # lse is to base 2


@pytest.mark.parametrize("seq_len", [7, 257])
@each_backend
def test_equal_keys_average_the_values_and_one_sharp_key_wins(backend: str, seq_len: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, dtype=torch.float16)
    qkv[:, :, 1] = 1.0
    mean = qkv[:, :, 2].double().mean(1, keepdim=True).expand(-1, seq_len, -1, -1)
    reference.assert_obeys_rule(ops.attention(qkv, backend=backend), mean, plain_attention(qkv))
    qkv[:, :, 0] = 1.0
    for sharp in (0, 3, seq_len - 1):
        qkv[:, :, 1] = 0.0
        qkv[:, sharp, 1] = 100.0
        winner = qkv[:, sharp : sharp + 1, 2].expand(-1, seq_len, -1, -1)
        assert torch.equal(ops.attention(qkv, backend=backend), winner)


@each_dtype
@each_backend
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(backend: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 65, heads=1, dtype=dtype)
    qkv[:, 3, 2] /= 1000
    qkv[:, 3, :2] = 2.0  # the token of the small value looks at little else
    out, ref, plain = ops.attention(qkv, backend=backend), reference.attention(qkv), plain_attention(qkv)
    reference.assert_obeys_rule(out[:, 3], ref[:, 3], plain[:, 3])
    reference.assert_obeys_rule(out, ref, plain)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seq_len", [3, 50, 65])
@each_backend
def test_scores_far_from_zero_obey_the_rule(backend: str, seq_len: int, sign: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, dtype=torch.float16)
    qkv[:, :, 0] += 6 * sign  # scores and lse of some hundred, all of one sign: exp(-lse) is beyond fp32
    qkv[:, :, 1] += 6
    reference.assert_obeys_rule(ops.attention(qkv, backend=backend), reference.attention(qkv), plain_attention(qkv))
    ours = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0]
    plain, exact = gradients(torch_attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    reference.assert_obeys_rule(ours, exact, plain)


def test_gradients_equal_finite_differences_in_fp64() -> None:
    qkv = random_qkv(1, 4, heads=2, head_dim=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.attention, (qkv,))
    assert torch.autograd.gradcheck(lambda x: ops.attention(x[0], seq_lens=(1, 3)), (qkv,))
    assert torch.autograd.gradcheck(ops.attention_probabilities, (qkv,))


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    qkv = random_qkv(1, 64, heads=8)
    qkv[:, :, 2] = 1.0
    out = torch.stack([ops.attention(qkv, dropout_p=0.5) for _ in range(20)])
    assert out.std() > 0.01
    torch.testing.assert_close(out.mean(), torch.tensor(1.0, device=DEVICE), atol=0.02, rtol=0)


@pytest.mark.parametrize("layout", STRIDES)
@each_backend
def test_strided_input_gives_what_a_copy_gives(backend: str, layout: str) -> None:
    dtype, atol = (torch.float64, 1e-12) if backend == "torch" else (torch.float16, 0.0)
    if backend != "torch" and layout == "misaligned":  # narrower loads may assign other elements to the threads
        atol = 2.0**-8
    qkv = STRIDES[layout](random_qkv(3, 19, dtype=dtype))
    dout = random(*qkv.shape[:2], *qkv.shape[-2:], dtype=qkv.dtype)
    results = []
    for x in (qkv.detach(), qkv.clone(memory_format=torch.contiguous_format)):
        x.requires_grad_()
        out = ops.attention(x, backend=backend)
        varlen = ops.attention(x[0], seq_lens=(1, x.shape[1] - 1), backend=backend)
        p = ops.attention_probabilities(x, slice(1, 8, 3), backend=backend)
        results.append([out, varlen, p, *torch.autograd.grad([out, varlen, p], x, [dout, dout[0], p.detach()])])
    for strided, copied in zip(*results, strict=True):
        torch.testing.assert_close(strided, copied, atol=atol, rtol=0)


@runs_triton
def test_a_strided_gradient_gives_what_a_copy_gives() -> None:
    qkv = random_qkv(2, 9).requires_grad_()
    out = ops.attention(qkv, backend="triton")
    dout = random(2, 2, 9, 64).transpose(1, 2)
    for g in (dout, random(1, 1, 1, 64).expand(2, 9, 2, 64)):
        strided, copied = (torch.autograd.grad(out, qkv, d, retain_graph=True)[0] for d in (g, g.contiguous()))
        assert torch.equal(strided, copied)


@pytest.mark.sanitize
@pytest.mark.parametrize("seq_len", [1, 9, 80])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_backend
def test_nan_and_inf_stay_in_their_image_and_head(backend: str, bad: float, seq_len: int) -> None:
    for part in range(3):
        qkv = random_qkv(3, seq_len, dtype=torch.float16)
        qkv[1, seq_len // 2, part, 0, 5] = bad
        packed = ops.attention(qkv.flatten(0, 1), seq_lens=(seq_len,) * 3, backend=backend)
        for out in (ops.attention(qkv, backend=backend), packed.unflatten(0, (3, -1))):
            assert out[::2].isfinite().all()
            assert out[1, :, 1].isfinite().all()
            if backend == "triton":  # torch's CPU kernel drops some of them
                assert torch.equal(out.isfinite(), reference.attention(qkv).isfinite())


@each_backend
def test_empty_input_gives_an_empty_result(backend: str) -> None:
    for shape in ((0, 5), (2, 0)):
        qkv = random_qkv(*shape).requires_grad_()
        out = ops.attention(qkv, backend=backend)
        assert out.shape == (*shape, 2, 64)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    assert ops.attention_probabilities(random_qkv(1, 5), slice(3, 3), backend=backend).shape == (1, 2, 0, 5)


# Refusals and contiguity


def test_the_result_is_contiguous_with_two_kernels_of_torch() -> None:
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            assert ops.attention(random_qkv(2, 9, dtype=torch.float16)).is_contiguous()


DENSE_REFUSALS = [
    ("triton", torch.float64, 64, 0.0, r"takes fp16, bf16 and fp32, got torch\.float64"),
    ("triton", torch.float16, 48, 0.0, "takes a head_dim of 32, 64, 128, got 48"),
    ("triton", torch.float16, 64, 0.1, "has no dropout, got dropout_p = 0.1"),
]


@fakes_cuda
@pytest.mark.parametrize(("backend", "dtype", "head_dim", "dropout_p", "reason"), DENSE_REFUSALS)
def test_refusals_say_why(backend: str, dtype: torch.dtype, head_dim: int, dropout_p: float, reason: str) -> None:
    with FakeTensorMode():
        qkv = torch.empty(2, 9, 3, 2, head_dim, device="cuda", dtype=dtype)
        with pytest.raises(BackendError, match=reason):
            ops.attention(qkv, dropout_p=dropout_p, backend=backend)
        with pytest.raises(BackendError, match=reason):
            ops.attention(qkv[0], seq_lens=(4, 5), dropout_p=dropout_p, backend=backend)


@each_backend
@pytest.mark.parametrize("key", [0, 64], ids=["in a tile", "in the tail"])
def test_a_key_of_infinite_negative_score_gets_no_weight(backend: str, key: int) -> None:
    qkv = random(1, 65, 3, 1, 64)
    qkv[:, :, 0] = qkv[:, :, 0].abs()
    qkv[0, key, 1, 0, 5] = float("-inf")
    without = torch.cat([qkv[:, :key, 1:], qkv[:, key + 1 :, 1:]], dim=1)
    scores = torch.einsum("bihd,bjhd->bhij", qkv[:, :, 0].double(), without[:, :, 0].double()) / 8
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), without[:, :, 1].double())
    torch.testing.assert_close(ops.attention(qkv, backend=backend).double(), expected, atol=1e-5, rtol=0)
    p = ops.attention_probabilities(qkv, backend=backend)
    assert (p[..., key] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))


def test_fx_traces_attention_and_its_weights() -> None:
    qkv = random_qkv(2, 5)
    for function in (ops.attention, ops.attention_probabilities):
        traced = torch.fx.symbolic_trace(lambda x: function(x))  # noqa: B023
        assert torch.equal(traced(qkv), function(qkv))


# Registration with torch


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_registered_ops_pass_opcheck(requires_grad: bool, strided: bool) -> None:
    qkv = random_qkv(3, 5, heads=1, head_dim=32).transpose(0, 1) if strided else random_qkv(5, 3, heads=1, head_dim=32)
    qkv.requires_grad_(requires_grad)
    packed = qkv[:, 1:2].detach().transpose(0, 1).requires_grad_(requires_grad)
    packing = torch.tensor([0, 1, 5], dtype=torch.int32, device=DEVICE), 4
    library = torch.ops.dinov2_fast
    opcheck(library.attention.default, (qkv, None, None, None))
    opcheck(library.attention.default, (packed, *packing, None))
    opcheck(library.attention_probabilities.default, (qkv, 0, 3, 2))
    if strided and not requires_grad:
        for x, lengths in ((qkv, (None, None)), (packed, packing)):
            opcheck(library.attention.default, (x, *lengths, 0.1))
            saved = library.attention(x, *lengths, None)
            opcheck(library.attention_backward.default, (x[:, :, 0], x, *saved, *lengths))


@runs_triton
def test_compiled_as_one_graph_with_gradients() -> None:
    def step(qkv: Tensor) -> Tensor:
        out = ops.attention(qkv, backend="triton") * 2
        packed = ops.attention(qkv.flatten(0, 1), seq_lens=(3, 1, 6), backend="triton")
        p = ops.attention_probabilities(qkv, slice(0, 1), backend="triton")
        return out.sum((1, 2)) + packed.sum() + p.square().sum()

    qkv = random_qkv(2, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, [qkv])[0], gradients(step, [qkv])[0])
    with torch.inference_mode():
        torch.testing.assert_close(compiled(qkv), step(qkv))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_gives_the_dtype_torch_gives(backend: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 5, dtype=dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = ops.attention(qkv, backend=backend)
        packed = ops.attention(qkv[0], seq_lens=(2, 3), backend=backend)
        p = ops.attention_probabilities(qkv, backend=backend)
        assert out.dtype == packed.dtype == F.scaled_dot_product_attention(*qkv.unbind(2)).dtype == torch.bfloat16
        assert p.dtype == ops.attention_probabilities(qkv, backend="torch").dtype
    assert torch.autograd.grad(out.sum() + packed.sum() + p.square().sum(), qkv)[0].dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("seq_lens", [None, (30, 30, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_half_precision_is_computed_in_fp32_on_a_cpu(
    dtype: torch.dtype, seq_lens: tuple[int, ...] | None, autocast: bool
) -> None:
    qkv = torch.randn((2, 67, 3, 2, 64) if seq_lens is None else (67, 3, 2, 64)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = ops.attention(qkv, seq_lens=seq_lens)
    expected = ops.attention(qkv.float(), seq_lens=seq_lens, backend="torch").to(dtype)
    assert torch.equal(found, expected)
    dout = torch.randn_like(found)
    assert torch.equal(*(torch.autograd.grad(out, qkv, dout)[0] for out in (found, expected)))
    assert not torch.equal(found, ops.attention(qkv, seq_lens=seq_lens, backend="torch"))
