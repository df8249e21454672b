"""Checkpoints: the same bits in any number of processes, whole or absent whatever ends a run, and damage is found."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2_fast.errors import InvalidStateError, WeightsError
from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.parallel import World, start_processes
from dinov2_fast.weights.run_folders import find_damage
from tests.helpers.pretraining import small_config
from tests.helpers.processes import run_processes
from tests.helpers.training_states import TrainingState, make_state


def config(**changes: Any) -> PretrainingConfig:
    """2 and 3 processes do not divide the prototypes."""
    return small_config(dino_head={"prototypes": 13}, ibot_head={"prototypes": 11}, **changes)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_processes("cpu") as alone:
        yield alone


@pytest.fixture(scope="module")
def state(world: World) -> TrainingState:
    return make_state(config(), world, seed=1, steps=2)


def save(out: Path, step: int, state: TrainingState, world: World) -> Path:
    return checkpoint.save(out, step, *state, config(), world)


def restore(folder: Path, world: World) -> tuple[int, TrainingState]:
    """A checkpoint in a state of other weights, whose optimizer has the parameters in another order."""
    other = make_state(config(), world, seed=2, steps=1, is_reversed=True)
    step, centers = checkpoint.restore(folder, other.student, other.teacher, other.optimizer, world)
    return step, other._replace(centers=centers)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# What a checkpoint holds


def test_a_restored_state_has_the_bits_of_the_saved_one_and_so_has_its_next_step(world: World, tmp_path: Path) -> None:
    saved = make_state(config(), world, seed=1, steps=2)
    folder = save(tmp_path, 12_500, saved, world)
    assert folder == tmp_path / "checkpoint-00012500"
    step, restored = restore(folder, world)
    assert step == 12_500
    expected = saved.whole()
    assert "optimizer/backbone.cls_token.exp_avg_sq" in expected
    assert "optimizer/backbone.mask_token.exp_avg" not in expected
    assert_equal(restored.whole(), expected)
    saved.step()
    restored.step()
    assert_equal(restored.whole(), saved.whole())


def test_a_state_before_the_first_step_has_no_moments(world: World, tmp_path: Path) -> None:
    saved = make_state(config(), world, seed=1, steps=0)
    _, restored = restore(save(tmp_path, 0, saved, world), world)
    assert_equal(restored.whole(), saved.whole())


def save_in_several(world: World, folder: Path) -> None:
    state = make_state(config(), world, seed=1, steps=2)
    save(folder / "run", 5, state, world)
    whole = state.whole()
    if world.is_main:
        save_file(whole, folder / "expected.safetensors")
    fail_in_one_process(world, folder / "run", state)


def fail_in_one_process(world: World, out: Path, state: TrainingState) -> None:
    """A full disk in one process ends the saving in all, at each of its places."""
    real = os.fsync
    for failing_rank, places in ((1, 3), (0, 7)):
        for place in range(places):
            calls = iter(range(100))

            def fsync(descriptor: int, place: int = place, calls: Iterator[int] = calls) -> None:
                if next(calls) == place:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(descriptor)

            os.fsync = fsync if world.rank == failing_rank else real
            with pytest.raises(OSError if world.rank == failing_rank else InvalidStateError, match="was not written"):
                save(out, 6, state, world)
            os.fsync = real
            world.wait()
            assert names(out) == ["checkpoint-00000005"]


def restore_in_several(world: World, folder: Path) -> None:
    newest = checkpoint.newest(folder / "run")
    assert newest is not None
    step, restored = restore(newest, world)
    assert step == 5
    assert_equal(restored.whole(), load_file(folder / "expected.safetensors"))


@pytest.mark.slow
def test_what_two_processes_saved_is_restored_in_one_and_in_three(world: World, tmp_path: Path) -> None:
    run_processes(2, tmp_path, save_in_several)
    files = names(tmp_path / "run" / "checkpoint-00000005")
    assert [name for name in files if "-of-" in name] == [
        f"{kind}-{rank}-of-00002.safetensors"
        for kind in ("optimizer", "student", "teacher")
        for rank in ("00001", "00002")
    ]
    restore_in_several(world, tmp_path)
    run_processes(3, tmp_path, restore_in_several)


def test_another_model_is_refused_with_the_tensor_that_differs(
    state: TrainingState, world: World, tmp_path: Path
) -> None:
    folder = save(tmp_path, 1, state, world)
    other = make_state(small_config(), world, seed=2, steps=0)
    with pytest.raises(WeightsError, match=r"another model: dino_head.last_layer.weight_g has the shape \[13, 1\]"):
        checkpoint.restore(folder, other.student, other.teacher, other.optimizer, world)


def test_another_format_is_refused(state: TrainingState, world: World, tmp_path: Path) -> None:
    folder = save(tmp_path, 1, state, world)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(WeightsError, match="has the format 2, not 1"):
        restore(folder, world)


# Whole or absent


def test_two_checkpoints_are_kept_and_what_killed_processes_left_is_removed(
    state: TrainingState, world: World, tmp_path: Path
) -> None:
    (tmp_path / ".checkpoint-00000001.part").mkdir(parents=True)
    (tmp_path / ".checkpoint-00000001.part" / "student-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").touch()
    for step in (9, 10, 12_500):
        save(tmp_path, step, state, world)
    assert names(tmp_path) == ["checkpoint-00000010", "checkpoint-00012500", "metrics.jsonl"]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-00012500"


def test_a_checkpoint_that_is_there_stays_unless_it_is_damaged(
    state: TrainingState, world: World, tmp_path: Path
) -> None:
    folder = save(tmp_path, 3, state, world)
    before = (folder / "state.json").stat().st_mtime_ns
    assert save(tmp_path, 3, state, world) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before
    os.truncate(folder / "heads.safetensors", 10)
    assert save(tmp_path, 3, state, world) == folder
    assert find_damage(folder) is None
    assert names(tmp_path) == ["checkpoint-00000003"]


KILL = """
import os, signal, sys
from pathlib import Path
from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.parallel import start_processes
from tests.helpers.pretraining import small_config
from tests.helpers.training_states import make_state

