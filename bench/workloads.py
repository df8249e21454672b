"""The workloads of :mod:`bench.ops`: each form of an op at the sizes of a backbone, and the least work it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.ops import dispatch
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.implementation import Implementation, first_tensor, tensors_of
from dinov2_fast.ops.linear import interleave

MODES = ("forward", "backward")
PATCH = 14
CPU = torch.device("cpu")
LOCAL_TOKENS = (98 // PATCH) ** 2 + 1  # of a local crop in pretraining
PROTOTYPES, BOTTLENECK = 65536, 256  # of a head in the reference


@dataclass(frozen=True)
class Shape:
    """A backbone and a batch of square images."""

    config: BackboneConfig
    resolution: int
    batch: int
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.config.name}, {self.resolution} px, batch {self.batch}"

    @property
    def tokens(self) -> int:
        return (self.resolution // PATCH) ** 2 + 1 + self.config.num_register_tokens

    @property
    def hidden(self) -> int:
        return self.config.embed_dim

    @property
    def swiglu(self) -> bool:
        return self.config.ffn_layer != "mlp"

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """The in_features and out_features of each linear of a block."""
        hidden = self.hidden
        ffn = (hidden * 8 // 3 + 7) // 8 * 8 if self.swiglu else 4 * hidden  # with SwiGLU that of one half
        fc1 = ffn * (1 + self.swiglu)
        return {"qkv": (hidden, 3 * hidden), "proj": (hidden, hidden), "fc1": (hidden, fc1), "fc2": (ffn, hidden)}

    @property
    def mixed_lengths(self) -> tuple[int, ...]:
        """The tokens of each global crop, then of as many local crops, packed into one sequence."""
        return (self.tokens,) * self.batch + (LOCAL_TOKENS,) * self.batch

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def bottleneck(self, *sizes: int) -> Tensor:
        """Normalised vectors (*sizes, BOTTLENECK)."""
        return torch.nn.functional.normalize(self.random(*sizes, BOTTLENECK), dim=-1)

    def stream(self) -> Tensor:
        return self.random(self.batch, self.tokens, self.hidden)

    def norm(self) -> tuple[Tensor, Tensor, float]:
        return self.random(self.hidden), self.random(self.hidden), 1e-6

    def qkv(self, *lead: int) -> Tensor:
        return self.random(*lead, 3, self.config.num_heads, self.hidden // self.config.num_heads)

    def every_second_image(self) -> Tensor:
        """The indices of every second image."""
        return torch.arange(0, self.batch, 2, device=self.device)


def all_bytes(arguments: tuple[Any, ...], results: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in [*tensors_of(arguments), *results])


@dataclass(frozen=True)
class Workload:
    """A form of an op, and its arguments. Names are those of `use_backend`."""

    op: str
    form: str
    arguments: Callable[[Shape], tuple[Any, ...]]
    flops: Callable[[Shape], float] = lambda shape: 0.0  # of its matrix products, forward
    # The bytes that it must read and write, forward, from its arguments and results.
    moved: Callable[[tuple[Any, ...], list[Tensor]], int] = all_bytes
    saved: tuple[int, ...] | None = None  # arguments that its backward must read (or as much); None: no backward
    needs_swiglu: bool | None = None  # whether only backbones with SwiGLU run it, or only those without
    place: str = ""  # in the model, if the form is used in several places
    e4m3: bool = False  # whether it reads or writes e4m3 values
    changes: int | None = None  # the argument that it changes in place

    @property
    def name(self) -> str:
        """Op and form, such as "linear.gelu e4m3"."""
        return dispatch.all_ops()[self.op].name_of(self.form, self.e4m3)

    @property
    def label(self) -> str:
        """The name with the place, such as "linear.gelu e4m3 (fc1)"."""
        return f"{self.name} ({self.place})" if self.place else self.name

    def implementations(self) -> list[Implementation]:
        """The implementations of the form, best first."""
        op = dispatch.all_ops()[self.op]
        sample = op.sample_inputs[self.form](torch.device("meta"), E4M3 if self.e4m3 else torch.bfloat16)
        assert sample is not None
        return [each for each in op.implementations if each.is_candidate(self.form, first_tensor(sample).dtype)]

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward",) if self.saved is None else MODES

    def applies(self, shape: Shape) -> bool:
        return self.needs_swiglu in (None, shape.swiglu)


def attention_flops(shape: Shape) -> float:
    """The operations of both products in one layer."""
    return 4.0 * shape.batch * shape.tokens**2 * shape.hidden


def _varlen_flops(shape: Shape) -> float:
    return 4.0 * sum(length**2 for length in shape.mixed_lengths) * shape.hidden


# The arguments of the forms below. With a `scale` the op returns e4m3 values.


def _norm(shape: Shape, scale: float | None = None, branch: bool = False) -> tuple[Any, ...]:
    addends = (shape.stream(), shape.random(shape.hidden)) if branch else (None, None)
    return shape.stream(), *shape.norm(), *addends, None, None, scale


def _activation(shape: Shape, scale: float | None) -> tuple[Any, ...]:
    x = shape.random(shape.batch, shape.tokens, shape.features["fc1"][1])
    return x, "swiglu" if shape.swiglu else "gelu", False, scale


def _quantised(shape: Shape, scale: float | None) -> tuple[Any, ...]:
    return shape.stream(), "identity", False, scale


def _attention(shape: Shape, scale: float | None) -> tuple[Any, ...]:
    return shape.qkv(shape.batch, shape.tokens), None, 0.0, scale


def _varlen(shape: Shape, scale: float | None) -> tuple[Any, ...]:
    return shape.qkv(sum(shape.mixed_lengths)), shape.mixed_lengths, 0.0, scale


def _subset(shape: Shape) -> tuple[Any, ...]:
    residual, index = shape.stream(), shape.every_second_image()
    return residual, residual[: len(index)].clone(), shape.random(shape.hidden), None, index, shape.batch / len(index)


def _crops(shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    """Global and local crops of the same images, and the images that stochastic depth keeps of both."""
    small = shape.random(shape.batch, LOCAL_TOKENS, shape.hidden)
    return [shape.stream(), small], [shape.every_second_image(), shape.every_second_image()]


def _pool(shape: Shape) -> tuple[Any, ...]:
    absorbed = shape.random(shape.batch, shape.config.num_heads, shape.hidden) / shape.hidden**0.5
    return shape.stream(), absorbed, *shape.norm()


def _images(shape: Shape) -> tuple[Any, ...]:
    size = (shape.batch, 3, shape.resolution, shape.resolution)
    images = torch.randint(256, size, device=shape.device, dtype=torch.uint8)
    return images, PATCH, (PATCH, PATCH), 592, shape.dtype


def _linear(shape: Shape, scale: float | None, epilogue: str, place: str) -> tuple[Any, ...]:
    """The residual form has no bias. For SwiGLU all gates come first; :func:`interleave_swiglu` reorders them."""
    in_features, out_features = shape.features[place]
    x, bias = shape.random(shape.batch, shape.tokens, in_features), shape.random(out_features)
    weight = shape.random(out_features, in_features) / in_features**0.5
    residual, bias = (shape.stream(), None) if epilogue == "residual" else (None, bias)
    if not scale:
        return x, weight, bias, epilogue, residual, 1.0, None, None, 1.0, False
    scales = torch.full_like(weight[:, 0], 0.125 / in_features**0.5, dtype=torch.float32)
    dtype = {"none": shape.dtype, "residual": None}.get(epilogue, E4M3)
    operands = (x * 8).to(E4M3), (weight / scales[:, None]).to(E4M3), bias
    return *operands, epilogue, residual, 0.125, scales, dtype, scale, False


def _sinkhorn(shape: Shape) -> tuple[Any, ...]:
    """The class tokens of the global crops of a batch."""
    return shape.bottleneck(2 * shape.batch), shape.bottleneck(PROTOTYPES), 0.07, 3, None, None


def _prototype_loss(shape: Shape) -> tuple[Any, ...]:
    """The class tokens of two global and eight local crops of a batch."""
    crops = 2, shape.batch
    z, w = shape.bottleneck(*crops), shape.bottleneck(PROTOTYPES)
    a, b = dispatch.all_ops()["sinkhorn"].implementations[0].function(z.flatten(0, 1), w, 0.07, 3, None, None)
    student = shape.bottleneck(10, shape.batch)
    pairing = torch.ones(10, 2, device=shape.device)
    return student, shape.bottleneck(PROTOTYPES), z, w, a, b.view(crops), 0.07, pairing, 0.1


def _prototype_flops(shape: Shape) -> float:
    """The logits of student and teacher, and the expected prototypes of the targets."""
    return 2.0 * (10 + 2 + 2) * shape.batch * PROTOTYPES * BOTTLENECK


def interleave_swiglu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a SwiGLU linear with alternating gates and values, which give the same result."""
    x, weight, bias, epilogue, residual, scale, weight_scale, dtype, out_scale, _ = arguments
    ordered = [None if t is None else interleave(t) for t in (weight, bias, weight_scale)]
    return x, *ordered[:2], epilogue, residual, scale, ordered[2], dtype, out_scale, True


