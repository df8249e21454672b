"""Extraction that is interrupted, repeated, shared or runs out of something: what is there stays right."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import dinov2_fast
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.extraction.run import Progress
from dinov2_fast.features import lock as locks
from dinov2_fast.features.lock import LockedError, lock
from dinov2_fast.features.manifest import ManifestError
from dinov2_fast.features.whole_files import part_of
from dinov2_fast.inference import optimize_for_inference
from tests.helpers.extraction import MeanColour, Stopping, assert_rows, contents, extract_files, rows_of
from tests.helpers.small_models import small

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_extraction_is_continued_with_the_same_bits(
    plain: list[str], tmp_path: Path, format: str, workers: int
) -> None:
    options: Any = {"batch_size": 2, "shard_size": 3, "format": format, "workers": workers}
    extract_files(plain, MeanColour(), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        extract_files(plain, Stopping(), tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    assert {name.split(".")[0] for name in before} == {"_manifest", "features-00000"}
    model, said = MeanColour(), []
    summary = extract_files(plain, model, tmp_path / "out", announce=said.append, **options)
    assert model.batches == [2, 1, 2, 1]
    assert (summary.images, summary.resumed, said[0].resumed) == (9, 3, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert before.items() <= contents(tmp_path / "out").items()


def test_a_run_that_is_complete_does_nothing(plain: list[str], tmp_path: Path) -> None:
    files = [plain[0], "missing", *plain]
    extract_files(files, MeanColour(), tmp_path / "out", shard_size=3)
    before, model = contents(tmp_path / "out"), MeanColour()
    summary = extract_files(files, model, tmp_path / "out", shard_size=3, workers=1)
    assert (summary.images, summary.failures, summary.resumed, model.batches) == (11, 1, 11, [])
    assert contents(tmp_path / "out") == before


def part_of_another_process(path: Path) -> Path:
    """The temporary file of a process that has ended."""
    code = (
        "import sys; from pathlib import Path; from dinov2_fast.features.whole_files import part_of; "
        "print(part_of(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(done.stdout.rstrip("\n"))


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_damaged_shard_is_made_again(plain: list[str], tmp_path: Path, format: str) -> None:
    options: Any = {"shard_size": 3, "format": format}
    extract_files(plain, MeanColour(), tmp_path, **options)
    before = contents(tmp_path)
    for name in before:
        if name.startswith("features-00001"):
            (tmp_path / name).write_bytes(before[name][:-20])
    part_of_another_process(tmp_path / "features-00002.parquet").write_bytes(b"left by a killed process")
    assert extract_files(plain, MeanColour(), tmp_path, **options).resumed == 6
    assert contents(tmp_path) == before


# Imports once, then lets 20 children, each in its turn, extract and kills them some moments after so many new shards,
# however slow the machine: on odd turns with a worker process.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from tests.helpers.extraction import MeanColour, extract_files

if __name__ == "__main__":
    out, *files = sys.argv[1:]
    random.seed(5)
    for turn in range(20):
        if not (child := os.fork()):
            extract_files(files, MeanColour(), out, batch_size=2, shard_size=3, workers=turn % 2)
            os._exit(0)
        wanted = len(list(Path(out).glob("features-*"))) + random.randint(0, 6)
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while len(list(Path(out).glob("features-*"))) < wanted and not os.waitid(os.P_PID, child, ended):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        there = sorted(Path(out).glob("features-*"))
        print(len(there), flush=True)
        for path in there[: -len(files) // 12]:  # so that there is work for all turns
            path.unlink()
"""


