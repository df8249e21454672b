"""`Extractor`: dictionaries in and out, as Ray Data hands them around; loads where it is called."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dinov2_fast
from dinov2_fast import Extractor
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.inference import Engine
from tests.helpers.extraction import MeanColour
from tests.helpers.images import read_image
from tests.helpers.small_models import small

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "examples" / "images").glob("*.jpg"))


def expected(model: Any, processor: Dinov2ImageProcessor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        output = model.forward_features(processor([read_image(path) for path in IMAGES]).pixel_values)
    return output["x_norm_clstoken"], output["x_norm_patchtokens"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(small(embed_dim=64, num_heads=1, img_size=518).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("engine", [False, True])
def test_bytes_arrays_and_images_have_the_features_of_the_model(weights: str, engine: bool) -> None:
    extractor = Extractor(
        weights, size=(28, 42), features=["cls", "patches"], dtype="fp32", engine=engine, device="cpu"
    )
    cls, patches = expected(dinov2_fast.load(weights), Dinov2ImageProcessor.for_size((28, 42)))
    images = [read_image(path) for path in IMAGES]
    for batch in (
        {"bytes": np.array([path.read_bytes() for path in IMAGES], object)},
        {"image": [np.asarray(image) for image in images]},
        {"image": images},
    ):
        found = extractor(batch)
        assert list(found) == ["cls", "patches", "error"]
        np.testing.assert_allclose(found["cls"], cls, atol=2e-5)
        np.testing.assert_allclose(found["patches"], patches, atol=2e-5)
        assert found["error"].tolist() == [None] * 5
    assert isinstance(extractor.outputs.model, Engine) == engine
    assert not engine or not extractor.outputs.model.plan.follow_weights


def test_one_array_is_a_batch_of_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    found = Extractor(MeanColour())({"image": pixels})
    assert found["cls"].shape == (4, 3)
    np.testing.assert_array_equal(found["cls"][2], Extractor(MeanColour())({"image": pixels[2:3]})["cls"][0])


def test_failures_are_rows_and_other_columns_stay() -> None:
    jpeg = IMAGES[0].read_bytes()
    labels = np.array([5, 4, 3, 2, 1])
    batch = {
        "label": labels,
        "image": [np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), np.nan), b"<html>", jpeg[:3000], jpeg],
        "path": list("abcde"),
    }
    found = Extractor(MeanColour(), features=["cls", "patch_mean", "patches"])(batch)
    assert list(found) == ["label", "path", "cls", "patch_mean", "patches", "error"]
    assert found["label"] is labels
    assert found["path"] == list("abcde")
    assert [error is None for error in found["error"]] == [True, False, False, False, True]
    for name in ("cls", "patch_mean", "patches"):
        assert np.isnan(found[name][1:4]).all()
        assert np.isfinite(found[name][[0, 4]]).all()
    assert (found["patches"].shape, found["patches"].dtype) == ((5, 256, 3), np.float16)
    only_bad = Extractor(MeanColour())({"bytes": [b"", b"GIF"]})
    assert np.isnan(only_bad["cls"]).all()
    assert only_bad["error"].tolist()[0] == "empty file"


def test_broken_or_too_large_pil_images_are_rows_with_an_error(tmp_path: Path) -> None:
    """Opened and not yet decoded, as datasets hand them out."""
    jpeg = IMAGES[0].read_bytes()
    huge = io.BytesIO()
    Image.new("L", (2000, 1000)).save(huge, "PNG")
    images = [Image.open(io.BytesIO(content)) for content in (jpeg, jpeg[:3000], huge.getvalue(), jpeg)]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(huge.getvalue()[:60] + b"x" * 100)
    with Image.open(damaged) as last:
        found = Extractor(MeanColour(), max_pixels=1_000_000)({"image": [*images, last]})
    assert [error is None for error in found["error"]] == [True, False, False, True, False]
    assert "truncated" in found["error"][1]
    assert found["error"][2] == "too large: 2000 x 1000 pixels, the limit is 1000000"
    np.testing.assert_array_equal(np.isnan(found["cls"]).all(axis=1), [False, True, True, False, True])


def test_an_empty_batch_gives_empty_columns() -> None:
    found = Extractor(MeanColour())({"bytes": [], "label": []})
    assert (found["cls"].shape, found["error"].shape, found["label"]) == ((0, 3), (0,), [])


def test_large_batches_run_in_parts_that_shrink_if_memory_runs_out() -> None:
    class Small(MeanColour):
        def forward_features(self, x: Tensor) -> dict[str, Tensor]:
            found = super().forward_features(x)
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 20, 3), dtype=np.uint8)
    whole = MeanColour()
    one = Extractor(whole, batch_size=8)({"image": pixels})
    assert whole.batches == [8, 3]
    model = Small()
    extractor = Extractor(model, batch_size=8)
    np.testing.assert_array_equal(extractor({"image": pixels})["cls"], one["cls"])
    assert model.batches == [8, 4, 2, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(extractor({"image": pixels})["cls"], one["cls"])
    assert max(model.batches[8:]) == 2


def test_a_pickle_holds_only_settings(weights: str) -> None:
    extractor = Extractor(weights, size=28, device="cpu")
    before = pickle.dumps(extractor)
    assert len(before) < 1500
    batch = {"bytes": [IMAGES[0].read_bytes()]}
    found = extractor(batch)
    assert pickle.dumps(extractor) == before
    np.testing.assert_array_equal(pickle.loads(before)(batch)["cls"], found["cls"])


def test_creating_and_pickling_an_extractor_loads_no_model() -> None:
    code = (
        "import pickle\nfrom dinov2_fast import Extractor\n"
        "extractor = pickle.loads(pickle.dumps(Extractor('no such model', size=448, features=['patches'])))\n"
        "print(extractor._loaded)\n"
        "try: extractor({'bytes': [b'']})\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "None"
    assert "no such model" in second


def test_the_settings_beside_the_model_are_used(weights: str, tmp_path: Path) -> None:
    processor = Dinov2ImageProcessor(size=56, crop_size=28, image_mean=(0.7, 0.2, 0.4))
    processor.save_pretrained(tmp_path)
    os.link(weights, tmp_path / "model.safetensors")
    extractor = Extractor(tmp_path, device="cpu")
    buffer = io.BytesIO()
    Image.open(IMAGES[0]).save(buffer, "PNG")
    found = extractor({"bytes": [buffer.getvalue()]})
    cls, _ = expected(dinov2_fast.load(weights), processor)
    np.testing.assert_allclose(found["cls"][0], cls[0], atol=2e-5)
    assert not extractor.outputs.decoder.do_rescale


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({}, {"photo": []}, "no column image or bytes, but photo: give column="),
        ({"column": "jpg"}, {"photo": []}, "no column jpg, but photo"),
        ({}, {"bytes": [b""], "label": [1, 2]}, "differ in length: {'bytes': 1, 'label': 2}"),
        ({}, {"bytes": [b""], "cls": [7], "error": ["mine"]}, "columns called cls, error, which the features"),
        ({"features": ["logits"]}, {"bytes": []}, "no feature 'logits'"),
    ],
)
def test_batches_that_do_not_fit_are_errors(settings: dict[str, Any], batch: dict[str, Any], message: str) -> None:
    with pytest.raises((KeyError, ValueError)) as caught:
        Extractor(MeanColour(), **settings)(batch)
    assert message in str(caught.value)


def test_impossible_settings_are_refused_before_weights_are_read() -> None:
    with pytest.raises(ValueError, match="size or processor, not both"):
        Extractor(size=28, processor=Dinov2ImageProcessor())
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Extractor(batch_size=0)
    with pytest.raises(ValueError, match="Precision fp8 exists in the engine only"):
        _ = Extractor(weights="random:0", precision="fp8", engine=False).outputs
    with pytest.raises(ValueError, match="Precision fp8 would be slower than fp32 here"):
        _ = Extractor(weights="missing.safetensors", precision="fp8", device="cpu").outputs
    with pytest.raises(ValueError, match="no device 'abacus'"):
        _ = Extractor(weights="random:0", device="abacus").outputs
