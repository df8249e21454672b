"""CUDA graphs of the engine: which calls are captured, results equal those of eager calls, and later calls keep them.

Without a GPU a graph is a function that is called again and overwrites what it returned the first time.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference import backbone, capture, cuda_graphs, weight_watch
from dinov2_fast.inference.cuda_graphs import CACHED_GRAPHS, GraphCache
from dinov2_fast.inference.weight_watch import WeightWatch
from tests.helpers.engines import CALLS, SIZE, FakeGraphs, random_images, with_graphs
from tests.helpers.huggingface_peers import images, make_pair
from tests.helpers.small_models import small


def pretend_to_capture(patch: pytest.MonkeyPatch) -> None:
    """Makes the engine act as if somebody else captured the current stream."""
    for module in (backbone, cuda_graphs):
        patch.setattr(module, "is_captured", lambda x: True)


# Results


def leaves(output: Any) -> list[Any]:
    return pytree.tree_leaves(output)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("outputs", ["auto", "all"])
@torch.no_grad()
def test_results_are_those_of_eager_calls_and_stay(call: Any, outputs: str) -> None:
    model = small(num_register_tokens=2)
    model.head = nn.Identity()
    eager = optimize_for_inference(model, "fp32", outputs=outputs, cuda_graphs=False)
    engine, fake = with_graphs(model, outputs=outputs)
    given = [(random_images(), torch.rand(2, 12) < 0.5) for _ in range(3)]
    results = [call(engine, *inputs) for inputs in given]
    assert (fake.count("capture"), fake.count("replay")) == (1, 3)
    for result, inputs in zip(results, given, strict=True):  # after all calls: none overwrote earlier results
        expected = call(eager, *inputs)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        for ours, theirs in zip(leaves(result), leaves(expected), strict=True):
            if isinstance(ours, Tensor):
                assert ours.stride() == theirs.stride() or ours.is_contiguous()
                assert ours.dtype == torch.bool or ours.untyped_storage().nbytes() <= theirs.untyped_storage().nbytes()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_a_captured_call_is_found_without_asking_whether_to_capture_it(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(num_register_tokens=2)
    engines = [with_graphs(model, mode)[0] for mode in (True, "auto")]
    eager = optimize_for_inference(model, "fp32", cuda_graphs=False)
    mask = torch.rand(2, 12) < 0.5
    given = random_images(), torch.randint(256, (2, 42, 56, 3)).byte()
    for engine in engines:
        for x in (*given, *given):
            call(engine, x, mask)
    expected = [call(eager, x, mask) for x in given]
    monkeypatch.delattr(GraphCache, "run")
    for engine in engines:
        torch.testing.assert_close([call(engine, x, mask) for x in given], expected, rtol=0, atol=0)


@torch.no_grad()
def test_inputs_that_a_call_returns_are_the_caller_s_tensors() -> None:
    engine, _ = with_graphs(small())
    for _ in range(2):
        x, mask = random_images(), torch.rand(2, 12) < 0.5
        assert engine(x, mask, is_training=True)["masks"] is mask
        assert engine(x, is_training=True)["masks"] is None


@torch.no_grad()
def test_results_that_share_memory_are_copied_at_once() -> None:
    engine, _ = with_graphs(small(num_register_tokens=2))
    for _ in range(2):
        features = engine.forward_features(random_images())
    parts = [features[key] for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert features["x_prenorm"].untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
    assert sum(part.numel() for part in parts) * 4 == parts[0].untyped_storage().nbytes()
    engine, _ = with_graphs(small(), outputs="all")
    token = engine(random_images())
    assert token.untyped_storage().nbytes() == token.numel() * 4, "the other tokens are not copied with it"


@torch.no_grad()
def test_hugging_face_models_return_what_eager_calls_return() -> None:
    for task, outputs in (
        ("Model", "auto"),
        ("Model", "cls"),
        ("Backbone", "auto"),
        ("ForImageClassification", "auto"),
    ):
        model = make_pair("Dinov2WithRegisters", task).ours
        engine, fake = with_graphs(model, outputs=outputs)
        eager = optimize_for_inference(model, "fp32", outputs=outputs, cuda_graphs=False)
        given = [images(98) + i for i in range(2)]
        for call in (lambda m, x: m(x), lambda m, x: m(pixel_values=x, return_dict=False)):
            before = fake.count("capture")
            results = [call(engine, x) for x in given]
            assert fake.count("capture") == before + 1
            for result, x in zip(results, given, strict=True):
                expected = call(eager, x)
                assert type(result) is type(expected)
                torch.testing.assert_close(result, expected, rtol=0, atol=0)


@torch.no_grad()
def test_each_setting_of_a_hugging_face_model_has_its_own_graph() -> None:
    engine, fake = with_graphs(make_pair("Dinov2", "Backbone", out_indices=[1]).ours)
    x = images(98)
    assert len(engine(x).feature_maps) == 1
    engine.config.out_indices = [1, 2]
    assert len(engine(x).feature_maps) == 2
    engine.config.reshape_hidden_states = False
    assert engine(x).feature_maps[0].ndim == 3
    engine.config.return_dict = False
    assert type(engine(x)) is tuple
    assert fake.count("capture") == 4
    engine.config.output_hidden_states = True
    engine(x)
    assert fake.count("capture") == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
        ("out_features", ["stage1", "stage2"]),
        ("apply_layernorm", False),
        ("reshape_hidden_states", False),
    ],
)
@torch.no_grad()
def test_a_hugging_face_setting_changed_between_two_calls_takes_effect(name: str, value: Any) -> None:
    model, x = make_pair("Dinov2", "Backbone", out_features=["stage1"]).ours, images(98)
    engine, fake = with_graphs(model)
    eager = optimize_for_inference(model, "fp32", cuda_graphs=False)
    engine(x)
    engine(x)
    assert (fake.count("capture"), fake.count("replay")) == (1, 2)
    for each in (engine, eager):
        setattr(each.config, name, value)
    found, expected = engine(x), eager(x)
    assert type(found) is type(expected)
    torch.testing.assert_close(leaves(found), leaves(expected), rtol=0, atol=0)
    assert fake.count("capture") == 1 + (name not in cuda_graphs.COSTLY)


@torch.no_grad()
def test_images_of_every_layout_and_dtype_are_copied_in_right() -> None:
    engine, fake = with_graphs(small())
    eager = optimize_for_inference(engine._model, "fp32")
    x = random_images(2, 3, 84, 56)
    layouts = [x, x.mT.contiguous().mT, x.contiguous(memory_format=torch.channels_last), x[:1].expand(2, -1, -1, -1)]
    layouts.append(random_images(4, 3, 84, 112)[::2, :, :, ::2])
    for image in layouts:
        torch.testing.assert_close(engine(image), eager(image), rtol=0, atol=0)
    assert fake.count("capture") == 1
    for pixels in (torch.randint(256, (2, 84, 56, 3)).byte(), torch.randint(256, (2, 3, 84, 56)).byte()):
        torch.testing.assert_close(engine(pixels), eager(pixels), rtol=0, atol=0)
    torch.testing.assert_close(engine(x.double()), eager(x.double()), rtol=0, atol=0)
    assert fake.count("capture") == 3


def test_calls_in_different_modes_of_autograd_share_a_graph() -> None:
    model, x = small(), random_images()
    engine, fake = with_graphs(model)
    with torch.inference_mode():
        first = engine(random_images())
    assert first.is_inference()
    second = engine(x)
    assert not second.is_inference()
    with torch.no_grad():
        assert torch.equal(engine(x.clone().requires_grad_()), second)
    head = nn.Linear(32, 1)
    head(second).sum().backward()
    assert fake.count("capture") == 1
    second.add_(1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(x) + 1, second)
    assert fake.count("capture") == 1


@torch.no_grad()
def test_a_graph_captured_under_autocast_is_in_the_engine_s_precision() -> None:
    engine, fake = with_graphs(small())
    x = random_images()
    with torch.autocast("cpu", torch.bfloat16):
        first = engine(x)
    assert torch.equal(engine(x), first)
    assert torch.equal(optimize_for_inference(engine._model, "fp32", cuda_graphs=False)(x), first)
    assert fake.count("capture") == 1


def _record_checks(monkeypatch: pytest.MonkeyPatch, fake: FakeGraphs) -> None:
    """Records each check for changes, in the order of a GPU."""
    monkeypatch.setattr(weight_watch, "is_asynchronous", lambda device: True)
    changed = WeightWatch.changed
    monkeypatch.setattr(WeightWatch, "changed", lambda self: fake.happened.append("check") or changed(self))


@torch.no_grad()
def test_changes_are_checked_while_the_device_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), random_images()
    engine, fake = with_graphs(model)
    before = engine(x)
    _record_checks(monkeypatch, fake)
    fake.happened.clear()
    assert torch.equal(engine(x), before)
    assert fake.happened == ["begin", "replay", "end", "check"]
    model.norm.bias.add_(1)
    fake.happened.clear()
    after = engine(x)
    torch.testing.assert_close(after, model(x), atol=1e-5, rtol=1e-5)
    dropped, again = ["begin", "replay", "end", "check"], ["wait", "forget", "capture", "begin", "replay", "end"]
    assert fake.happened == dropped + again
    fake.happened.clear()
    assert torch.equal(engine(x), after)
    assert fake.happened == ["begin", "replay", "end", "check"]


@torch.no_grad()
def test_a_call_that_only_the_changed_model_accepts_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), random_images(2, 4, 42, 56)
    engine, fake = with_graphs(model)
    _record_checks(monkeypatch, fake)
    with pytest.raises(ValueError, match="takes 3 channels, got 4"):
        engine(x)
    assert fake.count("check") == 1
    model.patch_embed = small(in_chans=4).patch_embed
    torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)


# One graph for each kind of call


@torch.no_grad()
def test_every_method_and_every_set_of_arguments_has_its_own_graph() -> None:
    engine, fake = with_graphs(small(num_register_tokens=2))
    x, mask = random_images(), torch.zeros(2, 12, dtype=torch.bool)

    kinds = [
        lambda: engine(x),
        lambda: engine(random_images(2, 3, 56, 42)),
        lambda: engine(x.half()),
        lambda: engine(x, mask),
        lambda: engine(x, is_training=True),
        lambda: engine.forward_features(x),
        lambda: engine.get_intermediate_layers(x, 1),
        lambda: engine.get_intermediate_layers(x, 2),
        lambda: engine.get_intermediate_layers(x, [1]),
        lambda: engine.get_intermediate_layers(x, 1, norm=False),
        lambda: engine.get_intermediate_layers(x, 1, return_class_token=True),
        lambda: engine.get_intermediate_layers(x, 1, reshape=True),
        lambda: engine.get_intermediate_layers(x, 1, reshape=False),
    ]
    assert len(kinds) <= CACHED_GRAPHS
    for _ in range(2):
        for kind in kinds:
            kind()
    assert (fake.count("capture"), fake.count("replay")) == (len(kinds), 2 * len(kinds))


@contextmanager
def _changed(get: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Changes a setting of torch inside."""
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


