"""The op attention: dense, packed sequences of different lengths, and the weights themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2_fast import ops
from dinov2_fast.ops import _attention_peers, _registry
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.attention_cases import (
    E4M3,
    STRIDES,
    assert_gradient_obeys_the_rule,
    assert_one_step,
    exact_gradient,
    plain_attention,
    plain_scores,
    qkv_of_all_sizes,
    quantized,
    random_qkv,
)
from tests.helpers.devices import (
    BACKENDS,
    DEVICE,
    fakes_cuda,
    gradients,
    on_gpu,
    poisoned_memory,
    random,
    runs_triton,
    skip_without_opcheck,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One key, tails of each width with and without whole tiles, no tail; one to three tiles of queries of either size
SEQ_LENS = [1, 16, 17, 63, 64, 65, 127, 128, 129, 257, 261]
VARLEN = (1, 57, 1, 16, 1, 16)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _each_sequence(function: Callable[[Tensor], Tensor], qkv: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
    """What a dense function gives for each packed sequence."""
    return torch.cat([function(part[None])[0] for part in qkv.split(list(seq_lens))])


# Dense


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
def test_other_head_dims(backend: str, dtype: torch.dtype, seq_len: int, head_dim: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, head_dim=head_dim, dtype=dtype)
    with poisoned_memory():
        out = ops.attention(qkv, backend=backend)
        ours = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0]
    reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))
    plain, exact = gradients(ops.attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    assert_gradient_obeys_the_rule(ours, exact, plain)


@pytest.mark.parametrize("seq_len", [1370, 2000])
@each_backend
def test_long_sequences(backend: str, seq_len: int) -> None:
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
    plain, exact = gradients(ops.attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    assert_gradient_obeys_the_rule(ours, exact, plain)


@each_dtype
@each_backend
def test_one_token_passes_its_gradient_to_its_value(backend: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(2, 1, dtype=dtype)
    dq, dk, dv = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0].unbind(2)
    exact = exact_gradient(reference.attention, qkv)[:, :, 2]
    torch.testing.assert_close(dv.double(), exact, atol=0, rtol=torch.finfo(dtype).eps)
    # 0 but for the rounding of two sums of 64 products, which cancel
    assert max(dq.abs().max(), dk.abs().max()) <= 64 * torch.finfo(torch.float32).eps * qkv.abs().max() ** 2


@runs_triton
@pytest.mark.parametrize("seq_len", [5, 64, 65])
def test_lse_obeys_the_rule(seq_len: int) -> None:
    qkv = random_qkv(2, seq_len)
    with poisoned_memory():
        _, lse = torch.ops.dinov2_fast.attention(qkv, None, None, None)
    ref, plain = reference.attention_lse(qkv), plain_scores(qkv).logsumexp(-1)
    reference.assert_obeys_rule(lse, ref / math.log(2), plain / math.log(2))  # it is kept to base 2


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
def test_scores_far_from_zero(backend: str, seq_len: int, sign: int) -> None:
    qkv = random_qkv(1, seq_len, heads=1, dtype=torch.float16)
    qkv[:, :, 0] += 6 * sign  # scores and lse of some hundred, all of one sign: exp(-lse) is beyond fp32
    qkv[:, :, 1] += 6
    reference.assert_obeys_rule(ops.attention(qkv, backend=backend), reference.attention(qkv), plain_attention(qkv))
    ours = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0]
    plain, exact = gradients(ops.attention, [qkv])[0], exact_gradient(reference.attention, qkv)
    reference.assert_obeys_rule(ours, exact, plain)


def test_gradients_in_fp64() -> None:
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
    if backend != "torch" and layout == "misaligned":  # narrower loads may give the threads other elements to sum
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
            if backend == "triton":  # torch's CPU kernel loses some
                assert torch.equal(out.isfinite(), reference.attention(qkv).isfinite())


@each_backend
def test_nothing_in_gives_nothing(backend: str) -> None:
    for shape in ((0, 5), (2, 0)):
        qkv = random_qkv(*shape).requires_grad_()
        out = ops.attention(qkv, backend=backend)
        assert out.shape == (*shape, 2, 64)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    assert ops.attention_probabilities(random_qkv(1, 5), slice(3, 3), backend=backend).shape == (1, 2, 0, 5)


# Packed sequences


@pytest.mark.parametrize("seq_lens", [(5,), VARLEN, (70, 3), (64, 40, 128)], ids=str)
@each_dtype
@each_backend
def test_varlen_obeys_the_rule(backend: str, dtype: torch.dtype, seq_lens: tuple[int, ...]) -> None:
    qkv = random_qkv(1, sum(seq_lens), dtype=dtype)[0]
    with poisoned_memory():
        out = ops.attention(qkv, seq_lens=seq_lens, backend=backend)
        ours = gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend=backend), [qkv])[0]
    assert out.is_contiguous()
    ref, plain = (_each_sequence(f, qkv, seq_lens) for f in (reference.attention, plain_attention))
    reference.assert_obeys_rule(out, ref, plain)
    for one, exact, usual in zip(*(x.split(list(seq_lens)) for x in (out, ref, plain)), strict=True):
        reference.assert_obeys_rule(one, exact, usual)
    exact = exact_gradient(lambda x: _each_sequence(reference.attention, x, seq_lens), qkv)
    plain = gradients(lambda x: ops.attention(x, seq_lens=seq_lens), [qkv])[0]
    assert_gradient_obeys_the_rule(ours, exact, plain)


def test_lengths_packed_in_inference_mode_serve_training_later() -> None:
    seq_lens = (2, 11, 3)
    qkv = random_qkv(1, 16)[0]
    with torch.inference_mode():
        offsets = _attention_peers.cu_seqlens(seq_lens, qkv.device)
    assert not offsets.is_inference()
    assert offsets.tolist() == [0, 2, 13, 16]
    assert _attention_peers.cu_seqlens(seq_lens, qkv.device) is offsets  # no second copy to the device


def test_fake_lengths_are_not_kept() -> None:
    with FakeTensorMode():
        _attention_peers.cu_seqlens((4, 12), torch.device(DEVICE))
    assert _attention_peers.cu_seqlens((4, 12), torch.device(DEVICE)).tolist() == [0, 4, 16]


# e4m3


@pytest.mark.parametrize(("seq_len", "head_dim"), [(1, 64), (50, 32), (65, 128), (257, 64)])
@each_dtype
@each_backend
def test_fp8_is_one_step_from_the_formula(backend: str, dtype: torch.dtype, seq_len: int, head_dim: int) -> None:
    qkv = qkv_of_all_sizes(1 if seq_len > 100 else 2, seq_len, dtype, head_dim)
    with poisoned_memory():
        y = ops.attention(qkv, scale=0.1, backend=backend)
    assert_one_step(y, reference.attention(qkv), plain_attention(qkv), 0.1)


@pytest.mark.parametrize("seq_lens", [VARLEN, (70, 3)], ids=str)
@each_dtype
@each_backend
def test_varlen_fp8_is_one_step_from_the_formula(backend: str, dtype: torch.dtype, seq_lens: tuple[int, ...]) -> None:
    qkv = qkv_of_all_sizes(1, sum(seq_lens), dtype)[0]
    with poisoned_memory():
        y = ops.attention(qkv, seq_lens=seq_lens, scale=0.1, backend=backend)
    exact, plain = (_each_sequence(f, qkv, seq_lens) for f in (reference.attention, plain_attention))
    assert_one_step(y, exact, plain, 0.1)


@pytest.mark.parametrize("scale", [2.0**-9, 0.003])
@pytest.mark.parametrize("seq_len", [50, 65])
@each_dtype
@each_backend
def test_fp8_is_the_other_form_rounded(backend: str, dtype: torch.dtype, seq_len: int, scale: float) -> None:
    """Where sums cancel, the errors of fp16 and bf16 are many steps, but those of both forms are the same, up to the
    rounding of the other to fp16 or bf16.
    """
    qkv, rounding = random_qkv(1, seq_len, dtype=dtype), max(torch.finfo(dtype).eps / 2, 1e-6)
    packed, seq_lens = qkv[0], (seq_len - 7, 7)
    for y, out in (
        (ops.attention(qkv, scale=scale, backend=backend), ops.attention(qkv, backend=backend)),
        (
            ops.attention(packed, seq_lens=seq_lens, scale=scale, backend=backend),
            ops.attention(packed, seq_lens=seq_lens, backend=backend),
        ),
    ):
        ends = [quantized(out.double() * (1 + sign * rounding), scale) for sign in (-1, 1)]
        assert torch.minimum(*(reference.e4m3_steps(y, end) for end in ends)).max() == 0


@pytest.mark.parametrize("layout", STRIDES)
@each_backend
def test_fp8_of_strided_input_is_that_of_a_copy(backend: str, layout: str) -> None:
    qkv = STRIDES[layout](random_qkv(3, 19, dtype=torch.float64 if backend == "torch" else torch.float16))
    copy = qkv.clone(memory_format=torch.contiguous_format)
    both = [ops.attention(x, scale=0.01, backend=backend) for x in (qkv, copy)]
    assert reference.e4m3_steps(*both).max() <= (layout == "misaligned")
    assert both[0].shape == (*qkv.shape[:2], *qkv.shape[-2:])
    assert both[0].is_contiguous()


@each_backend
def test_fp8_of_nothing_is_nothing(backend: str) -> None:
    for shape in ((0, 5), (2, 0)):
        y = ops.attention(random_qkv(*shape), scale=0.1, backend=backend)
        assert (y.shape, y.dtype) == ((*shape, 2, 64), E4M3)


@each_backend
def test_fp8_is_for_inference(backend: str) -> None:
    qkv = random_qkv(1, 5).requires_grad_()
    for run in (
        lambda: ops.attention(qkv, scale=0.1, backend=backend),
        lambda: ops.attention(qkv[0], seq_lens=(2, 3), scale=0.1, backend=backend),
    ):
        with pytest.raises(BackendError, match="inference only"):
            run()
        with torch.no_grad():
            run()


@fakes_cuda
def test_fp8_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(qkv: Tensor, reason: str) -> None:
        for run in (
            lambda: ops.attention(qkv, scale=0.1, backend="triton"),
            lambda: ops.attention(qkv[0], seq_lens=(4, 5), scale=0.1, backend="triton"),
        ):
            with pytest.raises(BackendError, match=reason):
                run()

    with FakeTensorMode():
        qkv = torch.empty(2, 9, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
        refused(qkv.double(), r"takes fp16, bf16 and fp32, got torch\.float64")
        refused(qkv[..., :48], "takes a head_dim of 32, 64, 128, got 48")
        monkeypatch.setattr(_registry, "_capability", lambda index: (8, 6))
        refused(qkv, "needs a device with e4m3, sm_89 or newer, got sm_86")
        assert ops.attention(qkv, scale=0.1).dtype == E4M3  # torch's form runs anywhere


@runs_triton
def test_fp8_compiled_whole() -> None:
    def step(qkv: Tensor) -> Tensor:
        packed = ops.attention(qkv.flatten(0, 1), seq_lens=(3, 1, 6), scale=0.05, backend="triton")
        return torch.stack([ops.attention(qkv, scale=0.1, backend="triton").float().flatten(0, 1), packed.float()])

    qkv = random_qkv(2, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(qkv), step(qkv))


# Weights

ROWS = [slice(None), slice(0, 1), slice(2, 5), slice(-3, None), slice(1, 70, 3)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@each_dtype
@each_backend
def test_probabilities_obey_the_rule(backend: str, dtype: torch.dtype, rows: slice) -> None:
    qkv = random_qkv(2, 75, dtype=dtype)

    def weights(x: Tensor, backend: str) -> Tensor:
        return ops.attention_probabilities(x, rows, backend=backend)

    with poisoned_memory():
        p = weights(qkv, backend)
        ours = gradients(lambda x: weights(x, backend), [qkv])[0]
    assert p.is_contiguous()
    reference.assert_obeys_rule(p, reference.attention_probabilities(qkv)[:, :, rows], weights(qkv, "torch"))
    exact = exact_gradient(lambda x: reference.attention_probabilities(x)[:, :, rows], qkv)
    plain = gradients(lambda x: weights(x, "torch"), [qkv])[0]
    for ours_, exact_, plain_ in zip(*(x.unbind(2)[:2] for x in (ours, exact, plain)), strict=True):
        reference.assert_obeys_rule(ours_, exact_, plain_)
    assert (ours[:, :, 2] == 0).all()


# Other implementations


def test_the_result_is_contiguous_with_every_kernel_of_torch() -> None:
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            assert ops.attention(random_qkv(2, 9, dtype=torch.float16)).is_contiguous()


DENSE_REFUSALS = [
    ("triton", torch.float64, 64, 0.0, r"takes fp16, bf16 and fp32, got torch\.float64"),
    ("triton", torch.float16, 48, 0.0, "takes a head_dim of 32, 64, 128, got 48"),
    ("triton", torch.float16, 64, 0.1, "has no dropout, asked for with p = 0.1"),
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


@fakes_cuda
def test_refusals_of_peers_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="needs a cuda tensor, got one on cpu"):
        ops.attention(random_qkv(1, 9).cpu(), backend="xformers")
    with pytest.raises(
        BackendError,
        match=r"probabilities: there is no backend .xformers. for torch.float32, only torch, triton",
    ):
        ops.attention_probabilities(random_qkv(1, 9), backend="xformers")
    with FakeTensorMode():
        qkv = torch.empty(2, 1, 3, 2, 64, device="cuda", dtype=torch.float16)
        packed = torch.empty(9, 3, 2, 64, device="cuda", dtype=torch.float16)
        with pytest.raises(BackendError, match=r"has no dropout, asked for with p = 0\.5"):
            ops.attention(packed, seq_lens=(4, 5), dropout_p=0.5, backend="varlen_attn")
        with pytest.raises(BackendError, match=r"takes fp16 and bf16, got torch\.float32"):
            ops.attention(packed.float(), seq_lens=(4, 5), backend="varlen_attn")
        with pytest.raises(BackendError, match="takes a head_dim up to 256, got 320"):
            ops.attention(packed.repeat(1, 1, 1, 5), seq_lens=(4, 5), backend="varlen_attn")
        monkeypatch.setattr(_attention_peers, "_XFORMERS_IS_INSTALLED", True)
        with pytest.raises(BackendError, match=r"takes fp16, bf16 and fp32, got torch\.float64"):
            ops.attention(qkv.double(), backend="xformers")
        with pytest.raises(BackendError, match="takes a head_dim that 8 divides, got 12"):
            ops.attention(qkv[..., :12], backend="xformers")
        monkeypatch.setenv("XFORMERS_DISABLED", "1")
        with pytest.raises(BackendError, match="switched off by XFORMERS_DISABLED"):
            ops.attention(qkv, backend="xformers")
        monkeypatch.setattr(_attention_peers, "_XFORMERS_IS_INSTALLED", False)
        with pytest.raises(BackendError, match="xformers, which is not installed"):
            ops.attention(packed, seq_lens=(4, 5), backend="xformers")


def test_results_of_peers_become_e4m3_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the queries as what a peer's attention gives."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_: q)
    peer = SimpleNamespace(memory_efficient_attention=lambda q, k, v, **_: q)
    monkeypatch.setitem(sys.modules, "xformers.ops", peer)
    monkeypatch.setattr(_attention_peers, "_block_diagonal_mask", lambda *_: None)
    qkv = torch.randn(2, 9, 3, 2, 64).half()
    for y, queries in (
        (_attention_peers.varlen_attn(qkv[0], (4, 5), 0.0, 0.01), qkv[0, :, 0]),
        (_attention_peers.xformers_attention(qkv[0], (4, 5), 0.0, 0.01), qkv[0, :, 0]),
        (_attention_peers.xformers_attention(qkv, None, 0.0, 0.01), qkv[:, :, 0]),
    ):
        assert torch.equal(y.float(), quantized(queries.float(), 0.01).float())
    assert torch.equal(_attention_peers.varlen_attn(qkv[0], (4, 5), 0.0, None), qkv[0, :, 0])


@each_backend
def test_lengths_that_do_not_sum_up_are_refused(backend: str) -> None:
    for seq_lens in ((4, 8), (4, 4)):
        with pytest.raises(ValueError, match=rf"seq_lens sum to {sum(seq_lens)}, but qkv has 10 tokens"):
            ops.attention(random(10, 3, 2, 64), seq_lens=seq_lens, backend=backend)


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


@runs_triton
def test_probabilities_of_any_length_are_one_graph() -> None:
    def rest(qkv: Tensor) -> Tensor:
        return ops.attention_probabilities(qkv, slice(1, None), backend="triton")

    compiled = torch.compile(rest, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seq_len in (7, 9, 12):
            qkv = random(2, seq_len, 3, 2, 32)
            torch.testing.assert_close(compiled(qkv), rest(qkv), atol=1e-5, rtol=0)


@on_gpu
@pytest.mark.parametrize("backend", ["varlen_attn", "xformers"])
def test_peers_obey_the_rule(backend: str) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers.ops")
    qkv = random_qkv(2, 257, dtype=torch.bfloat16)
    if backend != "varlen_attn":
        out = ops.attention(qkv, backend=backend)
        assert out.is_contiguous()
        reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))
        gradient, exact = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0], reference.attention
        reference.assert_obeys_rule(gradient, exact_gradient(exact, qkv), gradients(plain_attention, [qkv])[0])
    packed, seq_lens = qkv.flatten(0, 1), (200, 57, 257)
    out = ops.attention(packed, seq_lens=seq_lens, backend=backend)
    ref, plain = (_each_sequence(f, packed, seq_lens) for f in (reference.attention, plain_attention))
    reference.assert_obeys_rule(out, ref, plain)


def test_fx_traces_attention_and_its_weights() -> None:
    qkv = random_qkv(2, 5)
    for function in (ops.attention, ops.attention_probabilities):
        traced = torch.fx.symbolic_trace(lambda x: function(x))  # noqa: B023
        assert torch.equal(traced(qkv), function(qkv))


# The registered ops


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, strided: bool) -> None:
    skip_without_opcheck()
    qkv = random_qkv(3, 5, heads=1, head_dim=32).transpose(0, 1) if strided else random_qkv(5, 3, heads=1, head_dim=32)
    qkv.requires_grad_(requires_grad)
    packed = qkv[:, 1:2].detach().transpose(0, 1).requires_grad_(requires_grad)
    packing = torch.tensor([0, 1, 5], dtype=torch.int32, device=DEVICE), 4
    library = torch.ops.dinov2_fast
    torch.library.opcheck(library.attention.default, (qkv, None, None, None))
    torch.library.opcheck(library.attention.default, (packed, *packing, None))
    torch.library.opcheck(library.attention_probabilities.default, (qkv, 0, 3, 2))
    if strided and not requires_grad:
        for x, lengths in ((qkv, (None, None)), (packed, packing)):
            torch.library.opcheck(library.attention.default, (x, *lengths, 0.1))
            saved = library.attention(x, *lengths, None)
            torch.library.opcheck(library.attention_backward.default, (x[:, :, 0], x, *saved, *lengths))


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
def test_fakes_have_the_strides_of_results(strided: bool) -> None:
    """`opcheck` does not look at strides."""
    qkv = random_qkv(3, 5).transpose(0, 1) if strided else random_qkv(5, 3)
    packed = qkv[:, 1:2].transpose(0, 1)
    packing = torch.tensor([0, 1, 5], dtype=torch.int32, device=DEVICE), 4
    library = torch.ops.dinov2_fast
    calls = [(library.attention_probabilities, (qkv, 0, 3, 2))]
    for x, lengths in ((qkv, (None, None)), (packed, packing)):
        saved = library.attention(x, *lengths, None)
        calls += [(library.attention, (x, *lengths, scale)) for scale in (None, 0.1)]
        calls += [(library.attention_backward, (x[:, :, 0], x, *saved, *lengths))]
    for op, args in calls:
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
        for fake, real in zip(*((x,) if isinstance(x, Tensor) else x for x in (fakes, op(*args))), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@runs_triton
def test_compiled_whole_with_gradients() -> None:
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


@runs_triton
def test_the_surroundings_of_results_stay_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result lies between two strips of a number that nothing here computes."""
    new_empty, strips = Tensor.new_empty, []

    def between_strips(self: Tensor, *size: object, **options: object) -> Tensor:
        plain = new_empty(self, *size, **options)
        if plain.numel() == 0:  # the interpreter's own
            return plain
        whole = plain.new_full((plain.numel() + 8192,), -1234.0)
        strips.extend((whole[:4096], whole[-4096:]))
        return whole[4096:-4096].view(plain.shape)

    for dtype in DTYPES[:2]:
        for seq_len in (50, 65):
            qkv, seq_lens = random_qkv(1, seq_len, dtype=dtype), (1, seq_len - 1)
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "new_empty", between_strips)
                gradients(lambda x: ops.attention(x, backend="triton"), [qkv])
                gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend="triton"), [qkv[0]])  # noqa: B023
                ops.attention_probabilities(qkv, slice(0, 3), backend="triton")
    assert len(strips) == 2 * 4 * (2 * 4 + 1)  # out, lse, dqkv and delta; p
    assert all((strip == -1234.0).all() for strip in strips)


