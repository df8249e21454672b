"""Lists of images of different sizes: the features of each image alone, in few steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference.block import FoldedAttention
from dinov2_fast.inference.packing import ImageRange, split_into_runs
from tests.helpers.devices import DEVICE, poisoned_memory, runs_triton
from tests.helpers.engines import blocks_in_full
from tests.helpers.huggingface_peers import make_pair
from tests.helpers.small_models import KINDS_OF_MODEL, small, wild
from tests.reference import assert_obeys_rule

TOKENS = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")
BUDGETS = [None, 1, 40, 75]  # the images below have 7 to 36 tokens


def _images() -> list[Tensor]:
    """Batches and single images; sizes return, some differ only in height and width, one batch is empty."""
    shapes = [(2, 3, 28, 42), (3, 70, 98), (1, 3, 42, 28), (3, 3, 28, 42), (0, 3, 14, 28), (3, 28, 42), (1, 3, 56, 56)]
    return [torch.randn(shape) for shape in shapes]


def _alone(model: Any, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
    return model.forward_features(x[None] if x.ndim == 3 else x, masks)


def _close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize("kind", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
@torch.no_grad()
def test_a_list_gives_what_the_model_gives_for_each_entry(kind: dict[str, Any], max_tokens: int | None) -> None:
    model, images = small(**kind), _images()
    engine = optimize_for_inference(model, "fp32", max_tokens=max_tokens)
    masks = [torch.rand(2, 6) < 0.5, None, None, torch.rand(3, 6) < 0.5, None, None, torch.rand(1, 16) < 0.5]
    for given in (None, masks):
        expected = [_alone(model, x, mask) for x, mask in zip(images, given or [None] * 7, strict=True)]
        for found in (engine.forward_features(images, given), engine(images, masks=given, is_training=True)):
            _close(found, expected)
            assert all(features["masks"] is mask for features, mask in zip(found, given or [None] * 7, strict=True))
    cls_tokens = engine.cls_tokens(images)
    _close(cls_tokens, [_alone(model, x)["x_norm_clstoken"] for x in images])
    assert [len(x) for x in cls_tokens] == [2, 1, 1, 3, 0, 1, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_neither_lists_nor_max_tokens_make_errors_larger(precision: str) -> None:
    torch.manual_seed(0)
    model, images = wild({"num_register_tokens": 2}), _images()
    exact = [_alone(copy.deepcopy(model).double(), x.double()) for x in images]
    alone = [_alone(optimize_for_inference(model, precision, allow_slow=True), x) for x in images]
    for max_tokens in BUDGETS:
        engine = optimize_for_inference(model, precision, allow_slow=True, max_tokens=max_tokens)
        together = engine.forward_features(images)
        for key in TOKENS:
            assert_obeys_rule(*(torch.cat([x[key].flatten() for x in parts]) for parts in (together, exact, alone)))
        exact_cls, cls_alone = (torch.cat([x["x_norm_clstoken"] for x in parts]) for parts in (exact, alone))
        assert_obeys_rule(torch.cat(engine.cls_tokens(images)), exact_cls, cls_alone)


@runs_triton
@torch.no_grad()
def test_the_kernels_compute_the_same() -> None:
    model = wild({"num_register_tokens": 2}, num_heads=2, depth=2).to(DEVICE)
    images = [torch.randn(shape).to(DEVICE) for shape in ((3, 14, 28), (2, 3, 14, 14), (3, 14, 28))]
    engine = optimize_for_inference(model, "fp32", max_tokens=14)  # of 5, 4, 4 and 5 tokens: two runs
    found = {}
    for backend in ("torch", "triton"):
        with use_backend(backend, strict=True):
            engine.refresh()  # needs real memory
            with poisoned_memory():
                found[backend] = engine.forward_features(images), engine.cls_tokens(images)
    torch.testing.assert_close(found["triton"], found["torch"], atol=1e-4, rtol=1e-4)


# How it runs


def _attention_calls(call: Any) -> list[tuple[int, ...]]:
    """The lengths of the sequences of each call of attention; negative where they ran as a batch."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        attend = FoldedAttention.attend

        def noting(part: FoldedAttention, qkv: Tensor, seq_lens: tuple[int, ...] | None) -> Tensor:
            calls.append((-qkv.shape[1],) * len(qkv) if seq_lens is None else seq_lens)
            return attend(part, qkv, seq_lens)

        patch.setattr(FoldedAttention, "attend", noting)
        call()
    return calls


