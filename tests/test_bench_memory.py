"""The benchmark of memory: what is counted is what was allocated, the largest batch fits and the next one does not."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import memory, options, peers, records
from bench.memory import GIB, MIB, Entrant, Meter, largest_batch
from bench.model import Setting
from bench.peers import OURS, Peer
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=2, num_heads=2)
SETTING = Setting("memory", CONFIG, 56, 2, "all", "fp32")
TOKENS, PICTURE = 17, 4 * 3 * 56 * 56  # bytes of a picture


def _ours() -> nn.Module:
    torch.manual_seed(0)
    return DinoVisionTransformer(**CONFIG.constructor_arguments()).eval()


def _peer(name: str, **changes: Any) -> Peer:
    return dataclasses.replace(OURS, name=name, **changes)


def _measure(*entrants: Peer, setting: Setting = SETTING, budget: float | None = None) -> list[dict[str, Any]]:
    return memory.measure(setting, [(peer, "eager") for peer in entrants], _ours(), CPU, budget)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


class _Weight(nn.Module):
    """One parameter of `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))


def test_a_meter_counts_allocations_and_releases_by_hand() -> None:
    meter, held = Meter(CPU), []

    def hold_one_of_two() -> None:
        held.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(500, dtype=torch.uint8)

    def release_and_take_less() -> None:
        held.clear()
        torch.empty(700, dtype=torch.uint8)

    outside = torch.empty(10**6, dtype=torch.uint8)
    assert meter.peak(hold_one_of_two) == 1500
    assert meter.peak(lambda: None) == 1000
    assert meter.peak(lambda: outside.add_(1)) == pytest.approx(1000, abs=16)  # the 1 becomes a tensor
    assert meter.peak(lambda: torch.empty(300, dtype=torch.uint8)) == 1300
    assert meter.peak(release_and_take_less) == 1000
    assert meter.peak(lambda: torch.empty(200, dtype=torch.uint8)) == 200


def test_garbage_in_cycles_is_no_memory_in_use() -> None:
    def leave_a_cycle() -> None:
        cycle: list[Any] = [torch.empty(5000, dtype=torch.uint8)]
        cycle.append(cycle)

    meter = Meter(CPU)
    assert meter.peak(leave_a_cycle) == 5000
    assert meter.peak(lambda: torch.empty(100, dtype=torch.uint8)) == 100


def test_on_a_gpu_torch_counts(monkeypatch) -> None:
    calls, now, most = [], 700, 0

    def reset(device: torch.device) -> None:
        nonlocal most
        calls.append("reset")
        most = now

    def work() -> None:
        nonlocal now, most
        calls.append("work")
        now += 50
        most = now + 1000

    fakes = {
        "empty_cache": lambda: calls.append("empty"),
        "memory_allocated": lambda device: now,
        "reset_peak_memory_stats": reset,
        "synchronize": lambda device: calls.append("synchronize"),
        "max_memory_allocated": lambda device: most,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    meter = Meter(torch.device("cuda"))
    assert meter.peak(work) == 1050  # above what was there before
    assert meter.peak(work) == 1100
    assert calls == ["clear", "empty", "reset", "work", "synchronize", "reset", "work", "synchronize"]


def test_the_peak_is_weights_pictures_and_what_a_run_holds_at_once() -> None:
    peer = Peer("plain", lambda *args: _Weight(1000), {"all": lambda model, x: (x + 1) * 2}, {}, lambda config: "size")
    entrant = Entrant(peer, "eager", SETTING, _ours(), CPU)
    small = 16  # bytes of the numbers that become tensors
    for batch in (1, 2, 5):
        assert entrant.peak(batch) == pytest.approx(4 * 1000 + 3 * batch * PICTURE, abs=small)
    peer = dataclasses.replace(peer, call={"all": lambda model, x: x.mul_(2)})
    entrant = Entrant(peer, "eager", SETTING, _ours(), CPU)
    assert entrant.peak(3) == pytest.approx(4 * 1000 + 3 * PICTURE, abs=small)


def test_training_holds_weights_gradients_and_moments() -> None:
    numel = 10**6
    size = 4 * numel

    def call(model: _Weight, x: Tensor) -> Tensor:
        return model.weight[: TOKENS * CONFIG.embed_dim].view(1, TOKENS, -1).expand(len(x), -1, -1)

    peer = Peer("plain", lambda *args: _Weight(numel), {"all": call}, {"all": lambda y: y}, lambda config: "size")
    setting = dataclasses.replace(SETTING, output="training")
    incoming = 4 * TOKENS * CONFIG.embed_dim
    pictures = [Entrant(peer, "eager", setting, _ours(), CPU).peak(batch) for batch in (2, 4)]
    # AdamW without fusion needs two more tensors for a moment: the square root, and its quotient.
    assert 4 * size < pictures[0] < 6.2 * size
    assert pictures[1] - pictures[0] == pytest.approx(2 * (PICTURE + incoming), abs=16)


@pytest.mark.parametrize("output", memory.KINDS)
def test_rows_of_a_backbone(output: str) -> None:
    setting = dataclasses.replace(SETTING, output=output)
    weights = _bytes(_ours())
    (row,) = _measure(OURS, setting=setting)
    assert (row["task"], row["batch"], row["output"], row["unit"]) == ("memory", 2, output, "MiB")
    least = (4 if output == "training" else 1) * weights + 2 * PICTURE
    assert least < row["value"] * MIB < 2 * least
    assert ("outputs_max_error" in row) == (output != "training")


@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_what_a_peer_makes_of_our_weights_is_counted(peer: Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = BACKBONES["dinov2_vits14"]
    torch.manual_seed(0)
    ours = DinoVisionTransformer(**config.constructor_arguments()).eval()
    setting = dataclasses.replace(SETTING, config=config, output="cls")
    (row,) = memory.measure(setting, [(peer, "eager")], ours, CPU, None)
    assert 1.0 < row["value"] * MIB / _bytes(ours) < 1.2


def test_one_model_is_alive_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        assert [made for made in alive if made() is not None] == []
        made = OURS.build(config, ours, drop_path)
        alive.append(weakref.ref(made))
        return made

    def raising(model: nn.Module, x: Tensor) -> Any:
        raise NotImplementedError("no such operator")

    entrants = [_peer("a", build=build), _peer("b", build=build, call={"all": raising}), _peer("c", build=build)]
    rows = _measure(*entrants, _peer("d", build=build), budget=0.002)
    assert len(alive) == 4
    assert [row["value"] is None for row in rows[::2]] == [False, True, False, False]
    assert records.reason(rows[2]) == records.reason(rows[3]) == "cannot run here: no such operator"


def test_wrong_outputs_are_refused_and_what_is_missing_says_so(capsys) -> None:
    wrong = _peer("wrong", take={"all": lambda features: OURS.take["all"](features) * (1 + 1e-4)})
    absent = _peer("absent", missing="absent is not installed")
    rows = _measure(OURS, wrong, absent, budget=0.002)
    assert [row["value"] is None for row in rows] == [False, False, True, True, True, True]
    assert all(records.reason(row).startswith("refused: an element is") for row in rows[2:4])
    assert all(records.reason(row) == "missing: absent is not installed" for row in rows[4:])
    memory.show(SETTING, rows)
    said = capsys.readouterr().out
    assert "all, batch 2: dinov2_fast eager: " in said
    assert "all within 0.002 GiB, largest batch: wrong eager: – refused: an element is" in said


def _counted(size: Callable[[int], float]) -> tuple[Callable[[int], float], list[int]]:
    runs: list[int] = []

    def peak(batch: int) -> float:
        runs.append(batch)
        return size(batch)

    return peak, runs


@pytest.mark.parametrize("start", [1, 2, 64, 5000])
@pytest.mark.parametrize(
    "size",
    [
        lambda n: 100 + 3 * n,
        lambda n: 100 + 3 * max(1, int(0.7 * n)),
        lambda n: 500 + max(0, 2 * (n - 8)),
        lambda n: 100 + n + 100 * (n > 300),
        lambda n: 100 + 5 * n if n < 150 else math.inf,
        lambda n: 3 * n + 1000 * (n % 7 == 0),
    ],
    ids=["line", "stairs", "flat-at-first", "jump", "device-is-full", "bumps"],
)
def test_the_largest_batch_fits_and_a_little_more_does_not(size: Callable[[int], float], start: int) -> None:
    budget = 1003
    peak, runs = _counted(size)
    known = {start: peak(start)}
    largest = largest_batch(peak, budget, known)
    assert known == {batch: size(batch) for batch in runs}
    assert size(largest) <= budget
    assert any(size(batch) > budget for batch in runs if largest < batch <= largest + max(1, largest // 100))
    assert len(runs) == len(set(runs)) <= 14
    fitting = [batch for batch in runs if size(batch) <= budget]
    after_one_fits = runs[runs.index(fitting[0]) :]
    assert max(after_one_fits) <= memory.GROWTH * max(fitting)


def test_a_line_takes_few_runs() -> None:
    peak, runs = _counted(lambda n: 88 * MIB + n * 2 * MIB)
    assert largest_batch(peak, 16 * GIB, {64: peak(64)}) == (16 * GIB - 88 * MIB) // (2 * MIB)
    assert runs[:5] == [64, 8, 256, 1024, 4096]
    assert len(runs) == 7


def test_where_not_even_one_picture_fits_or_the_device_is_full() -> None:
    assert largest_batch(lambda batch: math.inf, 1000, {8: math.inf}) == 0
    largest = _measure(OURS, budget=1e-4)[1]
    assert largest["value"] is None
    assert records.reason(largest) == "out of memory: not even one picture fits"

    def full(model: nn.Module, x: Tensor) -> Any:
        if len(x) > 2:
            raise torch.OutOfMemoryError("tried to allocate much")
        return OURS.call["all"](model, x)

    setting = dataclasses.replace(SETTING, batch=4)
    peak, largest = _measure(_peer("full", call={"all": full}), setting=setting, budget=1)
    assert (peak["value"], records.reason(peak)) == (None, "out of memory")
    assert (largest["value"], largest["unit"], largest["batch"], largest["output"]) == (
        2,
        "images",
        None,
        "all within 1 GiB",
    )


def test_a_step_that_broke_off_leaves_no_gradients_behind() -> None:
    batches: list[int] = []

    def out_of_memory(gradient: Tensor) -> None:
        if batches[-1] > 2:
            raise torch.OutOfMemoryError("tried to allocate much")

    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        made = OURS.build(config, ours, drop_path)
        made.patch_embed.proj.weight.register_hook(out_of_memory)  # when nearly all gradients are there
        return made

    def call(model: nn.Module, x: Tensor) -> Any:
        batches.append(len(x))
        return OURS.call["all"](model, x)

    setting = dataclasses.replace(SETTING, output="training")
    entrant = Entrant(_peer("full", call={"all": call}, build=build), "eager", setting, _ours(), CPU)
    before = entrant.peak(2)
    assert entrant.peak(4) == math.inf
    assert entrant.peak(2) == pytest.approx(before, rel=0.001)


def test_the_moments_of_adamw_are_there_from_the_first_peak_on() -> None:
    entrant = Entrant(OURS, "eager", dataclasses.replace(SETTING, output="training"), _ours(), CPU)
    before = entrant.peak(32)
    assert entrant.peak(32) == pytest.approx(before, rel=0.001)


def test_the_command_keeps_rows_and_resumes(monkeypatch, tmp_path: Path, capsys) -> None:
    wrong = _peer("wrong", take={name: lambda result: OURS.take["cls"](result) * 2 for name in peers.OUTPUTS})
    monkeypatch.setattr(memory, "peers", lambda path: [OURS, wrong])
    monkeypatch.setattr(memory.dinov2_fast, "load", lambda name, weights: _ours())
    command = ["--device", "cpu", "--sizes", "28", "--results", str(tmp_path), "--commit", "c0ffee", "--write"]
    command += ["--outputs", "cls,training", "--largest", "cls,training", "--budget", "0.004"]
    assert memory.main(command) == 1
    rows = [json.loads(line) for line in (tmp_path / "cpu" / "memory.jsonl").read_text().splitlines()]
    assert [(row["implementation"], row["output"], row["batch"]) for row in rows] == [
        (name, output, batch)
        for kind in ("cls", "training")
        for name in ("dinov2_fast", "wrong")
        for output, batch in ((kind, 2), (f"{kind} within 0.004 GiB", None))
    ]
    assert "rows were refused or failed" in capsys.readouterr().err
    monkeypatch.setattr(memory, "measure", lambda *args: pytest.fail("measured again"))
    assert memory.main([*command, "--resume"]) == 0
    for bad in (["--budget", "0"], ["--budget", "much"], ["--outputs", "none"]):
        with pytest.raises(SystemExit):
            memory.main([*command, *bad])
    assert "0: a positive number of GiB is wanted" in capsys.readouterr().err


def test_what_a_device_gets_by_default() -> None:
    cpu, cuda = (memory._parse(["--device", device]) for device in ("cpu", "cuda"))
    assert (cpu.models, cpu.largest, cpu.modes) == ([options.MODELS["S"]], ["training"], ["eager"])
    assert (cuda.largest, cuda.budget, cuda.modes) == (list(memory.KINDS), 16.0, ["eager", "triton"])


def test_a_lost_device_ends_the_command_and_the_others_run_next_time(monkeypatch, tmp_path: Path) -> None:
    broken: list[bool] = []

    def breaking(model: nn.Module, x: Tensor) -> Any:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory, "peers", lambda path: [OURS, _peer("bad", call={"cls": breaking}), _peer("last")])
    monkeypatch.setattr(memory.dinov2_fast, "load", lambda name, weights: _ours())
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = ["--device", "cpu", "--sizes", "28", "--results", str(tmp_path), "--commit", "c0ffee", "--write"]
    command += ["--outputs", "cls", "--largest", "cls", "--budget", "0.004", "--resume"]

    def kept() -> list[tuple[str, bool]]:
        rows = records.read(tmp_path / "cpu" / "memory.jsonl")
        return [(row["implementation"], row["value"] is not None) for row in rows]

    assert memory.main(command) == records.AGAIN
    assert kept() == [("bad", False)] * 2
    broken.clear()
    assert memory.main(command) == 0
    assert kept() == [("bad", False)] * 2 + [("dinov2_fast", True)] * 2 + [("last", True)] * 2
