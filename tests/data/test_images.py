"""Reading images safely, and listing them."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from dinov2_fast.data.decoding import decode
from dinov2_fast.data.files import ImageError, ReadError
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import decode_image
from dinov2_fast.data.sources import ImageSource, find_images
from dinov2_fast.errors import InvalidValueError
from tests.helpers.images import read_image

IMAGES = Path(__file__).parents[2] / "examples" / "images"


def colourful(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "empty file"),
    "ten_bytes.jpg": (lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG that cannot be opened: Truncated"),
    "half.jpg": (lambda: (IMAGES / "coffee.jpg").read_bytes()[:36000], "cannot be decoded: .*truncated"),
    "html.jpg": (lambda: b"<!DOCTYPE html><html><body>Not found</body></html>", "not an image of a known format"),
    "bomb.png": (lambda: png_header(20_000, 20_000), "too large"),
    "121_mpx.png": (lambda: png_header(11_000, 11_000), "too large: 11000 x 11000 pixels, the limit is 50000000"),
    "narrow_bomb.png": (lambda: png_header(2**31 - 1, 1), "too large|PNG that cannot be opened"),
    "postscript.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_an_error_with_its_reason(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF"])
def test_each_format_is_read_and_half_of_it_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.anything"
    colourful(200, 150).save(path, kind)
    assert read_image(path).size == (200, 150)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError):
        read_image(path)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    colourful().save(tmp_path / "image.ppm")
    with pytest.raises(ImageError, match=r"not an image of a known format \(JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF\)"):
        read_image(tmp_path / "image.ppm")


def test_the_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colourful(100, 100).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png", max_pixels=10_000).size == (100, 100)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match="too large: 100 x 100"):
        read_image(tmp_path / "image.png", max_pixels=9_999)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    rgb = colourful()
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.array_equal(read_image(tmp_path / "cmyk.tif"), rgb)

    values = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
    for name in ("grey16.png", "grey16.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.abs(np.asarray(read_image(tmp_path / name))[..., 1] - values / 257).max() <= 0.5

    palette = rgb.quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(read_image(tmp_path / "palette.png"), palette.convert("RGB"))


def test_the_limit_of_pixels_may_exceed_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colourful(100, 100).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(tmp_path / "image.png", max_pixels=10_000).size == (100, 100)


def test_a_jpeg_without_its_end_marker_is_an_error_that_names_it(tmp_path: Path) -> None:
    content = (IMAGES / "coffee.jpg").read_bytes()
    assert content.endswith(b"\xff\xd9")
    (tmp_path / "image.jpg").write_bytes(content[:-2])
    with pytest.raises(ImageError, match=r"truncated.* a JPEG ends in FF D9, this one does not"):
        read_image(tmp_path / "image.jpg")


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A JPEG of 20 x 20 pixels with another size in its header: a decoder fills what is missing with grey."""
    content = bytearray(encoded(colourful(20, 20), "JPEG"))
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_with_canvas(width: int, height: int) -> bytes:
    """An animation of one frame of 8 x 8 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    def uint24(*numbers: int) -> bytes:
        return b"".join(struct.pack("<I", number)[:3] for number in numbers)

    canvas = chunk(b"VP8X", b"\2\0\0\0" + uint24(width - 1, height - 1)) + chunk(b"ANIM", bytes(6))
    frame = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    content = b"WEBP" + canvas + chunk(b"ANMF", uint24(0, 0, 7, 7, 100) + b"\0" + frame)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG that repeats its last scan."""
    content = encoded(colourful(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 200 + content[-2:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg_that_claims(2000, 2000), "truncated: .* bytes cannot hold 2000 x 2000 pixels"),
        (webp_with_canvas(7000, 7000), "truncated: .* bytes cannot hold 7000 x 7000 pixels"),
        (png_header(1, 49_000_000), "too long: 1 x 49000000 pixels, the limit of a side is 1000000"),
        (jpeg_of_many_scans(), "too many progressive scans: the limit is 100"),
    ],
    ids=["grey jpeg", "empty canvas", "narrow png", "scans"],
)
def test_small_files_that_would_cost_much_are_refused_by_their_headers(
    content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match=reason):
        decode_image(content)


@pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12 does not apply its limit to the canvas of a WebP")
def test_an_error_of_pillows_own_limit_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content = webp_with_canvas(16_000, 16_000)
    with pytest.raises(ImageError, match=r"too large: .* PIL\.Image\.MAX_IMAGE_PIXELS sets this limit"):
        decode_image(content, max_pixels=300_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(content, max_pixels=300_000_000)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("JPEG", {"quality": 1, "optimize": True, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "group4"}),
        ("AVIF", {"quality": 1}),
    ],
)
def test_images_of_one_colour_are_not_taken_for_truncated(kind: str, settings: dict[str, object]) -> None:
    """They compress best of all."""
    blank = Image.new("1", (4000, 3000)).convert("1" if kind in ("PNG", "TIFF") else "RGB")
    assert decode_image(encoded(blank, kind, **settings)).size == (4000, 3000)


def tiff_of_many_channels(channels: int) -> bytes:
    content = bytearray(encoded(colourful(), "TIFF"))
    entry = content.index(struct.pack("<HHI", 277, 3, 1)) + 8  # SamplesPerPixel
    content[entry : entry + 2] = struct.pack("<H", channels)
    return bytes(content)


def test_a_format_that_is_known_is_named_when_it_cannot_be_opened() -> None:
    with pytest.raises(ImageError, match=r"^TIFF that cannot be opened: unknown data organization"):
        decode_image(tiff_of_many_channels(5))


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_where_its_plugin_is_installed(tmp_path: Path, installed: bool) -> None:
    """By a stand-in, which opens what begins as HEIC does as one grey pixel."""
    plugin = (
        "from PIL import Image, ImageFile\n"
        "class Heif(ImageFile.ImageFile):\n"
        "    format = 'HEIF'\n"
        "    def _open(self):\n"
        "        self._size, self._mode, self.tile = (1, 1), 'L', []\n"
        "    def load(self):\n"
        "        self.im = Image.core.fill('L', (1, 1), 128)\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', Heif, lambda prefix: prefix[4:12] == b'ftypheic')\n"
    )
    (tmp_path / "pillow_heif.py").write_text(plugin if installed else "raise ImportError")
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x20ftypheic")
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from dinov2_fast.data.files import ImageError, read_bytes\n"
        "from dinov2_fast.data.images import decode_image\n"
        "from dinov2_fast.data.sources import find_images\n"
        "print(len(list(find_images(sys.argv[1:]))))\n"
        "try:\n"
        "    print(decode_image(read_bytes(sys.argv[1] + '/photo.HEIC')).getpixel((0, 0)))\n"
        "except ImageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    listed, read = done.stdout.splitlines()
    if installed:
        assert (listed, read) == ("1", "(128, 128, 128)")
    else:
        assert listed == "0"
        assert read == "HEIC, which is read where the package pillow_heif is installed"