def _with_and_without_e4m3(
    op: str,
    form: str,
    arguments: Callable[[Shape, float | None], tuple[Any, ...]],
    scale: float = 0.0625,
    **fields: Any,
) -> Iterator[Workload]:
    """Two workloads of a form: without e4m3 values, and with them, which has no backward."""
    yield Workload(op, form, partial(arguments, scale=None), **fields)
    yield Workload(op, form, partial(arguments, scale=scale), **(fields | {"saved": None, "e4m3": True}))


def _linears(form: str, place: str, **fields: Any) -> Iterator[Workload]:
    fields |= {"place": place, "flops": lambda s: 2.0 * s.batch * s.tokens * prod(s.features[place])}
    return _with_and_without_e4m3("linear", form, partial(_linear, epilogue=form, place=place), **fields)


WORKLOADS = (
    *_with_and_without_e4m3("layer_norm", "plain", _norm, 0.125, saved=(0, 1)),
    Workload("layer_norm", "add", partial(_norm, branch=True), saved=(0, 1, 4, 5)),
    *_with_and_without_e4m3("activation", "gelu", _activation, saved=(0,), needs_swiglu=False),
    *_with_and_without_e4m3("activation", "swiglu", _activation, saved=(0,), needs_swiglu=True),
    Workload("activation", "identity", partial(_quantised, scale=0.0625), e4m3=True),
    *_with_and_without_e4m3("attention", "batch", _attention, flops=attention_flops, saved=(0,)),
    *_with_and_without_e4m3("attention", "varlen", _varlen, flops=_varlen_flops, saved=(0,)),
    Workload(
        "attention",
        "probabilities",
        lambda s: (s.qkv(s.batch, s.tokens), slice(0, 1)),
        moved=lambda arguments, results: arguments[0].nbytes // 3 + results[0].nbytes,  # the keys in qkv
    ),
    Workload("residual", "add", lambda s: (s.stream(), s.stream(), s.random(s.hidden), None, None, 1.0), saved=(1, 2)),
    Workload("residual", "add", _subset, saved=(1, 2), place="subset"),
    # It reads as much as it writes.
    Workload("residual", "gather", _crops, moved=lambda _, results: 2 * sum(x.nbytes for x in results), saved=()),
    Workload("attention_pool", "pool", _pool, lambda s: 4.0 * s.batch * s.tokens * s.config.num_heads * s.hidden),
    Workload("patches", "patches", _images),
    # One product: the logits can be kept.
    Workload("sinkhorn", "sinkhorn", _sinkhorn, lambda s: 2.0 * 2 * s.batch * PROTOTYPES * BOTTLENECK),
    Workload("prototype_loss", "prototype_loss", _prototype_loss, _prototype_flops, saved=(0, 1, 2, 3)),
    *_linears("none", "qkv"),
    *_linears("gelu", "fc1", needs_swiglu=False),
    *_linears("swiglu", "fc1", needs_swiglu=True),
    *_linears("residual", "proj", changes=4),
    *_linears("residual", "fc2", changes=4),
)
