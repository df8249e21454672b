"""bench.model: peers share weights, wrong results are refused, a failure stops no other peer, rows are saved."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import forward, harness, memory, model, modes, peers, records, roofline, training
from bench.peers import OURS, TIMM, Peer
from bench.tasks import MIN_COSINE, Models, Scenario
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.errors import InvalidValueError, UnsupportedError
from dinov2_fast.model import DinoVisionTransformer
from tests.reference import assert_obeys_rule

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=2, num_heads=2)
SCENARIO = Scenario("throughput", CONFIG, 56, 2, "all", "fp32")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "UNTIMED_SECONDS", 0.0)


def _models(config: BackboneConfig = CONFIG) -> Models:
    torch.manual_seed(0)
    ours = DinoVisionTransformer(**config.constructor_arguments()).eval()
    torch.nn.init.normal_(ours.pos_embed)  # so that each way of resampling positions gives different outputs
    return Models(config, ours)


def _peer(name: str, **changes: Any) -> Peer:
    return dataclasses.replace(OURS, name=name, **changes)


def _measure(*variants: Peer | tuple[Peer, str], scenario: Scenario = SCENARIO, **changes: Any) -> list[dict[str, Any]]:
    scenario = dataclasses.replace(scenario, **changes)
    pairs = [variant if isinstance(variant, tuple) else (variant, "eager") for variant in variants]
    return model.TASKS[scenario.task](scenario, _models(scenario.config)).measure_variants(pairs, 0.0)


def _off(change: Callable[[Tensor], Tensor], output: str = "all") -> dict[str, Any]:
    return {output: lambda result: change(OURS.to_tensor[output](result).clone())}


def _raising(error: Exception) -> dict[str, Any]:
    def call(model: Any, x: Tensor) -> Any:
        raise error

    return {"all": call}


def _last_token_off(tokens: Tensor) -> Tensor:
    tokens[-1, -1, -1] += 1e-2
    return tokens


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_peers_have_our_weights_outputs_and_gradients(peer: Peer, registers: int) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = BACKBONES[f"dinov2_vits14{'_reg' if registers else ''}"]
    wrong = dataclasses.replace(peer, position_interpolation=lambda config: "offset")
    for output in peers.OUTPUTS:
        right, refused = _measure(peer, wrong, config=config, output=output, batch=1)
        assert right["outputs_max_error"] < 1e-5
        assert records.reason(refused).startswith("refused: the outputs: an element is")
    (row,) = _measure(peer, config=config, task="training")
    assert row["outputs_max_error"] < 1e-4


def test_wrong_outputs_are_refused_and_the_others_are_timed(tmp_path: Path) -> None:
    rows = _measure(
        OURS,
        _peer("scaled", to_tensor=_off(lambda y: y * (1 + 1e-4))),
        _peer("nan", to_tensor=_off(lambda y: y * float("nan"))),
        _peer("shape", to_tensor=_off(lambda y: y[:, 1:])),
        _peer("last", to_tensor=_off(_last_token_off)),
        _peer("unable", call=_raising(NotImplementedError("no such operator"))),
        _peer("full", call=_raising(torch.OutOfMemoryError("tried to allocate much"))),
        _peer("absent", missing="absent is not installed"),
        (_peer("dinov2_fast", to_tensor=_off(lambda y: y * (1 + 1e-3))), "engine"),
    )
    assert [row["implementation"] for row in rows if row["value"]] == ["dinov2_fast"]
    reasons = [records.reason(row) for row in rows[1:]]
    assert all(reason.startswith("refused: ") for reason in [*reasons[:4], reasons[7]])
    assert reasons[4:7] == [
        "cannot run here: no such operator",
        "out of memory: tried to allocate much",
        "missing: absent is not installed",
    ]


def test_a_peer_may_have_larger_errors_than_ours() -> None:
    (row,) = _measure(OURS)
    four_times = _off(lambda y: y * (1 + 4 * row["outputs_max_error"]))
    ours, peer = _measure(_peer(OURS.name, to_tensor=four_times), _peer("peer", to_tensor=four_times))
    assert records.reason(ours).startswith("refused: the outputs: ")
    assert peer["value"] > 0


@pytest.mark.parametrize("task", ["throughput", "training"])
def test_errors_are_compared_with_those_of_the_same_precision(task: str) -> None:
    right, wrong = _measure(OURS, _peer("x", to_tensor=_off(lambda y: y + 0.5)), precision="bf16", task=task)
    assert right["value"] > 0
    assert right["outputs_max_error"] > 1e-4
    assert records.reason(wrong).startswith("refused")


@pytest.mark.parametrize("task", ["throughput", "mixed"])
def test_fp8_is_checked_by_the_cosine_with_fp32(task: str) -> None:
    nan = _peer("nan", to_tensor=_off(lambda y: y * float("nan"), "cls"))
    scenario = dataclasses.replace(SCENARIO, resolution="28-56" if task == "mixed" else 56, output="cls")
    right, *wrong = _measure((OURS, "engine"), (nan, "engine"), scenario=scenario, task=task, precision="fp8")
    assert MIN_COSINE <= right["versions"]["cosine"] < 0.999999
    if task == "throughput":
        assert records.reason(wrong[0]).startswith("refused: the cosine of a token with that in fp32 is nan")


def test_runs_are_timed_in_turn_and_a_failing_one_is_left_out() -> None:
    called: list[str] = []

    def fails_in_round_three() -> None:
        called.append("c")
        if called.count("c") == 3:
            raise RuntimeError("no more")

    runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b"), "c": fails_in_round_three}
    stopped: list[str] = []
    times = harness.time_in_turn(
        runs, CPU, 0.0, calls={"a": 1, "b": 2, "c": 1}, on_error=lambda name, _: stopped.append(name)
    )
    assert "".join(called) == "abbcbbcacabbabbbba"
    assert (stopped, [len(taken) for taken in times.values()]) == (["c"], [5, 5])
    called.clear()
    clock = iter([0.0, 0.0, 0.02, 0.04, 0.06, *[1.0] * 99])  # two untimed calls in 50 ms, then a timed one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "UNTIMED_SECONDS", 0.05)
        patch.setattr(harness.time, "perf_counter", lambda: next(clock))
        patch.setattr(harness, "ROUNDS", 1)
        harness.time_in_turn({"a": runs["a"]}, CPU, 0.0)
    assert "".join(called) == "aaa"
    failed, fine = _measure(_peer("failed", call=_raising(RuntimeError("no more\nat all"))), OURS)
    assert records.reason(failed) == "failed: no more"
    assert fine["value"] > 0


def test_a_run_is_warm_when_its_time_is_steady_or_after_many_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, last in (([5.0, 3.0, 1.0, 1.05, 9.0], 1.05), ([1.0, 2.0] * 60, 2.0)):
        timings = iter(times)
        monkeypatch.setattr(harness, "elapsed", lambda run, device, timings=timings: next(timings))
        assert harness.warm_up(lambda: None, CPU) == last
    assert len([*timings]) == 120 - harness.WARM_UP_RUNS - 2


def test_the_largest_error_may_exceed_that_of_the_tests_but_not_the_norm() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    torchs, one, all_of_them = exact + 1e-6, exact + 1e-6, exact + 2.5e-6
    one[0] += 1.5e-6
    torchs, one, all_of_them = (x.float() for x in (torchs, one, all_of_them))
    with pytest.raises(AssertionError, match="an element is"):
        assert_obeys_rule(one, exact, torchs)
    harness.obeys_rule(one, exact, torchs)
    with pytest.raises(AssertionError, match="the error's norm is"):
        harness.obeys_rule(all_of_them, exact, torchs)
    one[0] += 1.5e-6
    with pytest.raises(AssertionError, match="an element is"):
        harness.obeys_rule(one, exact, torchs)


def test_each_mode_is_run_by_the_right_peers() -> None:
    pytest.importorskip("timm")
    among = [OURS, peers.TRANSFORMERS, TIMM, *peers.ACCELERATED_PEERS.values()]

    def having(mode: str, device: str = "cuda", **changes: Any) -> list[Peer]:
        scenario = dataclasses.replace(SCENARIO, **changes)
        return [peer for peer in among if model.runs_mode(scenario, peer, mode, among, torch.device(device))]

    assert having("eager") == having("eager", task="mixed") == among[:3]
    assert having("graphs") == among[1:3]
    assert having("compile") == having("freezing") == having("compile", task="training") == [TIMM]
    assert having("triton") == having("engine-best-graphs") == having("engine", task="mixed") == [OURS]
    assert having("engine-timm") == [peers.ACCELERATED_PEERS["engine-timm"]]
    assert having("engine-cuda", precision="fp8") == having("engine", "cpu", precision="fp8") == [OURS]
    for mode, changes in {
        "graphs": {"task": "mixed"},
        "engine": {"precision": "fp8"},
        "engine-graphs": {"precision": "fp8"},
        "triton": {"precision": "fp8"},
        "freezing": {"task": "training"},
        "engine-best": {"task": "memory", "output": "training"},
    }.items():
        assert not having(mode, **changes), mode
    among = [peers.TRANSFORMERS, dataclasses.replace(TIMM, missing="no")]
    assert having("compile") == among[:1]
    for text in ("engine-", "engine-nobody", "graphs-engine", "fast"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^unknown: (eager, )?{text}; choose from"):
            modes.parse_modes(f"eager,{text}")


def test_engine_best_takes_the_backends_of_the_nearest_resolution(tmp_path: Path) -> None:
    assert modes.read_best_backends(tmp_path, 224, "bf16") is None
    assert "bench.ops" in str(modes.reason_missing(OURS, "engine-best"))
    small = {"linear.gelu": "torch", "linear.gelu e4m3": "onednn", "layer_norm.plain": "torch"}
    (tmp_path / "best.json").write_text(json.dumps({"commit": "c0ffee", "forms": {"224": small, "518": {"a.b": "c"}}}))
    assert modes.read_best_backends(tmp_path, 224, "bf16") == "layer_norm.plain=torch,linear.gelu=torch"
    assert modes.read_best_backends(tmp_path, 280, "fp8") == "layer_norm.plain=torch,linear.gelu=onednn"
    assert modes.read_best_backends(tmp_path, 1036, "bf16") == "a.b=c"
    best_backends = "linear.gelu=torch"
    assert modes.reason_missing(OURS, "engine-best-graphs", best_backends) is None
    assert modes.backend_of("engine-best", best_backends) == best_backends
    (row,) = forward.ForwardTask(SCENARIO, _models(), best_backends=best_backends).measure_variants(
        [(OURS, "engine-best")], 0.0
    )
    assert row["value"] > 0
    assert row["versions"]["backends"] == best_backends
    assert row["versions"]["product_per_s"] > 0


def test_a_forced_backend_is_strict_and_a_graph_is_captured_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = _measure((OURS, "engine-triton"))
    assert records.reason(row).startswith("cannot run here: ")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(modes, "optimize_for_inference", lambda model, precision, **given: asked.append(given) or model)
    for mode in ("engine", "engine-best-graphs"):
        modes.forward_run(OURS, _models().ours, torch.zeros(1, 3, 28, 28), "cls", "fp32", mode)
    assert [given["cuda_graphs"] for given in asked] == ["auto", True]

    class Graph:
        def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> Any:
            self.run, self.result = run, run()
            return self, self.result, []

        def replay(self) -> None:
            replays.append(self)
            self.result.copy_(self.run())

    replays: list[Graph] = []
    monkeypatch.setattr(modes, "CudaRuntime", Graph)
    (row,) = _measure((_peer("other"), "graphs"), output="cls")
    assert row["value"] > 0
    assert len(replays) > harness.ROUNDS, "the check, and each timing"


def test_a_device_that_answers_only_with_errors_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False, True, True])

    def synchronize(device: torch.device) -> None:
        if next(answers):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not records.is_lost(torch.device("cuda"))  # the first error may belong to an earlier call
    assert records.is_lost(torch.device("cuda"))
    assert not records.is_lost(CPU)


def test_a_lost_device_ends_the_command_and_resuming_skips_what_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = _peer("timm", call=_raising(RuntimeError("CUDA error: an illegal memory access")))
    every_peer = [_peer("transformers"), bad, _peer("dinov2_fast")]
    monkeypatch.setattr(model, "PEERS", every_peer)
    command = ["--models", "tiny", "--sizes", "28", "--outputs", "all", "--modes", "eager", "--seconds", "0"]
    command += ["--device", "cpu", "--implementations", "dinov2_fast,transformers,timm", "--results", str(tmp_path)]
    command += ["--write", "--commit", "c0ffee", "--resume"]
    monkeypatch.setattr(records, "is_lost", lambda device: True)
    assert model.main(command) == records.EXIT_RETRY
    monkeypatch.setattr(records, "is_lost", lambda device: False)
    assert model.main(command) == 0
    rows = records.read(tmp_path / "cpu" / "throughput.jsonl")
    values = {row["implementation"]: row["value"] for row in rows}
    assert list(values) == ["timm", "transformers", "dinov2_fast"]
    assert values["timm"] is None
    assert records.reason(rows[0]).startswith(records.LOST_PREFIX)
    assert values["transformers"] > 0


COMMANDS = {
    "throughput": ["--modes", "eager,engine", "--outputs", "cls"],
    "latency": ["--modes", "eager,engine", "--outputs", "cls"],
    "host": ["--outputs", "cls"],
    "mixed": ["--sizes", "28,56", "--batches", "3"],
    "training": ["--batches", "3"],
    "memory": [],
}


@pytest.mark.parametrize("task", COMMANDS)
def test_a_command_saves_its_rows_and_resumes(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    threads = torch.get_num_threads()
    command = ["--task", task, "--models", "tiny", "--sizes", "28", "--seconds", "0", "--device", "cpu", "--write"]
    command += [*COMMANDS[task], "--implementations", "dinov2_fast,timm", "--results", str(tmp_path), "--resume"]
    assert model.main([*command, "--commit", "c0ffee"]) == 0
    torch.set_num_threads(threads)
    rows = records.read(tmp_path / "cpu" / f"{task}.jsonl")
    assert {row["implementation"] for row in rows} == {"dinov2_fast", "timm"}
    assert all(row["value"] > 0 and tuple(row) == records.KEYS for row in rows)
    unit = {"latency": "ms", "host": "ms", "memory": "MiB"}.get(task, "images/s")
    assert {row["unit"] for row in rows} == {unit}
    if task == "host":
        of_timm = {row["mode"]: row["versions"]["of_timm"] for row in rows if row["implementation"] == "timm"}
        assert of_timm == {"eager": 1}
        assert {row["versions"]["threads"] for row in rows} == {1}
    assert re.search(printed := r"  ours \d+\.\d+x", capsys.readouterr().out)
    assert model.main([*command, "--commit", "c0ffee"]) == 0
    torch.set_num_threads(threads)
    assert not re.search(printed, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "engine-fast"], "choose from eager"),
        (["--sizes", "225"], "a size must be a multiple of 14"),
        (["--models", "X"], "unknown: X; choose from S, B"),
        (["--task", "mixed", "--sizes", "56"], "task mixed needs two"),
        (["--task", "mixed", "--batches", "1"], "at least 2 images"),
        (["--outputs", "training"], "an output of task memory"),
    ],
)
def test_the_command_refuses_wrong_options(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model.main(["--device", "cpu", *arguments])
    assert said in capsys.readouterr().err


def test_images_of_many_sizes_give_the_class_tokens_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario("mixed", CONFIG, "28-56", 7, "cls", "fp32")
    variants = (OURS, (OURS, "engine"), _peer("other"))
    rows = _measure(*variants, scenario=scenario)
    assert [row["value"] > 0 for row in rows] == [True] * 3
    by_size = forward.run_by_size
    monkeypatch.setattr(forward, "run_by_size", lambda run, images: by_size(run, images).flip(0))
    reasons = [records.reason(row) for row in _measure(*variants, scenario=scenario)]
    assert [reason and reason[:22] for reason in reasons] == ["refused: the outputs: ", None, "refused: the outputs: "]
    assert sorted(forward.side_lengths(5, 28, 56))[::4] == [28, 56]


def _with_hook(name: str, change: Callable[[Tensor], Tensor]) -> Any:
    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        built = OURS.build(config, ours, drop_path)
        built.get_parameter(name).register_hook(change)
        return built

    return build


def test_wrong_gradients_and_parameters_that_are_not_finite_are_refused() -> None:
    scenario = dataclasses.replace(SCENARIO, task="training", batch=3)
    changes = (lambda g: g * (1 + 1e-4), lambda g: g.index_fill(0, torch.tensor([40]), 0), lambda g: g * 0, torch.sqrt)
    wrong = [
        _peer(name, build=_with_hook(name, change))
        for name, change in zip(training.checked_parameters(CONFIG), changes, strict=True)
    ]

    def infinite(model: nn.Module, x: Tensor) -> Any:
        features = OURS.call["all"](model, x)
        return features | {"x_norm_clstoken": features["x_norm_clstoken"] * (float("inf") if model.training else 1)}

    def without_one_image(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:1], tokens[1:2].detach(), tokens[2:]])

    part, lost = _peer("part", to_tensor=_off(without_one_image)), _peer("lost", call={"all": infinite})
    rows = _measure(OURS, *wrong, part, lost, scenario=scenario)
    assert [row["implementation"] for row in rows if row["value"]] == ["dinov2_fast"]
    for row in rows[1:5]:
        assert records.reason(row).startswith(f"refused: the gradient of {row['implementation']}: ")
    assert records.reason(rows[5]).startswith("refused: the gradient of ")
    assert records.reason(rows[6]) == "refused: after the steps a parameter is not finite"


def test_steps_are_timed_with_the_same_stochastic_depth() -> None:
    scenario = dataclasses.replace(SCENARIO, config=BACKBONES["dinov2_vits14"], task="training")
    for peer in (OURS, TIMM, peers.TRANSFORMERS):
        if peer.missing:
            continue
        built = training.build_model(peer, scenario, _models(scenario.config).ours, CPU)
        rates = {m.drop_prob for m in built.modules() if getattr(m, "drop_prob", None)}
        rates |= {m.sample_drop_ratio for m in built.modules() if getattr(m, "sample_drop_ratio", None)}
        assert rates == {training.DROP_PATH}
        assert built.training


def test_the_floor_of_training_follows_its_formula() -> None:
    scenario = Scenario("training", BACKBONES["dinov2_vits14"], 224, 8, "all", "bf16")
    kept = 5 / 8
    patches = 2 * 8 * 256 * 588 * 384
    layers = 12 * 2 * 8 * 257 * 12 * 384**2
    scores = 12 * 4 * 8 * 257**2 * 384
    stream = 12 * 6 * 8 * 257 * 384 * 2  # bytes of 6 transfers in bf16
    adamw = 7 * roofline.count_parameters(scenario.config)
    flops = 3 * (patches + kept * layers) + 3.5 * kept * scores
    found = training.floor_seconds(scenario, roofline.Rates(1e11, 1e12))
    assert found == pytest.approx(flops / 1e12 + (3 * kept * stream + 2 * adamw) / 1e11, rel=1e-12)


def test_a_meter_counts_allocations_and_releases() -> None:
    meter, held = memory.AllocationMeter(CPU), []

    def hold_one_of_two() -> None:
        held.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(500, dtype=torch.uint8)

    def leave_a_cycle() -> None:
        cycle: list[Any] = [torch.empty(5000, dtype=torch.uint8)]
        cycle.append(cycle)

    assert meter.peak(hold_one_of_two) == 1500
    assert meter.peak(lambda: torch.empty(300, dtype=torch.uint8)) == 1300
    assert meter.peak(held.clear) == 1000
    assert meter.peak(leave_a_cycle) == 5000
    assert meter.peak(lambda: torch.empty(100, dtype=torch.uint8)) == 100


def test_training_holds_weights_gradients_and_both_moments() -> None:
    numel = 10**6

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(numel))

    def call(model: Weight, x: Tensor) -> Tensor:
        return model.weight[: 17 * CONFIG.embed_dim].view(1, 17, -1).expand(len(x), -1, -1)

    plain = Peer("plain", lambda *args: Weight(), {"all": call}, {"all": lambda y: y}, lambda config: "size")
    scenario = dataclasses.replace(SCENARIO, task="memory", output="training")
    (row,) = memory.MemoryTask(scenario, _models(), device=CPU).measure_variants([(plain, "eager")], 0.0)
    # weight, gradient, two moments, and two tensors that AdamW makes in a step
    images, incoming = 4 * 2 * 3 * 56 * 56, 4 * 2 * 17 * CONFIG.embed_dim
    assert row["value"] * memory.MIB == pytest.approx(4 * 6 * numel + images + incoming, rel=0.01)


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert records.current_commit() is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [(InvalidValueError, "refused: x"), (UnsupportedError, "refused: x"), (KeyError, "failed: 'x'")],
)
def test_a_subclass_of_an_error_is_a_failure_of_the_same_kind(error: type[Exception], reason: str) -> None:
    row: dict[str, Any] = {}
    records.record_failure(row, error("x"), torch.device("cpu"))
    assert records.reason(row) == reason
