"""Changes of colours against torchvision's functions on tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.pretraining import colours as module
from dinov2_fast.pretraining.colours import Colours, apply_colours, draw_colours
from dinov2_fast.pretraining.config import CropsConfig

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PLAIN = Colours((1.0, 1.0, 1.0, 0.0), (), grey=False, sigma=0.0, solarize=False)


@pytest.fixture
def functional() -> Any:
    return pytest.importorskip("torchvision.transforms.functional")


def images(count: int = 6) -> Tensor:
    """Random images, among them grey, black and white ones and pixels of two equal channels."""
    x = torch.randint(0, 256, (count, 3, 20, 24), generator=torch.Generator().manual_seed(0)).float() / 255
    x[0], x[1], x[2, 1], x[3] = 0, 1, x[2, 0], x[3, :1]
    return x


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adjust_brightness", [0.6, 1.4, 1.0, 0.9, 1.2, 0.7]),
        ("adjust_contrast", [0.6, 1.4, 1.0, 0.9, 1.2, 0.7]),
        ("adjust_saturation", [0.8, 1.2, 1.0, 0.9, 1.1, 0.85]),
        ("adjust_hue", [-0.1, 0.1, 0.0, 0.05, -0.03, 0.08]),
        ("gaussian_blur", [0.1, 2.0, 1.0, 0.5, 0.2, 1.7]),
    ],
)
def test_each_image_is_changed_by_its_own_value(functional: Any, name: str, values: list[float]) -> None:
    x = images()
    arguments = [([9, 9], [value]) if name == "gaussian_blur" else (value,) for value in values]
    expected = torch.stack([getattr(functional, name)(y, *each) for y, each in zip(x, arguments, strict=True)])
    found = getattr(module, name)(x.clone(), torch.tensor(values).view(-1, 1, 1, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def normalized(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def eight_bits(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_jitters_are_applied_in_the_order_of_each_image(functional: Any, order: tuple[int, ...]) -> None:
    x, jitter = images(), (1.3, 0.7, 1.2, 0.06)
    changes = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    expected = x[4]
    for place in order:
        expected = getattr(functional, changes[place])(expected, jitter[place])
    colours = [PLAIN, Colours(jitter, order, grey=False, sigma=0.0, solarize=False), PLAIN]
    found = apply_colours(eight_bits(x[3:6])[None], colours)[0]
    torch.testing.assert_close(found, torch.stack([normalized(y) for y in (x[3], expected, x[5])]), rtol=0, atol=3e-5)


def test_grey_blur_and_solarisation_follow_in_this_order(functional: Any) -> None:
    x = images()[4]
    expected = functional.rgb_to_grayscale(x, 3)
    expected = functional.solarize(functional.gaussian_blur(expected, [9, 9], [1.5]), 128 / 255)
    colours = [Colours(PLAIN.jitter, (), grey=True, sigma=1.5, solarize=True)]
    found = apply_colours(eight_bits(x)[None, None], colours)[0, 0]
    torch.testing.assert_close(found, normalized(expected), rtol=0, atol=1e-5)


def test_the_crops_of_an_image_keep_their_shape_and_dtype() -> None:
    crops = eight_bits(images()).view(2, 3, 3, 20, 24)
    found = apply_colours(crops, [PLAIN] * 6, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), normalized(crops.float() / 255), rtol=1e-2, atol=1e-2)


def test_probabilities_are_those_of_the_kind_of_crop() -> None:
    drawn = [draw_colours(seed, CropsConfig(n_local=2)) for seed in range(2000)]
    for crop, blur, solarize in ((0, 0.0, 0.0), (1, 0.9, 0.2), (2, 0.5, 0.0), (3, 0.5, 0.0)):
        colours = [each[crop] for each in drawn]
        shares = [
            sum(map(bool, values)) / 2000
            for values in (
                [each.sigma for each in colours],
                [each.solarize for each in colours],
                [each.order for each in colours],
                [each.grey for each in colours],
            )
        ]
        assert shares == pytest.approx([blur, solarize, 0.8, 0.2], abs=0.04)
        assert shares[0] == blur if blur == 0 else True
    assert {len(each) for each in drawn} == {4}


def test_values_lie_in_their_ranges_and_orders_are_equally_frequent() -> None:
    drawn = [draw_colours(seed, CropsConfig(n_local=0))[1] for seed in range(4000)]
    for place, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        values = [each.jitter[place] for each in drawn]
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
    sigmas = [each.sigma for each in drawn if each.sigma]
    assert 0.1 <= min(sigmas) < 0.15
    assert 1.95 < max(sigmas) <= 2.0
    orders = Counter(each.order for each in drawn if each.order)
    assert len(orders) == 24
    assert min(orders.values()) > 85


def test_colours_depend_on_the_seed_alone() -> None:
    config = CropsConfig()
    assert draw_colours(3, config) == draw_colours(3, config)
    assert draw_colours(3, config) != draw_colours(4, config)
