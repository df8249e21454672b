"""`optimize_for_inference` of timm's face: the outputs of timm's own model, live, in every form; what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import Dinov2ImageProcessor, create_model, optimize_for_inference
from tests.helpers.engines import blocks_in_full, with_graphs
from tests.helpers.timm_peers import NAMES, SMALL, Pair, assert_close, images, make_pair

CALLS = {
    "forward": lambda m, x: m(x),
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_head": lambda m, x: m.forward_head(m.forward_features(x)),
    "pre_logits": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "intermediates": lambda m, x: m.forward_intermediates(x),
    "intermediates, early": lambda m, x: m.forward_intermediates(
        x, [1, -2], stop_early=True, norm=True, output_fmt="NLC", return_prefix_tokens=True
    ),
    "intermediates, dictionary": lambda m, x: m.forward_intermediates(x, indices=2, output_dict=True),
    "layers": lambda m, x: m.get_intermediate_layers(x, 2, reshape=True, return_prefix_tokens=True),
}


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, num_classes=5)


@torch.no_grad()
def test_every_call_equals_timm(pair: Pair) -> None:
    engine = optimize_for_inference(pair.ours, "fp32")
    for size in ((70, 98), (28, 42)):
        for call in CALLS.values():
            assert_close(call(engine, images(*size)), call(pair.theirs, images(*size)))


@pytest.mark.parametrize("fc_norm", [None, False, True])
@pytest.mark.parametrize("global_pool", ["", "token", "avg", "avgmax", "max"])
@torch.no_grad()
def test_pools_equal_those_of_the_model(global_pool: str, fc_norm: bool | None) -> None:
    pair = make_pair(NAMES[1], global_pool=global_pool, fc_norm=fc_norm, num_classes=5)
    x = images(28, 42)
    for outputs in ("auto", "all", *(["cls"] if global_pool == "token" else [])):
        engine = optimize_for_inference(pair.ours, "fp32", outputs=outputs)
        assert_close(engine(x), pair.theirs(x))
        assert_close(engine.forward_features(x), pair.theirs.forward_features(x))
        alone = global_pool == "token" and outputs != "all"
        assert blocks_in_full(engine, lambda m: m(x)) == (3 if alone else 4)
        assert blocks_in_full(engine, lambda m: m.forward_features(x)) == 4
    if global_pool != "token":
        with pytest.raises(ValueError, match="needs the tokens of all patches: outputs='cls' is not for it"):
            optimize_for_inference(pair.ours, outputs="cls")


@pytest.mark.parametrize("residual_dtype", [None, "fp32"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
@torch.no_grad()
def test_half_precision_differs_as_little_as_it_allows(global_pool: str, residual_dtype: str | None) -> None:
    """No worse than the model in that dtype, which rounds more often; the norm behind the pool is in it, too."""
    model, x = make_pair(NAMES[1], global_pool=global_pool, num_classes=5).ours, images(70, 98)
    exact = copy.deepcopy(model).double()(x.double())
    engine = optimize_for_inference(model, "bf16", residual_dtype=residual_dtype, allow_slow=True)
    plain = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert engine(x).dtype == torch.bfloat16
    # of ten outputs; on some CPUs chance adds a seventh
    assert (engine(x) - exact).norm() <= 1.25 * (plain - exact).norm()


@torch.no_grad()
def test_an_engine_follows_set_input_size() -> None:
    pair, x = make_pair(NAMES[1]), images(70, 98)
    engine = optimize_for_inference(pair.ours)
    assert_close(engine(x), pair.theirs(x))
    for model in pair:
        model.set_input_size((56, 28))
    for size in ((70, 98), (56, 28)):
        assert_close(engine(images(*size)), pair.theirs(images(*size)))


@torch.no_grad()
def test_a_feature_getter_takes_an_engine() -> None:
    features = create_model(NAMES[1], **SMALL, features_only=True, out_indices=(0, -2)).eval()
    x = images(42, 56)
    expected = features(x)
    features.model = optimize_for_inference(features.model)
    assert blocks_in_full(features, lambda m: assert_close(m(x), expected)) == 3
    assert features.feature_info.channels() == [128, 128]


@torch.no_grad()
def test_an_engine_takes_images_of_bytes() -> None:
    model = create_model(NAMES[0], **SMALL, dynamic_img_pad=True).eval()
    engine = optimize_for_inference(model, "fp32")
    pixels = torch.randint(256, (2, 42, 28, 3), dtype=torch.uint8)
    processor = Dinov2ImageProcessor(do_resize=False, do_center_crop=False)
    processed = processor(list(pixels.numpy()), return_tensors="pt").pixel_values
    assert_close(engine(pixels), model(processed))
    assert_close(engine.forward_intermediates(pixels), model.forward_intermediates(processed))
    x = images(31, 57)
    assert_close(engine(x), model(x))
    assert_close(engine.forward_intermediates(x), model.forward_intermediates(x))
    with pytest.raises(ValueError, match=r"uint8 images of \(42, 27\) pixels cannot be padded to multiples of 14"):
        engine(pixels[:, :, :27])
    with pytest.raises(TypeError, match="takes a tensor"):
        engine([x])


@torch.no_grad()
def test_lists_reports_and_print_work(pair: Pair) -> None:
    engine, x = optimize_for_inference(pair.ours, "fp32"), images(28, 42, batch=4)
    first = engine.cls_tokens([x, x[:1, :, :14]])[0]
    assert_close(first, pair.theirs.forward_features(x)[:, 0])
    assert engine.report(x).rows[-1].cls_worst > 0.99
    text = str(engine)
    assert "Engine of a TimmVisionTransformer: 4 blocks of 128 channels" in text
    assert "last block: computed for the CLS token alone where nothing else is returned" in text
    averaging = create_model(NAMES[0], **SMALL, global_pool="avg").eval()
    assert "last block: computed in full" in str(optimize_for_inference(averaging))


@torch.no_grad()
def test_an_engine_follows_changes_of_its_model() -> None:
    pair, x = make_pair(num_classes=5), images(28, 42)
    engine = optimize_for_inference(pair.ours)
    for changed in (engine, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        changed._model.reset_classifier(3)
        assert changed(x).shape == (2, 3)
        assert_close(changed(x), changed._model(x))
        changed._model.prune_intermediate_layers(2, prune_head=False)
        changed._model.blocks.pop(0)
        assert_close(changed.forward_intermediates(x), changed._model.forward_intermediates(x))
    for method in ("reset_classifier", "set_input_size", "prune_intermediate_layers"):
        with pytest.raises(AttributeError, match="This method changes the model: call it on the model"):
            getattr(engine, method)(2)
    for wrong in ({"is_causal": True}, {"attn_mask": torch.ones(7, 7)}):
        with pytest.raises(ValueError, match="every token attends to all"):
            engine(x, **wrong)


def test_other_faces_have_no_intermediates_of_timms() -> None:
    from tests.helpers.small_models import small

    for method in ("forward_intermediates", "forward_head"):
        with pytest.raises(AttributeError, match=f"no attribute '{method}'"):
            getattr(optimize_for_inference(small().eval()), method)(images(28, 28))


@torch.no_grad()
def test_it_compiles_and_runs_as_cuda_graphs(pair: Pair) -> None:
    torch._dynamo.reset()
    engine, x = optimize_for_inference(pair.ours, "fp32"), images(28, 42)
    assert_close(torch.compile(engine, fullgraph=True, backend="eager")(x), engine(x))
    captured, fake = with_graphs(pair.ours)
    for name in ("forward", "forward_features", "intermediates", "layers"):
        before = fake.count("capture")
        call: Any = CALLS[name]
        results: list[Any] = [call(captured, image) for image in (x, x + 1)]
        assert fake.count("capture") == before + 1, name
        for result, image in zip(results, (x, x + 1), strict=True):
            assert_close(result, call(engine, image))


def test_gradients_are_refused() -> None:
    engine = optimize_for_inference(create_model(NAMES[0], **SMALL).eval())
    x: Tensor = images(28, 28).requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        engine.forward_intermediates(x)
