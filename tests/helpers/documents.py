"""The text and the examples of README.md and docs/, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)


def example(text: str) -> str:
    """The one block of Python in the documents that contains `text`."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if text in block)
    return str(block)


def commands(pattern: str) -> list[str]:
    """The arguments in the indented lines ``dinov2-fast …`` of the documents, where they match the regular expression.

    Variables before the command and the ``&`` after it are left out.
    """
    lines = re.findall(r"^    (?:\w+=\S+ )*dinov2-fast (.*?)(?: &)?$", TEXT, flags=re.MULTILINE)
    return [line for line in lines if re.match(pattern, line)]
