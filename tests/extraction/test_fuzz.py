"""Damaged images by the hundred, and images by the ten thousand: every row is there, and memory stays flat."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinov2_fast
from dinov2_fast.extraction.extract import extract
from tests.helpers.extraction import MeanColour

ROOT = Path(__file__).parents[2]
SEEDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")


def seed_image(kind: str) -> bytes:
    """A small image of a format, with EXIF where the format has it."""
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {} if kind == "GIF" else {"exif": exif}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The bytes with some changed, cut, repeated or left out, mostly near the beginning, where headers are."""
    found = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = int(len(found) * random.random() ** 2)
        length = int(random.integers(1, 9))
        kind = random.integers(0, 5)
        if kind == 0:
            found[place : place + length] = random.bytes(length)
        elif kind == 1:
            found[place : place + length] = random.choice([b"\xff", b"\x00", b"\x7f"]) * length
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[place : place + 50]
        else:
            del found[max(place, 1) :]
    return bytes(found)


@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_images_are_rows(tmp_path: Path, kind: str) -> None:
    random, seed = np.random.default_rng(SEEDS.index(kind)), seed_image(kind)
    files = []
    for index in range(201):
        path = tmp_path / f"{index:03}"
        path.write_bytes(mutated(seed, random) if index % 201 else seed)
        files.append(str(path))
    summary = extract(files, MeanColour(), tmp_path / "out", workers=1, batch_size=16, shard_size=64)
    found = dinov2_fast.load_features(tmp_path / "out")
    assert len(found) == summary.images == 201
    assert found.path == files
    bad = np.array([error is not None for error in found.error])
    assert not bad[0]
    assert 20 < bad.sum() < 200, "of mutations some must damage, and some must not"
    assert np.isfinite(found["cls"][~bad]).all()
    assert not [error for error in found.error if error and "ended" in error]


MEMORY = """
import resource, sys
from dinov2_fast.extraction.extract import extract
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from tests.helpers.extraction import MeanColour

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

if __name__ == "__main__":
    out, image, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    seen = []
    def progress(status):
        if status.done % 2000 == 0:
            seen.append(resident())
            print(status.done, round(seen[-1]), file=sys.stderr)
    extract((image for _ in range(count)), MeanColour(), out, processor=Dinov2ImageProcessor.for_size(56), workers=1,
            batch_size=50, shard_size=1000, features=["cls", "patches"], dtype="fp32", progress=progress)
    print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_flat_over_20_000_images(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "a.png")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "out"), str(tmp_path / "a.png"), "20000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10, done.stderr  # MB; all rows in memory would be some 30
    assert len(dinov2_fast.load_features(tmp_path / "out")) == 20_000
