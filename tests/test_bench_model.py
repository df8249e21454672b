"""The benchmark of whole models: peers share weights, wrong outputs are refused, what is missing says so."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import model as bench
from bench import modes, options, peers, records, roofline, timing
from bench.peers import OURS, Peer
from dinov2_fast import accelerated, extension, optimize_for_inference
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops import _registry, dispatch
from tests.devices import fakes_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=2, num_heads=2)
SETTING = bench.Setting("throughput", CONFIG, 56, 2, "all", "fp32")


def _models(config: BackboneConfig = CONFIG) -> bench.Models:
    torch.manual_seed(0)
    ours = DinoVisionTransformer(**config.constructor_arguments()).eval()
    torch.nn.init.normal_(ours.pos_embed)  # so that each way of resampling positions gives other outputs
    return bench.Models(config, ours)


def _peer(name: str, **changes: Any) -> Peer:
    return dataclasses.replace(OURS, name=name, **changes)


def _measure(*entrants: Peer, setting: bench.Setting = SETTING, known: list[dict[str, Any]] | None = None) -> list[Any]:
    return bench.measure(setting, [(peer, "eager") for peer in entrants], _models(), 0.0, known or [])


def _options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    given = {"device": "cpu", "results": tmp_path, "commit": "c0ffee", "write": True, "resume": False}
    return argparse.Namespace(**(given | changes))


@pytest.mark.parametrize("output", peers.OUTPUTS)
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_peers_have_our_weights_and_our_outputs(peer: Peer, registers: int, output: str, monkeypatch) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = BACKBONES[f"dinov2_vits14{'_reg' if registers else ''}"]
    models = _models(config)
    setting = bench.Setting("throughput", config, 56, 1, output, "fp32")
    (row,) = bench.measure(setting, [(peer, "eager")], models, 0.0, [])
    assert (row["implementation"], row["unit"]) == (peer.name, "images/s")
    assert row["outputs_max_error"] < 1e-5
    wrong = dataclasses.replace(peer, dialect=lambda config: "offset")
    (row,) = bench.measure(setting, [(wrong, "eager")], models, 0.0, [])
    assert row["value"] is None
    assert records.reason(row).startswith("refused: an element is")


def test_wrong_outputs_are_refused_and_the_others_timed(tmp_path, capsys) -> None:
    def raising(model: Any, x: Tensor) -> Any:
        raise NotImplementedError("no such operator")

    def off(factor: float) -> dict[str, Any]:
        return {"all": lambda features: OURS.take["all"](features) * factor}

    def last_picture_off(features: Any) -> Tensor:
        tokens = OURS.take["all"](features).clone()
        tokens[-1, -1, -1] += 1e-2
        return tokens

    rows = _measure(
        OURS,
        _peer("scaled", take=off(1 + 1e-4)),
        _peer("nan", take=off(float("nan"))),
        _peer("half", take={"all": lambda features: OURS.take["all"](features).half()}),
        _peer("last", take={"all": last_picture_off}),
        _peer("unable", call={"all": raising}),
        _peer("absent", missing="absent is not installed"),
    )
    assert [row["implementation"] for row in rows if row["value"] is not None] == ["dinov2_fast"]
    reasons = {row["implementation"]: records.reason(row) for row in rows[1:]}
    assert all(reasons[name].startswith("refused: ") for name in ("scaled", "nan", "half", "last"))
    assert reasons["unable"] == "cannot run here: no such operator"
    assert reasons["absent"] == "missing: absent is not installed"
    bench.show("title", rows)
    recorder = records.Recorder("throughput", _options(tmp_path, write=False))
    recorder.keep([rows[0], *rows[5:]])
    assert recorder.finish() == 0
    recorder.keep(rows[1:5])
    assert recorder.finish() == 1
    said = capsys.readouterr()
    assert "4 rows were refused or failed" in said.err
    assert "absent is not installed" in said.out
    assert not list(tmp_path.iterdir())


def test_out_of_memory_stops_nothing() -> None:
    def raising(model: Any, x: Tensor) -> Any:
        raise torch.OutOfMemoryError("tried to allocate much")

    full, fine = _measure(_peer("full", call={"all": raising}), OURS)
    assert records.reason(full) == "out of memory: tried to allocate much"
    assert fine["value"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "autocast-bf16"])
def test_each_precision_is_held_to_its_own_error(precision: str) -> None:
    setting = dataclasses.replace(SETTING, precision=precision)
    right, wrong = _measure(
        _peer("right"),
        _peer("wrong", take={"all": lambda features: OURS.take["all"](features) + torch.tensor(0.5)}),
        setting=setting,
    )
    assert right["value"] > 0
    assert right["precision"] == precision
    assert (right["outputs_max_error"] > 1e-4) == (precision != "fp32")
    assert records.reason(wrong).startswith("refused")


def test_the_other_dtype_is_forgotten() -> None:
    models = _models()
    fp32 = models.get(OURS, torch.float32)
    assert fp32 is models.get(OURS, torch.float32)
    assert next(models.get(OURS, torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert models.get(OURS, torch.float32) is not fp32
    assert next(models.ours.parameters()).dtype == torch.float32


def test_a_row_is_pictures_over_time_or_time_and_has_every_key(tmp_path) -> None:
    times = [0.1, 0.2, 0.25, 0.4, 0.5]
    fast = bench.values(SETTING, times, 0.05)
    assert fast == pytest.approx({"value": 8, "p20": 2 / 0.42, "p80": 2 / 0.18, "unit": "images/s", "floor_share": 0.2})
    latency = dataclasses.replace(SETTING, task="latency")
    slow = bench.values(latency, times, None)
    assert slow == pytest.approx({"value": 250, "p20": 180, "p80": 420, "unit": "ms", "floor_share": None})
    recorder = records.Recorder("latency", _options(tmp_path))
    recorder.keep([latency.row(OURS, "eager") | slow, latency.row(_peer("x", variant="v"), "eager")])
    kept = [json.loads(line) for line in (tmp_path / "cpu" / "latency.jsonl").read_text().splitlines()]
    assert [tuple(row) for row in kept] == [records.KEYS] * 2
    assert [(row["task"], row["commit"], row["mode"]) for row in kept] == [
        ("latency", "c0ffee", "eager"),
        ("latency", "c0ffee", "v-eager"),
    ]
    recorder.keep([latency.row(OURS, "eager") | slow | {"value": 1.0}])
    assert [row["value"] for row in records.read(recorder.path)] == [1.0, None]


def test_what_is_there_already_is_left_out(tmp_path) -> None:
    first = records.Recorder("latency", _options(tmp_path))
    first.keep([SETTING.row(OURS, "eager") | records.not_measured("no time")])
    again = records.Recorder("latency", _options(tmp_path, resume=True))
    assert again.has(**SETTING.row(OURS, "eager"))
    assert not again.has(**SETTING.row(OURS, "compile"))
    first.keep([SETTING.row(OURS, "eager") | records.missing("not installed")])
    assert not records.Recorder("latency", _options(tmp_path, resume=True)).has(**SETTING.row(OURS, "eager"))
    assert not records.Recorder("latency", _options(tmp_path)).has(**SETTING.row(OURS, "eager"))
    first.keep([SETTING.row(OURS, "eager") | {"value": 1.0}])
    other = records.Recorder("latency", _options(tmp_path, resume=True, commit="deadbeef"))
    assert not other.has(**SETTING.row(OURS, "eager"))


def test_a_slower_implementation_is_seen_and_all_are_shares_of_the_floor(monkeypatch) -> None:
    def slow(model: Any, x: Tensor) -> Any:
        time.sleep(0.2)
        return OURS.call["all"](model, x)

    monkeypatch.setitem(BACKBONES, CONFIG.name, CONFIG)
    place = {"model": CONFIG.name, "resolution": 56, "batch": 2}
    parts = [product.place for product in roofline.products_of(CONFIG, 56, 2, "cls")]
    known = [roofline._row(part, "fp32", "TFLOP/s", [1e12, 1e12], **place) for part in [*parts, "attention"]]
    known.append(roofline._row("copy", None, "GB/s", [1e9, 1e9]))
    fast, slower = _measure(OURS, _peer("slow", call={"all": slow}), known=known)
    assert slower["value"] < fast["value"] / 2
    assert fast["p20"] <= fast["value"] <= fast["p80"]
    floor = roofline.floor(CONFIG, 56, 2, "all", roofline.ceilings_of(known, "fp32")).seconds
    assert fast["floor_share"] == pytest.approx(floor * fast["value"] / 2)
    (without,) = _measure(OURS)
    assert without["floor_share"] is None


def test_runs_take_turns_and_calls_follow_each_other() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timing.in_turn(runs, CPU, 0.0)
    assert "".join(calls) == "abcbcacababcbca"
    calls.clear()
    timing.in_turn(runs, CPU, 0.0, calls={"a": 1, "b": 3, "c": 1})
    assert "".join(calls) == "abbbcbbbcacabbbabbbcbbbca"


FAULTS = """
import resource, torch
from bench import timing