@pytest.mark.slow
def test_kills_at_random_moments_do_not_change_the_result(plain: list[str], tmp_path: Path) -> None:
    files, out = plain * 20, tmp_path / "out"
    extract_files(files, MeanColour(), tmp_path / "whole", batch_size=2, shard_size=3)
    killing = subprocess.run([sys.executable, "-c", KILLS, str(out), *files], cwd=ROOT, capture_output=True, text=True)
    assert killing.returncode == 0, killing.stderr
    found = [int(line) for line in killing.stdout.splitlines()]
    assert len(found) == 20
    assert len(set(found)) > 5, "the moments should differ"
    left = contents(out)
    whole = contents(tmp_path / "whole")
    assert {name: content for name, content in left.items() if name[0] != "."}.items() <= whole.items()
    assert 0 < extract_files(files, MeanColour(), out, batch_size=2, shard_size=3).resumed < len(files)
    assert contents(out) == whole


SCRIPT = """
import sys, time
from tests.helpers.extraction import MeanColour, extract_files

if __name__ == "__main__":
    out, *files = sys.argv[1:]
    extract_files(files, MeanColour(), out, batch_size=2, shard_size=3, progress=lambda status: time.sleep(0.1))
"""


def test_a_shard_appears_only_when_it_is_complete(plain: list[str], tmp_path: Path) -> None:
    seen: list[set[str]] = []
    out = tmp_path / "out"
    extract_files(
        plain, MeanColour(), out, batch_size=3, shard_size=6, progress=lambda _: seen.append(set(os.listdir(out)))
    )
    first = {".lock-1-of-1", "_manifest.json"}
    shards = ["features-00000.parquet", "features-00001.parquet"]
    assert seen == [first, {*first, shards[0]}, {*first, *shards}]
    assert set(os.listdir(out)) == {"_manifest.json", *shards}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_earlier_shards_unchanged(plain: list[str], tmp_path: Path, error: type) -> None:
    model, out = Stopping(), tmp_path / "out"
    model.error = error
    with pytest.raises(error):
        extract_files(plain, model, out, batch_size=2)
    assert os.listdir(out) == ["_manifest.json"]


