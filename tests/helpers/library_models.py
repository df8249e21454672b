"""Small models of the libraries that `dinov2_fast.accelerate` supports, how users call them, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate
from tests.helpers import facebook_model
from tests.helpers.small_models import filled

SIZE = 70
TOLERANCE = 1e-5  # of the largest element, in fp32


@dataclass(frozen=True)
class LibraryModel:
    """One kind of model.

    Args:
        make: builds it; takes `drop_path` and `attention_dropout`.
        calls: what a user calls, each on a model and images.
        blocks: where its blocks are.
    """

    name: str
    make: Callable[..., nn.Module]
    calls: tuple[Callable[[Any, Tensor], Any], ...]
    blocks: str

    def __str__(self) -> str:
        return self.name

    def build(self, **settings: Any) -> nn.Module:
        """A model in eval mode, with random weights and no parameter at a trivial value."""
        return filled(self.make(**settings)).eval()


def images(batch: int = 2, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output, in order."""
    return list(_tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def transformers_model(
    family: str,
    task: str,
    drop_path: float = 0.0,
    attention_dropout: float = 0.0,
    attention: str = "sdpa",
    **fields: Any,
) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 14}
    more: dict[str, Any] = {"drop_path_rate": drop_path, "attention_probs_dropout_prob": attention_dropout}
    more |= {"out_indices": [1, -1]} if task == "Backbone" else {}
    config = getattr(transformers, f"{family}Config")(**sizes | more | fields, attn_implementation=attention)
    return getattr(transformers, family + task)(config)


def timm_model(name: str, drop_path: float = 0.0, attention_dropout: float = 0.0, **arguments: Any) -> nn.Module:
    import timm

    sizes = {"depth": 2, "embed_dim": 192, "num_heads": 3, "img_size": SIZE}
    rates = {"drop_path_rate": drop_path, "attn_drop_rate": attention_dropout}
    return timm.create_model(name, **sizes | rates | arguments)


def hub_model(drop_path: float = 0.0, attention_dropout: float = 0.0, **arguments: Any) -> nn.Module:
    return facebook_model.DinoVisionTransformer(drop_path_rate=drop_path, attn_drop=attention_dropout, **arguments)


def _call(model: Any, x: Tensor) -> Any:
    return model(x)


def _with_labels(model: Any, x: Tensor) -> Any:
    return model(x, labels=torch.arange(len(x)) % 2)


def _hidden(model: Any, x: Tensor) -> Any:
    return model(pixel_values=x, output_hidden_states=True)


def _tuple(model: Any, x: Tensor) -> Any:
    return model(x, return_dict=False)


def _features(model: Any, x: Tensor) -> Any:
    return model.forward_features(x)


def _intermediates(model: Any, x: Tensor) -> Any:
    return model.forward_intermediates(x)


def _layers(model: Any, x: Tensor) -> Any:
    return model.get_intermediate_layers(x, n=2)


def _kinds() -> Iterator[LibraryModel]:
    for family in ("Dinov2", "Dinov2WithRegisters"):
        for task in ("Model", "ForImageClassification", "Backbone"):
            for swiglu in (False, True):
                classifies = task == "ForImageClassification"
                prefix = {"Dinov2": "dinov2.", "Dinov2WithRegisters": "dinov2_with_registers."}[family]
                yield LibraryModel(
                    f"{family}{task}{'-swiglu' if swiglu else ''}",
                    lambda family=family, task=task, swiglu=swiglu, **settings: transformers_model(
                        family, task, use_swiglu_ffn=swiglu, **settings
                    ),
                    (_with_labels if classifies else _call, _hidden, _tuple),
                    f"{prefix if classifies else ''}encoder.layer",
                )
    for name in ("small_patch14_dinov2", "small_patch14_reg4_dinov2", "giant_patch14_dinov2"):
        yield LibraryModel(
            f"timm-{name}",
            lambda name=name, **settings: timm_model(f"vit_{name}", **settings),
            (_call, _features, _intermediates),
            "blocks",
        )
    for name, arguments in (("mlp", {}), ("registers", {"registers": 4}), ("swiglu", {"swiglu": True})):
        yield LibraryModel(
            f"hub-{name}",
            lambda arguments=arguments, **settings: hub_model(**arguments | settings),
            (_call, _features, _layers),
            "blocks",
        )


KINDS = tuple(_kinds())
# One model of each library and kind of block.
SOME = tuple(
    kind
    for kind in KINDS
    if kind.name in ("Dinov2Model", "Dinov2WithRegistersBackbone-swiglu", "timm-giant_patch14_dinov2")
    or kind.name in ("timm-small_patch14_reg4_dinov2", "hub-mlp", "hub-swiglu")
)


def needs(kind: LibraryModel) -> None:
    """Skips the test if the library of this model is not installed."""
    pytest.importorskip("timm" if kind.name.startswith("timm") else "transformers")


def accelerated_pair(model: Any, **arguments: Any) -> tuple[Any, Any]:
    """`model`, accelerated with `arguments`, and an untouched copy of it."""
    untouched = copy.deepcopy(model)
    assert accelerate(model, **arguments) is model
    return model, untouched


def blocks_of(model: nn.Module, kind: LibraryModel) -> list[Any]:
    return list(model.get_submodule(kind.blocks))  # type: ignore[arg-type]


def assert_same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Asserts that outputs have the same type, and their tensors the same shapes, dtypes and nearly the same values."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
    found, wanted = tensors(ours), tensors(theirs)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
    for x, y in zip(found, wanted, strict=True):
        assert not y.numel() or (x - y).abs().max() <= tolerance * y.abs().max()


def loss_of(output: Any) -> Tensor:
    """A scalar loss of the first tensor of an output, with another weight for each element."""
    first = tensors(output)[0]
    weights = torch.linspace(-1, 1, first.numel()).view(first.shape)
    return (first * weights).sum() + first.square().mean()


def gradients(model: nn.Module, run: Callable[[Any], Any]) -> dict[str, Tensor | None]:
    torch.manual_seed(5)
    model.zero_grad()
    loss_of(run(model)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, wanted in theirs.items():
        found = ours[name]
        assert (found is None) == (wanted is None), name
        if found is not None and wanted is not None:
            # The gradient of the keys' bias is zero except for rounding: compare it on the scale of the queries'.
            scale = theirs[name.replace("key", "query").replace("k_proj", "q_proj")]
            assert (found - wanted).abs().max() <= 2 * TOLERANCE * scale.abs().max(), name


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter, as adapter libraries build it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