def run():
    first = torch.ones(8 << 20)
    return first + torch.ones(16 << 20)[: 8 << 20]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

timing.in_turn({"a": run}, torch.device("cpu"), 0.0)
print(min(faults() for _ in range(5)))  # the heap may grow once more
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what is freed, or cannot be told")
def test_memory_that_was_freed_is_kept_on_a_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 32,768 pages that a run needs


def test_a_run_is_warm_when_its_time_is_steady(monkeypatch) -> None:
    times = iter([9.0, 5.0, 3.0, 2.8, 1.0])
    monkeypatch.setattr(timing, "elapsed", lambda run, device: next(times))
    assert timing.warm_up(lambda: None, CPU) == 2.8


def test_modes_are_those_worth_running() -> None:
    everyone = [OURS, peers.TRANSFORMERS, peers.TIMM]
    wanted = ["eager", "triton", "engine", "engine-graphs", "compile", "max-autotune"]
    assert modes.modes_of(OURS, wanted, everyone) == ["eager", "triton", "engine", "engine-graphs", "compile"]
    assert modes.modes_of(peers.TIMM, wanted, everyone) == ["eager", "compile", "max-autotune"]
    assert modes.modes_of(peers.TRANSFORMERS, wanted, everyone) == ["eager", "compile"]
    assert modes.modes_of(peers.TRANSFORMERS, wanted, everyone[:2]) == ["eager", "compile", "max-autotune"]


