"""The errors of this package: one base class, and below it what callers already catch.

Where Python or the system has a precise class (`FileNotFoundError`, `KeyError`, `AttributeError`), that is raised.
"""


class Dinov2FastError(Exception):
    """The base of this package's errors. The message says what is wrong, and what to do."""


class InvalidValueError(Dinov2FastError, ValueError):
    """An argument, option or file has a value that cannot be used."""


class InvalidTypeError(Dinov2FastError, TypeError):
    """An argument is of a type that cannot be used."""


class InvalidStateError(Dinov2FastError, RuntimeError):
    """A call that is not possible now, or here."""


class UnsupportedError(Dinov2FastError, AssertionError):
    """What the reference refuses by an assertion, and so here."""