# On a GPU only


@on_gpu
@pytest.mark.parametrize("seq_len", [50, 257, 1370])
@each_dtype
def test_repeats_are_equal_bit_by_bit_while_the_device_is_busy(dtype: torch.dtype, seq_len: int) -> None:
    qkv = random_qkv(8, seq_len, heads=6, dtype=dtype)
    seq_lens = (seq_len, 1, seq_len - 1) + (2 * seq_len,) * 3
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run() -> list[Tensor]:
        with torch.cuda.stream(other):
            noise.matmul(noise)
        packed = qkv.flatten(0, 1)
        return [
            *gradients(lambda x: ops.attention(x, backend="triton"), [qkv]),
            *gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend="triton"), [packed]),
            ops.attention(qkv, backend="triton"),
            ops.attention_probabilities(qkv, slice(0, 17), backend="triton"),
        ]

    first = run()
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


@on_gpu
@pytest.mark.parametrize("form", ["dense", "varlen"])
def test_more_than_two_to_the_31_elements(form: str) -> None:
    """The last image of a batch that large gets what it gets alone."""
    batch, seq_len = 2750, 257

    def run(qkv: Tensor, dout: Tensor) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        if form == "dense":
            out = ops.attention(qkv, backend="triton")
        else:
            packed = ops.attention(qkv.flatten(0, 1), seq_lens=(seq_len,) * len(qkv), backend="triton")
            out = packed.unflatten(0, (-1, seq_len))
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    qkv = torch.randn(1, seq_len, 3, 16, 64, device="cuda", dtype=torch.bfloat16).repeat(batch, 1, 1, 1, 1)
    assert qkv.numel() > 2**31
    qkv[-1] = torch.randn_like(qkv[-1])
    dout = torch.randn_like(qkv[:1, :, 0])
    for large, alone in zip(run(qkv, dout.expand(batch, -1, -1, -1)), run(qkv[-1:], dout), strict=True):
        assert torch.equal(large[-1:], alone)


