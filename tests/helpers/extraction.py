"""A model whose features can be computed by hand, and checks of the shards that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.extraction.extract import extract
from dinov2_fast.extraction.run import Progress
from tests.helpers.images import read_image


class MeanColour(nn.Module):
    """The model's interface on features that can be computed by hand: colours, averaged over image and patches."""

    patch_size, stride, embed_dim, position_interpolation = 14, (14, 14), 3, "offset"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []
        self.eval()

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 14, width // 14

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(x))
        patches = avg_pool2d(x * self.scale, 14).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": 2 * patches[:, 0], "x_norm_patchtokens": patches}


def extract_files(images: Iterable[str], model: nn.Module, out: str | Path, **options: Any) -> Progress:
    """Extracts files as they are named: each is a row, also one that does not exist."""
    return extract(list(map(ImageSource, images)), model, out=out, **options)


def expected_features(path: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = Dinov2ImageProcessor()(read_image(path), "np").pixel_values[0]
    return 2 * pixels[:, :14, :14].mean((1, 2)), pixels.mean((1, 2))


def shard_tables(out: Path) -> list[Any]:
    return [pq.read_table(path) for path in sorted(out.glob("features-*.parquet"))]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for table in shard_tables(out) for row in table.to_pylist()]


def assert_rows(out: Path, files: list[str], bad: set[int]) -> None:
    for table in shard_tables(out):
        assert table.column_names == ["id", "path", "width", "height", "sha256", "error", "cls", "patch_mean"]
    rows = rows_of(out)
    assert [row["id"] for row in rows] == list(range(len(files)))
    assert [row["path"] for row in rows] == files
    for index, (row, file) in enumerate(zip(rows, files, strict=True)):
        if index in bad:
            assert row["error"]
            assert {row[name] for name in ("width", "height", "cls", "patch_mean")} == {None}
            continue
        assert row["error"] is None
        assert row["sha256"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
        assert (row["width"], row["height"]) == read_image(file).size
        cls, patch_mean = expected_features(file)
        np.testing.assert_allclose(row["cls"], cls, atol=1e-5)
        np.testing.assert_allclose(row["patch_mean"], patch_mean, atol=1e-5)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


class Stopping(MeanColour):
    """Raises instead of the third batch."""

    error: Any = KeyboardInterrupt

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        if len(self.batches) == 2:
            raise self.error("third batch")
        return super().forward_features(x)
