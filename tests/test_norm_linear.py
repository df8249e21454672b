"""The op norm_linear: linears that read a raw stream with the statistics of its rows, and those that leave them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.backends import BackendError, choose
from tests import reference
from tests.devices import (
    BACKENDS,
    DEVICE,
    assert_compiles_whole,
    fakes_cuda,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

op = import_module("dinov2_fast.ops.norm_linear")  # not the function of that name
EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["linear", "gelu", "swiglu"]
# (rows, out_features, in_features): each leads the launcher to another tile; all tails, and none
SIZES = [(0, 96, 40), (1, 6, 8), (130, 256, 64), (131, 322, 72), (5, 66, 130)]
LARGE_MEAN = {torch.float32: 1000.0, torch.float16: 100.0, torch.bfloat16: 30.0}  # in standard deviations

each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_path = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("triton without TMA", marks=runs_triton)], indirect=True
)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, without_tma = request.param.partition(" ")
    if without_tma:
        monkeypatch.setattr("dinov2_fast.kernels.linear._can_use_tma", lambda matrix: False)
    return name


def _operands(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, shift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    x = random(rows, in_features, dtype=dtype, shift=shift)
    weight = random(out_features, in_features, scale=in_features**-0.5)
    weight = weight - weight.mean(1, keepdim=True)
    return x, weight.to(dtype), random(out_features, dtype=dtype)


def _run(form: str, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    statistics = op.row_statistics(x, backend=backend)
    run = op.norm_linear if form == "linear" else getattr(op, f"norm_linear_{form}")
    return run(x, statistics, weight, bias, EPS, backend=backend)


def _rstd(x: Tensor) -> Tensor:
    """In two passes, in the dtype of `x`."""
    centred = x - x.mean(-1, keepdim=True)
    return (centred.square().mean(-1, keepdim=True) + EPS) ** -0.5


def _exact(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = reference.linear(x, weight, None) * _rstd(x.double())
    z = z if bias is None else z + bias.double()
    if form == "swiglu":
        return z[..., 0::2] / (1.0 + torch.exp(-z[..., 0::2])) * z[..., 1::2]
    return reference.gelu(z) if form == "gelu" else z


def _plain(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = F.linear(x, weight) * _rstd(x.float())
    z = (z if bias is None else z + bias).to(x.dtype)
    if form == "swiglu":
        return F.silu(z[..., 0::2]) * z[..., 1::2]
    return F.gelu(z) if form == "gelu" else z


@each_size
@each_dtype
@each_form
@each_path
def test_every_form_obeys_the_rule(backend: str, form: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    operands = _operands(*size, dtype)
    with poisoned_memory():
        y = _run(form, backend, *operands)
    reference.assert_obeys_rule(y, _exact(form, *operands), _plain(form, *operands))


@each_path
def test_many_tiles_in_groups_and_no_bias(backend: str) -> None:
    x, weight, _ = _operands(1100, 130, 16, torch.float16)
    with poisoned_memory():
        y = _run("linear", backend, x, weight, None)
    reference.assert_obeys_rule(y, _exact("linear", x, weight, None), _plain("linear", x, weight, None))


@each_dtype
@each_form
@each_backend
def test_rows_of_all_kinds_obey_the_rule_each_by_itself(backend: str, form: str, dtype: torch.dtype) -> None:
    x, weight, bias = _operands(7, 66, 1100, dtype)
    x[1] /= 1000  # its variance is near eps
    x[2] += LARGE_MEAN[dtype]
    x[3] = 0
    x[4, 100] = 300  # as a few channels of DINOv2's streams are
    x[5] += torch.linspace(-5, 5, 1100).to(x)  # each part has another mean
    y, exact, plain = (f(x, weight, bias) for f in (
        lambda *operands: _run(form, backend, *operands),
        lambda *operands: _exact(form, *operands),
        lambda *operands: _plain(form, *operands),
    ))  # fmt: skip
    for row in range(7):
        reference.assert_obeys_rule(y[row], exact[row], plain[row])


@pytest.mark.parametrize("width", [200, 1100])
@each_form
@each_backend
def test_a_mean_far_above_the_deviation_leaves_the_variance(backend: str, form: str, width: int) -> None:
    operands = _operands(66, 66, width, torch.float32, shift=LARGE_MEAN[torch.float32])
    reference.assert_obeys_rule(_run(form, backend, *operands), _exact(form, *operands), _plain(form, *operands))


@each_backend
def test_it_is_the_linear_of_a_layer_norm(backend: str) -> None:
    x, weight, bias = _operands(9, 70, 136, torch.float64)
    x, norm_weight, norm_bias = x * 3 + 2, random(136, dtype=torch.float64), random(136, dtype=torch.float64)
    exact = reference.linear(reference.layer_norm(x, norm_weight, norm_bias, EPS), weight, bias)
    folded = weight * norm_weight
    folded -= folded.mean(1, keepdim=True)
    operands = x, folded, bias + weight @ norm_bias
    if backend == "torch":
        torch.testing.assert_close(_run("linear", backend, *operands), exact, atol=1e-12, rtol=1e-12)
    y = _run("linear", backend, *(operand.float() for operand in operands))
    plain = F.linear(F.layer_norm(x.float(), (136,), norm_weight.float(), norm_bias.float(), EPS), weight.float())
    reference.assert_obeys_rule(y, exact, plain + bias.float())


# Statistics


SMALL = 20  # rows


def _two_pass_statistics(x: Tensor) -> Tensor:
    found = []
    for part in x.split(64, dim=-1):
        centred = part - part.mean(-1, keepdim=True)
        found.append(torch.stack((part.sum(-1), (centred * centred).sum(-1))))
    return torch.stack(found, 1)  # (2, parts, ...)


def _assert_statistics(statistics: Tensor, x: Tensor) -> None:
    """Sums and squares by themselves, and the last rows, which may be small, by themselves."""
    exact, plain = _two_pass_statistics(x.double()), _two_pass_statistics(x.float())
    assert (statistics.shape, statistics.dtype) == (exact.shape, torch.float32)
    assert statistics.is_contiguous()
    flat = [t.flatten(2) for t in (statistics, exact, plain)]
    for which in range(2):
        for rows in (slice(-SMALL), slice(-SMALL, None)):
            reference.assert_obeys_rule(*(t[which, :, rows] for t in flat))


STREAMS = {
    "plain": lambda x: x,
    "large mean": lambda x: x + LARGE_MEAN[x.dtype],
    "rows a thousandth of the others": lambda x: torch.cat((x[:-SMALL], x[-SMALL:] / 1000)),
    "outliers": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) % 70 == 3, 300 * x, x),
    "constant": lambda x: torch.full_like(x, 0.1),
}


@pytest.mark.parametrize("stream", STREAMS)
@each_dtype
@each_backend
def test_statistics_of_a_stream(backend: str, dtype: torch.dtype, stream: str) -> None:
    x = STREAMS[stream](random(67, 200, dtype=dtype))
    with poisoned_memory():
        statistics = op.row_statistics(x, backend=backend)
    _assert_statistics(statistics, x)


@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 384])
@each_backend
def test_statistics_of_any_width_and_of_nothing(backend: str, hidden: int) -> None:
    x = random(2, 3, hidden)
    with poisoned_memory():
        _assert_statistics(op.row_statistics(x, backend=backend), x)
        assert op.row_statistics(x[:0], backend=backend).shape == (2, -(-hidden // 64), 0, 3)


def _stream(rows: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A stream, statistics that are to be overwritten, with room around them for what is wrong, and a gamma."""
    stale = torch.full((6, -(-features // 64), rows), float("nan"), device=DEVICE)
    return random(rows, features, dtype=dtype), stale[2:4], random(features, dtype=dtype) + 1


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] != 1], ids=str)  # one number is too few for a rule
@each_dtype
@each_path
def test_the_stream_and_its_statistics_are_updated(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int]
) -> None:
    x, weight, bias = _operands(*size, dtype)
    residual, statistics, gamma = _stream(*size[:2], dtype)
    exact = residual.double() + gamma.double() * reference.linear(x, weight, bias)
    plain = residual + gamma * F.linear(x, weight, bias)
    assert op.linear_residual_statistics_(residual, statistics, x, weight, bias, gamma, backend=backend) is None
    reference.assert_obeys_rule(residual, exact, plain)
    _assert_statistics(statistics, residual)  # as it is stored