@torch.no_grad()
def test_images_of_one_size_are_a_batch_and_sequences_of_one_length_neighbours() -> None:
    engine = optimize_for_inference(small(depth=1), "fp32")
    images = _images()
    assert _attention_calls(lambda: engine.forward_features(images)) == [(7,) * 7 + (17, 36)]
    same = [images[0], images[5], images[3]]
    assert _attention_calls(lambda: engine.forward_features(same)) == [(-7,) * 6]
    packed = optimize_for_inference(small(depth=1), "fp32", max_tokens=40)
    assert _attention_calls(lambda: packed.forward_features(images)) == [(-7, -7), (-36,), (7,) * 5, (-17,)]


@torch.no_grad()
def test_cls_tokens_computes_the_last_block_for_cls_alone() -> None:
    images = _images()
    for model, depth in ((small(), 3), (make_pair("Dinov2").ours, 3)):
        for outputs, blocks in (("auto", depth - 1), ("cls", depth - 1), ("all", depth)):
            engine = optimize_for_inference(model, "fp32", outputs=outputs)
            assert blocks_in_full(engine, lambda m: m.cls_tokens(images)) == blocks
            expected = [features["x_norm_clstoken"] for features in engine.forward_features(images)]
            _close(engine.cls_tokens(images), expected)


@pytest.mark.parametrize(
    ("batches", "seq_lens", "max_tokens", "runs"),
    [
        ([2, 1], [5, 9], None, [[(0, 0, 2), (1, 0, 1)]]),
        ([2, 1], [5, 9], 19, [[(0, 0, 2), (1, 0, 1)]]),
        ([2, 1], [5, 9], 18, [[(0, 0, 2)], [(1, 0, 1)]]),
        ([5, 1], [5, 3], 13, [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, 5), (1, 0, 1)]]),
        ([1, 2, 1], [5, 9, 2], 8, [[(0, 0, 1)], [(1, 0, 1)], [(1, 1, 2)], [(2, 0, 1)]]),
        ([1, 0, 1], [5, 9, 5], 10, [[(0, 0, 1), (1, 0, 0), (2, 0, 1)]]),
        ([0], [5], 1, [[(0, 0, 0)]]),
    ],
)
def test_runs_take_what_fits_in_order(
    batches: list[int], seq_lens: list[int], max_tokens: int | None, runs: list[list[tuple[int, int, int]]]
) -> None:
    assert split_into_runs(batches, seq_lens, max_tokens) == [[ImageRange(*chosen) for chosen in run] for run in runs]


# Inputs


@torch.no_grad()
def test_uint8_and_floating_images_in_one_list() -> None:
    engine = optimize_for_inference(small(), "fp32")
    decoded = torch.randint(256, (2, 28, 42, 3), dtype=torch.uint8)
    images = [
        decoded,
        torch.randn(2, 3, 28, 42),
        decoded[0],
        decoded[1].permute(2, 0, 1),
        torch.randn(3, 28, 42).half(),
    ]
    expected = [engine.forward_features(x)["x_norm_clstoken"] for x in (decoded, images[1], decoded[:1], decoded[1:])]
    expected.append(engine.forward_features(images[4].float()[None])["x_norm_clstoken"])
    _close(engine.cls_tokens(images), expected)
    _close([features["x_norm_clstoken"] for features in engine.forward_features(images)], expected)