@pytest.mark.parametrize("output", peers.OUTPUTS)
@pytest.mark.parametrize("mode", peers.ACCELERATED)
def test_accelerated_models_of_others_are_rows_of_ours(mode: str, output: str) -> None:
    peer = peers.ACCELERATED[mode]
    if peer.missing:
        pytest.skip(peer.missing)
    assert all(mode not in modes.modes_of(p, list(modes.MODES), peers.peers()) for p in (OURS, *peers.peers()))
    config = BACKBONES["dinov2_vits14_reg"]
    models = _models(config)
    setting = bench.Setting("throughput", config, 56, 1, output, "fp32")
    (row,) = bench.measure(setting, [(peer, mode)], models, 0.0, [])
    assert (row["implementation"], row["mode"], row["unit"]) == ("dinov2_fast", mode, "images/s")
    assert row["outputs_max_error"] < 1e-5
    blocks, *engine = accelerated(models.get(peer, torch.float32)).rows
    assert (blocks.accelerated, blocks.reasons) == (config.depth, ())
    assert [(row.accelerated, row.reasons) for row in engine] == [(1, ())] * mode.startswith("engine")


def test_a_mode_is_what_it_says(monkeypatch) -> None:
    seen: list[Any] = []

    def call(model: Any, x: Tensor) -> Tensor:
        seen.append((dispatch.current_setting().everywhere, torch.is_autocast_enabled("cpu")))
        return x + 1

    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **given: compiled.append(given) or forward)
    peer = _peer("any", call={"all": call})
    for precision in ("fp32", "autocast-bf16"):
        for mode in ("eager", "triton"):
            modes.prepare(peer, torch.nn.Identity(), torch.zeros(1), "all", precision, mode)()
    assert seen == [("", False), ("triton", False), ("", True), ("triton", True)]
    assert dispatch.current_setting().everywhere == ""
    for mode in ("compile", "reduce-overhead", "max-autotune"):
        modes.prepare(peer, torch.nn.Identity(), torch.zeros(1), "all", "fp32", mode)
    assert compiled == [{"dynamic": False, "mode": m} for m in ("default", "reduce-overhead", "max-autotune")]