@pytest.mark.parametrize("width", [66, 128, 256, 320])
@each_path
def test_the_statistics_of_an_updated_stream_with_a_large_mean(backend: str, width: int) -> None:
    x, weight, bias = _operands(131, width, 40, torch.bfloat16)
    residual, statistics, _ = _stream(131, width, torch.bfloat16)
    residual += LARGE_MEAN[torch.bfloat16]
    op.linear_residual_statistics_(residual, statistics, x, weight, bias, None, backend=backend)
    _assert_statistics(statistics, residual)


@each_backend
def test_the_stream_may_be_wider_than_its_branch(backend: str) -> None:
    x, weight, bias = _operands(10, 72, 40, torch.bfloat16)
    residual, statistics, _ = _stream(10, 72, torch.float32)
    op.linear_residual_statistics_(residual, statistics, x, weight, bias, None, backend=backend)
    _assert_statistics(statistics, residual)


@each_path
def test_what_lies_around_stream_and_statistics_stays(backend: str) -> None:
    x, weight, bias = _operands(131, 70, 40, torch.float16)
    stream, around = random(131, 70, dtype=torch.float16), float("nan")
    wide = torch.full((133, 90), around, device=DEVICE, dtype=torch.float16)
    wide[1:-1, 8:78] = stream
    buffer = torch.full((4, 2, 131), around, device=DEVICE)
    op.linear_residual_statistics_(wide[1:-1, 8:78], buffer[1:3], x, weight, bias, None, backend=backend)
    _assert_statistics(buffer[1:3], wide[1:-1, 8:78])
    statistics = buffer[1:3].clone()
    y = op.norm_linear(wide[1:-1, 8:78], statistics, weight.new_ones(6, 70), None, EPS, backend=backend)
    assert y.isfinite().all()
    wide[1:-1, 8:78], buffer[1:3] = around, around
    assert wide.isnan().all()
    assert buffer.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of the interpreter: inf - inf
