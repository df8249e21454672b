"""What images may be given as: files, folders, globs, lists, archives, URLs; all of them, in a fixed order."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_fast.data import archives, files, parquet_images
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.files import ImageError
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource, find_images, require_images
from dinov2_fast.errors import InvalidValueError
from tests.helpers.images import read_image

PROCESSOR = Dinov2ImageProcessor(size=14, crop_size=14, do_rescale=False, do_normalize=False)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def colour(image: ImageSource) -> int | str | None:
    """The colour of an image, which tells them apart, or its error."""
    decoded = decode(image, PROCESSOR)
    return decoded.error if decoded.pixels is None else int(decoded.pixels[0, 0, 0])


def paths_of(given: list[Any]) -> list[str]:
    return [source.path for source in find_images(given)]


def names(paths: list[Any]) -> list[str]:
    return [os.path.basename(image.path) for image in find_images(paths)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(["b.png", "a/2.png", "a/10.png", "a/note.txt", "c.bin"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(10 * index))
    return tmp_path


def test_files_folders_and_globs_are_found_in_order(folder: Path) -> None:
    assert names([folder / "c.bin", folder]) == ["c.bin", "10.png", "2.png", "b.png"]
    assert names([folder / "*.png", folder / "a" / "[12]*"]) == ["b.png", "10.png", "2.png"]
    assert names([str(folder / "**" / "*.png")]) == ["10.png", "2.png", "b.png"]
    assert names([folder / "*"]) == ["10.png", "2.png", "b.png", "c.bin"]
    assert paths_of([folder / "**"]) == [f"{folder}/{name}" for name in ("a/10.png", "a/2.png", "b.png")]
    (folder / "[1].png").write_bytes(png(1))
    assert names([folder / "[1].png"]) == ["[1].png"]  # the file of that very name
    for missing in ("nothing.png", "*.gif"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            find_images([folder, folder / missing])


def test_skipped_files_are_counted_by_ending_in_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("photo.HEIC", "a/other.heic", ".hidden", "x.1", "x.2", "x.3", "x.4"):
        (folder / name).write_bytes(b"")
    write_tar(folder / "set.tar")
    for _ in range(2):  # the same files are counted once
        assert names([folder / "c.bin", folder, folder / "set.tar"])[:4] == ["c.bin", "10.png", "2.png", "b.png"]
    assert paths_of([folder]) == [str(folder / name) for name in ("a/10.png", "a/2.png", "b.png")]
    first, second = caplog.messages
    assert first.startswith("16 files with other endings were left out (.cls 3, .json 3, .heic 2, ")
    assert second.startswith("10 files with other endings were left out (.heic 2, ")
    assert ", …)." in second


def test_the_warning_names_the_plugin_that_heic_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README").write_bytes(b"")
    assert paths_of([tmp_path]) == []
    monkeypatch.setattr("dinov2_fast.data.sources.FORMATS", ("JPEG",))
    monkeypatch.setattr("dinov2_fast.data.sources.ENDINGS", (".jpg",))
    (tmp_path / "README").rename(tmp_path / "photo.heic")
    assert paths_of([tmp_path]) == []
    text = "1 file with another ending was left out"
    assert caplog.messages == [f"{text} (none 1).", f"{text} (.heic 1). HEIC needs: pip install pillow_heif."]


def test_the_command_line_prints_which_files_were_skipped(folder: Path) -> None:
    (folder / "b.png").rename(folder / "b.avi")
    command = [sys.executable, "-m", "dinov2_fast", "extract", str(folder), "--model", "x", "--out", str(folder / "o")]
    (folder / "a" / "2.png").unlink()
    (folder / "a" / "10.png").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said, error = done.stderr.splitlines()
    assert (done.returncode, said) == (1, "3 files with other endings were left out (.txt 1, .avi 1, .bin 1).")
    assert error.startswith("dinov2-fast: error: There are no ")


def test_folders_deeper_than_the_interpreters_stack_are_searched(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "/".join("d" * 150))
    (tmp_path / "/".join("d" * 150) / "a.png").write_bytes(png(1))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert names([tmp_path]) == ["a.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_text_and_table_lists_name_their_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    entries = ["b.png", "missing.jpg", "a/2.png", "b.png", "c.bin"]
    (folder / "list.txt").write_bytes("\n".join(entries[:3]).encode() + b"\r\n\n" + "\n".join(entries[3:]).encode())
    (folder / "list.csv").write_text("label,path\n" + "".join(f'1,"{entry}"\n' for entry in entries), "utf-8-sig")
    pq.write_table(pa.table({"n": range(5), "path": entries}), folder / "list.parquet")
    for name in ("list.txt", "list.csv", "list.parquet"):
        assert [image.path for image in find_images([name])] == entries
        assert list(map(colour, find_images([name]))) == [0, "No such file or directory", 10, 0, 40]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "a.png\n日本.png\n".encode("utf-8-sig")),
        ("list.txt", "a.png\r\n日本.png\r\n".encode("utf-16")),  # as PowerShell writes it
        ("list.csv", "path,label\na.png,1\n日本.png,2\n".encode("utf-16")),
        ("list.csv", "label;image\n1;a.png\n2;日本.png\n".encode()),
        ("list.csv", "path\na.png\n日本.png\n".encode()),
        ("list.tsv", "n\turl\n1\ta.png\n2\t日本.png\n".encode()),
        ("list.tsv", "url\ta,b;c,d\na.png\t1\n日本.png\t2\n".encode()),
        ("list.jsonl", '{"path": "a.png", "n": [1]}\n\n{"n": 2, "image": "日本.png"}\n'.encode()),
    ],
)
def test_lists_in_common_encodings_and_separators_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [image.path for image in find_images([tmp_path / name])] == ["a.png", "日本.png"]


def test_file_names_are_relative_to_their_list(folder: Path) -> None:
    """As in the metadata of Hugging Face's image folders."""
    (folder / "a" / "metadata.csv").write_text("file_name,text\n2.png,two\n/none.png,\n,nothing\n")
    (folder / "a" / "metadata.jsonl").write_text(
        '{"file_name": "2.png"}\n{"file_name": "/none.png"}\n{"file_name": null}'
    )
    for name in ("metadata.csv", "metadata.jsonl"):
        found = list(find_images([folder / "a" / name]))
        assert [image.path for image in found] == [str(folder / "a" / "2.png"), "/none.png", ""]
        assert list(map(colour, found)) == [10, "No such file or directory", "the list has no path here"]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_every_text_type_are_read(folder: Path, type: Any) -> None:
    values = pa.array([str(folder / "b.png"), None], type)
    pq.write_table(pa.table({"path": values}), folder / "list.parquet")
    assert list(map(colour, find_images([folder / "list.parquet"]))) == [0, "the list has no path here"]