class Cuda:
    """A torch.cuda that notes what is asked of it."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.mode = 0

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = {"error": 2}.get(mode, mode)

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.happened.append("capture")
        yield

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        replacements = {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": contextlib.nullcontext,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.happened.append("replay")),
            "graph": self.graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_sync_debug_mode,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)


def test_a_peer_that_waits_for_the_device_is_not_captured_and_its_row_says_why(monkeypatch) -> None:
    cuda = Cuda()
    cuda.install(monkeypatch)

    def waiting(model: Any, x: Tensor) -> Any:
        cuda.happened.append("call")
        if cuda.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        return OURS.call["all"](model, x)

    entrants = [(_peer("waiting", call={"all": waiting}), "graphs"), (OURS, "graphs")]
    refused, row = bench.measure(SETTING, entrants, _models(), 0.0, [])
    assert records.reason(refused) == "failed: called a synchronizing CUDA operation"
    assert cuda.happened[: modes.WARM_UP] == ["call"] * modes.WARM_UP
    assert cuda.happened[modes.WARM_UP] == "capture", "of the other peer"
    assert "replay" in cuda.happened
    assert row["value"] > 0
    assert cuda.mode == 0


@pytest.mark.parametrize("output", peers.OUTPUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engine_is_made_of_fp32_weights_for_what_is_asked(precision: str, output: str, monkeypatch) -> None:
    made: list[Any] = []

    def noting(model: Any, *args: Any, **kwargs: Any) -> Any:
        made.append((next(model.parameters()).dtype, args, kwargs))
        return optimize_for_inference(model, *args, **kwargs)

    monkeypatch.setattr(modes, "optimize_for_inference", noting)
    setting = dataclasses.replace(SETTING, precision=precision, output=output)
    (engine,) = bench.measure(setting, [(OURS, "engine")], _models(), 0.0, [])
    asked = {"outputs": output, "cuda_graphs": False, "allow_slow": True}
    assert made == [(torch.float32, (precision,), asked)]
    assert (engine["mode"], engine["unit"]) == ("engine", "images/s")
    assert engine["outputs_max_error"] < (1e-5 if precision == "fp32" else 0.1)
    for mode in ("engine-graphs", "engine-triton-graphs"):
        with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a GPU"):
            modes.prepare(OURS, _models().ours, torch.zeros(1, 3, 28, 28), output, precision, mode)
        assert made[-1][2]["cuda_graphs"] is True
    with modes.contexts(precision, "engine-triton", CPU)():
        assert dispatch.current_setting().everywhere == "triton"


def test_a_wrong_engine_is_refused() -> None:
    def off(features: Any) -> Tensor:
        return OURS.take["all"](features) * (1 + 1e-3)

    (row,) = bench.measure(SETTING, [(_peer("dinov2_fast", take={"all": off}), "engine")], _models(), 0.0, [])
    assert records.reason(row).startswith("refused: an element is")


@pytest.mark.parametrize("output", peers.OUTPUTS)
def test_fp8_is_held_to_the_cosine_with_fp32(output: str) -> None:
    setting = dataclasses.replace(SETTING, precision="fp8", output=output)

    def one_token_off(result: Any) -> Tensor:
        tokens = OURS.take[output](result).clone()
        tokens.view(-1, CONFIG.embed_dim)[-1, :16] += 2
        return tokens

    peers_ = [
        OURS,
        _peer("off", take={output: one_token_off}),
        _peer("nan", take={output: lambda r: OURS.take[output](r) * float("nan")}),
    ]
    right, *wrong = bench.measure(setting, [(peer, "engine") for peer in peers_], _models(), 0.0, [])
    assert right["value"] > 0
    assert right["precision"] == "fp8"
    assert bench.COSINE <= right["versions"]["cosine"] < 0.999999
    assert 1e-4 < right["outputs_max_error"] < 0.5
    for row in wrong:
        assert records.reason(row).startswith("refused: the cosine of a token with that in fp32 is ")


def test_modes_go_with_precisions() -> None:
    def precisions(mode: str, device: torch.device, output: str = "all") -> list[str]:
        return [precision for precision in modes.DTYPES if modes.goes_with(mode, precision, output, device)]

    assert precisions("engine", CPU) == ["fp32", "fp16", "bf16", "fp8"]
    assert precisions("engine", CUDA) == ["fp32", "fp16", "bf16"]
    assert precisions("triton", CUDA) == precisions("eager", CPU) == ["fp32", "fp16", "bf16", "autocast-bf16"]
    for mode in ("engine-triton", "engine-triton-sdpa", "engine-cuda-graphs", "engine-mixed"):
        assert precisions(mode, CUDA) == ["fp32", "fp16", "bf16", "fp8"]
    assert (precisions("engine-cublas", CUDA), precisions("engine-cublas", CUDA, "cls")) == (["fp8"], [])


def test_a_cpu_gets_only_the_modes_that_run_there() -> None:
    assert all(bench.MODES_OF_TASK[task, "cpu"][:2] == ["eager", "engine"] for task in bench.TASKS)
    assert not {mode for task in bench.TASKS for mode in bench.MODES_OF_TASK[task, "cpu"]} & {"triton", "cuda"}
    for task in bench.TASKS:
        assert set(bench.MODES_OF_TASK[task, "cuda"]) < set(modes.MODES)


@fakes_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14"])
def test_no_engine_mode_asks_for_what_an_op_refuses(name: str, precision: str, monkeypatch) -> None:
    """Every op that an engine calls is asked again, with fake tensors of a GPU of sm_90 that has the extension."""
    calls: list[tuple[dispatch.Op, str, tuple[Any, ...]]] = []
    choose = dispatch.Op.choose

    def noting(choosing: Callable[..., Any]) -> Callable[..., Any]:
        def run(op: dispatch.Op, form: str, args: tuple[Any, ...], *rest: Any) -> Any:
            calls.append((op, form, args))
            return choosing(op, form, args, *rest)

        return run

    def on_cuda(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(on_cuda, x))
        is_tensor = isinstance(x, Tensor)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if is_tensor else x

    config = dataclasses.replace(BACKBONES[name], embed_dim=192, depth=2, num_heads=3)
    model, x = _models(config).ours, torch.randn(2, 3, 28, 28).bfloat16()
    chosen: dict[str, set[tuple[str, str]]] = {}
    for output in peers.OUTPUTS:
        made = modes.engine(model, x, output, precision, graphs=False)
        calls.clear()
        with monkeypatch.context() as patch, torch.inference_mode(), dispatch.use_backend("torch"):  # all choose anew
            for method in ("choose", "_choose"):  # the second is that of bound ops
                patch.setattr(dispatch.Op, method, noting(getattr(dispatch.Op, method)))
            OURS.call[output](made, x)
            made.cls_tokens([x, x[..., :14]])
        monkeypatch.setattr(_registry, "_extension_is_absent", lambda: None)
        for mode in modes.ENGINES:
            if not modes.goes_with(mode, precision, output, CUDA):
                continue
            with FakeTensorMode(), torch.inference_mode(), modes.contexts(precision, mode, CUDA)():
                found = {(op.name, choose(op, form, on_cuda(args)).backend) for op, form, args in calls}
            chosen[mode] = chosen.get(mode, set()) | found
    with_all = {"patches", "layer_norm", "linear", "attention", "attention_pool"}
    assert chosen["engine-triton"] == {(name, "triton") for name in with_all}
    torch_attends = ("attention", "torch")
    assert chosen["engine-triton-sdpa"] == chosen["engine-triton"] - {("attention", "triton")} | {torch_attends}
    assert {("layer_norm", "torch"), ("linear", "cuda"), torch_attends} < chosen["engine-cuda"]
    assert {("layer_norm", "triton"), ("linear", "cuda"), torch_attends} < chosen["engine-mixed"]
    assert not {("layer_norm", "torch"), ("attention", "triton")} & chosen["engine-mixed"]
    if precision == "fp8":
        assert {("linear", "cublas"), ("attention", "triton")} < chosen["engine-cublas"]
        assert "engine" not in chosen


def test_without_the_extension_its_modes_are_missing(monkeypatch) -> None:
    monkeypatch.setattr(modes, "load", lambda: extension.Extension(extension.FILE, "not built"))
    wanted = ["engine-cuda", "engine-mixed", "eager", "engine-triton-sdpa"]
    rows = bench.rows_of(SETTING, [(OURS, mode) for mode in wanted])
    reasons = [records.reason(row) for row in rows.values()]
    assert reasons == ["missing: the CUDA extension is not available (not built)"] * 2 + [None] * 2
    monkeypatch.setattr(modes, "load", lambda: extension.Extension(extension.FILE, None))
    assert not any(records.reason(row) for row in bench.rows_of(SETTING, [(OURS, mode) for mode in wanted]).values())


def test_a_backend_that_an_op_refuses_is_a_row_with_the_reason(monkeypatch) -> None:
    def refusing(model: Any, x: Tensor) -> Any:
        raise dispatch.BackendError("layer_norm: backend 'triton' was asked for but cannot run: too wide.")

    refused, fine = _measure(_peer("refused", call={"all": refusing}), OURS)
    assert records.reason(refused) == (
        "cannot run here: layer_norm: backend 'triton' was asked for but cannot run: too wide."
    )
    assert fine["value"] > 0


def test_a_run_that_fails_while_it_is_timed_stops_no_other() -> None:
    calls = iter(range(100))

    def sometimes(model: Any, x: Tensor) -> Any:
        if next(calls) == 5:
            raise RuntimeError("no more")
        return OURS.call["all"](model, x)

    failed, fine = _measure(_peer("failed", call={"all": sometimes}), OURS)
    assert (failed["value"], records.reason(failed)) == (None, "failed: no more")
    assert fine["value"] > 0

    def failing() -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):  # where nobody is told of it
        timing.in_turn({"a": failing}, CPU, 0.0)


@pytest.mark.parametrize(("failures", "lost"), [(0, False), (1, False), (99, True)])
def test_a_device_is_lost_when_it_answers_nothing_but_errors(failures: int, lost: bool, monkeypatch) -> None:
    answers = iter([True] * failures + [False] * 99)

    def synchronize(device: torch.device) -> None:
        if next(answers):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert records.is_lost(CUDA) is lost
    assert not records.is_lost(CPU)


def test_a_lost_device_ends_the_command_and_what_it_was_lost_in_is_left_out_next_time(
    tmp_path, monkeypatch, capsys
) -> None:
    broken: list[bool] = []
    ran: list[str] = []

    def named(name: str, breaks: bool) -> Peer:
        def call(model: Any, x: Tensor) -> Any:
            ran.append(name)
            if breaks:
                broken.append(True)
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
            return OURS.call["all"](model, x)

        return _peer(name, call={"all": call})

    monkeypatch.setattr(bench.dinov2_fast, "load", lambda name, **given: _models().ours)
    monkeypatch.setattr(bench, "peers", lambda path: [named("first", False), named("bad", True), named("last", False)])
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "1,2", "--outputs", "all"]
    command += ["--seconds", "0", "--modes", "eager", "--results", str(tmp_path), "--write", "--commit", "c0ffee"]

    def kept() -> list[tuple[str, int, bool]]:
        rows = records.read(tmp_path / "cpu" / "throughput.jsonl")
        return [(row["implementation"], row["batch"], row["value"] is not None) for row in rows]

    assert bench.main(command) == records.AGAIN
    assert "last" not in ran
    assert kept() == [("bad", 1, False)]
    said = capsys.readouterr().err
    assert "bad eager: failed: after this the device ran nothing any more: CUDA error: an illegal memory" in said
    assert "--resume" in said
    broken.clear()
    assert bench.main([*command, "--resume"]) == records.AGAIN  # with two pictures it happens again
    first = [("bad", 1, False), ("first", 1, True), ("last", 1, True)]
    assert kept() == [*first, ("bad", 2, False)]
    broken.clear()
    ran.clear()
    assert bench.main([*command, "--resume"]) == 0
    assert kept() == [*first, ("bad", 2, False), ("first", 2, True), ("last", 2, True)]
    assert set(ran) == {"first", "last"}


def test_some_implementations_only(tmp_path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(bench.dinov2_fast, "load", lambda name, **given: _models().ours)
    monkeypatch.setattr(bench, "measure", lambda setting, some, *rest: seen.extend(p.name for p, _ in some) or [])
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--outputs", "all", "--results", str(tmp_path)]
    command += ["--modes", "eager,accelerated-transformers"]
    assert bench.main([*command, "--implementations", "transformers,facebook"]) == 0
    assert seen == ["transformers", "facebook", "facebook"]
    seen.clear()
    assert bench.main([*command, "--implementations", "dinov2_fast"]) == 0
    assert seen == ["dinov2_fast", "dinov2_fast"]
    assert [peer.name for peer in peers.peers()] == [*peers.NAMES, "facebook"]


def test_the_reference_is_computed_with_cudnn_and_without_tf32() -> None:
    before = torch.backends.cudnn.enabled
    with bench.exact_fp32():
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.enabled == before


def test_sensors_are_read_once_in_some_seconds(monkeypatch) -> None:
    now, started = [100.0], []

    def run(command: list[str], **given: Any) -> Any:
        started.append(command[0])
        return SimpleNamespace(stdout="1980, 2619, 40, 120.5\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    monkeypatch.setattr(records.subprocess, "run", run)
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    records._sensors.cache_clear()
    expected = {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "temperature_c": 40.0, "power_w": 120.5}
    for _ in range(3):
        found = records.sensors(CUDA)
        assert found == expected
        found.clear()
    assert started == ["nvidia-smi"]
    now[0] += records.SENSED
    assert records.sensors(CUDA) == expected
    assert len(started) == 2
    now[0] += records.SENSED

    def not_installed(command: list[str], **given: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(records.subprocess, "run", not_installed)
    assert records.sensors(CUDA) == {}
    records._sensors.cache_clear()
    assert records.sensors(CPU) == {}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package with the layout of the reference, which notes whether it was allowed to use xformers."""
    for folder in ("hub", "models"):
        (tmp_path / "dinov2" / folder).mkdir(parents=True)
        (tmp_path / "dinov2" / folder / "__init__.py").touch()
    (tmp_path / "dinov2" / "__init__.py").touch()
    (tmp_path / "dinov2" / "models" / "vision_transformer.py").write_text(
        "import os\nALLOWED = 'XFORMERS_DISABLED' not in os.environ\n"
    )
    (tmp_path / "dinov2" / "hub" / "backbones.py").write_text(
        "def made(**given):\n    from dinov2.models import vision_transformer\n"
        "    return vision_transformer.ALLOWED, vision_transformer.__name__\n"
    )
    return tmp_path


