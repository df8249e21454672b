"""The inference engine: the outputs of the model it was made from, in every form, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference import weight_watch
from dinov2_fast.inference.backbone import CACHED_SIZES
from dinov2_fast.inference.engine import Engine
from dinov2_fast.inference.fold import LinearLayout, layout_for
from dinov2_fast.layers import Mlp
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._fp8 import E4M3
from tests.helpers import golden, huggingface_peers
from tests.helpers.devices import DEVICE, fakes_cuda, poisoned_memory, runs_triton
from tests.helpers.engines import blocks_in_full
from tests.helpers.golden import INPUTS, TOLERANCE, close
from tests.helpers.huggingface_peers import KIND_NAMES, KINDS, images, make_pair
from tests.helpers.small_models import KINDS_OF_MODEL, small, wild, with_biases


@pytest.fixture(params=["", "linear=cublas"], ids=["", "deferred biases"])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Runs a test with the default backends, and with linears that leave their biases to the norms."""
    if not request.param:
        yield False
        return
    ran, addmm_ = [], Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda *args: ran.append(1) or addmm_(*args))
    with use_backend(request.param):
        yield True
    assert ran


@pytest.fixture(scope="module", params=golden.cases())
def reference(request) -> tuple[Any, dict[str, Tensor], str]:
    arguments, weights, tensors = golden.load_case(request.param)
    model = DinoVisionTransformer(**arguments).eval()
    model.load_state_dict(weights)
    return optimize_for_inference(model, "fp32"), tensors, request.param


@pytest.mark.golden
@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("i", INPUTS)
def test_golden_features(reference, i: int) -> None:
    engine, tensors, name = reference
    x = tensors[f"{i}.input"]
    features = engine.forward_features(x)
    keys = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")
    if name.startswith("timm"):
        tokens = torch.cat([features[keys[0]][:, None], *(features[key] for key in keys[1:])], dim=1)
        close(tokens, tensors[f"{i}.forward_features"])
        close(engine(x), tensors[f"{i}.forward"])
        return
    for key in (*keys, "x_prenorm"):
        close(features[key], tensors[f"{i}.{key}"])
    close(engine(x), tensors[f"{i}.forward"])
    masked = engine(x, masks=tensors[f"{i}.mask"], is_training=True)
    close(masked["x_prenorm"], tensors[f"{i}.masked_prenorm"])
    assert masked["masks"] is tensors[f"{i}.mask"]
    for j, pair in enumerate(engine.get_intermediate_layers(x, n=2, reshape=True, return_class_token=True)):
        close(pair[0], tensors[f"{i}.intermediate.{j}.patch"])
        close(pair[1], tensors[f"{i}.intermediate.{j}.cls"])