def test_parquet_paths_that_are_not_utf8_keep_their_bytes(folder: Path) -> None:
    name = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(png(7))
    values = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, len(name)], np.int32)), pa.py_buffer(name))
    pq.write_table(pa.table({"path": values}), folder / "list.parquet")
    assert list(map(colour, find_images([folder / "list.parquet"]))) == [7]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("l.csv", b"label,path\n1,a.png\n2\n", "line 3: the row has 1 columns, and 'path' is number 2"),
        ("l.csv", b'path,n\na.png,1\n"b.png,2\nc.png,3\n', "line 4: unexpected end of data"),
        ("l.csv", b"path,n\na.png,%b\n" % (b"x" * 200_000), "line 2: field larger than field limit"),
        ("l.csv", "path\na.png\n".encode("utf-16")[:-1], "truncated data"),
        ("l.jsonl", b'{"path": "a.png"}\n{"path": "b.p', "line 2: Unterminated string"),
        ("l.jsonl", b'["a.png"]', "line 1: a line must be an object"),
        ("l.jsonl", b'{"path": 7}', "line 1: 'path' is not a string"),
        ("l.jsonl", b'{"path": "\\ud800.png"}', "line 1: .* surrogates not allowed"),
        ("l.jsonl", b"[" * 100_000, "line 1: maximum recursion depth"),
        ("l.jsonl", b'{"file": "a.png"}', "line 1: there must be a column 'path' or .*; there are 'file'"),
        ("l.parquet", b"PAR1 but no more", "is damaged, or no Parquet file"),
    ],
)
def test_a_damaged_list_is_an_error_that_names_file_and_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}'.*{reason}"):
        list(find_images([tmp_path / name]))