@each_form
@each_backend
def test_nan_and_inf_stay_in_their_row(backend: str, form: str) -> None:
    x, weight, bias = _operands(70, 66, 130, torch.float32)
    for wrong in (float("nan"), float("inf")):
        x[3, 7] = wrong
        y = _run(form, backend, x, weight, bias)
        assert torch.equal(y.isfinite(), torch.arange(70, device=DEVICE)[:, None].expand_as(y) != 3)
    residual, statistics, _ = _stream(70, 66, torch.float32)
    op.linear_residual_statistics_(residual, statistics, x, weight, bias, None, backend=backend)
    assert torch.equal(statistics.isfinite(), torch.arange(70, device=DEVICE).expand_as(statistics) != 3)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns": lambda x: x[..., ::2],
    "misaligned": lambda x: x[..., 1:81],
}


@pytest.mark.parametrize("name", STRIDES)
@each_path
def test_strided_streams_give_what_copies_give(backend: str, name: str) -> None:
    x, weight = (STRIDES[name](random(6, 4, 160)) for _ in range(2))
    weight = weight[0]
    strided, copied = (_run("linear", backend, *pair, None) for pair in ((x, weight), (x.clone(), weight.clone())))
    torch.testing.assert_close(strided, copied, atol=2e-6, rtol=1e-6)
    both = [op.row_statistics(t, backend=backend) for t in (x, x.contiguous())]
    if name == "misaligned":  # compiled for narrower loads, so that a thread sums other elements
        torch.testing.assert_close(*both, atol=2e-5, rtol=1e-6)
    else:
        assert torch.equal(*both)


# How torch sees the ops


@runs_triton
def test_the_kernels_have_the_same_parts() -> None:
    assert import_module("dinov2_fast.kernels.linear").PART.value == op.PART == 64


@runs_triton
def test_opcheck() -> None:
    x, weight, bias = random(3, 5, 72).transpose(0, 1), random(8, 144)[:, ::2], random(8)
    library, statistics = torch.ops.dinov2_fast, op.row_statistics(x, backend="triton")
    opcheck(library.row_statistics.default, (x,))
    for name in ("norm_linear", "norm_linear_gelu", "norm_linear_swiglu"):
        opcheck(getattr(library, name).default, (x, statistics, weight, bias, EPS))
    residual, own = random(5, 3, 8), torch.zeros(2, 1, 5, 3, device=DEVICE)
    opcheck(library.linear_residual_statistics_.default, (residual, own, x, weight, None, bias))


@each_backend
def test_compiled_whole_and_in_inference_mode(backend: str) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stream = x * 2
        statistics = op.row_statistics(stream, backend=backend)
        y = op.norm_linear_gelu(stream, statistics, weight, bias, EPS, backend=backend)
        op.linear_residual_statistics_(stream, statistics, y, weight, bias, bias, backend=backend)
        return op.norm_linear_swiglu(stream, statistics, weight, bias, EPS, backend=backend) + stream[..., ::2]

    assert_compiles_whole(block, (random(2, 5, 72), random(72, 72, scale=0.2), random(72)))