_CUDA = torch.backends.cuda
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "deterministic": lambda: _changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "precision of products": lambda: _changed(
        lambda: _CUDA.matmul.fp32_precision, partial(setattr, _CUDA.matmul, "fp32_precision"), "tf32"
    ),
    "cuDNN's attention": lambda: _changed(_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp, False),
    "flash attention": lambda: _changed(_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp, False),
    "efficient attention": lambda: _changed(_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp, False),
    "math attention": lambda: _changed(_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp, False),
    "backend of all ops": lambda: use_backend("torch"),
    "backend of an op": lambda: use_backend("layer_norm=torch"),
    "strict": lambda: use_backend("layer_norm=torch", strict=True),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_a_process_setting_changed_between_two_calls_takes_effect(setting: Callable[[], Any]) -> None:
    engine, fake = with_graphs(small())
    x = random_images()
    with use_backend("layer_norm=torch") if setting is SETTINGS["strict"] else nullcontext():
        engine(x)
        engine(x)
        assert fake.count("capture") == 1
        with setting():
            engine(x)
        assert fake.count("capture") == 2
        engine(x)
    assert (fake.count("capture"), fake.count("replay")) == (2, 4)


@torch.no_grad()
def test_the_kinds_of_call_used_last_are_kept() -> None:
    engine, fake = with_graphs(small(), max_tokens=None)

    def call(i: int) -> int:
        before = fake.count("capture")
        engine(random_images(1, 3, 14, 14 * (i + 1)))
        return fake.count("capture") - before

    assert [call(i) for i in range(CACHED_GRAPHS)] == [1] * CACHED_GRAPHS
    assert call(0) == 0
    fake.happened.clear()
    assert call(CACHED_GRAPHS) == 1  # in place of 1, since 0 was used after it
    assert fake.happened.index("wait") < fake.happened.index("capture"), "memory is given back before it is needed"
    assert call(0) == 0
    assert call(1) == 1
    assert len(engine._graphs._calls) == CACHED_GRAPHS
    assert len(set(fake.pools.values())) == 1, "graphs share one pool"


