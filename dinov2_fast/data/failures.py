"""Counting the errors of images, to report them in a few lines."""

from __future__ import annotations

from collections import Counter

from dinov2_fast.errors import Dinov2FastError

FIRST = 3
REASONS = 5
MOST_REASONS = 1000  # to keep; reasons may name sizes, and then each image has its own


class NothingReadError(Dinov2FastError, RuntimeError):
    """Not one image could be read: the disk or server is probably missing."""


class Failures:
    """Counts errors by reason, and keeps the paths of the first ones."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: list[tuple[str, str]] = []

    def add(self, path: str, reason: str) -> None:
        """Counts one error."""
        if len(self._first) < FIRST:
            self._first.append((path, reason))
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else "other reasons"] += 1

    def __len__(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        """The first errors; and if there are more, the count of each reason."""
        lines = [f"  {path!r}: {reason}" for path, reason in self._first]
        if len(self) > len(lines):
            most = self.reasons.most_common(REASONS)
            others = len(self) - sum(count for _, count in most)
            counts = [f"{count} x {reason}" for reason, count in most] + [f"{others} x other reasons"] * (others > 0)
            lines.append(f"  in all {'; '.join(counts)}")
        return "\n".join(lines)
