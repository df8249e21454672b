"""The outputs of the models: ordered dictionaries, read by attribute, key or index, or as a tuple.

Only fields that are not None are items, and only these count in ``output[1]`` and ``output.to_tuple()``. As an
attribute, a missing field is None.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.huggingface.configuration import Dinov2Config
from dinov2_fast.torch_private import pytree

Layers = bool | Collection[int] | None  # all blocks, none, or the blocks with these indices


@torch.jit.ignore  # else torch.jit.trace, which returns it as a dictionary, would compile the class
class ModelOutput(OrderedDict[str, Any]):
    """An output, whose fields are the annotations of the subclass in their order.

    Like a dictionary it can be made from pairs or another dictionary: torch's `DataParallel` and training frameworks
    rebuild outputs in this way when they gather or cast them.
    """

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **fields: Any) -> None:
        fields = {**dict(items), **fields}
        known = list(type(self).__annotations__)
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise InvalidTypeError(
                f"{type(self).__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}."
            )
        super().__init__()
        for name in known:
            self[name] = fields.get(name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """transformers' output class of the same name if that is loaded: its tools recognise it by `isinstance`."""
        if torch.compiler.is_compiling():  # torch.compile looks up methods in this class
            return type(self)
        transformers = sys.modules.get("transformers.modeling_outputs")
        return getattr(transformers, type(self).__name__, type(self))

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__annotations__:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in type(self).__annotations__:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            del self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())


class BaseModelOutputWithPooling(ModelOutput):
    """Tokens (batch, seq_len, hidden), CLS token (batch, hidden), and what else was requested."""

    last_hidden_state: Tensor | None
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None


class ImageClassifierOutput(ModelOutput):
    """Loss (a scalar, if labels were given), logits (batch, num_labels), and what else was requested."""

    loss: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None


class BackboneOutput(ModelOutput):
    """One feature map (batch, hidden, rows, columns) per stage, and what else was requested."""

    feature_maps: tuple[Tensor, ...] | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor | None, ...] | None


class OutputOptions:
    """What a call returns besides the features, and in which form; None takes the config's."""

    def __init__(self, config: Dinov2Config, attentions: Layers, hidden_states: bool | None, dictionary: bool | None):
        self.attentions = config.output_attentions if attentions is None else attentions
        self.hidden_states = bool(config.output_hidden_states if hidden_states is None else hidden_states)
        self.dictionary = config.return_dict if dictionary is None else dictionary
