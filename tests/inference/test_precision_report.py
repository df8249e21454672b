"""`Engine.report` against cosines and neighbours that are computed here from the outputs of the models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference.precision_report import PrecisionReport, same_neighbours
from tests.helpers.huggingface_peers import images, make_pair
from tests.helpers.small_models import small, wild, with_biases


def _cosines(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    a, b = found.double(), wanted.double()
    cosine = (a * b).sum(-1) / (a * a).sum(-1).sqrt() / (b * b).sum(-1).sqrt()
    return cosine.mean().item(), cosine.min().item()


def _nearest(cls: Tensor) -> list[int]:
    unit = cls.double() / cls.double().norm(dim=1, keepdim=True)
    return [
        max((j for j in range(len(unit)) if j != i), key=lambda j: float(unit[i] @ unit[j])) for i in range(len(unit))
    ]


def _agreement(found: Tensor, wanted: Tensor) -> float:
    pairs = list(zip(_nearest(found), _nearest(wanted), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8"])
@torch.no_grad()
def test_rows_follow_from_the_outputs_of_the_models(precision: str) -> None:
    model, x = wild({"num_register_tokens": 2}, depth=3), torch.randn(9, 3, 42, 56)
    engine = optimize_for_inference(model, precision, allow_slow=True)
    engines = {precision: engine, "bf16": optimize_for_inference(model, "bf16", allow_slow=True)}
    report = engine.report([x[:4], x[4:]])
    assert report.images == 9
    assert len(report.rows) == 4 * len(engines)
    every = {"n": 3, "return_class_token": True}
    wanted = model.get_intermediate_layers(x, **every)
    for name, other in engines.items():
        rows = {row.layer: row for row in report.rows if row.precision == name}
        assert list(rows) == ["block 0", "block 1", "block 2", "final"]
        layers = [*other.get_intermediate_layers(x, **every)]
        layers.append((layers[-1][0], other(x)))  # its last block ran for CLS alone
        for row, (patches, cls), (exact, exact_cls) in zip(rows.values(), layers, [*wanted, wanted[-1]], strict=True):
            assert (row.cls_mean, row.cls_worst) == pytest.approx(_cosines(cls, exact_cls), abs=2e-4)
            assert (row.patch_mean, row.patch_worst) == pytest.approx(_cosines(patches, exact), abs=2e-4)
            assert row.neighbours == pytest.approx(_agreement(cls, exact_cls))
    worst = {row.precision: row.patch_worst for row in report.rows if row.layer == "final"}
    assert (worst[precision] < worst["bf16"]) == (precision == "fp8")


@torch.no_grad()
def test_a_hugging_face_model_runs_no_block_for_the_cls_token_alone() -> None:
    model, x = make_pair("Dinov2").ours, images(60, 74)
    decoded = torch.randint(256, (3, 42, 56, 3), dtype=torch.uint8)
    engine = optimize_for_inference(model, "fp8", allow_slow=True)
    rows = engine.report([x, decoded]).rows
    assert [row.precision for row in rows] == ["fp8", "bf16"] * 4
    assert all(0.98 < row.patch_worst <= row.patch_mean <= 1 for row in rows)
    *_, last, _, final, _ = engine.report(x).rows
    assert (final.layer, final.precision) == ("final", "fp8")
    assert (final.cls_mean, final.cls_worst) == (last.cls_mean, last.cls_worst)  # no block runs for CLS alone
    wanted = model(x).pooler_output
    assert (final.cls_mean, final.cls_worst) == pytest.approx(_cosines(engine(x).pooler_output, wanted), abs=2e-4)
    classifier = make_pair("Dinov2", "ForImageClassification").ours
    assert len(optimize_for_inference(classifier, "bf16", allow_slow=True).report(x).rows) == 4


@torch.no_grad()
def test_a_report_follows_the_model_and_does_not_change_the_engine() -> None:
    model, x = small(), torch.randn(4, 3, 28, 42)
    engine = optimize_for_inference(model, "fp32")
    expected = engine.forward_features(x)["x_prenorm"]
    assert all(row.cls_worst > 0.99999 for row in engine.report(x).rows if row.precision == "fp32")
    assert torch.equal(engine.forward_features(x)["x_prenorm"], expected)
    model.norm = nn.Identity()  # so that features are the stream, which the next block overwrites
    rows = engine.report(x).rows
    assert all(row.cls_worst > 0.99999 for row in rows if row.precision == "fp32")
    wanted, found = (
        [cls for _, cls in m.get_intermediate_layers(x, n=3, return_class_token=True)]
        for m in (model, optimize_for_inference(model, "bf16", allow_slow=True))
    )
    for row, a, b in zip((row for row in rows if row.precision == "bf16"), found, wanted, strict=False):
        assert row.cls_mean == pytest.approx(_cosines(a, b)[0], abs=1e-4)


@torch.no_grad()
def test_a_report_follows_the_setting_of_backends() -> None:
    model, x = with_biases(small()), torch.randn(3, 3, 28, 42)
    engine = optimize_for_inference(model, "fp32")
    with use_backend("linear.residual=cublas", strict=True):  # takes no bias, so the weights are folded again
        assert all(row.cls_worst > 0.99999 for row in engine.report(x).rows if row.precision == "fp32")
    assert engine.blocks[0].deferred.end is not None


def test_neighbours_that_are_equally_near_agree() -> None:
    exact = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1e-9], [0.0, 1.0], [0.1, 1.0]])
    assert same_neighbours(exact, exact) == 1
    tied = exact + 1e-5 * torch.arange(5)[:, None] * torch.tensor([0.0, 1.0])
    assert same_neighbours(tied, exact) == 1
    changed = exact.clone()
    changed[3] = torch.tensor([1.0, -0.01])  # now nearest to the first three in place of the last
    assert same_neighbours(changed, exact) == pytest.approx(3 / 5)
    assert math.isnan(same_neighbours(exact[:2], exact[:2]))


def test_a_report_prints_as_a_table() -> None:
    model = small(depth=2)
    report = optimize_for_inference(model, "fp32").report(torch.randn(3, 3, 28, 28))
    lines = str(report).splitlines()
    assert lines[0] == "Cosine to the features in fp32 (same neighbour: of the CLS tokens of 3 images)"
    assert lines[1].split("  ")[0] == "layer"
    assert len(lines) == 2 + 6
    assert lines[2].split() == ["block", "0", "fp32", "1.00000", "1.00000", "1.00000", "1.00000", "100.0%"]
    assert len({len(line) for line in lines[1:]}) == 1  # columns are aligned
    two = optimize_for_inference(model, "fp32").report(torch.randn(2, 3, 28, 28))
    assert str(two).splitlines()[-1].endswith(" -")


def test_values_that_are_not_finite_show_in_the_report() -> None:
    model, x = small(), torch.randn(4, 3, 28, 28)
    x[1] = math.nan
    final = optimize_for_inference(model, "fp32").report(list(x)).rows[-2]
    assert math.isnan(final.patch_worst)
    assert math.isnan(final.cls_worst)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "report needs at least one image"),
        ([torch.zeros(0, 3, 28, 28)], ValueError, "report needs at least one image"),
        ([[1, 2]], TypeError, "images must be one or more tensors, got list"),
        (torch.zeros(2, 3, 28, 29), ValueError, "width 29 is not a multiple"),
    ],
)
def test_wrong_images_get_a_clear_error(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize_for_inference(small(), "fp32").report(given)


def test_a_single_image_is_enough() -> None:
    report = optimize_for_inference(small(), "fp32").report(torch.randn(3, 28, 28))
    assert isinstance(report, PrecisionReport)
    assert report.images == 1