def test_the_reference_stands_beside_itself_with_and_without_xformers(checkout: Path, monkeypatch) -> None:
    monkeypatch.setenv("XFORMERS_DISABLED", "1")  # the user's own setting does not hold for the peer that needs it
    with_, without = (peers._reference(checkout, xformers).made() for xformers in (True, False))
    assert with_ == (True, "dinov2_with_xformers.models.vision_transformer")
    assert without == (False, "dinov2_without_xformers.models.vision_transformer")


def test_a_reference_that_is_not_there_is_a_row_or_an_error(tmp_path) -> None:
    plain, xformers = peers.peers()[3:]
    assert (plain.name, plain.mode("eager"), plain.missing) == ("facebook", "eager", "no --reference-path was given")
    assert (xformers.name, xformers.mode("eager")) == ("facebook", "xformers-eager")
    with pytest.raises(ValueError, match="no checkout of facebookresearch/dinov2"):
        peers.peers(tmp_path)


@pytest.mark.parametrize("peer", [OURS, peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_stochastic_depth_is_the_same_for_all(peer: Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = dataclasses.replace(BACKBONES["dinov2_vits14"])
    ours = DinoVisionTransformer(**config.constructor_arguments())
    drops = [m for m in peer.build(config, ours, 0.3).modules() if type(m).__name__.endswith("DropPath")]
    rates = {getattr(drop, "drop_prob", getattr(drop, "drop_path_rate", None)) for drop in drops}
    assert rates == {0.3}
    assert len(drops) in (config.depth, 2 * config.depth)
    assert not any(getattr(m, "drop_prob", 0) for m in peer.build(config, ours, 0.0).modules())


def test_the_command_measures_keeps_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench.dinov2_fast, "load", lambda name, **given: _models().ours)
    monkeypatch.setattr(bench, "peers", lambda path: [OURS, _peer("absent", missing="absent is not installed")])
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "1,2", "--seconds", "0"]
    command += ["--results", str(tmp_path), "--write", "--task", "latency"]
    assert bench.main(command) == 0
    rows = records.read(tmp_path / "cpu" / "latency.jsonl")
    assert [(row["batch"], row["output"], row["implementation"], row["mode"], row["unit"]) for row in rows] == [
        (batch, output, *rest)
        for batch in (1, 2)
        for output in ("all", "cls")
        for rest in (("dinov2_fast", "eager", "ms"), ("dinov2_fast", "engine", "ms"), ("absent", "eager", None))
    ]
    assert "ViT-S/14 28 px, batch 2, class token, fp32" in capsys.readouterr().out
    monkeypatch.setitem(bench.ACCELERATED, "accelerated-timm", _peer("dinov2_fast"))
    assert bench.main([*command, "--resume", "--modes", "eager,accelerated-timm"]) == 0
    rows = records.read(tmp_path / "cpu" / "latency.jsonl")
    assert {row["implementation"] for row in rows if row["mode"] == "accelerated-timm"} == {"dinov2_fast"}
    monkeypatch.setattr(bench, "measure", None)  # nothing is left to measure
    assert bench.main([*command, "--resume"]) == 0


@pytest.mark.skipif(bool(peers.TIMM.missing), reason="timm is not installed")
def test_host_cost_is_measured_on_one_thread_beside_timm(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        command = ["--device", "cpu", "--task", "host", "--outputs", "cls", "--seconds", "0", "--write"]
        assert bench.main([*command, "--results", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [row for row in records.read(tmp_path / "cpu" / "host.jsonl") if row["value"]]
    ratios = {(row["implementation"], row["mode"]): row["versions"]["of_timm"] for row in rows}
    ours = [("dinov2_fast", mode) for mode in ("eager", "engine", "accelerated-timm", "engine-timm")]
    assert set(ratios) >= {("timm", "eager"), *ours}
    assert ratios["timm", "eager"] == 1
    assert {(row["model"], row["resolution"], row["batch"], row["versions"]["threads"]) for row in rows} == {
        ("tiny", 28, 1, 1)
    }
    assert "times timm's time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "S,H"], "H: there are S, B, L, g, dinov2_vits14"),
        (["--sizes", "225"], "225: a size is a multiple of 14"),
        (["--batches", "two"], "two: positive numbers"),
        (["--outputs", "some"], "some: there are all, cls"),
        (["--modes", "fast"], "fast: there are eager, compile"),
        (["--precisions", "int8"], "int8: there are fp32, fp16, bf16, autocast-bf16, fp8"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit):
        bench._parse(arguments)
    assert said in capsys.readouterr().err
