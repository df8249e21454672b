"""CUDA graphs of the engine: what is captured and when, that results are those of eager calls, and that they stay.

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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference import cuda_graphs, watch
from dinov2_fast.inference.cuda_graphs import CACHED_GRAPHS, Graphs
from dinov2_fast.inference.waiting import NoWaiting
from dinov2_fast.inference.watch import ModelWatch
from tests.helpers.devices import DEVICE, on_gpu, runs_triton
from tests.helpers.engines import FakeGraphs, with_graphs
from tests.helpers.huggingface_peers import images, make_pair
from tests.helpers.small_models import small

X = (2, 3, 42, 56)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or X)).to(dtype)


# Results


CALLS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "forward": lambda m, x, mask: m(x),
    "forward, masks": lambda m, x, mask: m(x, masks=mask),
    "is_training": lambda m, x, mask: m(x, is_training=True),
    "is_training, masks": lambda m, x, mask: m(x, mask, is_training=True),
    "forward_features": lambda m, x, mask: m.forward_features(x),
    "intermediate": lambda m, x, mask: m.get_intermediate_layers(x, 2),
    "intermediate, chosen": lambda m, x, mask: m.get_intermediate_layers(x, [0, 2], return_class_token=True),
    "attention maps": lambda m, x, mask: m.attention_maps(x, [2, 0], heads=[1]),
    "queries, keys, values": lambda m, x, mask: m.qkv_features(x, reshape=True),
    "intermediate, maps": lambda m, x, mask: m.get_intermediate_layers(x, n=(1,), reshape=True, norm=False),
}


def leaves(output: Any) -> list[Any]:
    return pytree.tree_leaves(output)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("outputs", ["auto", "all"])
@torch.no_grad()
def test_results_are_those_of_eager_calls_and_stay(call: Any, outputs: str) -> None:
    model = small(num_register_tokens=2)
    model.head = nn.Identity()
    eager = optimize_for_inference(model, "fp32", outputs, cuda_graphs=False)
    engine, fake = with_graphs(model, outputs=outputs)
    given = [(random(), torch.rand(2, 12) < 0.5) for _ in range(3)]
    results = [call(engine, *inputs) for inputs in given]
    assert (fake.count("capture"), fake.count("replay")) == (1, 3)
    for result, inputs in zip(results, given, strict=True):  # after all calls: none wrote into another's results
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
    given = random(), torch.randint(256, (2, 42, 56, 3)).byte()
    for engine in engines:
        for x in (*given, *given):
            call(engine, x, mask)
    expected = [call(eager, x, mask) for x in given]
    monkeypatch.delattr(Graphs, "run")
    for engine in engines:
        torch.testing.assert_close([call(engine, x, mask) for x in given], expected, rtol=0, atol=0)


@torch.no_grad()
def test_what_a_call_passes_on_is_the_caller_s_own() -> None:
    engine, _ = with_graphs(small())
    for _ in range(2):
        x, mask = random(), torch.rand(2, 12) < 0.5
        assert engine(x, mask, is_training=True)["masks"] is mask
        assert engine(x, is_training=True)["masks"] is None


@torch.no_grad()
def test_what_lies_in_one_tensor_is_copied_at_once() -> None:
    engine, _ = with_graphs(small(num_register_tokens=2))
    for _ in range(2):
        features = engine.forward_features(random())
    parts = [features[key] for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert features["x_prenorm"].untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
    assert sum(part.numel() for part in parts) * 4 == parts[0].untyped_storage().nbytes()
    engine, _ = with_graphs(small(), outputs="all")
    token = engine(random())
    assert token.untyped_storage().nbytes() == token.numel() * 4, "the other tokens are not copied with it"


@torch.no_grad()
def test_the_hugging_face_face() -> None:
    for task, outputs in (
        ("Model", "auto"),
        ("Model", "cls"),
        ("Backbone", "auto"),
        ("ForImageClassification", "auto"),
    ):
        model = make_pair("Dinov2WithRegisters", task).ours
        engine, fake = with_graphs(model, outputs=outputs)
        eager = optimize_for_inference(model, "fp32", outputs, cuda_graphs=False)
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
def test_settings_of_a_hugging_face_model_are_heeded() -> None:
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
def test_a_setting_of_a_hugging_face_model_that_changes_between_two_calls(name: str, value: Any) -> None:
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
def test_images_in_every_layout_and_dtype() -> None:
    engine, fake = with_graphs(small())
    eager = optimize_for_inference(engine._model, "fp32")
    x = random(2, 3, 84, 56)
    layouts = [x, x.mT.contiguous().mT, x.contiguous(memory_format=torch.channels_last), x[:1].expand(2, -1, -1, -1)]
    layouts.append(random(4, 3, 84, 112)[::2, :, :, ::2])
    for image in layouts:
        torch.testing.assert_close(engine(image), eager(image), rtol=0, atol=0)
    assert fake.count("capture") == 1
    for pixels in (torch.randint(256, (2, 84, 56, 3)).byte(), torch.randint(256, (2, 3, 84, 56)).byte()):
        torch.testing.assert_close(engine(pixels), eager(pixels), rtol=0, atol=0)
    torch.testing.assert_close(engine(x.double()), eager(x.double()), rtol=0, atol=0)
    assert fake.count("capture") == 3


def test_modes_of_autograd_mix() -> None:
    model, x = small(), random()
    engine, fake = with_graphs(model)
    with torch.inference_mode():
        first = engine(random())
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
    x = random()
    with torch.autocast("cpu", torch.bfloat16):
        first = engine(x)
    assert torch.equal(engine(x), first)
    assert torch.equal(optimize_for_inference(engine._model, "fp32", cuda_graphs=False)(x), first)
    assert fake.count("capture") == 1


def _noting_checks(monkeypatch: pytest.MonkeyPatch, fake: FakeGraphs) -> None:
    """Adds each look for changes to what happened, in the order of a GPU."""
    monkeypatch.setattr(watch, "is_asynchronous", lambda device: True)
    changed = ModelWatch.changed
    monkeypatch.setattr(ModelWatch, "changed", lambda self: fake.happened.append("check") or changed(self))


@torch.no_grad()
def test_changes_are_looked_for_while_the_device_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), random()
    engine, fake = with_graphs(model)
    before = engine(x)
    _noting_checks(monkeypatch, fake)
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
def test_a_call_that_only_the_changed_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), random(2, 4, 42, 56)
    engine, fake = with_graphs(model)
    _noting_checks(monkeypatch, fake)
    with pytest.raises(ValueError, match="takes 3 channels, got 4"):
        engine(x)
    assert fake.count("check") == 1
    model.patch_embed = small(in_chans=4).patch_embed
    torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)


# What has a graph of its own


@torch.no_grad()
def test_a_graph_for_every_method_and_arguments() -> None:
    engine, fake = with_graphs(small(num_register_tokens=2))
    x, mask = random(), torch.zeros(2, 12, dtype=torch.bool)

    kinds = [
        lambda: engine(x),
        lambda: engine(random(2, 3, 56, 42)),
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
def test_a_setting_that_changes_between_two_calls_is_heeded(setting: Callable[[], Any]) -> None:
    engine, fake = with_graphs(small())
    x = random()
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
        engine(random(1, 3, 14, 14 * (i + 1)))
        return fake.count("capture") - before

    assert [call(i) for i in range(CACHED_GRAPHS)] == [1] * CACHED_GRAPHS
    assert call(0) == 0
    fake.happened.clear()
    assert call(CACHED_GRAPHS) == 1  # in place of 1, since 0 was used after it
    assert fake.happened.index("wait") < fake.happened.index("capture"), "memory is given back before it is needed"
    assert call(0) == 0
    assert call(1) == 1
    assert len(engine._graphs._kinds) == CACHED_GRAPHS
    assert len(set(fake.pools.values())) == 1, "graphs share one pool"


@torch.no_grad()
def test_graphs_of_two_engines_share_nothing() -> None:
    models = [small(), small(num_register_tokens=2)]
    engines, fakes = zip(*(with_graphs(model) for model in models), strict=True)
    for _ in range(2):
        x = random()
        outputs = [engine(x) for engine in engines]
        for output, model in zip(outputs, models, strict=True):
            torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)
    assert not set(fakes[0].pools.values()) & set(fakes[1].pools.values())


# When there is none


class Subclass(Tensor):
    """Of torch's, which may compute anything in its own way."""


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
    x = random()
    expected = call(optimize_for_inference(model, "fp32"), x)
    for ours, theirs in zip(leaves(call(engine, x)), leaves(expected), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert fake.count("capture") == 0


@torch.no_grad()
def test_replicas_on_another_device_run_eagerly() -> None:
    engine, fake = with_graphs(small())
    engine(random())
    meta = copy.deepcopy(engine.folded).to("meta")  # as `nn.DataParallel` makes them: with the same graphs
    for _ in range(2):
        x = random().to("meta")
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
def test_nothing_is_captured_while_something_else_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, x = small(), random()
    engine, fake = with_graphs(model)
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        with use_backend("torch"):  # an op of oneDNN's cannot be traced
            traced = torch.jit.trace(engine, x, check_trace=False)
        with FlopCounterMode(display=False) as counter:
            engine(x)
            engine(x)
        assert counter.get_total_flops() > 0
        monkeypatch.setattr(cuda_graphs, "is_captured", lambda x: True)
        engine(x)
        assert fake.happened == []
        monkeypatch.undo()
        for _ in range(2):
            torch.testing.assert_close(engine(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    assert fake.count("replay") == 2


@pytest.mark.filterwarnings(*TRACING)
@torch.no_grad()
def test_no_graph_answers_where_something_else_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is asked in each call, also of a kind that was captured."""
    engine, fake = with_graphs(small())
    x = random()
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
        patched.setattr(cuda_graphs, "is_captured", lambda x: True)
        assert torch.equal(engine(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    with use_backend("torch"):  # an op of oneDNN's cannot be traced
        engine(x)
        happened = list(fake.happened)
        traced = torch.jit.trace(engine, x, check_trace=False)
        other = random()
        assert fake.happened == happened == ["capture", "begin", "replay", "end"] * 2
        assert torch.equal(traced(other), engine(other))
    engine.folded.to("meta")  # past the engine, whose `to` drops the graphs
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
            engine(random())
        assert fake.count("capture") == captures
    assert fake.count("replay") == 2, "the first call is eager"
    fake.happened.clear()
    for _ in range(3):
        for i in range(CACHED_GRAPHS + 1):
            engine(random(1, 3, 14, 14 * (i + 1)))
    assert fake.count("capture") == 0, "more kinds of call than are remembered"
    assert f"up to {limit // 32**2} tokens" in str(engine)


def test_no_graphs_without_a_gpu_or_when_not_asked_for() -> None:
    model = small()
    for mode, said in (("auto", "none, since the engine is on cpu"), (False, "none, as asked")):
        engine = optimize_for_inference(model, cuda_graphs=mode)
        engine(random())
        assert f"CUDA graphs: {said}" in str(engine)
        assert not engine._graphs._kinds
    engine, fake = with_graphs(model, False)
    for _ in range(3):
        engine(random())
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


# Graphs end


@pytest.mark.parametrize("change", ["weights", "refresh", "move"])
@torch.no_grad()
def test_graphs_end_with_what_they_read(change: str) -> None:
    model, x = small(), random()
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
    assert len(engine._graphs._kinds) == 1


@torch.no_grad()
def test_a_call_that_began_before_a_refresh_leaves_no_graph_for_later() -> None:
    """Two threads: one is about to run the old weights when the other folds new ones."""
    model, x = small(), random()
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
        engine(random())


@torch.no_grad()
def test_cached_positions_are_held_by_our_graphs_and_left_alone_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x = optimize_for_inference(small(), "fp32"), random()
    expected = engine(x)
    (cached,) = engine.folded._sizes.values()
    assert engine.folded._tokens_of_size(x, 12) is cached
    monkeypatch.setattr(cuda_graphs, "is_captured", lambda x: True)
    assert engine.folded._tokens_of_size(x, 12) is not cached, "a foreign graph would read it after it is gone"
    assert torch.equal(engine(x), expected)
    monkeypatch.setattr(cuda_graphs._own, "held", [], raising=False)
    assert engine.folded._tokens_of_size(x, 12) is cached
    assert cuda_graphs._own.held == [cached]
    engine(random(1, 3, 14, 14))
    assert len(engine.folded._sizes) == 1, "what a capture makes is written only when its graph runs"


# Failures


@torch.no_grad()
def test_a_capture_that_fails_is_said_once_and_calls_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    engine, fake = with_graphs(model)
    fake.failure = RuntimeError("operation not permitted\nwhen capturing")
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        for shape in (X, X, (1, 3, 28, 28)):
            x = random(*shape)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    (record,) = caplog.records
    assert record.getMessage().endswith("capturing one failed: RuntimeError: operation not permitted")
    assert "CUDA graphs: none, since capturing one failed: RuntimeError: operation not permitted" in str(engine)
    assert (fake.count("capture"), fake.count("replay")) == (1, 0)
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        engine.refresh()
        engine(random())
    assert len(caplog.records) == 1, "the same reason again"
    fake.failure = None
    engine.refresh()
    engine(random())
    assert fake.count("replay") == 1
    assert "CUDA graphs: for every call that can be captured; 1 captured" in str(engine)


@torch.no_grad()
def test_wrong_arguments_are_no_failure_of_graphs(caplog: pytest.LogCaptureFixture) -> None:
    engine, fake = with_graphs(small())
    for _ in range(2):
        with pytest.raises(ValueError, match="height 60 is not a multiple"):
            engine(random(1, 3, 60, 70))
    with pytest.raises(ValueError, match="masks must be"):
        engine(random(), torch.zeros(2, 5, dtype=torch.bool))
    engine(random())
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
            x = torch.randn(X, generator=generator)
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
def test_each_use_waits_for_the_last_and_ends_with_the_copies() -> None:
    engine, fake = with_graphs(small())
    for _ in range(2):
        engine(random())
    assert fake.happened == ["capture", "begin", "replay", "end", "begin", "replay", "end"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A torch.cuda that notes what is asked of it."""
    happened: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            happened.append(f"{self.name} waits for event")

    class Event:
        def record(self, stream: Stream) -> None:
            happened.append(f"event on {stream.name}")

        def synchronize(self) -> None:
            happened.append("host waits for event")

    class Context:
        def __init__(self, name: str, *_: Any) -> None:
            self.name = name

        def __enter__(self) -> None:
            happened.append(f"into {self.name}")

        def __exit__(self, *_: object) -> None:
            happened.append(f"out of {self.name}")

    def graph(graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Context:
        return Context(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")

    fakes = {
        "Stream": lambda device: Stream("side"),
        "Event": Event,
        "CUDAGraph": lambda: "graph",
        "current_stream": lambda device: Stream("current"),
        "stream": lambda stream: Context(stream.name),
        "device": lambda device: Context(str(device)),
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return happened


def test_the_calls_into_cuda(calls: list[str]) -> None:
    cuda, device = cuda_graphs.Cuda(), torch.device("cuda:1")
    cuda.end(cuda.begin(device))
    cuda.wait()
    assert calls == []

    def run() -> str:
        calls.append("run")
        cuda_graphs.held((len(calls),))
        return "output"

    assert cuda.capture(run, device, "shared") == ("graph", "output", [(7,)])
    capture = "capture on side, pool shared, thread_local"
    assert calls == [
        *("into cuda:1", "into side", "side waits for current", "run", "run"),
        *(f"into {capture}", "run", f"out of {capture}"),
        *("out of side", "out of cuda:1", "current waits for side"),
    ]
    calls.clear()
    stream = cuda.begin(device)
    stream.name = "the same"
    cuda.end(stream)
    cuda.wait()
    assert calls == ["current waits for event", "event on the same", "host waits for event"]
    assert cuda_graphs.held((1,)) is None, "the capture is over"


def test_a_failed_capture_gives_the_caller_s_stream_back(calls: list[str]) -> None:
    def run() -> None:
        if "into capture on side, pool None, thread_local" in calls:
            raise RuntimeError("not permitted")

    cuda = cuda_graphs.Cuda()
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.capture(run, torch.device("cuda"), None)
    assert calls[-2:] == ["out of side", "out of cuda"]
    assert cuda_graphs.held((1,)) is None
    assert not cuda_graphs._one_at_a_time.locked()


# Calls for which the host waits


class Head(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


WAITING_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "condition": lambda x: x if (x > 0).all() else -x,
    "nonzero": lambda x: x + x.nonzero().shape[0],
    "unique": lambda x: x + x.unique().shape[0],
    "mask": lambda x: x + x[x > 0].sum(),
    "masked_select": lambda x: x + x.masked_select(x > 0).sum(),
    "set by a mask": lambda x: x.index_put((x > 0,), x.sum()[None]),
    "equal": lambda x: x + torch.equal(x, -x),
    "allclose": lambda x: x + torch.allclose(x, -x),
    "inverse": lambda x: x @ torch.linalg.inv(torch.eye(x.shape[-1], device=x.device)),
    "new numbers": lambda x: x + torch.tensor([1.0], device=x.device),
}
HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: nn.functional.linear(x, x),
    "indices": lambda x: x[torch.arange(1, device=x.device)],
    "rows set": lambda x: x.index_put((torch.arange(1, device=x.device),), x[0]),
    "where": lambda x: torch.where(x > 0, x, x.sum()),
    "top": lambda x: x.topk(2).values,
}


class OnCpu(cuda_graphs.Cuda):
    """Captures on the CPU, with the torch.cuda of the fixture `calls`."""

    def serves(self, device: torch.device) -> bool:
        return True


def with_a_head(function: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """An engine that captures, and one that does not."""
    model = small()
    model.head = Head(function)
    engine, eager = (optimize_for_inference(model, "fp32", cuda_graphs=False) for _ in range(2))
    engine._graphs = Graphs(True, OnCpu())
    return engine, eager


@pytest.mark.parametrize("function", WAITING_HEADS.values(), ids=WAITING_HEADS)
@torch.no_grad()
def test_no_capture_begins_where_the_host_would_wait(
    function: Callable[[Tensor], Tensor], calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine, eager = with_a_head(function)
    for _ in range(2):
        x = random()
        assert torch.equal(engine(x), eager(x))
    assert "into side" in calls, "warmed up"
    assert not [call for call in calls if call.startswith("into capture")]
    (record,) = caplog.records
    assert "capturing one failed: RuntimeError: aten." in record.getMessage()
    assert record.getMessage().endswith("makes the host wait for the device")
    assert "makes the host wait for the device" in str(engine)


@pytest.mark.parametrize("function", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_heads_for_which_nobody_waits_are_captured(
    function: Callable[[Tensor], Tensor], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    engine, eager = with_a_head(function)
    x = random()
    assert torch.equal(engine(x), eager(x))
    assert "into capture on side, pool None, thread_local" in calls
    assert "replay" in calls


LISTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "list": lambda m, x, mask: m.forward_features([x, x[:1]]),
    "list, masks": lambda m, x, mask: m([x, x[:1]], masks=[mask, mask[:1]], is_training=True),
    "cls_tokens": lambda m, x, mask: m.cls_tokens([x[0], x[1]]),
}


@pytest.mark.parametrize("call", (CALLS | LISTS).values(), ids=CALLS | LISTS)
@torch.no_grad()
def test_no_call_of_the_engine_waits(call: Any) -> None:
    engine = optimize_for_inference(small(num_register_tokens=2), "fp32")
    mask = torch.rand(2, 12) < 0.5
    for x in (random(), torch.randint(256, X).byte(), torch.randint(256, (2, 42, 56, 3)).byte()):
        expected = call(engine, x, mask)
        with NoWaiting(x.device):
            found = call(engine, x, mask)
        torch.testing.assert_close(found, expected)


@runs_triton
@torch.no_grad()
def test_no_call_of_the_engine_waits_on_kernels() -> None:
    engine = optimize_for_inference(small(embed_dim=64, num_heads=2), "fp32").to(DEVICE)
    x, mask = torch.randint(256, (1, 3, 28, 28)).byte().to(DEVICE), torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    with use_backend("triton", strict=True):
        expected = engine(x, mask, is_training=True)["x_prenorm"]
        with NoWaiting(x.device):
            found = engine(x, mask, is_training=True)["x_prenorm"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_no_call_of_the_engine_mixes_devices(call: Any) -> None:
    """On the meta device in place of a GPU."""
    folded = copy.deepcopy(optimize_for_inference(small(num_register_tokens=2), "fp32").folded).to("meta")
    x, mask = random().to("meta"), torch.zeros(2, 12, dtype=torch.bool, device="meta")
    with use_backend("torch"):
        call(folded, x, mask)
        with NoWaiting(x.device):
            call(folded, x, mask)


NUMBER, NUMBERS = torch.tensor(2.0), torch.tensor([1, 0])
WAITING_OPS: dict[str, Callable[[Tensor], Any]] = {
    "to the device": lambda x: x + NUMBERS.to(x.device),
    "a number to the device": lambda x: x * NUMBER.to(x.device),
    "into what is there": lambda x: x[0, 0].copy_(NUMBER),
    "indices": lambda x: x[NUMBERS],
}
OPS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x * NUMBER,
    "a row of a number": lambda x: x[0].fill_(NUMBER),
    "set by a mask to a number": lambda x: x.index_put((x > 0,), NUMBER),
    "elsewhere": lambda x: x * NUMBERS.sum().item() + NUMBERS.nonzero().shape[0] + NUMBERS[NUMBERS > 0].shape[0],
}


@pytest.mark.parametrize("op", (WAITING_OPS | OPS).values(), ids=WAITING_OPS | OPS)
def test_ops_that_copy_between_devices(op: Callable[[Tensor], Any]) -> None:
    x = torch.empty(2, 2, device="meta")
    with NoWaiting(x.device):
        if op in OPS.values():
            op(x)
        else:
            with pytest.raises(RuntimeError, match=r"aten\..* makes the host wait for the device"):
                op(x)


# On a GPU


def cuda_engine(mode: bool | str = True, **kwargs: Any) -> tuple[Any, Any]:
    """An engine with graphs and one without, of the same model."""
    torch.manual_seed(kwargs.pop("seed", 0))
    model = small(embed_dim=128, num_heads=2, **kwargs).cuda()
    return tuple(optimize_for_inference(model, "bf16", cuda_graphs=graphs) for graphs in (mode, False))


WAITING_HEADS_ON_A_GPU = {name: WAITING_HEADS[name] for name in ("item", "mask", "new numbers")} | {
    "numbers of the CPU": lambda x: x + torch.ones(1).to(x.device, x.dtype)
}


def captured(engine: Any) -> int:
    return sum(kind is not None for kind in engine._graphs._kinds.values())


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.inference_mode()
def test_a_graph_computes_what_eager_calls_do(call: Any) -> None:
    engine, eager = cuda_engine(num_register_tokens=2)
    given = [(random().cuda(), (torch.rand(2, 12) < 0.5).cuda()) for _ in range(3)]
    results = [call(engine, *inputs) for inputs in given]
    for result, inputs in zip(results, given, strict=True):
        equal(result, call(eager, *inputs))
    assert captured(engine) == 1
    assert engine._graphs._failure == ""


@on_gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.inference_mode()
def test_graphs_of_every_backend_also_for_uint8(backend: str) -> None:
    engine, eager = cuda_engine("auto")
    with use_backend(backend, strict=True):
        for _ in range(3):
            pixels = torch.randint(256, (2, 56, 70, 3)).byte().cuda()
            equal(engine(pixels), eager(pixels))
    assert captured(engine) == 1


@on_gpu
@torch.inference_mode()
def test_on_side_streams() -> None:
    """What is slow to write on a stream is there when the graph reads it, and graphs on two streams do not mix."""
    engine, eager = cuda_engine()
    engine(random().cuda())
    given = [random().cuda() for _ in range(8)]
    slow = torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(given):
        with torch.cuda.stream(streams[i % 2]):
            late = x + 0 * (slow @ slow).sum()
            results.append(engine(late))
            late.fill_(7)
    torch.cuda.synchronize()
    for result, x in zip(results, given, strict=True):
        equal(result, eager(x))
    assert captured(engine) == 1


@on_gpu
@torch.inference_mode()
def test_two_engines_and_many_sizes_interleaved() -> None:
    pairs = [cuda_engine(seed=seed) for seed in range(2)]
    sizes = [(1, 3, 14, 14 * (i + 1)) for i in range(CACHED_GRAPHS + 4)]
    for _ in range(2):
        for size in sizes:
            x = random(*size).cuda()
            results = [engine(x, is_training=True) for engine, _ in pairs]
            for result, (_, eager) in zip(results, pairs, strict=True):
                equal(result, eager(x, is_training=True))
    assert [captured(engine) for engine, _ in pairs] == [CACHED_GRAPHS] * 2


@on_gpu
@torch.no_grad()
def test_after_a_change_of_weights_and_a_move() -> None:
    engine, eager = cuda_engine()
    x = random().cuda()
    before = engine(x)
    engine._model.norm.bias.add_(1)
    equal(engine(x), eager(x))
    assert not torch.equal(engine(x), before)
    engine.to("cpu").to("cuda")
    equal(engine(x), eager(x))


@on_gpu
@torch.inference_mode()
def test_inside_a_graph_of_the_user_s() -> None:
    engine, eager = cuda_engine()
    static = random().cuda()
    engine(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        engine(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = engine(static)
    for i in range(40):  # forgets the positions of this size
        eager(random(1, 3, 14, 14 * (i + 1)).cuda())
        engine(random(1, 3, 14, 14 * (i + 1)).cuda())
    x = random().cuda()
    static.copy_(x)
    graph.replay()
    equal(output, eager(x))
    equal(engine(x), eager(x))
    engine._model.norm.bias.data.add_(1)
    with pytest.raises(RuntimeError, match="cannot be folded"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        engine.refresh()


@on_gpu
@pytest.mark.parametrize("function", WAITING_HEADS_ON_A_GPU.values(), ids=WAITING_HEADS_ON_A_GPU)
@torch.inference_mode()
def test_a_head_that_cannot_be_captured(function: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture) -> None:
    model = small(embed_dim=128, num_heads=2).cuda()
    model.head = Head(function)
    engine, eager = (optimize_for_inference(model, "bf16", cuda_graphs=graphs) for graphs in (True, False))
    before = torch.cuda.current_stream()
    for _ in range(2):
        x = random().cuda()
        equal(engine(x), eager(x))
    assert torch.cuda.current_stream() == before
    assert len([record for record in caplog.records if "capturing one failed" in record.getMessage()]) == 1
    assert "none, since capturing one failed" in str(engine)
    assert torch.randn(1, device="cuda").isfinite(), "random numbers are not in the middle of a capture"
    torch.cuda.empty_cache()
    cached = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del cached
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**28, "nor is the allocator"


@on_gpu
def test_threads_on_a_gpu() -> None:
    engine, eager = cuda_engine()
    wrong: list[int] = []

    @torch.inference_mode()
    def calls(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                x = torch.randn((2, 3, 42, 56 + 14 * (i % 3)), generator=generator).cuda()
                if not torch.equal(engine(x), eager(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert captured(engine) == 3
