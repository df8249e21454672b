"""Which images failed and why, in a few lines."""

from __future__ import annotations

from collections import Counter

from dinov2_fast.errors import Dinov2FastError

FIRST = 3
REASONS = 5
MOST_REASONS = 1000  # that are told apart: some name sizes, so that there may be as many as images


class NothingReadError(Dinov2FastError, RuntimeError):
    """Not one image could be read: more likely than that is a disk or a server that is away."""


class Failures:
    """Counts errors by their reason, and keeps the first with the images that they are of."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: list[tuple[str, str]] = []

    def add(self, path: str, reason: str) -> None:
        """Takes one more."""
        if len(self._first) < FIRST:
            self._first.append((path, reason))
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else "other reasons"] += 1

    def __len__(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        """The first images, and the number for each reason where that says more."""
        lines = [f"  {path!r}: {reason}" for path, reason in self._first]
        if len(self) > len(lines):
            most = self.reasons.most_common(REASONS)
            others = len(self) - sum(count for _, count in most)
            counts = [f"{count} x {reason}" for reason, count in most] + [f"{others} x other reasons"] * (others > 0)
            lines.append(f"  in all {'; '.join(counts)}")
        return "\n".join(lines)
