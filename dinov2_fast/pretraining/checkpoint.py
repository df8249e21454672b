"""Checkpoints of a run: folders that are complete or absent, for any number of processes, without pickle.

    student-00001-of-00004.safetensors      of each parameter, the rows (dimension 0) of the first of four processes
    teacher-00001-of-00004.safetensors      the same for the teacher, with ``centers.dino`` and ``centers.ibot``
    optimizer-00001-of-00004.safetensors    the same for AdamW's moments: ``NAME.exp_avg``, ``NAME.exp_avg_sq``
    teacher.safetensors, heads.safetensors  the whole teacher for others: its backbone, and its heads
    config.json                             what `dinov2_fast.load` needs besides
    state.json                              the step; the shape of each tensor and its rows in each file; what the files
                                            were when they were written (`dinov2_fast.weights.run_folders`)

The main process renames the folder when all processes have written their files to the disk. Nothing else is state:
what is random in a step depends on the seed and the step alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2_fast.errors import InvalidStateError, WeightsError
from dinov2_fast.features.whole_files import sync_folder
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.parallel import World, sharded_parameters
from dinov2_fast.pretraining.rows import RowReader, Written, file_name, row_bounds, write_bytes, write_tensors
from dinov2_fast.weights import run_folders
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.run_folders import CONFIG, STATE, TEACHER
from dinov2_fast.weights.sources import read_config

FORMAT = 1
KEPT = 2  # checkpoints of a run
HEADS = "heads.safetensors"
CENTERS = "centers."


def newest(out: Path) -> Path | None:
    """The newest checkpoint of a run whose files are all as they were written; None if the run has none.

    Every file is read. A damaged checkpoint is named in a warning, and the one before it is taken.

    Raises:
        WeightsError: there are checkpoints, and all are damaged.
    """
    return run_folders.newest_checkpoint(out)


def read_heads(folder: Path) -> dict[str, Tensor]:
    """The teacher's heads in the newest checkpoint of a run, or in a checkpoint: ``dino_head.…`` and ``ibot_head.…``.

    There are none if `folder` is neither.
    """
    teacher = run_folders.find_teacher(folder)
    return {} if teacher is None else dict(open_weights(teacher.with_name(HEADS)))


@torch.no_grad()
def save(
    out: Path,
    step: int,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    centers: Mapping[str, Tensor],
    config: PretrainingConfig,
    world: World,
) -> Path:
    """Writes a checkpoint, and removes all but the newest two. Every process calls it.

    Args:
        out: the folder of the run. No other run writes to it.
        step: the number of steps that are done. If their checkpoint is there and not damaged, it stays.
        student, teacher: networks that :func:`.parallel.shard` has sharded.
        optimizer: AdamW, of the student's parameters.
        centers: the same in every process.
        config: of the run.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: a file cannot be written: the disk is full, for instance. The earlier checkpoints are as they were.
        InvalidStateError: this happened in another process.
    """
    folder = run_folders.checkpoint_folder(out, step)
    if world.agree(world.is_main and folder.exists() and run_folders.find_damage(folder) is None):
        return folder
    part = run_folders.part_of(folder)
    with _all_or_none(world, folder):
        if world.is_main:
            for left_over in out.glob(run_folders.PARTS):
                shutil.rmtree(left_over)
            part.mkdir(parents=True)
    tensors = _tensors(student, teacher, optimizer, centers)
    written = torch.zeros(len(tensors), world.size, len(Written._fields), dtype=torch.int64, device=world.device)
    with _all_or_none(world, folder):
        for index, (kind, by_name) in enumerate(tensors.items()):
            own = {name: _own_rows(tensor, world) for name, tensor in by_name.items()}
            shapes = {name: rows.shape for name, rows in own.items()}
            path = part / file_name(kind, world.rank, world.size)
            written[index, world.rank] = torch.tensor(write_tensors(path, shapes, own.values()))
    files = {
        file_name(kind, rank, world.size): Written(*pair)
        for kind, by_rank in zip(tensors, world.sum(written).tolist(), strict=True)
        for rank, pair in enumerate(by_rank)
    }
    parameters = sharded_parameters(teacher)
    whole = (parameter.full_tensor() for parameter in parameters.values())
    with _all_or_none(world, folder):
        try:
            if world.is_main:
                files |= _write_for_others(part, parameters, whole, config)
                _write_state(part, step, world.size, tensors, files)
                _give_name(part, folder)
        finally:
            deque(whole, maxlen=0)  # also after an error: a tensor is made whole by all processes together
    return folder


@contextmanager
def _all_or_none(world: World, folder: Path) -> Iterator[None]:
    """If a file cannot be written in one process, all end with an error, and the incomplete checkpoint is removed."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if not world.agree(failure is not None):
        return
    if world.is_main:
        shutil.rmtree(run_folders.part_of(folder), ignore_errors=True)
    kept = f"{folder.name} was not written, and the checkpoints before it are as they were"
    if failure is None:
        raise InvalidStateError(f"Another process could not write to {str(folder.parent)!r}: {kept}. See its error.")
    raise OSError(failure.errno, f"{failure.strerror} ({kept})", str(folder.parent)) from failure