def test_reading_in_threads_does_not_change_warning_filters(tmp_path: Path) -> None:
    colourful().save(tmp_path / "image.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read_image, [tmp_path / "image.png"] * 200))
    assert list(warnings.filters) == before


def test_nothing_is_printed_about_odd_files(tmp_path: Path) -> None:
    """Pillow logs an error for a TIFF that claims more samples than it can decode."""
    (tmp_path / "image.tif").write_bytes(tiff_of_many_channels(999))
    code = (
        "import sys\n"
        "from dinov2_fast.data.files import ImageError, read_bytes\n"
        "from dinov2_fast.data.images import decode_image\n"
        "try:\n"
        "    decode_image(read_bytes(sys.argv[1]))\n"
        "except ImageError:\n"
        "    print('refused')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "image.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_or_page_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "frames", kind, save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "frames") as image:
        assert image.n_frames == 3
    red = np.asarray(read_image(tmp_path / "frames")).reshape(-1, 3).mean(axis=0)
    assert np.abs(red - [255, 0, 0]).max() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = colourful()
    # The standard names the visual side of the stored row 0 and of the stored column 0.
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    stored = np.asarray(upright)
    if row_0 in ("left", "right"):
        stored = stored.transpose(1, 0, 2)
    stored = stored[:: -1 if row_0 in ("bottom", "right") else 1, :: -1 if column_0 in ("bottom", "right") else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_hide_the_image(tmp_path: Path) -> None:
    colourful().save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert read_image(tmp_path / "exif.jpg").size == (40, 30)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "missing.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ImageError, match="symbolic links"):
        read_image(tmp_path / "loop.jpg")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    errors: list[str] = []

    def read() -> None:
        try:
            read_image(tmp_path / "pipe.jpg")
        except ImageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert errors == ["not a regular file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_a_read_error(tmp_path: Path) -> None:
    colourful().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(tmp_path / "secret.png")


def test_an_io_error_of_the_disk_is_a_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colourful().save(tmp_path / "image.png")

    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "image.png")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(ImageError, match=r"^Permission denied$"):
        read_image(tmp_path / "image.png")


def outcome(path: Path) -> tuple[str | None, bool]:
    decoded = decode(ImageSource(str(path)), Dinov2ImageProcessor())
    return decoded.error, decoded.transient


def test_read_errors_are_transient_and_decoding_errors_are_not(tmp_path: Path) -> None:
    with pytest.raises(ReadError):
        read_image(tmp_path / "missing.png")
    assert outcome(tmp_path / "missing.png") == ("No such file or directory", True)
    (tmp_path / "damaged.png").write_bytes(png_header(30, 40))
    for path in (tmp_path / "damaged.png", tmp_path):
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert not isinstance(caught.value, ReadError)
        assert outcome(path) == (str(caught.value), False)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("dinov2_fast.data.decoding.read_bytes", "out of memory"),
        ("dinov2_fast.data.files._read_local", "out of memory"),
        ("PIL.Image.preinit", "out of memory"),
        ("PIL.Image.Image.load", "out of memory"),
        ("dinov2_fast.data.image_processor.Dinov2ImageProcessor.__call__", "cannot be processed: out of memory"),
    ],
)
def test_running_out_of_memory_is_a_transient_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: str
) -> None:
    colourful().save(tmp_path / "good.png")

    def fail(*args: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr(step, fail)
    assert outcome(tmp_path / "good.png") == (error, True)


def test_images_of_several_sizes_make_no_batch_with_channels_last_either() -> None:
    processor = Dinov2ImageProcessor(do_resize=False, do_center_crop=False)
    with pytest.raises(InvalidValueError, match=r"2 sizes \(20 x 40, 30 x 40\)"):
        processor([colourful(40, 30), colourful(40, 20)], "np", data_format="channels_last")


def test_a_resampling_that_does_not_exist_is_one_of_our_errors() -> None:
    with pytest.raises(InvalidValueError, match="resample: 17 is not a valid Resampling"):
        Dinov2ImageProcessor(resample=17)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux'")
def test_reading_takes_as_much_memory_as_the_file(tmp_path: Path) -> None:
    colourful().save(tmp_path / "small.png")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from dinov2_fast.data.files import read_bytes\n"
        "from dinov2_fast.data.images import decode_image\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), -1))\n"
        "print(decode_image(read_bytes(sys.argv[1])).size)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "small.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "(40, 30)\n", done.stderr


def touch(folder: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass


def paths_of(given: list[Any]) -> list[str]:
    return [source.path for source in find_images(given)]


def test_listing_is_recursive_sorted_and_takes_images_only(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/z.png", "a/y/x.webp", "c.txt", "README.md", "a.jpeg", "a/notes.jpg.txt")
    expected = [tmp_path / name for name in ("a/y/x.webp", "a/z.png", "a.jpeg", "b.JPG")]
    assert paths_of([tmp_path]) == [str(path) for path in expected]


def test_paths_keep_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    touch(tmp_path, "one.jpg", "image_without_ending", "folder/two.jpg")
    given = [tmp_path / "image_without_ending", tmp_path / "folder", tmp_path / "one.jpg", tmp_path / "one.jpg"]
    names = [os.path.basename(path) for path in paths_of(given)]
    assert names == ["image_without_ending", "two.jpg", "one.jpg", "one.jpg"]
    assert paths_of([]) == []
    (tmp_path / "empty").mkdir()
    assert paths_of([tmp_path / "empty"]) == []


def test_a_missing_path_is_an_error_before_any_image_is_found(tmp_path: Path) -> None:
    touch(tmp_path, "one.jpg")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*missing'"):
        paths_of([tmp_path, tmp_path / "missing"])


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/one.jpg", "b/two.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("dinov2_fast.data.sources.os.scandir", refuse)
    with pytest.raises(PermissionError):
        paths_of([tmp_path])


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "root/inner/one.jpg", "elsewhere/two.jpg")
    root = tmp_path / "root"
    (root / "inner" / "back").symlink_to(root)
    (root / "inner" / "itself").symlink_to("itself")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "dead.jpg").symlink_to("nowhere.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    found = [os.path.relpath(path, root) for path in paths_of([root])]
    assert found == ["dead.jpg", "inner/one.jpg", "linked/two.jpg", "loop.jpg"]


def test_names_with_any_bytes_are_kept(tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"caf\xe9.jpg", "日本.jpg".encode(), b" blank.jpg", b"-dash.jpg", b"\x1b[31m.jpg"]
    touch(tmp_path, *names)
    assert sorted(os.path.basename(os.fsencode(path)) for path in paths_of([tmp_path])) == sorted(names)
    assert paths_of([os.fsencode(tmp_path)]) == paths_of([tmp_path])
