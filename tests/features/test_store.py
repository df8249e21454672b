"""`load_features` refuses a manifest with impossible values, and reads one with huge counts at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dinov2_fast

MANIFEST = {"inputs": {"images": 5}, "shard_size": 2, "format": "npy", "features": {}}


def written(folder: Path, **fields: Any) -> Path:
    """The folder with a manifest that has other values for these fields, and lacks those that are `...`."""
    found = {name: value for name, value in (MANIFEST | fields).items() if value is not ...}
    (folder / "_manifest.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"shard_size": 0},
        {"shard_size": -1},
        {"shard_size": "2"},
        {"shard_size": 1.5},
        {"inputs": {"images": -1}},
        {"inputs": {"images": None}},
        {"inputs": {"images": 10**30}},
        {"format": ...},
    ],
    ids=str,
)
def test_a_manifest_with_impossible_numbers_or_without_a_format_is_refused(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json' is no manifest of features"):
        dinov2_fast.load_features(written(tmp_path, **fields))


def test_a_manifest_with_huge_counts_is_answered_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, inputs={"images": 10**12})
    with pytest.raises(ValueError, match=r"500000000000 of the 500000000000 shards .* are missing"):
        dinov2_fast.load_features(folder)
    assert len(dinov2_fast.load_features(folder, partial=True)) == 0
