"""The rules for the fields of a configuration. The error for a bad ``config.json`` names the field."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dinov2_fast.errors import InvalidValueError

# Far above every model, but small enough that a model on the meta device takes little memory and time.
MAX_LAYERS = 1000
MAX_SIZE = 1 << 20


class Rule(NamedTuple):
    """A test of a value, and a description of the values that pass it."""

    fits: Callable[[Any], bool]
    description: str


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and type(value) is not bool


def _whole(low: int, high: int) -> Rule:
    return Rule(
        lambda value: _is(numbers.Integral, value) and low <= value <= high, f"a whole number from {low} to {high}"
    )


def _real(low: float, high: float) -> Rule:
    return Rule(lambda value: _is(numbers.Real, value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def _size(high: int) -> Rule:
    side = _whole(1, high)
    pair = _list_of(side.fits, "")
    return Rule(lambda value: side.fits(value) or (pair.fits(value) and len(value) == 2), f"{side.description}, or two")


def _list_of(fits: Callable[[Any], bool], what: str) -> Rule:
    def are(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value))

    return Rule(are, f"a list of {what}")


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.fits(value), rule.description)


def _are_labels(value: Any) -> bool:
    return isinstance(value, Mapping) and all(str(key).isdecimal() for key in value)


_FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
_TEXT = Rule(lambda value: isinstance(value, str), "a text")
_RULES = {
    "hidden_size": _whole(1, MAX_SIZE),
    "num_hidden_layers": _whole(0, MAX_LAYERS),
    "num_attention_heads": _whole(1, MAX_SIZE),
    "num_channels": _whole(1, 1 << 16),
    "num_register_tokens": _whole(0, MAX_SIZE),
    "num_labels": _optional(_whole(0, MAX_SIZE)),
    "image_size": _size(MAX_SIZE),
    "patch_size": _size(1 << 10),
    "mlp_ratio": _real(1 / MAX_SIZE, MAX_SIZE),
    "layer_norm_eps": _real(0, 1),
    "initializer_range": _real(0, MAX_SIZE),
    "layerscale_value": _real(-MAX_SIZE, MAX_SIZE),
    "hidden_dropout_prob": _real(0, 1),
    "attention_probs_dropout_prob": _real(0, 1),
    "drop_path_rate": _real(0, 1),
    "qkv_bias": _FLAG,
    "use_swiglu_ffn": _FLAG,
    "apply_layernorm": _FLAG,
    "reshape_hidden_states": _FLAG,
    "use_mask_token": _FLAG,
    "hidden_act": _TEXT,
    "problem_type": _optional(_TEXT),
    "position_interpolation": _optional(_TEXT),
    "out_features": _optional(_list_of(_TEXT.fits, "names")),
    "out_indices": _optional(_list_of(lambda value: _is(numbers.Integral, value), "whole numbers")),
    "id2label": _optional(Rule(_are_labels, "a dictionary from whole numbers to names")),
}


def check_fields(fields: Mapping[str, Any], kind: type) -> None:
    """Raises `ValueError` if a field of a configuration of the class `kind` has a wrong value or a method's name."""
    for name, value in fields.items():
        rule = _RULES.get(name)
        if rule is not None and not rule.fits(value):
            raise InvalidValueError(
                f"{name} must be {rule.description}, got {_shown(value)}: correct it in the configuration."
            )
        if name.startswith("__") or callable(getattr(kind, name, None)):
            raise InvalidValueError(f"A configuration cannot have a field {name!r}, the name of a method: remove it.")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