out = Path(sys.argv[1])

def save(step, place):
    calls = iter(range(100))

    def mortal(real):
        def call(*args):
            if next(calls) == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        return call

    with start_processes("cpu") as world:
        state = make_state(small_config(), world, seed=step, steps=1)
        os.fsync, os.rename = mortal(os.fsync), mortal(os.rename)
        checkpoint.save(out, step, *state, small_config(), world)

def is_killed(step, place):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            save(step, place)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)

assert not is_killed(1, None)
place = 0
while is_killed(2, place):
    whole = checkpoint.newest(out)
    print(place, whole.name, *sorted(path.name for path in out.iterdir() if path.name[0] != "."))
    place += 1
"""


@pytest.mark.slow
def test_a_process_killed_at_any_place_of_a_save_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Before each call that writes to the disk or renames: seven files, their folder, its name, the run's folder."""
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = "checkpoint-00000001", "checkpoint-00000002"
    before_the_name = [f"{place} {first} {first}" for place in range(9)]
    assert done.stdout.splitlines() == [*before_the_name, f"9 {second} {first} {second}"]
    assert "damaged" not in done.stderr


@pytest.mark.parametrize("place", range(8))  # its folder, or one of its seven files
def test_a_full_disk_leaves_the_checkpoint_before(
    place: int, state: TrainingState, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1, state, world)
    calls = iter(range(100))

    def full(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if next(calls) == place:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full(Path.mkdir))
        patch.setattr(os, "fsync", full(os.fsync))
        with pytest.raises(OSError, match=r"No space left on device .checkpoint-00000002 was not written") as caught:
            save(tmp_path, 2, state, world)
    assert caught.value.filename == str(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-00000001"]
    assert checkpoint.newest(tmp_path) == first
    second = save(tmp_path, 2, state, world)
    assert checkpoint.newest(tmp_path) == second


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(path: Path) -> None:
    path.write_text('{"files": {"heads.safetensors": 3}}')


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (cut, "optimizer-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors has "),
    (flip, "student-00001-of-00001.safetensors", "student-00001-of-00001.safetensors has other bytes"),
    (Path.unlink, "heads.safetensors", "heads.safetensors cannot be read"),
    (cut, "state.json", "state.json does not describe it"),
    (Path.unlink, "state.json", "state.json cannot be read"),
    (rewrite, "state.json", "state.json does not describe it"),
]


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_continued(
    damage: Callable[[Path], None],
    file: str,
    reason: str,
    state: TrainingState,
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "none") is None
    first, second = (save(tmp_path, step, state, world) for step in (1, 2))
    assert checkpoint.newest(tmp_path) == second
    assert not caplog.records
    damage(second / file)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == first
    assert [record.getMessage().startswith(f"{second} is damaged: {reason}") for record in caplog.records] == [True]
    step, _ = restore(first, world)
    assert step == 1
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_a_run_of_damaged_checkpoints_alone_does_not_begin_again(
    state: TrainingState, world: World, tmp_path: Path
) -> None:
    for step in (1, 2):
        cut(save(tmp_path, step, state, world) / "teacher.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)No checkpoint of .*00000002 is damaged.*00000001 is damaged.*delete"):
        checkpoint.newest(tmp_path)