@on_gpu
def test_more_than_two_to_the_31_weights() -> None:
    qkv = torch.randn(2100, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    p = ops.attention_probabilities(qkv, backend="triton")
    assert p.numel() > 2**31
    assert torch.equal(p[-1:], ops.attention_probabilities(qkv[-1:], backend="triton"))


@on_gpu
@pytest.mark.parametrize("on_a_side_stream", [False, True])
def test_cuda_graphs_and_streams(on_a_side_stream: bool) -> None:
    qkv, seq_lens = random_qkv(2, 257, dtype=torch.bfloat16).requires_grad_(), (1, 200, 313)
    dout = random(2, 257, 2, 64, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        out = ops.attention(qkv, backend="triton")
        packed = ops.attention(qkv.flatten(0, 1), seq_lens=seq_lens, backend="triton")
        p = ops.attention_probabilities(qkv, slice(0, 1), backend="triton")
        gradient = torch.autograd.grad([out, packed], qkv, [dout, dout.flatten(0, 1)])
        return [out, packed, p, *gradient]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    with torch.cuda.stream(side) if on_a_side_stream else nullcontext():
        side.wait_stream(torch.cuda.default_stream())
        graph.replay()
        replayed = [x.detach().clone() for x in results]
        expected = run()
    torch.cuda.synchronize()
    for x, y in zip(replayed, expected, strict=True):
        assert torch.equal(x, y)
