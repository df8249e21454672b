"""What the fields of a configuration may be, so that a ``config.json`` that makes no sense is refused by name."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_LAYERS = 1000
MAX_LABELS = 1 << 20
MAX_SIZE = 1 << 20


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a whole number from {low} to {high}"


def _real(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a number from {low:g} to {high:g}"


def _size(high: int) -> tuple[Callable[[Any], bool], str]:
    side, text = _whole(1, high)
    return (
        lambda value: side(value) or (isinstance(value, Sequence) and len(value) == 2 and all(map(side, value))),
        f"{text}, or two of them",
    )


def _list_of(kind: type, what: str) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return value is None or (is_list and all(isinstance(item, kind) for item in value))

    return fits, f"a list of {what}"


def _are_labels(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(str(key).isdecimal() for key in value))


_PROBABILITY = _real(0, 1)
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: value is None or isinstance(value, str), "a text")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_size": _whole(1, MAX_SIZE),
    "num_hidden_layers": _whole(0, MAX_LAYERS),
    "num_attention_heads": _whole(1, MAX_SIZE),
    "num_channels": _whole(1, 1 << 16),
    "num_register_tokens": _whole(0, MAX_SIZE),
    "num_labels": (lambda value: value is None or _whole(0, MAX_LABELS)[0](value), _whole(0, MAX_LABELS)[1]),
    "image_size": _size(MAX_SIZE),
    "patch_size": _size(1 << 10),
    "mlp_ratio": _real(1 / MAX_SIZE, MAX_SIZE),
    "layer_norm_eps": _real(0, 1),
    "initializer_range": _real(0, MAX_SIZE),
    "layerscale_value": _real(-MAX_SIZE, MAX_SIZE),
    "hidden_dropout_prob": _PROBABILITY,
    "attention_probs_dropout_prob": _PROBABILITY,
    "drop_path_rate": _PROBABILITY,
    "qkv_bias": _FLAG,
    "use_swiglu_ffn": _FLAG,
    "apply_layernorm": _FLAG,
    "reshape_hidden_states": _FLAG,
    "use_mask_token": _FLAG,
    "hidden_act": _TEXT,
    "problem_type": _TEXT,
    "position_dialect": _TEXT,
    "out_features": _list_of(str, "names"),
    "out_indices": _list_of(numbers.Integral, "whole numbers"),
    "id2label": (_are_labels, "a dictionary from whole numbers to names"),
}


def check_fields(fields: Mapping[str, Any], kind: type) -> None:
    """Checks the fields of a configuration of the class `kind`.

    Raises:
        ValueError: one has a value that it cannot have, or the name of a method; the message says which.
    """
    for name, value in fields.items():
        fits, wanted = _RULES.get(name, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {_shown(value)}: correct it in the configuration.")
        if name.startswith("__") or callable(getattr(kind, name, None)):
            raise ValueError(f"A configuration cannot have a field {name!r}, which its class has: take it out.")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