def test_a_parquet_column_without_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": pa.array([b"a.png"])}), tmp_path / "l.parquet")
    with pytest.raises(ValueError, match=r"l\.parquet'.* the column 'path' holds binary, not strings"):
        list(find_images([tmp_path / "l.parquet"]))


@pytest.mark.parametrize("name", ["w.tar.gz", "w.TGZ", "w.txt.xz", "w.7z", "w.json", "w.xlsx"])
def test_compressed_archives_and_unread_tables_are_refused_by_the_call(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}' is .*\. (Unpack it|Write the paths)"):
        find_images([tmp_path / name])
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "folder.tgz").mkdir()
    assert list(find_images([tmp_path / "folder.zip", tmp_path / "folder.tgz"])) == []


def test_a_line_of_a_list_may_have_any_ending(folder: Path) -> None:
    name = os.fsencode(folder) + b'/ "caf\xe9",1.png'
    Path(os.fsdecode(name)).write_bytes(png(7))
    (folder / "list.txt").write_bytes(name + b"\n")
    (folder / "list.csv").write_bytes(b'path\n"' + name.replace(b'"', b'""') + b'"\n')
    for list_ in ("list.txt", "list.csv"):
        assert list(map(colour, find_images([folder / list_]))) == [7]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_list_without_paths_is_an_error(folder: Path, name: str) -> None:
    (folder / "list.csv").write_text("file,label\nb.png,1\n")
    pq.write_table(pa.table({"file": ["b.png"], "label": [1]}), folder / "list.parquet")
    with pytest.raises(ValueError, match=r"list\..*column 'path' or .* 'file_name'; there are 'file', 'label'"):
        list(find_images([folder / name]))


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
def test_images_in_a_tar_archive_are_found_and_read(tmp_path: Path, format: int) -> None:
    contents = write_tar(tmp_path / "train-000.tar", format=format)
    images = list(find_images([tmp_path / "train-*.tar"]))
    assert [image.path for image in images] == [
        f"{tmp_path}/train-000.tar/{name}.png" for name in ("0000", "deep/" * 30 + "0001", "0002")
    ]
    assert list(map(colour, images)) == [1, 2, 3]
    assert [decode(p, PROCESSOR).sha256 for p in images] == [hashlib.sha256(c).hexdigest() for c in contents]


@pytest.mark.parametrize(
    "damage", ["gzip", "cut in a file", "cut in a header", "cut before a file", "zeros before a file", "header", "text"]
)
def test_a_damaged_archive_is_an_error_and_never_a_shorter_list(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, 4, "w:gz" if damage == "gzip" else "w")
    content = bytearray(path.read_bytes())
    header = content.find(b"0002.png")
    if damage == "cut in a file":
        content = content[: header + 512 + 20]
    elif damage == "cut in a header":
        content = content[: header + 100]
    elif damage == "cut before a file":
        content = content[:header]
    elif damage == "zeros before a file":
        content[header:header] = bytes(512)
    elif damage == "header":
        content[header + 3] ^= 1
    elif damage == "text":
        content = bytearray(b"not found" * 200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar' is damaged, or no uncompressed tar archive"):
        list(find_images([path]))


def test_an_archive_truncated_after_listing_is_an_error_of_the_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar")
    *_, last = find_images([tmp_path / "a.tar"])
    assert last.offset is not None
    os.truncate(tmp_path / "a.tar", last.offset + 10)
    assert colour(last) == f"truncated: 10 of {last.size} bytes are there"


def test_links_and_sparse_files_in_an_archive_are_rows_with_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("sparse.png", tarfile.GNUTYPE_SPARSE),
            ("folder.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("sparse of pax.png")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "0"}
        tar.addfile(info)
    found = list(find_images([tmp_path / "a.tar"]))
    assert names([tmp_path / "a.tar"]) == ["link.png", "hard.png", "sparse.png", "sparse of pax.png"]
    assert set(map(colour, found)) == {"a link or sparse file in the archive, which is not read: unpack the archive"}


@pytest.mark.parametrize(
    "headers", [{"size": "-1536"}, {"size": "9" * 30}, {"GNU.sparse.map": "x", "GNU.sparse.size": "0"}]
)
def test_hostile_sizes_in_an_archive_are_an_error_and_end(tmp_path: Path, headers: dict[str, str]) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("first.txt"))
        info = tarfile.TarInfo("second.png")
        info.pax_headers = headers
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"a\.tar' is damaged"):
        list(islice(find_images([path]), 1000))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_in_a_zip_archive_are_found_and_read(tmp_path: Path, method: int) -> None:
    content = np.random.default_rng(0).bytes(100) + png(1)  # no image: what is read must be these very bytes
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.mkdir("deep.png") if hasattr(archive, "mkdir") else None
        archive.writestr("deep.png/日本.png", png(7))
        archive.writestr("b.PNG", content)
        archive.writestr("notes.txt", b"no image")
    found = list(find_images([tmp_path / "a.zip"]))
    assert [image.path for image in found] == [f"{tmp_path}/a.zip/deep.png/日本.png", f"{tmp_path}/a.zip/b.PNG"]
    first, second = (decode(image, PROCESSOR) for image in found)
    assert (first.error, first.sha256) == (None, hashlib.sha256(png(7)).hexdigest())
    assert second.sha256 == hashlib.sha256(content).hexdigest()