@each_form
@each_backend
def test_autocast_gives_the_dtype_torch_gives(backend: str, form: str) -> None:
    operands = _operands(3, 8, 16, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _run(form, backend, *operands).dtype == _run(form, "torch", *operands).dtype == torch.float32
        assert op.row_statistics(operands[0], backend=backend).dtype == torch.float32


@each_backend
def test_autograd_sees_that_stream_and_statistics_were_overwritten(backend: str) -> None:
    x, weight, _ = _operands(4, 8, 16, torch.float32)
    residual, statistics, _ = _stream(4, 8, torch.float32)
    versions = residual._version, statistics._version
    op.linear_residual_statistics_(residual, statistics, x, weight, None, None, backend=backend)
    assert residual._version > versions[0]
    assert statistics._version > versions[1]


@each_backend
def test_gradients_are_refused(backend: str) -> None:
    x, weight, bias = _operands(2, 4, 8, torch.float32)
    residual, statistics, _ = _stream(2, 4, torch.float32)
    weight.requires_grad_()
    for form in FORMS:
        with pytest.raises(BackendError, match="inference only"):
            _run(form, backend, x, weight, bias)
    with pytest.raises(BackendError, match="inference only"):
        op.linear_residual_statistics_(residual, statistics, x, weight, bias, None, backend=backend)
    with pytest.raises(BackendError, match="inference only"):
        op.row_statistics(weight, backend=backend)


def _statistics_of(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, 1, *x.shape[:-1], device=x.device, dtype=dtype)


REFUSALS = {
    "row_statistics: .* takes fp16, bf16 and fp32, got torch.float64": lambda x, w: op.row_statistics(
        x.double(), backend="triton"
    ),
    "norm_linear: .* takes fp16, bf16 and fp32": lambda x, w: op.norm_linear(
        x.double(), _statistics_of(x), w, None, EPS, backend="triton"
    ),
    "takes x and weight of one dtype": lambda x, w: op.norm_linear_gelu(
        x, _statistics_of(x), w.half(), None, EPS, backend="triton"
    ),
    "needs contiguous fp32 statistics, got torch.float16": lambda x, w: op.norm_linear_swiglu(
        x, _statistics_of(x, torch.float16), w, None, EPS, backend="triton"
    ),
    "needs contiguous fp32 statistics, got torch.float32 with strides": lambda x, w: op.linear_residual_statistics_(
        x, _statistics_of(torch.empty(8, 16, device="cuda"))[..., ::2], x, w, None, None, backend="triton"
    ),
    "evenly spaced rows": lambda x, w: op.linear_residual_statistics_(
        x[:1].expand(4, 16), _statistics_of(x), x, w, None, None, backend="triton"
    ),
    "there is no backend 'cublas'": lambda x, w: op.norm_linear(x, _statistics_of(x), w, None, EPS, backend="cublas"),
}


@fakes_cuda
@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._registry._capability", lambda device: (9, 0))
    with FakeTensorMode():
        x, weight = (torch.empty(shape, device="cuda") for shape in ((4, 16), (16, 16)))
        with pytest.raises(BackendError, match=reason):
            REFUSALS[reason](x, weight)
        assert choose(op._NORM_LINEAR, x, _statistics_of(x), weight, None, EPS).backend == "torch"


MISTAKES = {
    "weight has shape": lambda x, s, w: op.norm_linear(x, s, w[:, 1:], None, EPS),
    "bias has shape": lambda x, s, w: op.norm_linear_gelu(x, s, w, w, EPS),
    "pairs of gate and value": lambda x, s, w: op.norm_linear_swiglu(x, s, w[1:], None, EPS),
    r"statistics have shape \(2, 1, 3\), those of the stream have \(2, 1, 4\)": lambda x, s, w: op.norm_linear(
        x, s[..., 1:], w, None, EPS
    ),
    "statistics have shape": lambda x, s, w: op.linear_residual_statistics_(x, s[0], x, w, None, None),
    "residual has shape": lambda x, s, w: op.linear_residual_statistics_(x[1:], s, x, w, None, None),
    "gamma has shape": lambda x, s, w: op.linear_residual_statistics_(x, s, x, w, None, x),
    "nothing to take statistics of": lambda x, s, w: op.row_statistics(x[:, :0]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_sizes_that_do_not_go_together_are_an_error(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](random(4, 8), torch.zeros(2, 1, 4, device=DEVICE), random(8, 8))
