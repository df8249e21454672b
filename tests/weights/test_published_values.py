"""The values that transformers' own tests expect of the published checkpoints, on their image 000000039769.png.

They were published three times for dinov2-base, as the way the positions are resampled changed: generation A is the
reference's ("offset"), B transformers' since 4.45 ("size"), both with its image processor on PIL.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2_fast import Dinov2ImageProcessor, WeightsError, load
from dinov2_fast.environment import cache_dir

IMAGE = "000000039769.png"  # of COCO val2017; transformers keeps it in tests/fixtures/tests_samples/COCO
BASE, REGISTERS = "dinov2_vitb14", "dinov2_vitb14_reg"

GENERATION_A = [[-2.1747, -0.4729, 1.0936], [-3.2780, -0.8269, -0.9210], [-2.9129, 1.1284, -0.7306]]
GENERATION_B = [[-2.2005, -0.4495, 1.0964], [-3.3959, -0.8942, -1.0315], [-2.9355, 1.1564, -0.7656]]
WITH_REGISTERS = [[-0.4638, -1.4563, -0.0289], [-1.4736, -0.8866, 0.3005], [0.0720, -0.2406, -1.5943]]


@pytest.mark.parametrize(
    ("name", "position_interpolation", "expected", "tokens", "tolerance"),
    [
        pytest.param(BASE, "offset", GENERATION_A, 257, 1e-4, id="base-A"),
        pytest.param(BASE, "size", GENERATION_B, 257, 1e-3, id="base-B"),
        pytest.param(REGISTERS, "antialias", WITH_REGISTERS, 261, 1e-4, id="registers"),
    ],
)
def test_published_weights_give_the_published_values(
    name: str, position_interpolation: str, expected: list[list[float]], tokens: int, tolerance: float
) -> None:
    image = _image()
    try:
        model = load(name, position_interpolation=position_interpolation, local_files_only=True)
    except WeightsError as error:
        pytest.skip(
            f"needs the published weights of {name}, which are in no cache here ({error.args[0].splitlines()[0]})"
        )
    pixel_values = Dinov2ImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 224, 224)
    with torch.no_grad():
        last_hidden_state = model.norm(model.forward_features(pixel_values)["x_prenorm"])
    assert last_hidden_state.shape == (1, tokens, 768)
    torch.testing.assert_close(last_hidden_state[0, :3, :3], torch.tensor(expected), rtol=tolerance, atol=tolerance)


def _image() -> Image.Image:
    path: Path = cache_dir() / IMAGE
    if not path.is_file():
        pytest.skip(f"needs COCO's image {IMAGE}, which is not in {cache_dir()}")
    return Image.open(path)