def test_damage_in_a_zip_archive_is_an_error_of_the_image_or_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\3\4 and no more")
    with pytest.raises(ValueError, match=r"a\.zip' is damaged, or no zip archive"):
        list(find_images([path]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10_000))
    content = bytearray(path.read_bytes())
    (member,) = find_images([path])

    def error(place: int, *values: int) -> tuple[str | None, bool]:
        """What reading gives with other values in the header of the member."""
        path.write_bytes(content[:place] + bytes(values) + content[place + len(values) :])
        decoded = decode(member, PROCESSOR)
        return decoded.error, decoded.transient

    unread = "in the zip archive, which is not read: unpack the archive"
    assert error(6, 1) == (f"encrypted {unread}", False)
    assert error(8, 12) == (f"compressed by method 12 {unread}", False)
    assert error(0, 0) == ("the zip archive has changed, or is damaged", True)
    assert error(35, 255) == (
        "damaged in the zip archive: Error -3 while decompressing data: invalid block type",
        False,
    )
    monkeypatch.setattr(archives, "MAX_BYTES", 9_999)
    assert error(0) == ("damaged in the zip archive, or larger than 9999 bytes", False)


def write_dataset(path: Path, images: list[Any], rows: int = 2, **settings: Any) -> None:
    """As Hugging Face's datasets do, in row groups of some rows."""
    pq.write_table(pa.table({"image": images, "label": range(len(images))}), path, row_group_size=rows, **settings)


def test_images_in_a_parquet_file_are_found_and_read(folder: Path) -> None:
    images = [{"bytes": png(value), "path": f"{value}.png"} for value in range(1, 6)]
    images += [{"bytes": None, "path": str(folder / "a" / "2.png")}, {"bytes": None, "path": None}, None]
    write_dataset(folder / "train.parquet", images)
    found = list(find_images([folder / "train.parquet"]))
    assert [image.path for image in found] == [f"{folder}/train.parquet/{row}" for row in range(8)]
    expected = [1, 2, 3, 4, 5, 10, "no image in this row", "no image in this row"]
    assert list(map(colour, found)) == expected
    assert list(map(colour, reversed(found))) == expected[::-1]
    for values in ([3], [5, 6, 7]):
        write_dataset(folder / "plain.parquet", [png(value) for value in values], rows=len(values))
        assert list(map(colour, find_images([folder / "plain.parquet"]))) == values


