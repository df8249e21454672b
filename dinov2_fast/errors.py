"""The package's errors: one base class and, below it, classes that are also the Python errors callers already catch.

Where Python or the system has a precise class (`FileNotFoundError`, `KeyError`, `AttributeError`), that one is raised.
"""


class Dinov2FastError(Exception):
    """The base class of this package's errors. The message says what is wrong and what to do."""


class InvalidValueError(Dinov2FastError, ValueError):
    """An argument, an option or a file has a value that cannot be used."""


class InvalidTypeError(Dinov2FastError, TypeError):
    """An argument has a type that cannot be used."""


class InvalidStateError(Dinov2FastError, RuntimeError):
    """The call is not possible in the current state or on this machine."""


class UnsupportedError(Dinov2FastError, AssertionError):
    """The reference rejects this with an assertion, so it is an `AssertionError` here too."""


class WeightsError(Dinov2FastError, RuntimeError):
    """Weights cannot be found, downloaded, read or used. The message says what was tried and what to do."""
