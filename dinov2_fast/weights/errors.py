"""The error of this package's users: weights that cannot be found, fetched, read or used."""


class WeightsError(RuntimeError):
    """Weights could not be had; the message says what was tried and what to do."""