def test_bytes_of_another_type_are_an_error_of_the_image(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train.parquet", [{"bytes": "a.png", "path": None}])
    assert list(map(colour, find_images([tmp_path / "train.parquet"]))) == ["string argument without an encoding"]


def test_parquet_files_that_are_damaged_or_deleted_later_are_errors(folder: Path) -> None:
    path = folder / "train.parquet"
    write_dataset(path, [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}], rows=1)
    first, second = find_images([path])
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    assert type(colour(first)) is str
    assert colour(second) == 2
    path.unlink()
    assert (decode(first, PROCESSOR).error, decode(first, PROCESSOR).transient) == ("No such file or directory", True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_images_behind_one_dictionary_entry_take_no_extra_memory(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train.parquet", [{"bytes": bytes(1 << 20), "path": None}] * 300, rows=300)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dinov2_fast.data.parquet_images import read_row\n"
        "def peak():\n"
        "    return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "read_row(sys.argv[1], 0)\n"
        "before = peak()\n"
        "read_row(sys.argv[1], 299)\n"
        "print((peak() - before) / 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "train.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB, of 300


def test_row_groups_above_the_limit_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"bytes": bytes([index]) * 3000, "path": None} for index in range(4)]
    write_dataset(folder / "train.parquet", images, rows=4, compression="none")
    monkeypatch.setattr(parquet_images, "MAX_BYTES", 10_000)
    with pytest.raises(
        ValueError, match=r"train\.parquet' has a row group with \d+ bytes of images.* smaller row groups"
    ):
        list(find_images([folder / "train.parquet"]))


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


def test_every_kind_of_path_may_be_a_url(bucket: str) -> None:
    for given, expected in (
        ("", ["10.png", "2.png", "b.png"]),
        ("/c.bin", ["c.bin"]),
        ("/*.png", ["b.png"]),
        ("/a*/**", ["10.png", "2.png"]),
        ("/set.tar", ["0000.png", "0001.png", "0002.png"]),
        ("/list.txt", ["b.png", "none.png"]),
    ):
        assert names([bucket + given]) == expected, given
    assert list(map(colour, find_images([f"{bucket}/set.tar"]))) == [1, 2, 3]
    assert list(map(colour, find_images([bucket]))) == [20, 10, 0]
    first, second = map(colour, find_images([f"{bucket}/list.txt"]))
    assert (first, type(second)) == (0, str)
    assert read_image(f"{bucket}/b.png").size == (16, 16)
    with pytest.raises(ImageError):
        read_image(f"{bucket}/none.png")
    with pytest.raises(FileNotFoundError, match="nothing at 'memory://bucket/none"):
        find_images([f"{bucket}/none.png"])


def test_urls_that_cannot_be_opened_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'nosuch://a/b\.png' cannot be opened: Protocol not known"):
        find_images(["nosuch://a/b.png"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match="need fsspec, which is not installed: pip install fsspec"):
        find_images(["memory://bucket"])


class Unwell(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A server whose answers are errors, as fsspec's file systems raise them, and that ignores ranges."""

    protocol = "unwell"
    cachable = False

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        causes = {
            "500": RuntimeError("500, message='Internal Server Error', url='http://h/500?token=SECRET'"),
            "redirect": ValueError("file:///etc/passwd?token=SECRET"),
            "refused": ConnectionRefusedError(111, "Connection refused"),
        }
        name = path.partition("?")[0].rpartition("/")[2]
        raise FileNotFoundError(f"unwell://{path}") from causes.get(name)

    def _open(self, path: str, *args: Any, **settings: Any) -> Any:
        self.info(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **settings: Any) -> bytes:
        return bytes(20480)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("500", "RuntimeError: 500, message='Internal Server Error', url='…'"),
        ("redirect", "ValueError"),
        ("refused", "Connection refused"),
        ("missing", "No such file or directory"),
    ],
)
def test_errors_of_urls_name_the_reason_and_no_secrets(name: str, reason: str) -> None:
    fsspec.register_implementation("unwell", Unwell, clobber=True)
    url = f"unwell://bucket/{name}?token=SECRET"
    decoded = decode(ImageSource(url), PROCESSOR)
    assert (decoded.error, decoded.transient) == (reason, True)
    with pytest.raises(FileNotFoundError) as caught:
        find_images([url])
    assert str(caught.value) == f"There is nothing at 'unwell://bucket/{name}' ({reason})."


