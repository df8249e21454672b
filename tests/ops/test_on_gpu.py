"""What only a GPU can show, for every op: races, streams, CUDA graphs, sizes beyond 2^31, special values in e4m3."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import ops
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import use_backend
from dinov2_fast.ops.implementation import tensors_of
from dinov2_fast.ops.prototype_loss import Targets
from tests import reference
from tests.helpers.devices import on_gpu, runs_cuda

EPS = 1e-6
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape).to("cuda", BF16)


def _stream(images: int = 8, seq_len: int = 257, hidden: int = 768) -> tuple[Tensor, Tensor, Tensor]:
    return _x(images, seq_len, hidden), _x(images, seq_len, hidden), _x(hidden)


def _index(*images: int) -> Tensor:
    return torch.tensor(images, device="cuda")


def _e4m3(*shape: int) -> Tensor:
    return _x(*shape).to(E4M3)


def _linear(x: Tensor, weight: Tensor, rest: Tensor, form: str, dtype: torch.dtype | None = None) -> Tensor:
    """`rest` is the bias, or with a `dtype` of the result the scales of e4m3 weights."""
    interleaved = form == "swiglu"
    if dtype is None:
        return ops.linear(x, weight, rest, epilogue=form, interleaved=interleaved)
    e4m3 = {"scale": 0.01, "weight_scale": rest, "dtype": dtype, "out_scale": 0.1}
    return ops.linear(x, weight, None, epilogue=form, interleaved=interleaved, **e4m3)


def _linear_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, epilogue="residual", residual=residual.clone())


def _linear_residual_e4m3(residual: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    scales = {"scale": 0.1, "weight_scale": weight_scale}
    return ops.linear(x, weight, None, epilogue="residual", residual=residual.clone(), **scales)


def _features(out_features: int, e4m3: bool = False) -> Callable[[], list[Any]]:
    if e4m3:
        return lambda: [_e4m3(2056, 768), _e4m3(out_features, 768), torch.rand(out_features, device="cuda")]
    return lambda: [_x(2056, 768), _x(out_features, 768), _x(out_features)]


def _add_on_subset(residual: Tensor, branch: Tensor, gamma: Tensor, index: Tensor) -> Tensor:
    return ops.add_residual(residual, branch, gamma, index=index, scale=8 / 3)


def _prototype_loss(student: Tensor, prototypes: Tensor) -> Tensor:
    """The targets are those of the first two crops."""
    z, w = student[:2].detach(), prototypes.detach()
    a, b = ops.sinkhorn(z.flatten(0, 1), w, 0.07)
    targets = Targets(z, w, a, b.view(z.shape[:2]), 0.07)
    return ops.prototype_loss(student, prototypes, targets, torch.ones(len(student), 2, device="cuda"))


# Function and arguments, by name. If the op has a backward, it is differentiated for every floating-point argument.
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Any]]]] = {
    "layer_norm.plain": (ops.layer_norm, lambda: [_x(8, 257, 768), _x(768), _x(768), EPS]),
    "layer_norm.plain e4m3": (partial(ops.layer_norm, scale=0.1), lambda: [_x(8, 257, 768), _x(768), _x(768), EPS]),
    "layer_norm.plain deferred": (
        lambda x, weight, bias, deferred: ops.layer_norm(x, weight, bias, EPS, deferred_bias=deferred),
        lambda: [_x(8, 257, 768), _x(768), _x(768), _x(768)],
    ),
    "layer_norm.add": (
        lambda x, branch, gamma, weight, bias: ops.layer_norm(x, weight, bias, EPS, branch=branch, gamma=gamma),
        lambda: [*_stream(), _x(768), _x(768)],
    ),
    "activation.gelu": (partial(ops.activation, kind="gelu"), lambda: [_x(8, 257, 3072)]),
    "activation.gelu e4m3": (partial(ops.activation, kind="gelu", scale=0.1), lambda: [_x(8, 257, 3072)]),
    "activation.swiglu": (partial(ops.activation, kind="swiglu"), lambda: [_x(8, 257, 4096)]),
    "activation.identity e4m3": (partial(ops.activation, kind="identity", scale=0.1), lambda: [_x(8, 257, 768)]),
    "activation.swiglu e4m3": (partial(ops.activation, kind="swiglu", scale=0.1), lambda: [_x(8, 257, 4096)]),
    "add_residual": (ops.add_residual, lambda: [*_stream(), None]),
    "add_residual on a subset": (
        _add_on_subset,
        lambda: [_x(8, 257, 768), _x(3, 257, 768), _x(768), _index(6, 1, 3)],
    ),
    "gather_rows": (
        lambda x, y, index: ops.gather_rows([x, y], [index, index]),
        lambda: [_x(8, 257, 768), _x(5, 50, 768), _index(4, 1)],
    ),
    "attention": (ops.attention, lambda: [_x(8, 257, 3, 12, 64)]),
    "attention varlen": (
        lambda qkv: ops.attention(qkv, seq_lens=(257, 1, 300, 50)),
        lambda: [_x(608, 3, 12, 64)],
    ),
    "attention e4m3": (lambda qkv: ops.attention(qkv, scale=0.01), lambda: [_x(8, 257, 3, 12, 64)]),
    "attention varlen e4m3": (
        lambda qkv: ops.attention(qkv, seq_lens=(257, 1, 300, 50), scale=0.01),
        lambda: [_x(608, 3, 12, 64)],
    ),
    "attention_probabilities": (
        lambda qkv: ops.attention_probabilities(qkv, slice(0, 1)),
        lambda: [_x(8, 257, 3, 6, 64)],
    ),
    "attention_pool": (
        ops.attention_pool,
        lambda: [_x(8, 257, 768), _x(8, 12, 768), _x(768), _x(768), EPS],
    ),
    "sinkhorn": (partial(ops.sinkhorn, temperature=0.07), lambda: [_x(128, 256) / 16, _x(4096, 256) / 16]),
    "prototype_loss": (_prototype_loss, lambda: [_x(10, 64, 256) / 16, _x(4096, 256) / 16]),
    "patches": (
        lambda images: ops.patches(images, 14, padded_to=592, dtype=BF16),
        lambda: [_x(8, 3, 224, 224)],
    ),
    "linear.none": (partial(_linear, form="none"), _features(2304)),
    "linear.gelu": (partial(_linear, form="gelu"), _features(3072)),
    "linear.swiglu": (partial(_linear, form="swiglu"), _features(4096)),
    "linear.residual": (_linear_residual, lambda: [_x(2056, 768), _x(2056, 3072), _x(768, 3072), _x(768)]),
    "linear.none e4m3": (partial(_linear, form="none", dtype=BF16), _features(2304, True)),
    "linear.gelu e4m3": (partial(_linear, form="gelu", dtype=BF16), _features(3072, True)),
    "linear.swiglu e4m3": (partial(_linear, form="swiglu", dtype=E4M3), _features(4096, True)),
    "linear.residual e4m3": (
        _linear_residual_e4m3,
        lambda: [_x(2056, 768), _e4m3(2056, 3072), _e4m3(768, 3072), _x(768).float()],
    ),
}
# What a first run on a GPU tests: the forward kernels that may become the engine's defaults.
FIRST = [
    name
    for name in CASES
    if re.fullmatch(
        r"(layer_norm\.plain( deferred)?|attention|linear\.\w+)( e4m3)?|attention_pool|patches"
        r"|activation\.(swiglu|identity e4m3)",
        name,
    )
]
TRAINABLE = [
    *("layer_norm.plain", "layer_norm.add", "activation.gelu", "activation.swiglu"),
    *("add_residual", "add_residual on a subset"),
    *(
        "gather_rows",
        "attention",
        "attention varlen",
        "attention_probabilities",
        "prototype_loss",
    ),
]


def _leaves(arguments: list[Any]) -> list[Any]:
    def is_float(a: Any) -> bool:
        return isinstance(a, Tensor) and a.is_floating_point()

    return [a.detach().requires_grad_() if is_float(a) else a for a in arguments]


def _results(name: str, arguments: list[Any], train: bool, backend: str = "triton") -> list[Tensor]:
    """The outputs, and if `train` the gradients for all floating-point arguments."""
    function = CASES[name][0]
    with use_backend(backend, strict=True):
        if not train:
            with torch.no_grad():
                return list(tensors_of([function(*arguments)]))
        outputs = list(tensors_of([function(*arguments)]))
        wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        return [*(y.detach() for y in outputs), *gradients]


def _prepared(name: str, train: bool) -> list[Any]:
    arguments = CASES[name][1]()
    return _leaves(arguments) if train else arguments


def _each_backend(name: str) -> list[Any]:
    op, _, form = name.partition(" ")[0].partition(".")
    dtype = E4M3 if name.endswith("e4m3") and op != "attention" else BF16  # of the operands
    form = form or ("varlen" if "varlen" in name else "batch")  # of attention
    has_cuda = op in dispatch.all_ops() and "cuda" in dispatch.all_ops()[op].backends(form, dtype)
    return ["triton", *([pytest.param("cuda", marks=runs_cuda)] if has_cuda else [])]


def _cases(names: Iterable[str], *rest: Any, first: Iterable[str] = ()) -> list[Any]:
    """A case (name, *rest, backend) for each backend of each name. Those in `first` are marked gpu_first."""
    cases = []
    for name in names:
        marked = [pytest.mark.gpu_first] if name in first else []
        for backend in _each_backend(name):
            marks = [*getattr(backend, "marks", ()), *marked]
            cases.append(pytest.param(name, *rest, *getattr(backend, "values", [backend]), marks=marks))
    return cases


each_case = pytest.mark.parametrize(
    ("name", "train", "backend"), [*_cases(CASES, False, first=FIRST), *_cases(TRAINABLE, True)]
)


def test_every_op_has_a_case() -> None:
    assert set(ops.__all__) - {"set_backend", "use_backend"} == {re.split("[. ]", name)[0] for name in CASES}


@on_gpu
@each_case
def test_fifty_repeats_are_equal_bit_by_bit_while_the_device_is_busy(name: str, train: bool, backend: str) -> None:
    arguments = _prepared(name, train)
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    first = _results(name, arguments, train, backend)
    for _ in range(50):
        with torch.cuda.stream(other):
            noise @ noise
        again = _results(name, arguments, train, backend)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(again, first, strict=True))
    torch.cuda.synchronize()


@on_gpu
@each_case
def test_a_side_stream_and_a_graph_replayed_on_new_data(name: str, train: bool, backend: str) -> None:
    arguments, new = _prepared(name, train), _prepared(name, train)
    expected = _results(name, new, train, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _results(name, arguments, train, backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = _results(name, arguments, train, backend)
        with torch.no_grad():
            for old, fresh in zip(arguments, new, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(fresh)
        graph.replay()
        eager = _results(name, arguments, train, backend)
    torch.cuda.current_stream().wait_stream(side)
    for results in (captured, eager):
        for ours, right in zip(results, expected, strict=True):
            assert torch.equal(ours.view(torch.uint8), right.view(torch.uint8))


LARGE = {  # a tensor has more than 2^31 elements; its last rows are compared with a small run
    "layer_norm.plain": lambda n: [_x(n, 1024), _x(1024), _x(1024), EPS],
    "activation.gelu": lambda n: [_x(n, 1024)],
    "activation.swiglu": lambda n: [_x(n, 1024)],
    "linear.gelu": lambda n: [_x(n, 1024), _x(64, 1024), _x(64)],
    "linear.none": lambda n: [_x(n, 64), _x(1024, 64), None],
}


@pytest.mark.gpu_large
@on_gpu
@pytest.mark.parametrize(("name", "backend"), _cases(LARGE))
def test_more_than_two_to_the_31_elements(name: str, backend: str) -> None:
    small = LARGE[name](64)
    rows, last = 2**31 // 1024 + 64, small[0]
    x = last.repeat(rows // 64 + 1, 1)[:rows]
    assert x.shape[0] * 1024 > 2**31
    whole = _results(name, [x, *small[1:]], False, backend)
    part = _results(name, [x[-64:].contiguous(), *small[1:]], False, backend)
    for ours, right in zip(whole, part, strict=True):
        assert torch.equal(ours[-64:], right)


@pytest.mark.gpu_large
@on_gpu
def test_more_than_two_to_the_31_elements_of_a_stream_and_its_gradients() -> None:
    images, seq_len, hidden = 2**31 // (256 * 1024) + 2, 256, 1024
    residual, branch, gamma = _stream(2, seq_len, hidden)
    index = _index(images - 1, 0)
    stream = residual.repeat(images // 2, 1, 1)
    assert stream.numel() > 2**31
    for train in (False, True):
        arguments = [stream, branch, gamma, index]
        whole = _results("add_residual on a subset", _leaves(arguments) if train else arguments, train)
        arguments = [stream[-2:], branch, gamma, _index(1, 0)]
        part = _results("add_residual on a subset", _leaves(arguments) if train else arguments, train)
        assert torch.equal(whole[0][-1], part[0][-1])
        if train:
            assert torch.equal(whole[1][-1], part[1][-1])
            assert torch.equal(whole[2], part[2])
        del whole


@on_gpu
@pytest.mark.gpu_first
@pytest.mark.parametrize(
    ("name", "backend"), _cases(["layer_norm.plain e4m3", "activation.gelu e4m3", "attention e4m3"])
)
def test_e4m3_saturates_and_keeps_nan(name: str, backend: str) -> None:
    values = torch.tensor(
        [math.nan, math.inf, -math.inf, 1e30, -1e30, 464.0, 465.0, 2.0**-10, 0.0, -0.0] + 6 * [0.0], device="cuda"
    )
    with use_backend(backend, strict=True), torch.no_grad():
        if name == "activation.gelu e4m3":
            y = ops.activation(values, "gelu", scale=1.0).float()
            assert y[0].isnan()
            assert y[[1, 3, 5, 6]].tolist() == [448.0] * 4
            assert y[4] == 0
        elif name == "attention e4m3":  # with one token, the value is the result
            qkv = torch.zeros(1, 1, 3, 1, 64, device="cuda", dtype=BF16)
            qkv[..., 2, 0, : len(values)] = values
            y = ops.attention(qkv, scale=1.0)[..., : len(values)].flatten()
            assert y[0].float().isnan()
            assert reference.e4m3_steps(y[1:], values[1:].clamp(-448, 448).to(E4M3)).max() == 0
        else:  # with a weight of zero, the bias is quantised
            bias = values[3:11]
            x = torch.randn(3, bias.shape[0], device="cuda")
            y = ops.layer_norm(x, torch.zeros_like(bias), bias, EPS, scale=1.0)
            expected = bias.clamp(-448, 448).to(E4M3).expand_as(y)
            assert reference.e4m3_steps(y, expected).max() <= 1
            x[1, 0] = math.nan
            assert ops.layer_norm(x, torch.ones_like(bias), bias, EPS, scale=1.0)[1].float().isnan().all()
