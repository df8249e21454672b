"""The CUDA kernels of the op attention: the rules of tests/ops/test_attention.py, refusals, and checks of the launch.

Without a GPU, `-p tests.cuda_on_host` runs everything except the products and the softmax between them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.ops import _attention_cuda, _backends, attention
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.attention_cases import (
    STRIDES,
    assert_gradient_obeys_the_rule,
    assert_one_step,
    assert_one_token_passes_its_gradient_to_its_value,
    exact_gradient,
    plain_attention,
    plain_scores,
    qkv_of_all_sizes,
    random_qkv,
)
from tests.helpers.devices import (
    DEVICE,
    assert_compiles_whole,
    fakes_cuda,
    gradients,
    on_gpu,
    opcheck,
    poisoned_memory,
    random,
    runs_cuda,
    runs_triton,
)

QUERIES = 192  # of a block, which reads 96 keys at a time
# (batch, tokens, heads): one token; tokens around a warp group, a tile of keys and a tile of queries; several images.
SIZES = [
    *((1, 1, 1), (3, 63, 1), (1, 64, 6), (3, 65, 2)),
    *((1, 96, 2), (3, 97, 1), (1, 192, 1), (1, 193, 2), (1, 257, 6), (2, 261, 1)),
]
# Of the first three, some of 132 multiprocessors compute several blocks. The last one has the longest sequence.
LARGE = [(8, 257, 12), (64, 261, 6), (4, 1370, 6), (2, 5477, 1)]

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
bf16_first = pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu_first)], ids=str
)


def _cuda(qkv: Tensor, **options: Any) -> Tensor:
    return attention(qkv, backend="cuda", **options)


def _with_lse(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dinov2_fast.attention_cuda(qkv, True)


def _assert_obeys_the_rule(qkv: Tensor) -> None:
    with poisoned_memory():
        out = _cuda(qkv)
        with_lse, lse = _with_lse(qkv)
    assert out.is_contiguous()
    reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))
    assert torch.equal(with_lse, out)  # the order of the sums is fixed
    ref, plain = reference.attention_lse(qkv), plain_scores(qkv.float()).logsumexp(-1)
    reference.assert_obeys_rule(lse, ref / math.log(2), plain / math.log(2))  # to base 2, as the backward reads it


@pytest.mark.sanitize
@runs_cuda
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_dtype
def test_attention_obeys_the_rule(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    _assert_obeys_the_rule(random_qkv(*size, dtype=dtype))


@on_gpu
@runs_cuda
@pytest.mark.parametrize("size", LARGE, ids=str)
@bf16_first
def test_large_batches_and_long_sequences_obey_the_rule(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    _assert_obeys_the_rule(random_qkv(*size, dtype=dtype))


@runs_cuda
@runs_triton
@pytest.mark.parametrize("tokens", [2, 50, 97])
@each_dtype
def test_gradients_come_from_the_lse_that_it_keeps(dtype: torch.dtype, tokens: int) -> None:
    qkv = random_qkv(2, tokens, heads=1, dtype=dtype)
    with poisoned_memory():
        ours = gradients(_cuda, [qkv])[0]
    plain = gradients(lambda x: attention(x, backend="torch"), [qkv])[0]
    assert_gradient_obeys_the_rule(ours, exact_gradient(reference.attention, qkv), plain)


@runs_cuda
@runs_triton
@each_dtype
def test_one_token_passes_its_gradient_to_its_value(dtype: torch.dtype) -> None:
    assert_one_token_passes_its_gradient_to_its_value(_cuda, dtype)


@runs_cuda
def test_without_gradients_no_lse_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def launch(qkv: Tensor, out: Tensor, lse: Tensor | None) -> None:
        given.append(lse)

    monkeypatch.setattr(torch.ops.dinov2_fast_cuda, "attention_forward", launch)
    qkv = random_qkv(2, 5, dtype=torch.float16)
    _cuda(qkv)
    with torch.no_grad():
        _cuda(qkv.requires_grad_())
    assert given == [None, None]
    if _backends.TRITON_IS_INSTALLED:
        _cuda(qkv)
        assert given[-1].shape == (2, 2, 5)


@runs_cuda
@pytest.mark.parametrize("sign", [1, -1])
@each_dtype
def test_scores_far_from_zero_obey_the_rule(dtype: torch.dtype, sign: int) -> None:
    qkv = random_qkv(1, 100, heads=1, dtype=dtype)
    qkv[:, :, 0] += 6 * sign  # scores and lse of some hundred, all of one sign: exp(lse) is beyond fp32
    qkv[:, :, 1] += 6
    _assert_obeys_the_rule(qkv)


@runs_cuda
@each_dtype
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 65, heads=1, dtype=dtype)
    qkv[:, 3, 2] /= 1000
    qkv[:, 3, :2] = 2.0  # the token of the small value looks at little else
    out, ref, plain = _cuda(qkv), reference.attention(qkv), plain_attention(qkv)
    reference.assert_obeys_rule(out[:, 3], ref[:, 3], plain[:, 3])


@runs_cuda
@pytest.mark.parametrize("layout", STRIDES)
def test_strided_input_gives_what_a_copy_gives(layout: str) -> None:
    qkv = STRIDES[layout](random_qkv(3, 19, dtype=torch.float16))
    assert torch.equal(_cuda(qkv), _cuda(qkv.clone(memory_format=torch.contiguous_format)))


IN_PLACE = {"transposed", "strided", "offset", "heads", "heads first"}


@pytest.mark.parametrize("layout", STRIDES)
def test_what_can_be_read_in_place_is_not_copied(layout: str) -> None:
    qkv = STRIDES[layout](random_qkv(3, 19, dtype=torch.float16))
    assert (_attention_cuda._operand(qkv) is qkv) == (layout in IN_PLACE)


@pytest.mark.sanitize
@runs_cuda
@pytest.mark.parametrize("tokens", [5, 65, 100])
def test_what_lies_around_the_operands_is_not_read(tokens: int) -> None:
    qkv = random_qkv(2, tokens, heads=1, dtype=torch.float16)
    wide = torch.full((4, tokens + 2, 3, 3, 64), float("nan"), device=DEVICE).half()
    wide[1:-1, 1:-1, :, 1:-1] = qkv
    assert torch.equal(_cuda(wide[1:-1, 1:-1, :, 1:-1]), _cuda(qkv))


@runs_cuda
@pytest.mark.parametrize("tokens", [1, 9, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image_and_head(bad: float, tokens: int) -> None:
    for part in range(3):
        qkv = random_qkv(3, tokens, dtype=torch.float16)
        qkv[1, tokens // 2, part, 0, 5] = bad
        out, lse = _with_lse(qkv)
        exact = reference.attention(qkv).isfinite()
        assert not exact[1].all()
        assert torch.equal(out.isfinite(), exact)
        assert torch.equal(_cuda(qkv).isfinite(), exact)
        if part < 2:
            assert torch.equal(lse.isfinite(), exact.all(-1).transpose(1, 2))


@runs_cuda
def test_a_row_whose_scores_are_all_minus_infinity_is_nan() -> None:
    qkv = random_qkv(1, 100, heads=1, dtype=torch.float16)
    qkv[:, :, :2, :, 5] = 1.0
    qkv[0, 3, 0, 0, 5] = float("-inf")
    out, lse = _with_lse(qkv)
    expected = torch.arange(100, device=DEVICE) == 3
    assert torch.equal(out[0, :, 0].isnan().all(-1), expected)
    assert torch.equal(lse[0, 0].isnan(), expected)


@runs_cuda
@pytest.mark.parametrize("key", [0, 64, 99])
def test_a_key_of_infinite_negative_score_gets_no_weight(key: int) -> None:
    qkv = random_qkv(1, 100, heads=1, dtype=torch.float16)
    qkv[:, :, 0] = qkv[:, :, 0].abs()
    qkv[0, key, 1, 0, 5] = float("-inf")
    reference.assert_obeys_rule(_cuda(qkv), reference.attention(qkv), plain_attention(qkv))


@runs_cuda
def test_empty_input_gives_an_empty_result() -> None:
    for batch, tokens in ((0, 5), (2, 0)):
        out, lse = _with_lse(random_qkv(batch, tokens, dtype=torch.float16))
        assert out.shape == (batch, tokens, 2, 64)
        assert lse.shape == (batch, 2, tokens)


@runs_cuda
@pytest.mark.parametrize("tokens", [1, 65, 100])
@each_dtype
def test_e4m3_is_one_step_from_the_formula(dtype: torch.dtype, tokens: int) -> None:
    qkv = qkv_of_all_sizes(1, tokens, dtype)
    assert_one_step(_cuda(qkv, scale=0.1), reference.attention(qkv), plain_attention(qkv), 0.1)


@pytest.mark.gpu_large
@on_gpu
@runs_cuda
def test_more_than_two_to_the_31_elements() -> None:
    """The last image of so large a batch has the same result as alone."""
    qkv = torch.randn(1, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16).repeat(2750, 1, 1, 1, 1)
    assert qkv.numel() > 2**31
    qkv[-1] = torch.randn_like(qkv[-1])
    for large, alone in zip(_with_lse(qkv), _with_lse(qkv[-1:]), strict=True):
        assert torch.equal(large[-1:], alone)


# Registration with torch


@runs_cuda
@pytest.mark.parametrize("with_lse", [False, True])
def test_registered_ops_pass_opcheck(with_lse: bool) -> None:
    for qkv in (random_qkv(2, 3, 1, dtype=torch.float16), random_qkv(3, 2, 1, dtype=torch.bfloat16).transpose(0, 1)):
        opcheck(torch.ops.dinov2_fast.attention_cuda.default, (qkv, with_lse))


@runs_cuda
def test_compiled_as_one_graph_and_in_inference_mode() -> None:
    assert_compiles_whole(lambda x: _cuda(x * 2), [random_qkv(2, 5, dtype=torch.float16)])


@runs_cuda
@runs_triton
def test_compiled_as_one_graph_with_gradients() -> None:
    qkv = random_qkv(2, 5, dtype=torch.float16)
    compiled = torch.compile(_cuda, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradients(compiled, [qkv])[0], gradients(_cuda, [qkv])[0])


@runs_cuda
def test_autocast_gives_the_dtype_torch_gives() -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _cuda(random_qkv(1, 5, dtype=torch.float16)).dtype == torch.bfloat16


# Refusals


REFUSALS = {
    r"takes fp16 and bf16, got torch\.float32": lambda qkv: _cuda(qkv.float()),
    "takes a head_dim of 64, got 32": lambda qkv: _cuda(qkv[..., :32]),
    r"has no dropout, got dropout_p = 0\.1": lambda qkv: _cuda(qkv, dropout_p=0.1),
    "needs triton for its gradient": lambda qkv: _cuda(qkv.requires_grad_()),
    "has no backend 'cuda'": lambda qkv: _cuda(qkv[0], seq_lens=(2, 3)),
}


@fakes_cuda
@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "missing_extension", lambda: None)
    monkeypatch.setattr(_backends, "TRITON_IS_INSTALLED", False)
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 2, 64, device="cuda", dtype=torch.half)
        with pytest.raises(BackendError, match=reason):
            REFUSALS[reason](qkv)


@fakes_cuda
@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_devices_other_than_sm_90_are_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "capability", lambda device: capability)
    monkeypatch.setattr(_backends, "missing_extension", lambda: None)
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 2, 64, device="cuda", dtype=torch.half)
        with pytest.raises(BackendError, match=f"runs on sm_90 only, got sm_{capability[0]}{capability[1]}"):
            _cuda(qkv)


def _wrong(**changes: Tensor) -> list[Tensor]:
    """Arguments of the raw launch, correct except for the changes."""
    right = {"qkv": _half(2, 5, 3, 4, 64), "out": _half(2, 5, 4, 64), "lse": random(2, 4, 5)}
    return list({**right, **changes}.values())


def _half(*size: int) -> Tensor:
    return random(*size, dtype=torch.float16)


MISTAKES = {
    "qkv must be bf16 or fp16, got fp32": lambda: _wrong(qkv=random(2, 5, 3, 4, 64)),
    r"qkv must have the shape \(batch, tokens, 3, heads, 64\), got \(2, 5, 3, 4, 32\)": lambda: _wrong(
        qkv=_half(2, 5, 3, 4, 32)
    ),
    r"qkv must have the shape .*, got \(2, 5, 2, 4, 64\)": lambda: _wrong(qkv=_half(2, 5, 2, 4, 64)),
    r"qkv must have the shape .*, got \(5, 3, 4, 64\)": lambda: _wrong(qkv=_half(5, 3, 4, 64)),
    "qkv must have contiguous heads": lambda: _wrong(qkv=_half(2, 5, 3, 4, 128)[..., ::2]),
    "qkv must begin at a multiple of 16 bytes": lambda: _wrong(qkv=_half(2, 5, 3, 4, 72)[..., 4:68]),
    "heads that start at multiples of 16 bytes .*, got a stride of 68": lambda: _wrong(
        qkv=_half(2, 5, 3, 4, 68)[..., :64]
    ),
    "do not overlap, got a stride of 0": lambda: _wrong(qkv=_half(1, 5, 3, 4, 64).expand(2, -1, -1, -1, -1)),
    "out must be fp16, got bf16": lambda: _wrong(out=_half(2, 5, 4, 64).bfloat16()),
    r"out must have the shape \(2, 5, 4, 64\), got \(2, 4, 5, 64\)": lambda: _wrong(out=_half(2, 4, 5, 64)),
    r"out must have the shape \(2, 5, 4, 64\), got \(2, 5, 256\)": lambda: _wrong(out=_half(2, 5, 256)),
    "out must be contiguous": lambda: _wrong(out=_half(2, 4, 5, 64).transpose(1, 2)),
    "out must begin at a multiple of 16 bytes": lambda: _wrong(out=_half(2561)[1:].view(2, 5, 4, 64)),
    "lse must be fp32, got fp16": lambda: _wrong(lse=_half(2, 4, 5)),
    r"lse must have the shape \(2, 4, 5\), got \(2, 5, 4\)": lambda: _wrong(lse=random(2, 5, 4)),
    "lse must be contiguous": lambda: _wrong(lse=random(2, 5, 4).transpose(1, 2)),
}


@runs_cuda
@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_launch_with_wrong_arguments_says_what_is_wrong(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        torch.ops.dinov2_fast_cuda.attention_forward(*MISTAKES[sentence]())


# The offsets of operands

LAYOUTS = {
    "packed": lambda *size: torch.empty(*size, device="meta"),
    "tokens first": lambda batch, tokens, *size: torch.empty(tokens, batch, *size, device="meta").transpose(0, 1),
    "heads first": lambda batch, tokens, kinds, heads, head_dim: torch.empty(
        batch, heads, kinds, tokens, head_dim, device="meta"
    ).transpose(1, 3),
}
LAYOUT = """
import ctypes, json, sys, torch
layout = ctypes.CDLL(sys.argv[1]).dinov2_fast_attention_layout
for arguments in json.loads(sys.argv[2]):
    out = (ctypes.c_int64 * 3)()
    layout(*((ctypes.c_int64 * len(numbers))(*numbers) for numbers in arguments), out)
    print(*out)
"""


def test_the_offsets_of_elements_are_those_of_torch() -> None:
    from tests import cuda_on_host

    if cuda_on_host.reason_against():
        pytest.skip(cuda_on_host.reason_against())
    asked, expected = [], []
    for make in LAYOUTS.values():
        for tokens in (1, 63, 64, 65, QUERIES, 257, 261, 1370):
            for batch, heads in ((1, 1), (3, 1), (1, 6), (3, 6), (3000, 6)):  # 3000 x 1370: beyond 2^31 elements
                qkv = make(batch, tokens, 3, heads, 64)
                tiles = math.ceil(tokens / QUERIES)
                for kind in range(3):
                    at = batch - 1, tokens - 1, kind, heads - 1
                    asked.append([qkv.shape, qkv.stride(), at])
                    expected.append([tiles, tiles * batch * heads, qkv[at].storage_offset()])
    assert max(place for *_, place in expected) > 2**31
    # in a process of its own, because torch accepts the library's ops once and this process may have the extension
    command = [sys.executable, "-c", LAYOUT, str(cuda_on_host.build()), json.dumps(asked)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [list(map(int, line.split())) for line in said.splitlines()] == expected