def test_a_server_that_sends_more_than_was_asked_for_is_an_error() -> None:
    fsspec.register_implementation("unwell", Unwell, clobber=True)
    url = "unwell://bucket/set.tar"
    assert colour(ImageSource(f"{url}/a.png", url, 512, 100)) == "the server sends 20480 bytes where 100 were asked for"


@pytest.mark.parametrize("name", ["list.txt", "set.tar"])
def test_a_list_or_archive_that_cannot_be_read_is_named_without_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    url = f"memory://{name}?token=SECRET"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{name}?token=SECRET", b"")

    def fail(*_: object, **settings: object) -> None:
        raise FileNotFoundError(url) from ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(type(memory), "_open", fail)
    with pytest.raises(OSError) as caught:
        list(find_images([url]))
    assert str(caught.value) == f"'memory://{name}' cannot be read: Connection reset by peer."


def test_secrets_are_not_shown_and_do_not_hide_the_ending(tmp_path: Path) -> None:
    signed = "https://user:SECRET@host/a/b.Tar?token=SECRET.x"
    assert (files.shown(signed), files.ending(signed)) == ("https://host/a/b.Tar", ".tar")
    assert (files.shown("a?b.tar"), files.ending("a?b.tar")) == ("a?b.tar", ".tar")
    with pytest.raises(ValueError, match=r"^'nosuch://a/b' cannot be opened"):
        find_images(["nosuch://a/b?token=SECRET"])
    fsspec.filesystem("memory").pipe_file("/cut.tar?token=SECRET", b"")
    with pytest.raises(ValueError, match=r"^'memory://cut.tar' is damaged"):
        list(find_images(["memory://cut.tar?token=SECRET"]))
    fsspec.filesystem("memory").pipe_file("/empty.txt?token=SECRET", b"")
    with pytest.raises(ValueError, match=r"^There are no images in 'memory://empty\.txt'\."):
        require_images(["memory://empty.txt?token=SECRET"])


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    assert colour(ImageSource(str(tmp_path / "huge.png"))) == "too large: 1073741825 bytes, the limit is 1073741824"
    fsspec.filesystem("memory").pipe_file("/large.png", bytes(2000))
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    assert colour(ImageSource("memory://large.png")) == "too large: 1001 bytes, the limit is 1000"


def test_images_of_an_archive_and_of_files_are_decoded_alike(tmp_path: Path) -> None:
    (content, *_) = write_tar(tmp_path / "a.tar")
    (tmp_path / "a.png").write_bytes(content)
    alone = decode(ImageSource(str(tmp_path / "a.png")), PROCESSOR)
    (packed, *_) = (decode(image, PROCESSOR) for image in find_images([tmp_path / "a.tar"]))
    assert (alone.sha256, alone.width) == (packed.sha256, packed.width)
    np.testing.assert_array_equal(alone.pixels, packed.pixels)


def test_a_single_path_or_source_needs_no_list(folder: Path) -> None:
    expected = list(find_images([folder]))
    assert list(find_images(folder)) == list(find_images(str(folder))) == expected
    assert list(find_images(expected[0])) == expected[:1]


def test_sources_are_passed_on_lazily() -> None:
    taken: list[int] = []

    def sources() -> Iterator[ImageSource]:
        for index in range(5):
            taken.append(index)
            yield ImageSource(f"missing{index}")

    found = find_images(sources())
    assert [next(found), next(found)] == [ImageSource("missing0"), ImageSource("missing1")]
    assert taken == [0, 1]


def test_require_images_raises_if_there_are_none(folder: Path, tmp_path: Path) -> None:
    assert list(require_images(folder)) == list(find_images([folder]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidValueError, match=r"There are no images in '.*empty'\. Archives and lists in a folder"):
        require_images(tmp_path / "empty")
    for nothing in ([], iter(())):
        with pytest.raises(InvalidValueError, match=r"There are no images\. Archives"):
            require_images(nothing)


def test_paths_and_sources_may_be_mixed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    source, glob = ImageSource("c.png"), str(tmp_path / "*.png")
    expected = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert [image.path for image in find_images([source, glob])] == ["c.png", *expected]
    assert [image.path for image in find_images([glob, source])] == [*expected, "c.png"]
