"""`dinov2-fast verify`: its verdict on two checkpoints and on other implementations, and the numbers behind it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2_fast import DinoVisionTransformer, convert_state_dict
from dinov2_fast.cli import main
from dinov2_fast.weights.architecture import plan_weights
from dinov2_fast.weights.compare import compare_features, compare_weights
from tests.helpers import checkpoints, golden

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of three images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (90, 120, 3), np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def weights_of(case: str = "facebook_mlp") -> Weights:
    return dict(golden.load_case(case)[1])


def saved(weights: Weights, path: Path) -> str:
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    return str(path)


class Runs:
    """Runs the command on two sets of weights; returns its exit code and its output."""

    def __init__(self, folder: Path, images: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.images, self.capsys = folder, images, capsys

    def __call__(self, a: Weights, b: Weights | str, *options: str, size: int = 56) -> tuple[int, str]:
        first = saved(a, self.folder / "a.safetensors")
        second = b if isinstance(b, str) else saved(b, self.folder / "b.safetensors")
        self.capsys.readouterr()
        code = main(["verify", first, second, self.images, "--size", str(size), "--device", "cpu", *options])
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err


@pytest.fixture
def runs(tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(tmp_path, images, capsys)


@pytest.mark.parametrize("layout", ["facebook", "huggingface", "huggingface_memory", "timm"])
@pytest.mark.parametrize("case", ["facebook_mlp", "facebook_reg4", "facebook_swiglu"])
def test_the_same_weights_in_another_layout_are_the_same(case: str, layout: str, runs: Runs) -> None:
    weights = weights_of(case)
    position_interpolation = () if case == "facebook_reg4" else ("--position-interpolation", "size")
    code, said = runs(weights, checkpoints.SOURCES[layout](weights), *position_interpolation)
    assert code == 0
    assert f"{len(weights) - (layout == 'timm')} tensors have the same values" in said
    assert "3 image(s) of 56 x 56, fp32, cpu" in said
    assert "The features are the same, bit for bit." in said or "the same up to rounding" in said
    assert "DIFFERENT" not in said


def test_one_tensor_that_differs_is_found(runs: Runs) -> None:
    weights = weights_of()
    changed = {**weights, "blocks.1.ls2.gamma": weights["blocks.1.ls2.gamma"] * 1.1}
    code, said = runs(weights, changed)
    assert code == 1
    assert f"1 of {len(weights)} tensors differ (blocks.1.ls2.gamma), at most by 0." in said
    assert "in blocks.1.ls2.gamma" in said
    assert "DIFFERENT: the worst difference is" in said
    assert "resampling of positions" not in said
    assert runs(weights, changed, "--tolerance", "1000")[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_recognised(dtype: torch.dtype, runs: Runs) -> None:
    weights = weights_of()
    rounded = {key: tensor.to(dtype) for key, tensor in weights.items()}
    name = str(dtype).removeprefix("torch.")
    assert f"B has the values of A rounded to {name}" in runs(weights, rounded)[1]
    code, said = runs(rounded, weights)
    assert f"A has the values of B rounded to {name}" in said
    assert code == 1
    almost = {**rounded, "norm.bias": rounded["norm.bias"] + 0.25}
    assert "rounded to" not in runs(weights, almost)[1]


def test_a_mask_token_plays_no_part(runs: Runs) -> None:
    weights = weights_of()
    code, said = runs(weights, {**weights, "mask_token": weights["mask_token"] + 1})
    assert code == 0
    assert "the same except for the mask token" in said


def test_differences_within_the_tolerance_are_not_called_rounding(runs: Runs) -> None:
    weights = weights_of()
    code, said = runs(weights, {**weights, "norm.bias": weights["norm.bias"] + 3e-4})
    assert code == 0
    assert "The features are the same within the tolerance of 0.001: the worst difference is 0.0003" in said


def test_nan_features_are_different(runs: Runs) -> None:
    weights = weights_of()
    broken = {**weights, "norm.bias": weights["norm.bias"].clone()}
    broken["norm.bias"][3] = float("nan")
    for a, b in ((weights, broken), (broken, weights), (broken, broken)):
        code, said = runs(a, b)
        assert (code, "DIFFERENT: some features are NaN" in said) == (1, True)


def test_models_of_different_sizes_are_an_error(runs: Runs) -> None:
    code, said = runs(weights_of(), weights_of("facebook_swiglu"))
    assert code == 1
    assert "only in A: " in said
    assert "only in B: " in said
    small = DinoVisionTransformer(70, 14, embed_dim=64, depth=3, num_heads=1, init_values=1.0, block_chunks=0)
    code, said = runs(weights_of(), dict(small.state_dict()))
    assert code == 1
    assert "of other shapes: blocks.0.attn.proj.bias (128,) and (64,), " in said
    assert (
        "error: The models differ in size: for the same images their tokens have the shapes (3, 128) and (3, 64)"
        in said
    )


@pytest.mark.parametrize(("peer", "position_interpolation"), [("transformers", "size"), ("timm", "antialias")])
def test_only_the_resampling_of_positions_differs_from_other_implementations(
    peer: str, position_interpolation: str, runs: Runs
) -> None:
    pytest.importorskip(peer)
    code, said = runs(weights_of(), peer)
    assert code == 1
    assert "Only the resampling of positions differs: A resamples them as 'offset', and with" in said
    assert f"--position-interpolation {position_interpolation} it agrees with B (worst difference" in said
    assert "with the weights of A" in said
    code, said = runs(weights_of(), peer, "--position-interpolation", position_interpolation)
    assert code == 0
    assert "the same up to rounding" in said
    assert runs(weights_of(), peer, size=70)[0] == 0  # the table's own size


@pytest.mark.parametrize("case", ["facebook_reg4", "facebook_swiglu"])
@pytest.mark.parametrize("peer", ["transformers", "timm"])
def test_every_kind_of_model_agrees_with_other_implementations(peer: str, case: str, runs: Runs) -> None:
    pytest.importorskip(peer)
    code, said = runs(weights_of(case), peer, size=70)
    assert (code, "the same up to rounding" in said) == (0, True), said


def test_a_model_that_the_other_library_loads_itself(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder, weights = tmp_path / "theirs", weights_of()
    changed = {**weights, "blocks.2.ls1.gamma": weights["blocks.2.ls1.gamma"] * 0.9}
    saved(changed, tmp_path / "changed.safetensors")
    assert main(["convert", str(tmp_path / "changed.safetensors"), str(folder), "--to", "huggingface"]) == 0
    assert runs(changed, f"transformers:{folder}", size=70)[0] == 0
    code, said = runs(weights, f"transformers:{folder}", size=70)
    assert (code, "resampling of positions" in said) == (1, False)


def test_a_library_that_is_missing_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    code, said = runs(weights_of(), "timm")
    assert code == 1
    assert "timm is not installed: pip install timm" in said


def test_unreadable_images_are_left_out_and_have_an_exit_code_of_their_own(
    tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of()
    a = saved(weights, tmp_path / "a.safetensors")
    b = saved({**weights, "norm.bias": weights["norm.bias"] + 1}, tmp_path / "b.safetensors")
    bad = tmp_path / "bad.jpg"
    bad.write_text("<html>")
    for other, code in ((a, 3), (b, 1)):
        assert main(["verify", a, other, str(bad), images, "--size", "56"]) == code
        captured = capsys.readouterr()
        assert "3 image(s) of 56 x 56" in captured.out
        assert captured.err.startswith(f"\nLeft out:\n  {str(bad)!r}: not a")


def test_where_no_image_can_be_read_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(weights_of(), tmp_path / "a.safetensors")
    (tmp_path / "bad.jpg").write_text("<html>")
    (tmp_path / "empty").mkdir()
    for path, message in (("bad.jpg", "None of the images can be read:\n  "), ("empty", "There are no images in")):
        assert main(["verify", a, a, str(tmp_path / path)]) == 1
        assert message in capsys.readouterr().err


def test_the_numbers_are_those_of_their_formulas() -> None:
    batches = [torch.randn(2, 3), torch.randn(3, 3)]
    a = {id(b): (torch.randn(len(b), 8), torch.randn(len(b), 4, 8)) for b in batches}
    b = {id(x): (torch.randn(len(x), 8) + 5, torch.randn(len(x), 4, 8)) for x in batches}
    result = compare_features(lambda x: a[id(x)], lambda x: b[id(x)], batches)
    assert result.images == 5
    for found, kind in ((result.cls, 0), (result.patches, 1)):
        x, y = (torch.cat([side[id(batch)][kind] for batch in batches]).double().numpy() for side in (a, b))
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        std = y.std()
        expected = [np.abs(x - y).max() / std, np.abs(x - y).mean() / std, std, cosine.min(), cosine.mean()]
        actual = [found.worst, found.mean, found.std, found.cosine_worst, found.cosine_mean]
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert result.worst == max(result.cls.worst, result.patches.worst)
    with pytest.raises(ValueError, match="no images"):
        compare_features(lambda x: x, lambda x: x, [])


def test_the_worst_tensor_is_named_and_what_only_one_has() -> None:
    weights = weights_of()
    other = {**weights, "norm.bias": weights["norm.bias"] + 1, "norm.weight": weights["norm.weight"] - 2}
    del other["blocks.2.norm1.bias"]
    found = compare_weights(plan_weights(weights), plan_weights(other))
    assert set(found.different) == {"norm.weight", "norm.bias"}
    assert (found.worst_key, round(found.worst, 5)) == ("norm.weight", 2.0)
    assert (found.only_in_a, found.only_in_b) == (("blocks.2.norm1.bias",), ())
    same = compare_weights(plan_weights(weights), plan_weights(convert_state_dict(weights, to="timm")))
    assert (same.different, same.misshapen, same.only_in_a, same.only_in_b) == ((), (), (), ())


def test_nan_in_weights_is_the_worst_difference() -> None:
    weights = weights_of()
    other = {**weights, "norm.bias": weights["norm.bias"] * float("nan"), "norm.weight": weights["norm.weight"] + 1}
    found = compare_weights(plan_weights(weights), plan_weights(other))
    assert found.worst_key == "norm.bias"
    assert found.worst != found.worst


def usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], str]] = [
        (["verify", "a", "b"], "required: PATH"),
        (["verify", "a", "b", "c", "--tolerance", "much"], "invalid float value: 'much'"),
        (["verify", "a", "b", "c", "--size", "100"], "nearest: 98 or 112"),
        (["convert", "a", "b"], "required: --to"),
        (["convert", "a", "b", "--to", "keras"], "invalid choice: 'keras'"),
    ]
    for arguments, message in cases:
        assert message in usage(arguments, capsys)