@torch.no_grad()
def test_a_list_may_have_more_sizes_than_are_cached() -> None:
    model = small()
    engine = optimize_for_inference(model, "fp32")
    images = [torch.randn(3, 14, 14 * columns) for columns in range(1, 40)]
    for _ in range(2):
        _close(engine.cls_tokens(images), [model(x[None]) for x in images])


def test_lists_compile() -> None:
    torch._dynamo.reset()
    engine = optimize_for_inference(small(num_register_tokens=2, depth=2), "fp32")
    images = [torch.randn(2, 3, 28, 42), torch.randn(1, 3, 56, 42), torch.randn(3, 28, 42)]
    for method in (engine.cls_tokens, engine.forward_features):
        _close(torch.compile(method, fullgraph=True, backend="aot_eager")(images), method(images))


def test_an_engine_follows_its_model_for_lists_too() -> None:
    model, images = small(), _images()
    engine = optimize_for_inference(model, "fp32", max_tokens=40)
    engine.cls_tokens(images)
    with torch.no_grad():
        model.norm.weight.mul_(2)
        _close(engine.cls_tokens(images), [_alone(model, x)["x_norm_clstoken"] for x in images])
    assert copy.deepcopy(engine).plan.max_tokens == 40
    assert "lists of images: packed, up to 40 tokens at a time" in str(engine)
    assert "lists of images: packed, all at a time" in str(optimize_for_inference(model))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        engine.cls_tokens([images[0].requires_grad_()])


@pytest.mark.parametrize(
    ("images", "masks", "error", "message"),
    [
        ([], None, ValueError, "list of batches is empty"),
        (torch.zeros(1, 3, 28, 28), None, TypeError, "Got a Tensor where a list"),
        ([torch.zeros(1, 3, 28, 28), torch.zeros(28, 28)], None, ValueError, r"entry 1 has shape \(28, 28\)"),
        ([None], None, TypeError, "takes a tensor"),
        ([torch.zeros(3, 28, 30)], None, ValueError, "width 30 is not a multiple"),
        ([torch.zeros(3, 28, 28)], [], ValueError, "Got 1 batches but 0 masks"),
        ([torch.zeros(3, 28, 28)], [torch.zeros(1, 5).bool()], ValueError, r"masks must be .* \(1, 4\)"),
        ([torch.zeros(3, 28, 28)], [torch.zeros(2, 4).bool()], ValueError, r"masks must be .* \(1, 4\)"),
        ([torch.zeros(3, 28, 28)], [torch.zeros(1, 4)], TypeError, "masks must be bool"),
    ],
)
def test_bad_lists_get_a_clear_error(images: Any, masks: Any, error: type[Exception], message: str) -> None:
    engine = optimize_for_inference(small(), "fp32")
    with pytest.raises(error, match=message):
        engine.forward_features_list(images, masks)
    if masks is None:
        with pytest.raises(error, match=message):
            engine.cls_tokens(images)


def test_wrong_settings_and_calls_for_lists_get_a_clear_error() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1, or None for no limit; got 0"):
        optimize_for_inference(small(), max_tokens=0)
    with pytest.raises(TypeError, match=r"use cls_tokens, forward_features, or is_training=True"):
        optimize_for_inference(small())([torch.zeros(1, 3, 28, 28)])
    model = small()
    model.head = nn.Linear(32, 5)
    engine = optimize_for_inference(model)
    assert engine.cls_tokens([torch.zeros(3, 28, 28)])[0].shape == (1, 32), "the head is for the plain call"


@pytest.mark.parametrize("name", ["x_norm_clstoken", "x_norm_patchtokens"])
def test_features_of_a_list_can_be_written_to(name: str) -> None:
    """Autograd forbids writing in place to one of several views that an op returned together."""
    engine = optimize_for_inference(small(), "fp32")
    features = engine.forward_features([torch.randn(2, 3, 28, 42), torch.randn(1, 3, 28, 42)])[0][name]
    features += torch.zeros(features.shape[-1], requires_grad=True)
    assert features.requires_grad
