"""What pictures may be given as: files, folders, globs, lists, archives, URLs; all of them, in a fixed order."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_fast.extraction import ImageError, files, read_image
from dinov2_fast.extraction.decoding import decode
from dinov2_fast.extraction.inputs import Picture, PictureList, find_pictures
from dinov2_fast.image_processor import Dinov2ImageProcessor

PROCESSOR = Dinov2ImageProcessor(size=14, crop_size=14, do_rescale=False, do_normalize=False)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def colour(picture: Picture) -> int | str | None:
    """The colour of a picture, which tells them apart, or its error."""
    decoded = decode(picture, PROCESSOR)
    return decoded.error if decoded.pixels is None else int(decoded.pixels[0, 0, 0])


def names(paths: list[Any]) -> list[str]:
    return [os.path.basename(picture.path) for picture in find_pictures(paths)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(["b.png", "a/2.png", "a/10.png", "a/note.txt", "c.bin"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(10 * index))
    return tmp_path


def test_files_folders_and_globs(folder: Path) -> None:
    assert names([folder / "c.bin", folder]) == ["c.bin", "10.png", "2.png", "b.png"]
    assert names([folder / "*.png", folder / "a" / "[12]*"]) == ["b.png", "10.png", "2.png"]
    assert names([str(folder / "**" / "*.png")]) == ["10.png", "2.png", "b.png"]
    assert names([folder / "*"]) == ["10.png", "2.png", "b.png", "c.bin"]
    (folder / "[1].png").write_bytes(png(1))
    assert names([folder / "[1].png"]) == ["[1].png"]  # the file of that very name
    for missing in ("nothing.png", "*.gif"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            find_pictures([folder, folder / missing])


def test_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    entries = ["b.png", "missing.jpg", "a/2.png", "b.png", "c.bin"]
    (folder / "list.txt").write_bytes("\n".join(entries[:3]).encode() + b"\r\n\n" + "\n".join(entries[3:]).encode())
    (folder / "list.csv").write_text("label,path\n" + "".join(f'1,"{entry}"\n' for entry in entries), "utf-8-sig")
    pq.write_table(pa.table({"n": range(5), "path": entries}), folder / "list.parquet")
    for name in ("list.txt", "list.csv", "list.parquet"):
        assert [picture.path for picture in find_pictures([name])] == entries
        assert list(map(colour, find_pictures([name]))) == [0, "No such file or directory", 10, 0, 40]


def test_a_line_may_be_any_name(folder: Path) -> None:
    name = os.fsencode(folder) + b'/ "caf\xe9",1.png'
    Path(os.fsdecode(name)).write_bytes(png(7))
    (folder / "list.txt").write_bytes(name + b"\n")
    (folder / "list.csv").write_bytes(b'path\n"' + name.replace(b'"', b'""') + b'"\n')
    for list_ in ("list.txt", "list.csv"):
        assert list(map(colour, find_pictures([folder / list_]))) == [7]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_list_without_paths_is_an_error(folder: Path, name: str) -> None:
    (folder / "list.csv").write_text("file,label\nb.png,1\n")
    pq.write_table(pa.table({"file": ["b.png"], "label": [1]}), folder / "list.parquet")
    with pytest.raises(ValueError, match=r"list\..* has no column 'path', but 'file', 'label'"):
        list(find_pictures([folder / name]))


def write_tar(path: Path, count: int = 3, mode: Any = "w", format: int = tarfile.PAX_FORMAT) -> list[bytes]:
    """An archive as webdataset has them: samples of several files with one key."""
    contents = []
    with tarfile.open(path, mode, format=format) as tar:
        for index in range(count):
            contents.append(png(index + 1))
            key = f"{'deep/' * 30}{index:04}" if index == 1 else f"{index:04}"
            for ending, content in (("cls", b"7"), ("json", b"{}"), ("png", contents[-1])):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return contents


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives(tmp_path: Path, format: int) -> None:
    contents = write_tar(tmp_path / "train-000.tar", format=format)
    pictures = list(find_pictures([tmp_path / "train-*.tar"]))
    assert [picture.path for picture in pictures] == [
        f"{tmp_path}/train-000.tar/{name}.png" for name in ("0000", "deep/" * 30 + "0001", "0002")
    ]
    assert list(map(colour, pictures)) == [1, 2, 3]
    assert [decode(p, PROCESSOR).sha256 for p in pictures] == [hashlib.sha256(c).hexdigest() for c in contents]


@pytest.mark.parametrize("damage", ["gzip", "cut in a file", "cut in a header", "header", "text"])
def test_a_damaged_archive_is_an_error_and_never_shorter(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, 4, "w:gz" if damage == "gzip" else "w")
    content = bytearray(path.read_bytes())
    header = content.find(b"0002.png")
    if damage == "cut in a file":
        content = content[: header + 512 + 20]
    elif damage == "cut in a header":
        content = content[: header + 100]
    elif damage == "header":
        content[header + 3] ^= 1
    elif damage == "text":
        content = bytearray(b"not found" * 200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar' is damaged, or no uncompressed tar archive"):
        list(find_pictures([path]))


def test_an_archive_that_shrinks_afterwards_is_an_error_of_the_picture(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar")
    *_, last = find_pictures([tmp_path / "a.tar"])
    assert last.offset is not None
    os.truncate(tmp_path / "a.tar", last.offset + 10)
    assert colour(last) == f"truncated: 10 of {last.size} bytes are there"


def test_what_an_archive_links_to_is_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("folder.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(find_pictures([tmp_path / "a.tar"])) == []


@pytest.fixture
def bucket(folder: Path) -> str:
    """The same files behind a scheme."""
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.ls("/") else None
    write_tar(folder / "set.tar")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/{path.relative_to(folder).as_posix()}", path.read_bytes())
    memory.pipe_file("/bucket/list.txt", b"memory://bucket/b.png\nmemory://bucket/none.png\n")
    return "memory://bucket"


def test_urls(bucket: str) -> None:
    for given, expected in (
        ("", ["10.png", "2.png", "b.png"]),
        ("/c.bin", ["c.bin"]),
        ("/*.png", ["b.png"]),
        ("/set.tar", ["0000.png", "0001.png", "0002.png"]),
        ("/list.txt", ["b.png", "none.png"]),
    ):
        assert names([bucket + given]) == expected, given
    assert list(map(colour, find_pictures([f"{bucket}/set.tar"]))) == [1, 2, 3]
    assert list(map(colour, find_pictures([bucket]))) == [20, 10, 0]
    first, second = map(colour, find_pictures([f"{bucket}/list.txt"]))
    assert (first, type(second)) == (0, str)
    assert read_image(f"{bucket}/b.png").size == (16, 16)
    with pytest.raises(ImageError):
        read_image(f"{bucket}/none.png")
    with pytest.raises(FileNotFoundError, match="nothing at 'memory://bucket/none"):
        find_pictures([f"{bucket}/none.png"])


def test_urls_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'nosuch://a/b\.png' cannot be opened: Protocol not known"):
        find_pictures(["nosuch://a/b.png"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match="need fsspec, which is not installed: pip install fsspec"):
        find_pictures(["memory://bucket"])


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    assert colour(Picture(str(tmp_path / "huge.png"))) == "too large: 1073741825 bytes, the limit is 1073741824"
    fsspec.filesystem("memory").pipe_file("/large.png", bytes(2000))
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    assert colour(Picture("memory://large.png")) == "too large: 1001 bytes, the limit is 1000"


# The list of an extraction


def make_list(count: int, part: tuple[int, int], folder: Path, size: int = 4) -> PictureList:
    pictures = (Picture(f"{n}.png", "a.tar", n, 10) if n % 3 else Picture(f"/x\udce9/{n}") for n in range(count))
    return PictureList(pictures, size, part, folder)


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 1), (4, 1), (10, 1), (10, 2), (23, 3), (24, 4), (5, 7)])
def test_parts_of_a_list_are_the_list(tmp_path: Path, count: int, parts: int) -> None:
    lists = [make_list(count, (index, parts), tmp_path) for index in range(parts)]
    assert {listed.count for listed in lists} == {count}
    assert len({listed.sha256 for listed in lists}) == 1
    found: dict[int, Picture] = {}
    for listed in lists:
        for shard in listed.shards:
            found.update(zip(listed.rows(shard), listed.shard(shard), strict=True))
    whole = make_list(count, (0, 1), tmp_path, size=max(count, 1))
    assert [found[row] for row in range(count)] == [p for shard in whole.shards for p in whole.shard(shard)]
    assert os.listdir(tmp_path) == []
    for listed in (*lists, whole):
        listed.close()


def test_the_digest_of_a_list_depends_on_all_it_says(tmp_path: Path) -> None:
    rows = [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"]]
    lists = [[Picture(path) for path in row] for row in rows]
    lists += [
        [Picture("a", "x", 1, 2)],
        [Picture("a", "x", 1, 3)],
        [Picture("a", "x", 2, 2)],
        [Picture("a", "y", 1, 2)],
    ]
    digests = set()
    for pictures in lists:
        with closing(PictureList(pictures, 4, (0, 1), tmp_path)) as listed:
            digests.add(listed.sha256)
    assert len(digests) == len(lists)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_long_list_takes_no_memory(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport pyarrow\n"
        "from dinov2_fast.extraction.inputs import Picture, PictureList\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "def make(count):\n"
        "    return PictureList((Picture(f'{n:0200}') for n in range(count)), 8192, (0, 1), Path(sys.argv[1]))\n"
        "make(20_000).close()\nbefore = peak()\nlisted = make(300_000)\n"
        "assert listed.shard(30)[5].path == f'{30 * 8192 + 5:0200}'\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB; the paths alone are 60


def test_pictures_of_an_archive_and_of_files_are_decoded_alike(tmp_path: Path) -> None:
    (content, *_) = write_tar(tmp_path / "a.tar")
    (tmp_path / "a.png").write_bytes(content)
    alone = decode(Picture(str(tmp_path / "a.png")), PROCESSOR)
    (packed, *_) = (decode(picture, PROCESSOR) for picture in find_pictures([tmp_path / "a.tar"]))
    assert (alone.sha256, alone.width) == (packed.sha256, packed.width)
    np.testing.assert_array_equal(alone.pixels, packed.pixels)
