"""The error of this package's users: weights that cannot be found, fetched, read or used."""

from dinov2_fast.errors import Dinov2FastError


class WeightsError(Dinov2FastError, RuntimeError):
    """Weights could not be had; the message says what was tried and what to do."""