@pytest.mark.parametrize("kind", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
@pytest.mark.usefixtures("deferred")
@torch.no_grad()
def test_every_call_of_the_reference_s_face_returns_what_the_model_does(kind: dict[str, Any]) -> None:
    model = with_biases(small(**kind))
    engine = optimize_for_inference(model, "fp32")
    x, other = torch.randn(2, 3, 42, 98), torch.randn(1, 3, 70, 70)
    masks = torch.rand(2, 21) < 0.5
    calls = [
        lambda m: m(x),
        lambda m: m(x, masks),
        lambda m: m(x, masks=masks, is_training=True),
        lambda m: m.forward_features([x, other], [masks, None]),
        lambda m: m.forward_features_list([other, x], None),
        lambda m: m([x, x, other], is_training=True),
        lambda m: m.get_intermediate_layers(x, 3),
        lambda m: m.get_intermediate_layers(x, [0, 2], norm=False, return_class_token=True),
        lambda m: m.get_intermediate_layers(x, n=(1,), reshape=True),
    ]
    for call in calls:
        torch.testing.assert_close(call(engine), call(model), atol=2e-5, rtol=2e-5)
    with pytest.raises(TypeError, match="is_training=True"):
        engine([x])
    with pytest.raises(ValueError, match="height 60 is not a multiple"):
        engine(x[:, :, :, :60].mT)
    assert engine(torch.zeros(0, 3, 56, 56)).shape == (0, 32)


@torch.no_grad()
def test_images_of_many_sizes_get_their_own_positions() -> None:
    model = small(num_register_tokens=2)
    engine = optimize_for_inference(model, "fp32")
    sizes = [(42, 98), (98, 42), (42, 70), (70, 70), *((14, 14 * columns) for columns in range(1, 20)), (42, 98)]
    for height, width in sizes:
        x = torch.randn(1, 3, height, width)
        torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(engine._sizes) <= CACHED_SIZES


@torch.no_grad()
def test_cached_positions_may_be_cleared_by_another_thread() -> None:
    class Cleared(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    model, x = small(), torch.randn(1, 3, 42, 98)
    engine = optimize_for_inference(model, "fp32")
    engine.folded._sizes = Cleared()
    for _ in range(2):
        torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(("family", "swiglu"), KINDS, ids=KIND_NAMES)
@torch.no_grad()
def test_every_call_of_the_hugging_face_face_returns_what_transformers_does(family: str, swiglu: bool) -> None:
    pair = make_pair(family, swiglu=swiglu)
    engine = optimize_for_inference(pair.ours, "fp32")
    for size in ((98, 140), (60, 74)):  # 60 and 74 are not multiples of the patch size
        x = images(*size)
        masks = torch.rand(2, (size[0] // 14) * (size[1] // 14)) < 0.5
        asked = {"output_hidden_states": True, "output_attentions": True, "bool_masked_pos": masks}
        for kwargs in ({}, asked):
            ours, theirs = engine(x, **kwargs), pair.theirs(x, **kwargs)
            assert list(ours) == list(theirs)
            for key in theirs:
                huggingface_peers.assert_close(ours[key], theirs[key], TOLERANCE)
        ours, theirs = engine(x, return_dict=False), pair.theirs(x, return_dict=False)
        huggingface_peers.assert_close(ours, theirs, TOLERANCE)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(("family", "swiglu"), KINDS, ids=KIND_NAMES)
@torch.no_grad()
def test_classifiers_and_backbones_return_what_transformers_does(family: str, swiglu: bool) -> None:
    x = images(98)
    pair = make_pair(family, "ForImageClassification", swiglu=swiglu, num_labels=5)
    ours, theirs = (model(x, labels=torch.tensor([1, 4])) for model in (optimize_for_inference(pair.ours), pair.theirs))
    huggingface_peers.assert_close(ours.logits, theirs.logits, TOLERANCE)
    huggingface_peers.assert_close(ours.loss, theirs.loss, TOLERANCE)
    pair = make_pair(family, "Backbone", swiglu=swiglu, out_indices=[0, 2, 3])
    ours, theirs = (model(x, output_hidden_states=True) for model in (optimize_for_inference(pair.ours), pair.theirs))
    huggingface_peers.assert_close(ours.feature_maps, theirs.feature_maps, TOLERANCE)
    huggingface_peers.assert_close(ours.hidden_states, theirs.hidden_states, TOLERANCE)


# Numbers


def _exact(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return copy.deepcopy(model).double().forward_features(x.double())


def _errors(model: Any, wanted: dict[str, Tensor], x: Tensor) -> Tensor:
    """Relative errors of CLS and patch tokens, and of CLS in the plain call, for each image: (3, batch)."""
    features = model.forward_features(x)
    pairs = [(features[key], wanted[key]) for key in ("x_norm_clstoken", "x_norm_patchtokens")]
    pairs.append((model(x), wanted["x_norm_clstoken"]))
    return torch.stack([(ours - ref).flatten(1).norm(dim=1) / ref.flatten(1).norm(dim=1) for ours, ref in pairs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
@pytest.mark.usefixtures("deferred")
@torch.no_grad()
def test_errors_are_no_larger_than_those_of_the_model_in_that_dtype(kind: dict[str, Any], dtype: torch.dtype) -> None:
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    same, wide = [], []
    for seed in range(4 if dtype == torch.bfloat16 else 2):  # fp16 is slow on a CPU
        torch.manual_seed(seed)
        model, x = wild(kind), torch.randn(16, 3, 56, 56)
        exact = _exact(model, x)
        eager = _errors(copy.deepcopy(model).to(dtype), exact, x.to(dtype))
        for settings, ratios in (({}, same), ({"residual_dtype": "fp32"}, wide)):
            engine = optimize_for_inference(model, precision, allow_slow=True, **settings)
            ratios.append(_errors(engine, exact, x) / eager)
    same, wide = (torch.cat(ratios, dim=1).log() for ratios in (same, wide))  # (3, images)
    chance = 3 * same.std(dim=1) / same.shape[1] ** 0.5  # three standard errors of the mean
    assert (same.mean(1) <= chance).all()  # geometric means measured: 0.87 to 1.06
    assert (wide.mean(1).exp() <= 0.9).all()  # measured 0.66 to 0.81


@pytest.mark.parametrize("kind", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
@pytest.mark.usefixtures("deferred")
@torch.no_grad()
def test_fp32_features_are_close_to_fp64(kind: dict[str, Any]) -> None:
    model, x = wild(kind), torch.randn(4, 3, 56, 70)
    errors = _errors(optimize_for_inference(model, "fp32"), _exact(model, x), x)
    assert (errors < 1e-5).all()


@runs_triton
@pytest.mark.parametrize(
    ("kind", "settings", "precision", "backends"),
    [
        ("mlp", {}, "fp32", "triton"),
        ("swiglu", {"residual_dtype": "fp32"}, "bf16", "triton"),
        ("registers", {}, "bf16", "triton"),
        ("registers", {}, "bf16", "triton,linear.gelu=cublas,linear.residual=cublas"),
    ],
    ids=["mlp", "swiglu", "registers", "deferred biases"],
)
@torch.no_grad()
def test_the_kernels_compute_the_same(kind: str, settings: dict[str, Any], precision: str, backends: str) -> None:
    model, x = wild(KINDS_OF_MODEL[kind], num_heads=2, depth=2).to(DEVICE), torch.randn(2, 3, 28, 42).to(DEVICE)
    decoded = torch.randint(256, (1, 28, 28, 3), dtype=torch.uint8).to(DEVICE)
    exact = _exact(model, x)
    outputs = {}
    for backend in ("torch", backends):
        with use_backend(backend, strict=True):
            engine = optimize_for_inference(model, precision, allow_slow=True, **settings)
            assert {row.backend for row in engine.backends()} == ({"cublas", "triton"} if "," in backend else {backend})
            assert (engine.blocks[0].deferred.end is not None) == ("," in backend)
            with poisoned_memory():
                lists = engine.forward_features([x, x[:1, :, :28, :28]])
                outputs[backend] = (_errors(engine, exact, x), engine(decoded), [part["x_prenorm"] for part in lists])
    (plain, *expected), (errors, *found) = outputs["torch"], outputs[backends]
    assert (errors <= (2e-5 if precision == "fp32" else 2 * plain)).all()
    tolerance = 1e-4 if precision == "fp32" else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# Layouts of weights


@torch.no_grad()
def test_the_norms_add_the_sum_of_the_biases_before_them() -> None:
    model = with_biases(small(init_values=0.3))
    with use_backend("linear.residual=cublas"):
        engine = optimize_for_inference(model, "fp32")
    plain = optimize_for_inference(model, "fp32")
    lacking = torch.zeros(32)
    for made, block, whole in zip(engine.blocks, model.blocks, plain.blocks, strict=True):
        assert made.attn.proj.bias is made.mlp.down.bias is None
        biases = [block.ls1.gamma * block.attn.proj.bias, block.ls2.gamma * block.mlp.fc2.bias]
        assert (made.deferred.norm1 is None) == (made is engine.blocks[0])
        if made.deferred.norm1 is not None:
            torch.testing.assert_close(made.deferred.norm1, lacking)
        torch.testing.assert_close(made.deferred.norm2, lacking + biases[0])
        lacking = lacking + sum(biases)
        torch.testing.assert_close(made.deferred.end, lacking)
        x = torch.randn(2, 5, 32)
        torch.testing.assert_close(made(x), whole(x))
        torch.testing.assert_close(made.first_token(x), whole.first_token(x))
        torch.testing.assert_close(whole(x)[:, 0], whole.first_token(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_engine_folds_again_when_other_backends_need_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = with_biases(small(ffn_layer="swiglu")), torch.randn(2, 3, 28, 28)
    engine = optimize_for_inference(model, "fp32")
    folded, layouts, expected = [], [], model(x)
    fold = Engine._fold
    monkeypatch.setattr(Engine, "_fold", lambda self, device: folded.append(device) or fold(self, device))

    def call() -> None:
        torch.testing.assert_close(engine(x), expected, atol=1e-5, rtol=1e-5)
        layouts.append((engine.blocks[0].mlp.up.interleaved, engine.blocks[0].deferred.end is not None))

    call()
    with use_backend("linear=cublas"):
        call()
        assert "in place, the norms add the biases" in str(engine)
        with use_backend("linear=torch,layer_norm=torch"):
            call()
    with use_backend("linear.gelu=torch"):
        call()
    assert layouts == [(False, False), (False, True), (False, False), (False, False)]
    assert len(folded) == 2
    copied = copy.deepcopy(engine)
    torch.testing.assert_close(copied(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_engine_that_does_not_follow_its_model_keeps_its_layout_and_its_weights() -> None:
    model, other, x = with_biases(small()), with_biases(small()), torch.randn(2, 3, 28, 28)
    still, loaded = (optimize_for_inference(model, "fp32", follow_weights=follow) for follow in (False, True))
    loaded.load_state_dict(optimize_for_inference(other, "fp32").state_dict())
    expected = model(x)
    model.norm.bias.add_(1)
    for engine, wanted in ((still, expected), (loaded, other(x))):
        if engine is loaded:
            engine._watch = None  # it would fold the model's weights again
        with use_backend("linear.residual=cublas"):
            torch.testing.assert_close(engine(x), wanted, atol=1e-5, rtol=1e-5)
        assert engine.blocks[0].deferred.end is None
    still.refresh()
    torch.testing.assert_close(still(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_state_dict_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = optimize_for_inference(small(ffn_layer="swiglu"), "fp32")
    monkeypatch.setattr("dinov2_fast.inference.fold.layout_for", lambda *args: LinearLayout(True, False))
    interleaved = optimize_for_inference(small(ffn_layer="swiglu"), "fp32")
    for ours, theirs in ((engine, interleaved), (interleaved, engine)):
        with pytest.raises(RuntimeError, match="interleaved_rows"):
            ours.load_state_dict(theirs.state_dict())


def test_autocast_does_not_change_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast some linears refuse inputs that they accept in the engine, which disables it."""
    autocast = []
    monkeypatch.setattr(
        "dinov2_fast.inference.fold.layout_for",
        lambda *args: autocast.append(torch.is_autocast_enabled("cpu")) or LinearLayout(False, False),
    )
    with torch.autocast("cpu"):
        engine = optimize_for_inference(small(), "fp32")
        with use_backend("linear=torch"):
            engine(torch.zeros(1, 3, 28, 28))
    assert autocast == [False, False]


@fakes_cuda
def test_layouts_are_those_of_the_device_that_an_engine_is_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels with SwiGLU in the epilogue run on a GPU alone, and need interleaved gates and values."""
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
    with use_backend("linear.swiglu=triton,linear.residual=cublas"):
        layouts = [
            layout_for(torch.device("cuda"), dtype, stream, gated=True)
            for dtype, stream in (
                (torch.bfloat16, torch.bfloat16),
                (torch.bfloat16, torch.float32),
                (E4M3, torch.bfloat16),
            )
        ]
        assert layout_for(torch.device("cuda"), torch.bfloat16, torch.bfloat16, gated=False) == (False, True)
    assert layouts == [(True, True), (True, False), (True, False)]
    assert layout_for(torch.device("cuda"), torch.bfloat16, torch.bfloat16, gated=True) == (False, False)
    with use_backend("linear=cublas"):  # its e4m3 products take a bias in bf16, in any residual dtype
        assert layout_for(torch.device("cuda"), E4M3, torch.float32, gated=True) == (False, False)
    engine, asked, folded = optimize_for_inference(small(), "fp32").to("meta"), [], []
    monkeypatch.setattr(Engine, "_fold", lambda self, device: folded.append(device))
    monkeypatch.setattr(
        "dinov2_fast.inference.engine.layouts_for",
        lambda plan, device, gated: asked.append(device) or {plan.dtype: LinearLayout(False, True)},
    )
    engine(torch.zeros(1, 3, 28, 28, device="meta"))
    engine(torch.zeros(1, 3, 28, 28, device="meta"))
    assert asked == folded == [torch.device("meta")]


# CLS only


@torch.no_grad()
def test_the_last_block_runs_for_cls_alone_only_where_nothing_else_is_returned() -> None:
    model, x = small(num_register_tokens=2), torch.randn(2, 3, 56, 70)
    auto, cls, full = (optimize_for_inference(model, "fp32", outputs=kind) for kind in ("auto", "cls", "all"))
    depth = len(model.blocks)
    for engine, blocks in ((auto, depth - 1), (cls, depth - 1), (full, depth)):
        assert blocks_in_full(engine, lambda m: m(x)) == blocks
        torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)
        for call in (
            lambda m: m(x, is_training=True),
            lambda m: m.forward_features(x),
            lambda m: m.get_intermediate_layers(x),
            lambda m: m.forward_features([x]),
        ):
            assert blocks_in_full(engine, call) == depth
            torch.testing.assert_close(call(engine), call(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_head_gets_the_cls_token() -> None:
    model, x = small(), torch.randn(2, 3, 56, 70)
    model.head = nn.Linear(32, 7)
    for outputs in ("auto", "all"):
        torch.testing.assert_close(
            optimize_for_inference(model, "fp32", outputs=outputs)(x), model(x), atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_outputs_cls_returns_only_the_cls_token_in_the_hugging_face_face() -> None:
    model, x = make_pair("Dinov2").ours, images(98)
    engine = optimize_for_inference(model, outputs="cls")
    assert blocks_in_full(engine, lambda m: m(x)) == 2
    output, expected = engine(pixel_values=x), model(x, output_hidden_states=True, output_attentions=True)
    assert list(output) == ["pooler_output"]
    assert output.last_hidden_state is None
    huggingface_peers.assert_close(output.pooler_output, expected.pooler_output)
    huggingface_peers.assert_close(engine(x, return_dict=False), (expected.pooler_output,))
    output = engine(x, output_hidden_states=True, output_attentions=True)
    assert list(output) == ["pooler_output", "hidden_states", "attentions"]
    for key, value in output.items():
        huggingface_peers.assert_close(value, expected[key])
    assert blocks_in_full(optimize_for_inference(model), lambda m: m(x)) == 3
    assert blocks_in_full(optimize_for_inference(model, outputs="all"), lambda m: m(x)) == 3
    for task in ("Backbone", "ForImageClassification"):
        with pytest.raises(ValueError, match="needs the tokens of all patches"):
            optimize_for_inference(make_pair("Dinov2", task).ours, outputs="cls")


# uint8 images


@torch.no_grad()
def test_uint8_images_give_what_processing_and_the_model_give() -> None:
    model = small(embed_dim=64)
    pixels = torch.randint(256, (2, 3, 56, 70), dtype=torch.uint8)
    processor = dinov2_fast.Dinov2ImageProcessor(do_resize=False, do_center_crop=False)
    processed = processor(list(pixels.numpy()), return_tensors="pt").pixel_values
    expected = model.forward_features(processed)["x_prenorm"]
    engine = optimize_for_inference(model, "fp32")
    for decoded in (pixels, pixels.permute(0, 2, 3, 1), pixels.permute(0, 2, 3, 1).contiguous()):
        torch.testing.assert_close(engine.forward_features(decoded)["x_prenorm"], expected, atol=1e-5, rtol=1e-5)
        (patches,) = engine.get_intermediate_layers(decoded, reshape=True)
        torch.testing.assert_close(patches, model.get_intermediate_layers(processed, reshape=True)[0])
        assert torch.equal(
            engine([decoded], is_training=True)[0]["x_norm_clstoken"],
            engine(pixels, is_training=True)["x_norm_clstoken"],
        )
    half = {dtype: copy.deepcopy(model).to(dtype)(processed.to(dtype)) for dtype in (torch.bfloat16, torch.float16)}
    for dtype, eager in half.items():
        engine = optimize_for_inference(
            model, str(dtype)[6] + "p16" if dtype == torch.float16 else "bf16", allow_slow=True
        )
        assert (engine(pixels).float() - model(processed)).norm() <= 1.1 * (eager.float() - model(processed)).norm()
    hub = optimize_for_inference(make_pair("Dinov2").ours)
    pixels = torch.randint(256, (1, 60, 74, 3), dtype=torch.uint8)  # cut to whole patches, as transformers does
    processed = processor(list(pixels.numpy()), return_tensors="pt").pixel_values
    huggingface_peers.assert_close(hub(pixels).last_hidden_state, hub(processed).last_hidden_state)


def test_uint8_images_are_normalised_as_by_the_processor_that_is_given() -> None:
    model, pixels = small(), torch.randint(256, (1, 3, 28, 28), dtype=torch.uint8)
    processor = dinov2_fast.Dinov2ImageProcessor(image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.25, 1.0))
    engine = optimize_for_inference(model, processor=processor)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.5, 0.25, 1.0)))
    torch.testing.assert_close(engine(pixels), model((pixels / 255 - mean) / std).detach(), atol=1e-5, rtol=1e-5)
    model.patch_embed.proj = nn.Conv2d(6, 32, 14, 14)
    engine = optimize_for_inference(model)
    x = torch.randn(1, 6, 28, 28)
    torch.testing.assert_close(engine(x), model(x).detach(), atol=1e-5, rtol=1e-5)
    assert "uint8 images: not taken" in str(engine)
    with pytest.raises(ValueError, match="uint8 images of 3 channels, and this model takes 6"):
        engine(torch.zeros(1, 6, 28, 28, dtype=torch.uint8))
    for wrong in (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.zeros(1, 3, 28, 28)):
        with pytest.raises(ValueError, match="takes 6 channels, got 3"):
            engine(wrong)


# Changes of the model


def test_the_model_is_not_changed_and_shares_no_memory() -> None:
    model = make_pair("Dinov2WithRegisters", "ForImageClassification").ours
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    engine = optimize_for_inference(model)
    for buffer in engine.buffers():
        buffer.fill_(7)
    engine.config.problem_type = "regression"
    assert model.config.problem_type is None
    assert list(engine.parameters()) == []
    assert {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])} == set()


def _optimizer_step(kind: type[torch.optim.Optimizer], **settings: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model(torch.randn(1, 3, 28, 28)).sum().backward()
        kind(model.parameters(), lr=1e-2, **settings).step()

    return change


def _write_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.blocks[1].mlp.fc2.bias.add_(1)


def _double_heads(model: Any) -> None:
    for block in model.blocks:
        block.attn.num_heads *= 2


CHANGES = {
    "optimizer": _optimizer_step(torch.optim.SGD),
    "fused AdamW": _optimizer_step(torch.optim.AdamW, fused=True),
    "fused SGD": _optimizer_step(torch.optim.SGD, fused=True),
    "fused Adagrad": _optimizer_step(torch.optim.Adagrad, fused=True),
    "load_state_dict": lambda m: m.load_state_dict(small().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(small().state_dict(), assign=True),
    "in inference mode": _write_in_inference_mode,
    "a parameter": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.full((32,), 2.0))),
    "a module": lambda m: m.blocks.__setitem__(1, small().blocks[1]),
    "dtype": lambda m: m.to(torch.bfloat16).float(),
    "a new head": lambda m: setattr(m, "head", nn.Linear(32, 3)),
    "one more block": lambda m: m.blocks.append(small().blocks[0]),
    "position interpolation": lambda m: setattr(m, "position_interpolation", "antialias"),
    "eps": lambda m: setattr(m.blocks[0].norm1, "eps", 0.1),
    "heads": _double_heads,
    "positions of its own": lambda m: setattr(m, "interpolate_pos_encoding", lambda x, w, h: torch.zeros(1, 1, 32)),
}


@pytest.fixture(params=[False, True], ids=["check first", "run first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the check before the call, as on a CPU, and after it, as on a GPU."""
    monkeypatch.setattr(weight_watch, "is_asynchronous", lambda device: request.param)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_engine_follows_its_model(change: Any) -> None:
    model, x = small(), torch.randn(1, 3, 56, 56)
    engine = optimize_for_inference(model)
    folded, before = engine.folded, engine(x)
    assert engine.folded is folded, "folded again though nothing had changed"
    change(model)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), atol=1e-5, rtol=1e-5)
    assert before.shape != engine(x).shape or not torch.equal(before, engine(x))


def _stays(name: str) -> Callable[[Any], None]:
    """Replaces the method `name` on the instance, as users do to change what it returns."""
    return lambda m: setattr(m, name, MethodType(lambda self, *args: getattr(type(self), name)(self, *args), m))


EDITS = {
    "padding": (lambda m: setattr(m.patch_embed.proj, "padding", (1, 1)), "needs .* square patch without padding"),
    "a method": (_stays("prepare_tokens_with_masks"), "the model has its own prepare_tokens_with_masks"),
    "a block's method": (lambda m: _stays("project_qkv")(m.blocks[1].attn), "blocks.1.attn has its own project_qkv"),
    "a hook": (lambda m: m.blocks[1].mlp.register_forward_hook(lambda *args: None), "blocks.1.mlp has a hook"),
    "a hook before": (lambda m: m.norm.register_forward_pre_hook(lambda *args: None), "norm has a hook"),
    "a class": (lambda m: setattr(m.blocks[0].mlp.act, "__class__", nn.SiLU), "blocks.0.mlp.act is a SiLU"),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=EDITS)
def test_what_an_engine_cannot_compute_is_refused_before_and_after(edit: Any, reason: str) -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model)
    edit(model)
    with pytest.raises(TypeError, match=reason):
        optimize_for_inference(model)
    for _ in range(2):
        with pytest.raises(TypeError, match=reason):
            engine(x)


def test_a_model_on_the_meta_device_is_refused_and_an_engine_there_runs() -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model)
    assert copy.deepcopy(engine).to("meta")(x.to("meta")).shape == (1, 32)
    model.to("meta")
    for call in (lambda: optimize_for_inference(model), lambda: engine(x)):
        with pytest.raises(TypeError, match=r"cls_token is on the meta device, .* load the weights first"):
            call()


@torch.no_grad()
def test_loading_a_model_s_state_dict_into_an_engine_is_refused() -> None:
    model, other, x = small(), small(), torch.randn(1, 3, 42, 56)
    engine, expected = optimize_for_inference(model), optimize_for_inference(other)
    with pytest.raises(RuntimeError, match="load them into the model, which the engine follows"):
        engine.load_state_dict(other.state_dict())
    engine(x)  # caches position embeddings
    engine.load_state_dict(expected.state_dict())
    assert torch.equal(engine(x), expected(x))


def test_an_engine_follows_the_configuration() -> None:
    model, x = make_pair("Dinov2", "Backbone").ours, torch.randn(1, 3, 28, 42)
    engine = optimize_for_inference(model)
    engine(x)
    model.config.apply_layernorm = False
    model.out_features = ["stage1", "stage2"]
    with torch.no_grad():
        for ours, expected in zip(engine(x).feature_maps, model(x).feature_maps, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_class_that_was_patched_is_followed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model)
    engine(x)
    positions = DinoVisionTransformer.interpolate_pos_encoding
    doubled = lambda self, *args: 2 * positions(self, *args)  # noqa: E731
    monkeypatch.setattr(DinoVisionTransformer, "interpolate_pos_encoding", doubled)
    torch.testing.assert_close(engine(x), model(x).detach(), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: torch.zeros_like(x))
    with pytest.raises(TypeError, match=r"differ from the model's by [0-9.]+ of their norm, and rounding explains"):
        engine(x)


def test_a_model_beyond_the_range_of_a_precision_is_refused() -> None:
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e8)
    optimize_for_inference(model, "fp32")
    with pytest.raises(TypeError, match="values are beyond the range of the precision"):
        optimize_for_inference(model, "fp16", allow_slow=True)


def test_hooks_that_an_engine_would_not_run_are_refused() -> None:
    engine = optimize_for_inference(small())
    for name in ("patch_embed", "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp", "blocks.1.norm2"):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            with pytest.raises(TypeError, match="would not run in every call: register it on the model"):
                getattr(engine.get_submodule(f"folded.{name}"), register)(lambda *args: None)


def test_changes_that_an_engine_does_not_notice_need_refresh() -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model)
    model.position_interpolation = "antialias"
    before = engine(x)
    model.norm.bias.data.add_(1)
    assert torch.equal(engine(x), before)
    engine.refresh()
    torch.testing.assert_close(engine(x), model(x).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        AttributeError, match="position_interpolation belongs to the model: set it there and call refresh"
    ):
        engine.position_interpolation = "size"
    assert engine.position_interpolation == "antialias"
    assert (engine.embed_dim, engine.patch_size, engine.patch_embed.num_patches) == (32, 14, 25)


@torch.no_grad()
def test_an_engine_that_does_not_follow_its_model_changes_by_refresh_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), torch.randn(1, 3, 56, 56)
    with monkeypatch.context() as patched:
        patched.delattr("dinov2_fast.inference.engine.WeightWatch")  # it uses none
        engine = optimize_for_inference(model, "fp32", follow_weights=False)
        assert "changes of the model: not noticed: call refresh()" in str(engine)
        engines = [engine, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))]
        before = engine(x)
        for each in engines:
            each._model.norm.bias.add_(1)
            each._model.position_interpolation = "antialias"
            assert torch.equal(each(x), before)
            each.refresh()
            torch.testing.assert_close(each(x), each._model(x), atol=1e-5, rtol=1e-5)
            assert not torch.equal(each(x), before)
    assert "changes of the model: noticed at the next call" in str(optimize_for_inference(model))


@pytest.mark.parametrize("made", ["deepcopy", "pickle", "pickle of both"])
def test_copies_compute_the_same_and_follow_their_own_model(made: str) -> None:
    model, x = small(num_register_tokens=2), torch.randn(1, 3, 56, 70)
    engine = optimize_for_inference(model)
    expected = engine(x)
    if made == "deepcopy":
        other = copy.deepcopy(engine)
    elif made == "pickle":
        other = pickle.loads(pickle.dumps(engine))
    else:
        own_model, other = pickle.loads(pickle.dumps((model, engine)))
        assert other.model is own_model
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert torch.equal(other(x), expected)
    assert not torch.equal(engine(x), expected)
    with torch.no_grad():
        other.model.norm.bias.add_(1)
    assert torch.equal(other(x), engine(x))
    model.train()
    assert torch.equal(copy.deepcopy(engine)(x), engine(x))


def test_a_module_that_contains_an_engine_compiles() -> None:
    torch._dynamo.reset()
    model, x = small(num_register_tokens=2), torch.randn(2, 3, 42, 56)
    engine = optimize_for_inference(model)
    whole = nn.Sequential(engine, nn.Linear(32, 3)).requires_grad_(False)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), whole(x), atol=1e-5, rtol=1e-5)
    features = torch.compile(engine.forward_features, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(features["x_prenorm"], engine.forward_features(x)["x_prenorm"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.norm.bias.add_(1)
    engine.refresh()
    torch.testing.assert_close(compiled(x), whole(x), atol=1e-5, rtol=1e-5)


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model)
    with torch.inference_mode():
        first = engine(x)
        in_inference_mode = optimize_for_inference(model)
        model.norm.bias.add_(1)
        second = engine(x)  # folds again
    assert not any(buffer.is_inference() for buffer in in_inference_mode.buffers()), "could not be written later"
    with torch.no_grad():
        assert torch.equal(engine(x), second)
        assert torch.equal(in_inference_mode(x), second)
    assert torch.equal(engine(x), second)
    assert not torch.equal(first, second)
    head = nn.Linear(32, 1)
    head(engine(x)).sum().backward()  # the engine's features can train a head
    assert head.weight.grad is not None


@torch.no_grad()
def test_outputs_are_the_caller_s_to_keep_and_to_change() -> None:
    model, x = make_pair("Dinov2").ours, images(98)
    engine = optimize_for_inference(model)
    output = engine(x, output_hidden_states=True)
    kept = [state.clone() for state in output.hidden_states]
    again = engine(x, output_hidden_states=True)
    for state, copied, other in zip(output.hidden_states, kept, again.hidden_states, strict=True):
        assert torch.equal(state, copied)
        state.zero_()
        assert torch.equal(other, copied)
    assert torch.equal(engine(x).last_hidden_state, again.last_hidden_state)


@torch.no_grad()
def test_autocast_changes_nothing() -> None:
    model, x = small(), torch.randn(1, 3, 42, 56)
    engine = optimize_for_inference(model.to(DEVICE), "fp32")
    x = x.to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = engine(x)
    assert torch.equal(out, engine(x))


def test_training_is_refused() -> None:
    model, x = small(), torch.randn(1, 3, 28, 28)
    engine = optimize_for_inference(model)
    with pytest.raises(RuntimeError, match=r"cannot be trained\. Train the model it was made from"):
        engine.train()
    assert engine.eval() is engine
    assert not any(module.training for module in engine.modules())
    with pytest.raises(RuntimeError, match="computes no gradients, but an input requires one"):
        engine(x.requires_grad_())
    with torch.no_grad():
        engine(x)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            torch.func.jvp(engine, (x.detach(),), (x.detach(),))
    with pytest.raises(
        TypeError, match=r"precision is set when it is made: use optimize_for_inference\(precision=...\)"
    ):
        engine.half()
    assert engine.to(DEVICE) is engine
    with pytest.raises(ValueError, match=r"is in training mode, .* call model\.eval"):
        optimize_for_inference(model.train())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "bf15"}, "no precision 'bf15'; choose one of auto, bf16, fp16, fp32"),
        ({"outputs": "patches"}, "no outputs 'patches'; choose one of auto, cls, all"),
        ({"residual_dtype": "bf16"}, "no residual_dtype 'bf16'; choose 'fp32', or None for the dtype of the precision"),
        ({"residual_dtype": torch.float64}, "no residual_dtype torch.float64"),
    ],
)
def test_settings_that_do_not_exist_get_a_clear_error(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(small(), **kwargs)


def test_the_residual_dtype_is_a_name_or_a_dtype_of_torch() -> None:
    model = small()
    plans = [
        optimize_for_inference(model, "bf16", residual_dtype=given, allow_slow=True).plan
        for given in (None, "fp32", torch.float32)
    ]
    assert [plan.residual_dtype for plan in plans] == [torch.bfloat16, torch.float32, torch.float32]


def test_options_are_keyword_only_and_the_processor_is_one_of_ours() -> None:
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        optimize_for_inference(small(), "fp32", "all")  # type: ignore[misc]
    with pytest.raises(TypeError, match="processor must be a Dinov2ImageProcessor, got a tuple"):
        optimize_for_inference(small(), processor=(0.5, 0.5, 0.5))  # type: ignore[arg-type]


def test_half_precisions_are_refused_where_the_processor_makes_them_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"no instructions for products in {precision}.* allow_slow=True"):
            optimize_for_inference(model, precision)
        assert optimize_for_inference(model, precision, allow_slow=True).plan.dtype != torch.float32
    assert optimize_for_inference(model).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert optimize_for_inference(model, "bf16").dtype == torch.bfloat16


def test_print_says_what_the_engine_does() -> None:
    text = str(optimize_for_inference(small(ffn_layer="swiglu"), "bf16", residual_dtype="fp32", allow_slow=True))
    for part in (
        "Engine of a DinoVisionTransformer: 3 blocks of 32 channels",
        "weights: bf16, folded in fp64 from fp32 and rounded once",
        "LayerScale into proj and w3",
        "uint8 images: normalised in the patch embedding",
        "residual stream: fp32",
        "last block: computed for the CLS token alone where nothing else is returned (outputs='auto')",
        "linear (none, swiglu, residual) ",
        "attention_pool ",
    ):
        assert part in text
    for task in ("ForImageClassification", "Model", "Backbone"):
        text = str(optimize_for_inference(make_pair("Dinov2", task).ours))
        assert f"Engine of a Dinov2{task}: 3 blocks of 128 channels" in text
        assert "last block: computed in full" in text
        assert "linear (none, gelu, residual) " in text
        assert "attention_pool" not in text