def test_a_full_disk_leaves_complete_shards(plain: list[str], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; the first shard, of bad images, fits."""
    (tmp_path / "bad.png").write_text("<html>")
    files = [str(tmp_path / "bad.png")] * 5 + plain[:5]
    options: Any = {"shard_size": 5, "features": ["patches"], "dtype": "fp32"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            extract_files(files, MeanColour(), tmp_path / "out", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (
        errno.EFBIG,
        str(tmp_path / "out" / "features-00001.parquet"),
    )
    assert set(os.listdir(tmp_path / "out")) == {"_manifest.json", "features-00000.parquet"}
    assert [bool(row["error"]) for row in rows_of(tmp_path / "out")] == [True] * 5
    assert extract_files(files, MeanColour(), tmp_path / "out", **options).resumed == 5


# One folder, other settings


def changed(plain: list[str], name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = small(num_register_tokens=0)
    given: dict[str, Any] = {"images": plain, "model": model, "processor": Dinov2ImageProcessor.for_size(28)}
    if name == "weights":
        with torch.no_grad():
            model.blocks[1].mlp.fc1.bias[7] += 1e-3
    elif name == "model.num_heads":
        model.num_heads = 4
    elif name == "position_interpolation":
        model.position_interpolation = "size"
    elif name == "dtype":
        model.double()
    elif name == "engine":
        given["model"] = optimize_for_inference(model, "fp32")
    elif name == "processor.crop_size.height":
        given["processor"] = Dinov2ImageProcessor.for_size(42)
    elif name == "processor.image_mean":
        given["processor"] = Dinov2ImageProcessor.for_size(28, image_mean=0.5)
    elif name == "decoder.max_pixels":
        given["max_pixels"] = 10**6
    elif name == "features.cls.dtype":
        given["dtype"] = "fp16"
    elif name == "features.patches":
        given["features"] = ["cls", "patch_mean", "patches"]
    elif name in ("batch_size", "shard_size"):
        given[name] = 4
    elif name == "format":
        given["format"] = "npy"
    elif name == "inputs.images":
        given["images"] = plain[:-1]
    elif name == "inputs.sha256":
        given["images"] = [*plain[1:], plain[0]]
    return given


NAMES = ["weights", "model.num_heads", "position_interpolation", "dtype", "engine", "processor.crop_size.height"]
NAMES += ["processor.image_mean", "decoder.max_pixels", "features.cls.dtype", "features.patches", "batch_size"]
NAMES += ["shard_size", "format", "inputs.images", "inputs.sha256"]


def test_images_are_identified_by_their_paths(plain: list[str], tmp_path: Path) -> None:
    """Copies with other times are the same images; of which bytes a row is says its sha256."""
    extract_files(plain, MeanColour(), tmp_path / "out")
    for path in plain:
        os.utime(path, (0, 0))
    old = Path(plain[3]).read_bytes()
    Path(plain[3]).write_bytes(Path(plain[4]).read_bytes())
    assert extract_files(plain, MeanColour(), tmp_path / "out").resumed == 9
    assert dinov2_fast.load_features(tmp_path / "out").sha256[3] == hashlib.sha256(old).hexdigest()


def test_other_settings_are_refused_and_named(plain: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_files(out=out, **changed(plain, ""))
    assert extract_files(out=out, **changed(plain, "")).resumed == 9
    before = contents(out)
    for name in NAMES:
        with pytest.raises(ManifestError, match=rf"were made otherwise: (.*; )?{re.escape(name)} is .* there and "):
            extract_files(out=out, **changed(plain, name))
        assert contents(out) == before
    extract_files(out=out, overwrite=True, **changed(plain, "features.cls.dtype"))
    assert dinov2_fast.load_features(out)["cls"].dtype == np.float16


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("dinov2_fast.extraction.provenance.PIL.__version__", "decoder.pillow"),
        ("dinov2_fast.extraction.provenance.__version__", "versions.dinov2_fast"),
        ("dinov2_fast.extraction.provenance.FORMATS", "decoder.formats"),
    ],
)
def test_other_versions_are_refused_and_named(
    plain: list[str], tmp_path: Path, target: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_files(plain, MeanColour(), tmp_path / "out")
    monkeypatch.setattr(target, "0")
    with pytest.raises(ManifestError, match=name):
        extract_files(plain, MeanColour(), tmp_path / "out")


def test_shards_without_a_manifest_are_refused(plain: list[str], tmp_path: Path) -> None:
    extract_files(plain, MeanColour(), tmp_path / "out")
    (tmp_path / "out" / "_manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"holds features without a _manifest\.json"):
        extract_files(plain, MeanColour(), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ManifestError, match="Choose another folder, or delete them"):
        extract_files(plain, MeanColour(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_overwrite_makes_all_shards_again(plain: list[str], tmp_path: Path) -> None:
    extract_files(plain, MeanColour(), tmp_path / "out", shard_size=2)
    summary = extract_files(plain[:3], MeanColour(), tmp_path / "out", shard_size=2, overwrite=True)
    assert (summary.images, summary.resumed) == (3, 0)
    assert_rows(tmp_path / "out", plain[:3], set())


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_overwrite_deletes_only_shards(plain: list[str], tmp_path: Path, format: str) -> None:
    out, options = tmp_path / "out", {"features": ["cls", "patches"], "format": format}
    extract_files(plain, MeanColour(), out, shard_size=3, **options)
    (out / "features-00003.dir").mkdir()
    (out / "features-00004.parquet").mkdir()
    mine = [
        "features-2024.notes.txt",
        "features-1_backup.tar.gz",
        "features-00001.parquet.bak",
        "features-0001.parquet",
    ]
    mine += ["features-00001.csv", "my-features-00001.parquet", "manifest.json", "notes.npy"]
    for name in mine:
        (out / name).write_text("mine")
    extract_files(plain[:2], MeanColour(), out, overwrite=True, shard_size=3, **options)
    ours = {"parquet": ["parquet"], "npy": ["cls.npy", "jsonl", "patches.npy"]}[format]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *mine,
            "features-00003.dir",
            "features-00004.parquet",
            "_manifest.json",
            *(f"features-00000.{e}" for e in ours),
        ]
    )
    assert {(out / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("content", ["{}", '{"name": "my web page"}', "cut of"])
def test_overwrite_deletes_nothing_beside_the_manifest_of_another_program(
    plain: list[str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "features-00000.parquet").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ManifestError, match=r"holds features without a _manifest\.json"):
        extract_files(plain, MeanColour(), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == before


# Several processes


def test_parts_together_are_what_one_process_writes(plain: list[str], tmp_path: Path) -> None:
    files = [plain[0], "missing", *plain]
    options: Any = {"batch_size": 2, "shard_size": 2}
    extract_files(files, MeanColour(), tmp_path / "whole", **options)
    said: list[Progress] = []
    models = [MeanColour() for _ in range(3)]
    done = [
        extract_files(files, models[i], tmp_path / "out", part=(i + 1, 3), announce=said.append, **options)
        for i in (2, 0, 1)
    ]
    assert [summary.images for summary in done] == [3, 4, 4]
    assert [summary.failures for summary in done] == [0, 1, 0]
    assert [(about.shards, about.resumed) for about in said] == [(2, 0)] * 3
    assert [len(model.batches) for model in models] == [2, 2, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_without_shards_writes_only_the_manifest(plain: list[str], tmp_path: Path) -> None:
    summary = extract_files(plain, MeanColour(), tmp_path / "out", part=(6, 6))
    assert (summary.images, os.listdir(tmp_path / "out")) == (0, ["_manifest.json"])


def test_a_second_writer_is_refused(plain: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = plain * 50
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), *files], cwd=ROOT) as process:
        wait_for(lambda: any(out.glob("features-*")))
        with pytest.raises(LockedError, match="Another process is writing to"):
            extract_files(files, MeanColour(), out, batch_size=2, shard_size=3)
        with pytest.raises(LockedError, match=r"writing the part 1/1 of .*: all parts must be of one number"):
            extract_files(files, MeanColour(), out, batch_size=2, shard_size=3, part=(2, 2))
        process.kill()
    extract_files(files, MeanColour(), out, batch_size=2, shard_size=3, part=(2, 2))


def test_parts_of_one_count_are_locked_separately_and_other_counts_refused(tmp_path: Path) -> None:
    with lock(tmp_path, (1, 2)), lock(tmp_path, (2, 2)):
        with pytest.raises(LockedError, match="writing the part 1/2 of"), lock(tmp_path, (1, 2)):
            pytest.fail("locked twice")
        with pytest.raises(LockedError, match="one number"), lock(tmp_path, (1, 1)):
            pytest.fail("parts of two numbers")
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_deleted_file_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder deletes the file between the moments in which another opens and locks it."""
    flock, opened = locks._flock, 0

    def late(file: Any) -> bool:
        nonlocal opened
        opened += 1
        if opened == 1:
            (tmp_path / ".lock-1-of-1").unlink()
        return flock(file)

    monkeypatch.setattr(locks, "_flock", late)
    with lock(tmp_path, (1, 1)), pytest.raises(LockedError), lock(tmp_path, (1, 1)):
        pytest.fail("locked twice")
    assert opened == 3


def test_without_file_locks_a_warning_is_logged(
    plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    extract_files(plain, MeanColour(), tmp_path / "out")
    assert "cannot be locked" in caplog.text


def test_without_file_locks_no_process_deletes_the_temporary_file_of_another(plain: list[str], tmp_path: Path) -> None:
    """What is of this process stands for another that runs; the last is of another machine, where nobody can tell."""
    extract_files(plain, MeanColour(), tmp_path, shard_size=3)
    ours, theirs = part_of(tmp_path / "features-00000.parquet"), part_of_another_process(tmp_path / "features-00000.x")
    foreign = theirs.with_name(re.sub(r"\.[0-9a-f]{8}-", ".0123abcd-", theirs.name))
    for path in (ours, theirs, foreign):
        path.touch()
    extract_files(plain, MeanColour(), tmp_path, shard_size=3)
    assert [path.exists() for path in (ours, theirs, foreign)] == [True, False, True]
    for path in (ours, foreign):
        os.utime(path, (0, time.time() - 100_000))
    extract_files(plain, MeanColour(), tmp_path, shard_size=3)
    assert not ours.exists()
    assert not foreign.exists()


def test_a_temporary_file_names_its_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {part_of(Path("a")).name.split("-")[0] for _ in range(3)}
    assert len(names) == 1
    monkeypatch.setattr("platform.node", lambda: "another machine")
    assert part_of(Path("a")).name.split("-")[0] not in names
    monkeypatch.undo()
    monkeypatch.setattr("os.readlink", lambda path: "pid:[1]")
    assert part_of(Path("a")).name.split("-")[0] not in names


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


# Memory


class Small(MeanColour):
    """A model for which memory suffices for `most` images."""

    most = 3
    error: Any = torch.OutOfMemoryError

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward_features(x)
        if len(x) > self.most:
            raise self.error("CUDA out of memory")
        return found


def test_batches_are_halved_if_memory_runs_out(plain: list[str], tmp_path: Path) -> None:
    files = [*plain[:4], "missing", *plain[4:], plain[0]]
    expected = extract_files(files, MeanColour(), tmp_path / "whole", shard_size=8).folder
    model = Small()
    extract_files(files, model, tmp_path / "out", batch_size=8, shard_size=8)
    assert model.batches == [7, 3, 3, 1, 3]  # the second shard begins with whole batches, and has 3 images
    assert rows_of(tmp_path / "out") == rows_of(expected)
    files = [tmp_path / "out" / "features-00000.parquet", tmp_path / "out" / "features-00001.parquet"]
    notes = [(pq.read_schema(path).metadata or {}).get(b"dinov2_fast") for path in files]
    assert notes == [b'{"batch_size": 3}', None]
    assert pq.read_schema(expected / "features-00000.parquet").metadata is None


def test_batches_stay_small_for_the_rest_of_the_shard(plain: list[str], tmp_path: Path) -> None:
    model = Small()
    model.most = 1
    extract_files(plain, model, tmp_path / "out", batch_size=4, shard_size=9, format="npy")
    assert model.batches == [4, 2, *[1] * 9]
    assert_same(tmp_path / "out", plain)
    assert '"batch_size": 1}' in (tmp_path / "out" / "features-00000.jsonl").read_text()


def assert_same(out: Path, files: list[str]) -> None:
    found = dinov2_fast.load_features(out)
    expected = extract_files(files, MeanColour(), out.with_name("expected"), batch_size=4).folder
    np.testing.assert_array_equal(found["cls"], dinov2_fast.load_features(expected)["cls"])


def test_running_out_of_memory_for_one_image_is_an_error(plain: list[str], tmp_path: Path) -> None:
    model = Small()
    model.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        extract_files(plain, model, tmp_path / "out", batch_size=4)
    assert model.batches == [4, 2, 1]


def test_device_errors_other_than_memory_are_not_retried(plain: list[str], tmp_path: Path) -> None:
    model = Small()
    model.error = getattr(torch, "AcceleratorError", RuntimeError)
    try:
        raise model.error("CUDA error: an illegal memory access was encountered")
    except TypeError:
        model.error = RuntimeError  # where it cannot be made by hand
    except RuntimeError:
        pass
    with pytest.raises(RuntimeError, match=r"illegal memory access|CUDA out of memory"):
        extract_files(plain, model, tmp_path / "out", batch_size=4)
    assert model.batches == [4]
    assert os.listdir(tmp_path / "out") == ["_manifest.json"]


def test_shards_have_the_requested_size(plain: list[str], tmp_path: Path) -> None:
    extract_files(plain, MeanColour(), tmp_path / "out", shard_size=4)
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sizes == [4, 4, 1]
