"""The list of an extraction: every image in order, in parts that together are the whole, without growing memory."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dinov2_fast.data.sources import ImageSource
from dinov2_fast.extraction.image_list import ImageList


def make_list(count: int, part: tuple[int, int], folder: Path, size: int = 4) -> ImageList:
    images = (ImageSource(f"{n}.png", "a.tar", n, 10) if n % 3 else ImageSource(f"/x\udce9/{n}") for n in range(count))
    return ImageList(images, size, folder, part=part)


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 1), (4, 1), (10, 1), (10, 2), (23, 3), (24, 4), (5, 7)])
def test_parts_of_a_list_are_the_list(tmp_path: Path, count: int, parts: int) -> None:
    lists = [make_list(count, (number, parts), tmp_path) for number in range(1, parts + 1)]
    assert {listed.section.images for listed in lists} == {count}
    assert len({listed.section.sha256 for listed in lists}) == 1
    found: dict[int, ImageSource] = {}
    for listed in lists:
        for shard in listed.shards:
            assert listed.rows(shard) == len(listed.sources(shard))
            found.update(enumerate(listed.sources(shard), shard * 4))
    whole = make_list(count, (1, 1), tmp_path, size=max(count, 1))
    assert [found[row] for row in range(count)] == [p for shard in whole.shards for p in whole.sources(shard)]
    assert os.listdir(tmp_path) == []
    for listed in (*lists, whole):
        listed.close()


def test_the_digest_of_a_list_depends_on_all_it_says(tmp_path: Path) -> None:
    rows = [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"]]
    lists = [[ImageSource(path) for path in row] for row in rows]
    lists += [
        [ImageSource("a", "x", 1, 2)],
        [ImageSource("a", "x", 1, 3)],
        [ImageSource("a", "x", 2, 2)],
        [ImageSource("a", "y", 1, 2)],
    ]
    digests = set()
    for images in lists:
        with closing(ImageList(images, 4, tmp_path)) as listed:
            digests.add(listed.section.sha256)
    assert len(digests) == len(lists)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_long_list_takes_no_memory(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport pyarrow\n"
        "from dinov2_fast.data.sources import ImageSource\n"
        "from dinov2_fast.extraction.image_list import ImageList\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "def make(count):\n"
        "    return ImageList((ImageSource(f'{n:0200}') for n in range(count)), 8192, Path(sys.argv[1]))\n"
        "make(20_000).close()\nbefore = peak()\nlisted = make(300_000)\n"
        "assert listed.sources(30)[5].path == f'{30 * 8192 + 5:0200}'\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB; the paths alone are 60