@torch.no_grad()
def test_graphs_of_two_engines_share_nothing() -> None:
    models = [small(), small(num_register_tokens=2)]
    engines, fakes = zip(*(with_graphs(model) for model in models), strict=True)
    for _ in range(2):
        x = random_images()
        outputs = [engine(x) for engine in engines]
        for output, model in zip(outputs, models, strict=True):
            torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)
    assert not set(fakes[0].pools.values()) & set(fakes[1].pools.values())


# Calls that run eagerly


class Subclass(Tensor):
    """A subclass of torch.Tensor, which may compute in its own way."""


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.forward_features([x, x[:1]]),
        lambda m, x: m([x], is_training=True),
        lambda m, x: m.cls_tokens([x]),
        lambda m, x: m.cls_tokens([x[0], x[1]]),
        lambda m, x: m(x[:0]),
        lambda m, x: m(x.as_subclass(Subclass)),
        lambda m, x: m.get_intermediate_layers(x, {1, 2}),
    ],
    ids=["lists", "list, is_training", "cls_tokens", "images", "no images", "subclass", "unknown argument"],
)
@torch.no_grad()
def test_other_calls_run_eagerly(call: Any) -> None:
    model = small()
    engine, fake = with_graphs(model)
    x = random_images()
    expected = call(optimize_for_inference(model, "fp32"), x)
    for ours, theirs in zip(leaves(call(engine, x)), leaves(expected), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert fake.count("capture") == 0


@torch.no_grad()
def test_replicas_on_another_device_run_eagerly() -> None:
    engine, fake = with_graphs(small())
    engine(random_images())
    meta = copy.deepcopy(engine.folded).to("meta")  # replicas of `nn.DataParallel` share the graphs, too
    for _ in range(2):
        x = random_images().to("meta")
        assert engine._graphs.run(meta, meta, "forward_features", (x,), {})["x_norm_clstoken"].is_meta
    assert fake.count("capture") == 1
    engine.to("cpu")
    engine._graphs.run(meta, meta, "forward_features", (x,), {})
    assert fake.count("capture") == 2


@torch.no_grad()
def test_hidden_states_attentions_and_losses_run_eagerly() -> None:
    engine, fake = with_graphs(make_pair("Dinov2").ours)
    x = images(98)
    for kwargs in ({"output_hidden_states": True}, {"output_attentions": True}, {"output_attentions": [1]}):
        engine(x, **kwargs)
    assert engine(x, None, None, [0]).attentions is not None
    assert fake.count("capture") == 0
    engine(x, output_hidden_states=False)
    assert fake.count("capture") == 1
    classifier, fake = with_graphs(make_pair("Dinov2", "ForImageClassification", num_labels=3).ours)
    assert classifier(x, torch.tensor([1, 2])).loss is not None
    assert fake.count("capture") == 0


TRACING = ("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")


@pytest.mark.filterwarnings(*TRACING)
def test_nothing_is_captured_under_a_compiler_tracer_or_dispatch_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, x = small(), random_images()
    engine, fake = with_graphs(model)
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        with use_backend("torch"):  # oneDNN's ops cannot be traced
            traced = torch.jit.trace(engine, x, check_trace=False)
        with FlopCounterMode(display=False) as counter:
            engine(x)
            engine(x)
        assert counter.get_total_flops() > 0
        pretend_to_capture(monkeypatch)
        engine(x)
        assert fake.happened == []
        monkeypatch.undo()
        for _ in range(2):
            torch.testing.assert_close(engine(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    assert fake.count("replay") == 2


@pytest.mark.filterwarnings(*TRACING)
@torch.no_grad()
def test_no_graph_replays_for_gradients_tracers_or_dispatch_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs in each call, also in those that have a graph."""
    engine, fake = with_graphs(small())
    x = random_images()
    expected = engine(x)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="an input requires one"):
        engine(x.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="carries a tangent"):
        engine(forward_ad.make_dual(x, x))
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(engine(x), expected)
    assert counter.get_total_flops() > 0
    assert torch.equal(engine(x.as_subclass(Subclass)), expected)
    with pytest.raises(RuntimeError, match="device"):
        engine(x.to("meta"))
    with monkeypatch.context() as patched:
        pretend_to_capture(patched)
        assert torch.equal(engine(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    with use_backend("torch"):  # oneDNN's ops cannot be traced
        engine(x)
        happened = list(fake.happened)
        traced = torch.jit.trace(engine, x, check_trace=False)
        other = random_images()
        assert fake.happened == happened == ["capture", "begin", "replay", "end"] * 2
        assert torch.equal(traced(other), engine(other))
    engine.folded.to("meta")  # not by the engine, whose `to` drops the graphs
    happened = list(fake.happened)
    assert engine(x.to("meta")).is_meta
    assert fake.happened == happened


@torch.no_grad()
def test_auto_captures_small_calls_when_they_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fake = with_graphs(small(num_register_tokens=2), "auto")
    limit = 2 * (1 + 2 + 12) * 32**2
    for work, captures in ((limit - 1, 0), (limit, 1)):
        monkeypatch.setattr(cuda_graphs, "AUTO_WORK", work)
        for _ in range(3):
            engine(random_images())
        assert fake.count("capture") == captures
    assert fake.count("replay") == 2, "the first call is eager"
    fake.happened.clear()
    for _ in range(3):
        for i in range(CACHED_GRAPHS + 1):
            engine(random_images(1, 3, 14, 14 * (i + 1)))
    assert fake.count("capture") == 0, "more kinds of call than are remembered"
    assert f"up to {limit // 32**2} tokens" in str(engine)


def test_there_are_no_graphs_without_a_gpu_or_with_false() -> None:
    model = small()
    for mode, said in (("auto", "none, since the engine is on cpu"), (False, "none, as asked")):
        engine = optimize_for_inference(model, cuda_graphs=mode)
        engine(random_images())
        assert f"CUDA graphs: {said}" in str(engine)
        assert not engine._graphs._calls
    engine, fake = with_graphs(model, False)
    for _ in range(3):
        engine(random_images())
    assert fake.happened == []
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a GPU, this one is on cpu"):
        optimize_for_inference(model, cuda_graphs=True)
    for wrong in ("always", 1, None):
        with pytest.raises(ValueError, match=f"no cuda_graphs {wrong!r}; choose one of auto, True, False"):
            optimize_for_inference(model, cuda_graphs=wrong)


def test_copies_keep_the_setting_and_have_graphs_of_their_own() -> None:
    engine = optimize_for_inference(small(), cuda_graphs=False)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other._graphs.mode is False
        assert other._graphs is not engine._graphs


# When graphs are dropped


@pytest.mark.parametrize("change", ["weights", "refresh", "move"])
@torch.no_grad()
def test_graphs_are_dropped_when_the_weights_they_read_are_replaced(change: str) -> None:
    model, x = small(), random_images()
    engine, fake = with_graphs(model)
    engine(x)
    fake.happened.clear()
    if change == "weights":
        model.norm.bias.add_(1)
    elif change == "refresh":
        model.norm.bias.data.add_(1)
        engine.refresh()
    else:
        engine.to("cpu")
    torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    assert fake.happened[:3] == ["wait", "forget", "capture"]
    assert len(engine._graphs._calls) == 1


@torch.no_grad()
def test_a_call_that_began_before_a_refresh_leaves_no_graph_for_later() -> None:
    """One thread is about to run the old weights when another thread folds new ones."""
    model, x = small(), random_images()
    engine, _ = with_graphs(model)
    old = engine.folded
    model.norm.bias.add_(1)
    engine.refresh()
    engine._graphs.run(old, old, "__call__", (x,), {})
    torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_is_folded_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    engine, _ = with_graphs(model)
    model.norm.bias.add_(1)
    monkeypatch.setattr("dinov2_fast.inference.engine.is_captured", lambda x: True)
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured nothing can be folded: call refresh\(\)"):
        engine(random_images())


@torch.no_grad()
def test_cached_positions_are_kept_alive_by_our_graphs_and_not_read_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x = optimize_for_inference(small(), "fp32"), random_images()
    expected = engine(x)
    (cached,) = engine.folded._sizes.values()
    assert engine.folded._tokens_of_size(x, 12) is cached
    pretend_to_capture(monkeypatch)
    assert engine.folded._tokens_of_size(x, 12) is not cached, "a foreign graph would read it after it is gone"
    assert torch.equal(engine(x), expected)
    monkeypatch.setattr(capture._capturing, "kept", [], raising=False)
    assert engine.folded._tokens_of_size(x, 12) is cached
    assert capture._capturing.kept == [cached]
    engine(random_images(1, 3, 14, 14))
    assert len(engine.folded._sizes) == 1, "what a capture makes is written only when its graph runs"


# Failures


@torch.no_grad()
def test_a_failed_capture_is_logged_once_and_calls_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    engine, fake = with_graphs(model)
    fake.failure = RuntimeError("operation not permitted\nwhen capturing")
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        for shape in (SIZE, SIZE, (1, 3, 28, 28)):
            x = random_images(*shape)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    (record,) = caplog.records
    assert record.getMessage().endswith("capturing one failed: RuntimeError: operation not permitted")
    assert "CUDA graphs: none, since capturing one failed: RuntimeError: operation not permitted" in str(engine)
    assert (fake.count("capture"), fake.count("replay")) == (1, 0)
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        engine.refresh()
        engine(random_images())
    assert len(caplog.records) == 1, "the same reason again"
    fake.failure = None
    engine.refresh()
    engine(random_images())
    assert fake.count("replay") == 1
    assert "CUDA graphs: for every call that can be captured; 1 captured" in str(engine)


@torch.no_grad()
def test_wrong_arguments_are_no_failure_of_graphs(caplog: pytest.LogCaptureFixture) -> None:
    engine, fake = with_graphs(small())
    for _ in range(2):
        with pytest.raises(ValueError, match="height 60 is not a multiple"):
            engine(random_images(1, 3, 60, 70))
    with pytest.raises(ValueError, match="masks must be"):
        engine(random_images(), torch.zeros(2, 5, dtype=torch.bool))
    engine(random_images())
    assert fake.count("replay") == 1
    assert not caplog.records


# Threads and streams


@torch.no_grad()
def test_threads_do_not_get_each_other_s_results() -> None:
    model = small()
    engine, fake = with_graphs(model)
    fake.pause = 0.005
    wrong: list[str] = []

    def calls(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            x = torch.randn(SIZE, generator=generator)
            with torch.no_grad():
                if not torch.allclose(engine(x), model(x), rtol=1e-5, atol=1e-5):
                    wrong.append(f"of thread {seed}")

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (fake.count("capture"), fake.count("replay")) == (1, 16)


@torch.no_grad()
def test_each_use_waits_for_the_last_and_ends_with_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fake = with_graphs(small())
    copied = capture.OutputCopier.copy
    monkeypatch.setattr(capture.OutputCopier, "copy", lambda *args: fake.happened.append("copy") or copied(*args))
    for _ in range(2):
        engine(random_images())
    assert fake.happened == ["capture", *("begin", "replay", "copy", "end") * 2]