def _tensors(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, centers: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of the state, by kind and name. Those that are not sharded are the same in every process."""
    parameters = sharded_parameters(student)
    return {
        "student": parameters,
        "teacher": sharded_parameters(teacher) | {CENTERS + name: center for name, center in centers.items()},
        "optimizer": {
            f"{name}.{key}": value if value.ndim else value[None]  # "step" is a number
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
    }


def _own_rows(tensor: Tensor, world: World) -> Tensor:
    """The rows that this process writes."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    bounds = row_bounds(tensor.shape[0], world.size)
    return tensor[bounds[world.rank] : bounds[world.rank + 1]]


def _write_for_others(
    part: Path, parameters: Mapping[str, Tensor], whole: Iterator[Tensor], config: PretrainingConfig
) -> dict[str, Written]:
    """Writes the whole teacher. `whole` are its parameters in the order of `parameters`, the backbone's first."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    backbone = {name.removeprefix("backbone."): shape for name, shape in shapes.items() if name.startswith("backbone.")}
    heads = {name: shape for name, shape in shapes.items() if not name.startswith("backbone.")}
    architecture = {
        "num_attention_heads": config.model.num_heads,
        "image_size": config.crops.global_size,
        "position_interpolation": config.model.position_interpolation,
    }
    return {
        TEACHER: write_tensors(part / TEACHER, backbone, islice(whole, len(backbone))),
        HEADS: write_tensors(part / HEADS, heads, whole),
        CONFIG: write_bytes(part / CONFIG, [json.dumps(architecture, indent=1).encode()]),
    }


def _write_state(
    part: Path,
    step: int,
    processes: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, Written],
) -> None:
    state = {
        "format": FORMAT,
        "step": step,
        "processes": processes,
        "files": {name: written._asdict() for name, written in files.items()},
        "tensors": {
            kind: {
                name: {"shape": list(tensor.shape), "rows": row_bounds(tensor.shape[0], processes)}
                for name, tensor in by_name.items()
            }
            for kind, by_name in tensors.items()
        },
    }
    write_bytes(part / STATE, [json.dumps(state).encode()])


def _give_name(part: Path, folder: Path) -> None:
    """Makes a complete checkpoint the newest, and removes those that are older than the one before it."""
    sync_folder(part)
    if folder.exists():  # it is damaged
        _remove(folder)
    os.rename(part, folder)
    sync_folder(folder.parent)
    for old in run_folders.find_checkpoints(folder.parent)[:-KEPT]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Removes a checkpoint. If that is cut short, what is left does not have a checkpoint's name."""
    with suppress(OSError):
        left_over = folder.with_name(f".{folder.name}.removed.part")
        os.rename(folder, left_over)
        shutil.rmtree(left_over)


@torch.no_grad()
def restore(
    folder: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> tuple[int, dict[str, Tensor]]:
    """Sets networks and optimizer to a checkpoint, and removes later ones of its run, since they are damaged.

    Args:
        folder: what `newest` returned.
        student, teacher: networks that :func:`.parallel.shard` has sharded, over any number of processes.
        optimizer: AdamW, of the student's parameters.

    Returns:
        The number of steps that are done, and the centres, whole in every process.

    Raises:
        WeightsError: the checkpoint is of other networks or of another version, or cannot be read.
    """
    state = read_config(folder / STATE)
    if state["format"] != FORMAT:
        raise WeightsError(f"{folder} has the format {state['format']!r}, not {FORMAT}: use the version that wrote it.")
    readers = {kind: RowReader(folder, kind, state) for kind in ("student", "teacher", "optimizer")}
    parameters = sharded_parameters(student)
    _fill(parameters, readers["student"], world)
    _fill(sharded_parameters(teacher), readers["teacher"], world)
    shapes = readers["teacher"].shapes
    centers = {name: readers["teacher"].read(name, 0, shapes[name][0]) for name in shapes if name.startswith(CENTERS)}
    _fill_moments(optimizer, {parameter: name for name, parameter in parameters.items()}, readers["optimizer"], world)
    if world.is_main:
        for later in run_folders.find_checkpoints(folder.parent):
            if later.name > folder.name:
                _remove(later)
    return state["step"], {name.removeprefix(CENTERS): center.to(world.device) for name, center in centers.items()}


def _fill(tensors: Mapping[str, Any], reader: RowReader, world: World) -> None:
    """Sets sharded tensors to those of the same names in a checkpoint."""
    for name, tensor in tensors.items():
        found, shape = reader.shapes.get(name), list(tensor.shape)
        if found != shape:
            raise WeightsError(
                f"{reader.folder} holds another model: {name} has the shape {found}, and {shape} is needed. Continue "
                "it with the configuration of its run."
            )
        bounds = row_bounds(shape[0], world.size)
        tensor.to_local().copy_(reader.read(name, *bounds[world.rank : world.rank + 2]))


def _fill_moments(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], reader: RowReader, world: World
) -> None:
    """Sets the state of AdamW, for the parameters that had one."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if f"{name}.step" in reader.shapes:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                _fill({f"{name}.{key}": moment for key, moment in moments.items()}, reader, world)
                step = reader.read(f"{name}.step", 0, 1)[0]
                step = step.to(parameter.device) if group["fused"] or group["capturable"] else step
                optimizer.state[parameter] = {"step": step, **moments}
