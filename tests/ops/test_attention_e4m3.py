"""The op attention with results in e4m3."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops import _backends
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.attention_cases import (
    E4M3,
    PACKED_LENGTHS,
    STRIDES,
    assert_one_step,
    each_dtype,
    each_sequence,
    plain_attention,
    qkv_of_all_sizes,
    quantized,
    random_qkv,
)
from tests.helpers.devices import (
    each_backend,
    fakes_cuda,
    poisoned_memory,
    runs_triton,
)


@pytest.mark.parametrize(("seq_len", "head_dim"), [(1, 64), (50, 32), (65, 128), (257, 64)])
@each_dtype
@each_backend
def test_fp8_is_one_step_from_the_formula(backend: str, dtype: torch.dtype, seq_len: int, head_dim: int) -> None:
    qkv = qkv_of_all_sizes(1 if seq_len > 100 else 2, seq_len, dtype, head_dim)
    with poisoned_memory():
        y = ops.attention(qkv, scale=0.1, backend=backend)
    assert_one_step(y, reference.attention(qkv), plain_attention(qkv), 0.1)


@pytest.mark.parametrize("seq_lens", [PACKED_LENGTHS, (70, 3)], ids=str)
@each_dtype
@each_backend
def test_varlen_fp8_is_one_step_from_the_formula(backend: str, dtype: torch.dtype, seq_lens: tuple[int, ...]) -> None:
    qkv = qkv_of_all_sizes(1, sum(seq_lens), dtype)[0]
    with poisoned_memory():
        y = ops.attention(qkv, seq_lens=seq_lens, scale=0.1, backend=backend)
    exact, plain = (each_sequence(f, qkv, seq_lens) for f in (reference.attention, plain_attention))
    assert_one_step(y, exact, plain, 0.1)


@pytest.mark.parametrize("scale", [2.0**-9, 0.003])
@pytest.mark.parametrize("seq_len", [50, 65])
@each_dtype
@each_backend
def test_fp8_is_the_other_form_rounded(backend: str, dtype: torch.dtype, seq_len: int, scale: float) -> None:
    """Where sums cancel, the errors of fp16 and bf16 are many e4m3 steps. The result in e4m3 has the same errors as the
    result in fp16 or bf16, except for the rounding of the latter.
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
def test_fp8_of_empty_input_is_empty(backend: str) -> None:
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
        monkeypatch.setattr(_backends, "capability", lambda index: (8, 6))
        refused(qkv, "needs a device with e4m3, sm_89 or newer, got sm_86")
        assert ops.attention(qkv, scale=0.1).dtype == E4M3  # torch runs on any device


@runs_triton
def test_fp8_compiled_as_one_graph() -> None:
    def step(qkv: Tensor) -> Tensor:
        packed = ops.attention(qkv.flatten(0, 1), seq_lens=(3, 1, 6), scale=0.05, backend="triton")
        return torch.stack([ops.attention(qkv, scale=0.1, backend="triton").float().flatten(0, 1), packed.float()])

    qkv = random_qkv(2, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(qkv), step(qkv))
