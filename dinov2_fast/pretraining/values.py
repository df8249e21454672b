"""The types of settings: numbers that obey a rule, and the check of a value against the type of its field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from dinov2_fast.errors import InvalidValueError


class Rule(NamedTuple):
    """What a value must obey, beside its type."""

    text: str
    holds: Callable[[Any], bool]


def _is_range(low_and_high: tuple[float, float]) -> bool:
    low, high = low_and_high
    return 0 <= low <= high <= 1


Count = Annotated[int, Rule("an integer from 1", lambda x: x >= 1)]
Number = Annotated[int, Rule("an integer from 0", lambda x: x >= 0)]
Positive = Annotated[float, Rule("a number above 0", lambda x: x > 0)]
Factor = Annotated[float, Rule("a number from 0", lambda x: x >= 0)]
Share = Annotated[float, Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ShareBelow1 = Annotated[float, Rule("a number from 0 to 1, but not 1", lambda x: 0 <= x < 1)]
Areas = Annotated[tuple[float, float], Rule("two numbers with 0 < low <= high <= 1", lambda x: _is_range(x) and x[0])]
Shares = Annotated[tuple[float, float], Rule("two numbers with 0 <= low <= high <= 1", _is_range)]
ThreeShares = Annotated[
    tuple[float, float, float], Rule("three numbers from 0 to 1", lambda x: min(x) >= 0 and max(x) <= 1)
]


def check_value(name: str, value: Any, hint: Any) -> None:
    """Checks a value against the type of its field: bool, a choice of words, or numbers with a rule."""
    if hint is bool:
        is_right, text = isinstance(value, bool), "true or false"
    elif get_origin(hint) is Literal:
        is_right, text = value in get_args(hint), " or ".join(f'"{word}"' for word in get_args(hint))
    else:
        kind, rule = get_args(hint)
        kinds = get_args(kind) or (kind,)
        numbers = value if get_origin(kind) is tuple and isinstance(value, tuple) else (value,)
        is_right = len(numbers) == len(kinds) and all(map(_is_number, numbers, kinds)) and bool(rule.holds(value))
        text = rule.text
    if not is_right:
        raise InvalidValueError(f"{name} must be {text}, got {value!r}.")


def _is_number(value: Any, kind: type) -> bool:
    allowed = int if kind is int else (int, float)
    return isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
