"""What models with heads compute, against the formulas of the reference written out here in fp64, step by step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import BACKBONES, DinoVisionTransformer, hub, optimize_for_inference
from dinov2_fast.hub.depth_heads import DPTHead, LinearDepthHead
from dinov2_fast.hub.pixels import slide
from dinov2_fast.hub.segmenters import LinearSegmentationHead
from dinov2_fast.inference.engine import Engine
from dinov2_fast.weights.load import RandomWeights
from tests.helpers.checkpoints import head_of
from tests.helpers.documents import example
from tests.helpers.weight_folders import isolate, refuse_network, write

D, BLOCKS = 64, (2, 5, 8, 11)
SIZES = [(42, 70), (45, 64), (28, 28)]  # 3 x 5 patches; padded to 56 x 70, by odd numbers; 2 x 2 patches
EXACT = {"atol": 1e-9, "rtol": 1e-9}  # in fp64


def make(head: nn.Module) -> Any:
    """A head with random weights, none of them at its initial value, in fp64 and eval mode."""
    generator = torch.Generator().manual_seed(5)
    for tensor in head.state_dict().values():
        if tensor.is_floating_point():
            # Positive, as variances have to be; small, so that sums over many channels stay near 1.
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / max(tensor[:1].numel(), 2) ** 0.5 + 0.01)
    for name, parameter in head.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            parameter.data -= parameter.data.mean()
    return head.double().eval()


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "registers"])
def backbone(request: pytest.FixtureRequest) -> DinoVisionTransformer:
    arguments = BACKBONES["dinov2_vits14_reg" if request.param else "dinov2_vits14"].constructor_arguments()
    model = DinoVisionTransformer(**{**arguments, "embed_dim": D, "num_heads": 1})
    model.load_state_dict(dict(RandomWeights(model, 0)))
    return model.double().eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def tokens_after(backbone: DinoVisionTransformer, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """All tokens after each of `blocks`, before the norm, with nothing but the model's parts."""
    found = []
    tokens = backbone.prepare_tokens_with_masks(x)
    for i, block in enumerate(backbone.blocks):
        tokens = block(tokens)
        if i in blocks:
            found.append(tokens)
    return found


def padded(x: Tensor) -> Tensor:
    height, width = ((size + 13) // 14 * 14 for size in x.shape[2:])
    canvas = x.new_zeros(*x.shape[:2], height, width)
    top, left = (height - x.shape[2]) // 2, (width - x.shape[3]) // 2
    canvas[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    return canvas


def maps_after(backbone: DinoVisionTransformer, x: Tensor, blocks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Map and CLS token after each of `blocks`, before the norm, of padded images."""
    x = padded(x)
    first, rows = 1 + backbone.num_register_tokens, x.shape[2] // 14
    tokens = tokens_after(backbone, x, blocks)
    return [(t[:, first:].transpose(1, 2).reshape(len(x), D, rows, -1), t[:, 0]) for t in tokens]


def upsample(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


# Padding


@pytest.mark.parametrize(
    ("size", "pads"),
    [((42, 70), (0, 0, 0, 0)), ((43, 69), (0, 1, 6, 7)), ((1, 27), (0, 1, 6, 7)), ((40, 65), (2, 3, 1, 1))],
)
def test_center_padding_equals_the_reference(size: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    x = images(*size).requires_grad_()
    out = hub.CenterPadding(14)(x)
    assert torch.equal(out, F.pad(x, pads))
    assert torch.equal(out, padded(x))
    out.sum().backward()  # the reference's gives tensors that cannot be trained through
    assert torch.equal(x.grad, torch.ones_like(x))


# Classes


@pytest.mark.parametrize("layers", [1, 4])
def test_a_classifier_equals_the_reference(backbone: DinoVisionTransformer, layers: int) -> None:
    x, head = images(42, 70), make(nn.Linear((1 + layers) * D, 10))
    tokens = [backbone.norm(t) for t in tokens_after(backbone, x, range(12 - layers, 12))]
    mean = tokens[-1][:, 1 + backbone.num_register_tokens :].mean(1)
    features = torch.cat([*(t[:, 0] for t in tokens), mean], dim=1)
    wanted = features @ head.weight.T + head.bias
    model = hub.LinearClassifier(backbone=backbone, linear_head=head, layers=layers)
    torch.testing.assert_close(model(x), wanted, **EXACT)


# Depth


def linear_depth(head: LinearDepthHead, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
    joined = []
    for x, cls_token in maps:
        spread = cls_token.reshape(*cls_token.shape, 1, 1).repeat(1, 1, *x.shape[2:])
        joined.append(upsample(torch.cat([x, spread], 1), [4 * size for size in x.shape[2:]]))
    logits = F.conv2d(torch.cat(joined, 1), head.conv_depth.weight, head.conv_depth.bias)
    assert (logits < 0).any()  # otherwise the ReLU does nothing
    p = logits.clamp(min=0) + 0.1
    bins = torch.tensor([head.min_depth + k * (head.max_depth - head.min_depth) / 255 for k in range(256)]).double()
    return (p * bins.view(1, -1, 1, 1)).sum(1, keepdim=True) / p.sum(1, keepdim=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("blocks", [(11,), BLOCKS], ids=["1 layer", "4 layers"])
def test_a_linear_depth_estimator_equals_the_reference(
    backbone: DinoVisionTransformer, blocks: tuple[int, ...], size: tuple[int, int]
) -> None:
    head = make(LinearDepthHead(D, len(blocks), 0.001, 80.0))
    model = hub.DepthEstimator(backbone, head, blocks)
    x = images(*size)
    small = linear_depth(head, maps_after(backbone, x, blocks))
    # The bins are written with 24 bits in one of the two places.
    torch.testing.assert_close(model.encode_decode(x, rescale=False), small, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), upsample(small, size), atol=1e-5, rtol=0)


def conv(x: Tensor, weights: dict[str, Tensor], name: str, **kwargs: Any) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **kwargs)


def dpt_depth(weights: dict[str, Tensor], maps: list[tuple[Tensor, Tensor]], min_depth: float) -> Tensor:
    def residual(x: Tensor, name: str) -> Tensor:
        inner = conv(F.relu(x), weights, f"{name}.conv1.conv")
        return conv(F.relu(inner), weights, f"{name}.conv2.conv") + x

    scaled = []
    for i, (x, cls_token) in enumerate(maps):
        name = "reassemble_blocks"
        both = torch.cat([x, cls_token[:, :, None, None].expand_as(x)], 1)  # a linear is a convolution of size 1
        readout = weights[f"{name}.readout_projects.{i}.0.weight"][:, :, None, None]
        x = F.gelu(F.conv2d(both, readout, weights[f"{name}.readout_projects.{i}.0.bias"]))
        x = conv(x, weights, f"{name}.projects.{i}.conv")
        if i < 2:
            layer = f"{name}.resize_layers.{i}"
            x = F.conv_transpose2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride=4 >> i)
        elif i == 3:
            x = conv(x, weights, f"{name}.resize_layers.3", stride=2)
        scaled.append(conv(x, weights, f"convs.{i}.conv"))
    out = None
    for i, x in enumerate(reversed(scaled)):
        name = f"fusion_blocks.{i}"
        if out is None:
            out = x
        else:
            x = x if x.shape == out.shape else upsample(x, out.shape[2:])
            out = out + residual(x, f"{name}.res_conv_unit1")
        out = residual(out, f"{name}.res_conv_unit2")
        out = upsample(out, [2 * size for size in out.shape[2:]], align_corners=True)
        out = conv(out, weights, f"{name}.project.conv")
    out = F.relu(conv(out, weights, "project.conv"))
    out = conv(out, weights, "conv_depth.head.0")
    out = upsample(out, [2 * size for size in out.shape[2:]], align_corners=True)
    out = conv(F.relu(conv(out, weights, "conv_depth.head.2")), weights, "conv_depth.head.4")
    return F.relu(out) + min_depth


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_dpt_depth_estimator_equals_the_reference(backbone: DinoVisionTransformer, size: tuple[int, int]) -> None:
    head = make(DPTHead(D, 0.001, 10.0))
    model = hub.DepthEstimator(backbone, head, BLOCKS)
    x = images(*size, batch=1)
    maps = maps_after(backbone, x, BLOCKS)
    middle = dpt_depth(dict(head.state_dict()), maps, 0.0).median()
    head.conv_depth.head[4].bias.data -= middle  # so that the last ReLU has something to do
    wanted = dpt_depth(dict(head.state_dict()), maps, 0.001)
    assert 0.2 < (wanted == 0.001).double().mean() < 0.8
    torch.testing.assert_close(head(maps), wanted, **EXACT)
    rows, columns = ((side + 13) // 14 for side in size)
    assert wanted.shape == (1, 1, 32 * ((rows + 1) // 2), 32 * ((columns + 1) // 2))
    small = model.encode_decode(x, rescale=False)
    torch.testing.assert_close(small, wanted.clamp(0.001, 10.0), **EXACT)
    torch.testing.assert_close(model(x), upsample(small, size), **EXACT)


class FixedHead(nn.Module):
    """Gives a depth map from -5 to 15, whatever the images."""

    min_depth, max_depth = 0.5, 7.0

    def forward(self, inputs: Any) -> Tensor:
        return torch.linspace(-5, 15, 12, dtype=torch.float64).view(1, 1, 3, 4)


def test_depths_are_clamped_before_they_are_resized(backbone: DinoVisionTransformer) -> None:
    model, x = hub.DepthEstimator(backbone, FixedHead(), (11,)), images(28, 28, batch=1)
    clamped = FixedHead()(None).clamp(0.5, 7.0)
    assert torch.equal(model.encode_decode(x, rescale=False), clamped)
    torch.testing.assert_close(model.whole_inference(x, img_meta=None, rescale=True), upsample(clamped, (28, 28)))
    torch.testing.assert_close(model.encode_decode(x, size=(5, 6)), upsample(clamped, (5, 6)))
    meta = [{"ori_shape": (50, 60, 3)}]
    torch.testing.assert_close(model.encode_decode(x, meta), upsample(clamped, (50, 60)))
    torch.testing.assert_close(model.inference(x, meta, size=(5, 6)), upsample(clamped, (5, 6)))
    for direction, axis in (("horizontal", 3), ("vertical", 2)):
        mirrored = [{**meta[0], "flip": True, "flip_direction": direction}]
        torch.testing.assert_close(model.inference(x, mirrored), upsample(clamped, (50, 60)).flip(axis))
    with pytest.raises(ValueError, match="no mode 'slide', only whole; for windows call slide_inference"):
        model.inference(x, mode="slide")


# Segments


def segmentation_logits(
    head: LinearSegmentationHead, backbone: DinoVisionTransformer, x: Tensor, layers: int
) -> Tensor:
    rows = (x.shape[2] + 13) // 14
    tokens = [backbone.norm(t) for t in tokens_after(backbone, padded(x), range(12 - layers, 12))]
    features = torch.cat([t[:, 1 + backbone.num_register_tokens :] for t in tokens], dim=-1)
    bn = head.bn
    features = (features - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
    logits = features @ head.conv_seg.weight[:, :, 0, 0].T + head.conv_seg.bias
    return upsample(logits.transpose(1, 2).unflatten(2, (rows, -1)), x.shape[2:])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layers", [1, 4])
def test_a_segmenter_equals_the_reference(backbone: DinoVisionTransformer, layers: int, size: tuple[int, int]) -> None:
    head = make(LinearSegmentationHead(D, layers, 7))
    model = hub.Segmenter(backbone, head, range(12 - layers, 12))
    x = images(*size)
    wanted = segmentation_logits(head, backbone, x, layers)
    torch.testing.assert_close(model(x), wanted, **EXACT)
    torch.testing.assert_close(model.inference(x, mode="whole"), F.softmax(wanted, 1), **EXACT)
    meta = [{"ori_shape": (50, 60, 3)}] * 2
    torch.testing.assert_close(model.whole_inference(x, meta, rescale=True), upsample(wanted, (50, 60)), **EXACT)
    torch.testing.assert_close(model.whole_inference(x, meta, rescale=False), wanted, **EXACT)


def test_a_segmenter_with_windows_equals_the_reference(backbone: DinoVisionTransformer) -> None:
    head = make(LinearSegmentationHead(D, 1, 3))
    model = hub.Segmenter(backbone, head, [11], crop_size=(28, 42), stride=(20, 30))
    x = images(60, 80, batch=1)
    total, count = torch.zeros(1, 3, 60, 80).double(), torch.zeros(60, 80)
    for top in (0, 20, 32):  # the last ends with the image
        for left in (0, 30, 38):
            window = (slice(top, top + 28), slice(left, left + 42))
            total[:, :, window[0], window[1]] += segmentation_logits(head, backbone, x[:, :, window[0], window[1]], 1)
            count[window] += 1
    torch.testing.assert_close(model.slide_inference(x), total / count, **EXACT)
    torch.testing.assert_close(model.inference(x), F.softmax(total / count, 1), **EXACT)
    meta = [{"ori_shape": (30, 40, 3)}]
    torch.testing.assert_close(model.slide_inference(x, meta), upsample(total / count, (30, 40)), **EXACT)
    with pytest.raises(ValueError, match="no mode 'whales'; choose one of slide, whole"):
        model.inference(x, mode="whales")


def test_img_meta_rescales_and_mirrors_as_in_mmsegmentation(backbone: DinoVisionTransformer) -> None:
    """Padding below and on the right is cut off, and what was a mirror image is mirrored back."""
    head = make(LinearSegmentationHead(D, 1, 3))
    model = hub.Segmenter(backbone, head, [11], crop_size=(28, 42), stride=(20, 30))
    x = images(45, 64)
    meta = {"ori_shape": (30, 40, 3), "img_shape": (42, 60, 3)}
    for mode, logits in (("whole", segmentation_logits(head, backbone, x, 1)), ("slide", model.slide_inference(x))):
        wanted = F.softmax(upsample(logits[:, :, :42, :60], (30, 40)), 1)
        for flip, axis in ((None, None), ("horizontal", 3), ("vertical", 2)):
            metas = [{**meta, "flip": flip is not None, "flip_direction": flip}] * 2
            mirrored = wanted if axis is None else wanted.flip(axis)
            torch.testing.assert_close(model.inference(x, metas, mode=mode), mirrored, **EXACT)
        unscaled = model.inference(x, [{**meta, "flip": True}] * 2, rescale=False, mode=mode)
        torch.testing.assert_close(unscaled, F.softmax(logits, 1).flip(3), **EXACT)


def test_depth_with_windows_equals_the_whole_image_if_it_fits_in_one(backbone: DinoVisionTransformer) -> None:
    model = hub.DepthEstimator(backbone, make(LinearDepthHead(D, 1, 0.001, 80.0)), (11,))
    x = images(45, 64, batch=1)
    torch.testing.assert_close(model.slide_inference(x, None, True, (50, 50), (100, 70)), model(x), **EXACT)


@pytest.mark.parametrize(
    ("length", "size", "step", "starts"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 4, [0]), (3, 4, 2, [0]), (9, 4, 4, [0, 4, 5])],
)
def test_windows_cover_the_image(length: int, size: int, step: int, starts: list[int]) -> None:
    x = torch.arange(float(length)).expand(1, 1, length, length)
    seen: list[list[int]] = []

    def decode(part: Tensor) -> Tensor:
        seen.append([int(part[0, 0, 0, 0]), part.shape[3]])
        return part

    assert torch.equal(slide(decode, x, (length, size), (length, step)), x)
    assert seen == [[start, min(size, length)] for start in starts]


@pytest.mark.parametrize(("size", "step"), [(4, 5), (4, 0), (0, 0), (4, -1)])
def test_windows_that_leave_gaps_are_refused(size: int, step: int) -> None:
    with pytest.raises(ValueError, match="do not cover an image"):
        slide(nn.Identity(), torch.ones(1, 1, 9, 9), (size, 4), (step, 4))


# What people do with such models


def models(backbone: DinoVisionTransformer) -> dict[str, nn.Module]:
    return {
        "classifier": hub.LinearClassifier(backbone=backbone, linear_head=make(nn.Linear(5 * D, 10))),
        "linear depth": hub.DepthEstimator(backbone, make(LinearDepthHead(D, 4, 0.001, 80.0)), BLOCKS),
        "dpt depth": hub.DepthEstimator(backbone, make(DPTHead(D, 0.001, 10.0)), BLOCKS),
        "segmenter": hub.Segmenter(backbone, make(LinearSegmentationHead(D, 1, 7)), [11]),
    }


@pytest.mark.parametrize("name", models(DinoVisionTransformer(embed_dim=D, depth=1, num_heads=1)))
def test_gradients_reach_every_parameter_used(backbone: DinoVisionTransformer, name: str) -> None:
    model = copy.deepcopy(models(backbone)[name]).train()
    x = images(42, 70)
    model(x).square().sum().backward()
    unused = {"backbone.mask_token", *(["backbone.norm.weight", "backbone.norm.bias"] if "depth" in name else [])}
    assert {key for key, parameter in model.named_parameters() if parameter.grad is None} == unused
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert any(parameter.grad.any() for parameter in model.backbone.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", models(DinoVisionTransformer(embed_dim=D, depth=1, num_heads=1)))
def test_the_engine_can_be_the_backbone(backbone: DinoVisionTransformer, name: str) -> None:
    model = copy.deepcopy(models(backbone)[name]).float()
    x = images(42, 70).float()
    with torch.no_grad():
        wanted = model(x)
        with pytest.raises(TypeError, match="Its backbone can be an engine: ") as refusal:
            optimize_for_inference(model)
        exec(str(refusal.value).partition("engine: ")[2].rstrip("."), globals(), {"model": model})
        assert isinstance(model.backbone, Engine)
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_images_that_were_not_normalised_are_not_padded(backbone: DinoVisionTransformer) -> None:
    """The engine takes uint8 images. There, zeros are black; in normalised images they are the mean colour."""
    model = hub.Segmenter(backbone, make(LinearSegmentationHead(D, 1, 7)), [11]).float()
    model.backbone = optimize_for_inference(model.backbone)
    pixels = torch.randint(256, (1, 3, 42, 70), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), model((pixels / 255 - mean) / std), atol=1e-4, rtol=1e-4)
        with pytest.raises(
            TypeError, match=r"\(42, 69\) pixels must be padded with zeros .* These are torch.uint8: normalise"
        ):
            model(pixels[..., :69])


def test_the_documented_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    attempts = refuse_network(monkeypatch)
    folders = isolate(monkeypatch, tmp_path)
    write(
        dict(dinov2_fast.load("dinov2_vits14", weights="random:0").state_dict()),
        folders.cache / "dinov2_vits14_pretrain.pth",
    )
    for model, file in (
        (hub.dinov2_vits14_lc, "linear4_head"),
        (hub.dinov2_vits14_dd, "nyu_dpt_head"),
        (hub.dinov2_vits14_ld, "nyu_linear4_head"),
        (hub.dinov2_vits14_ls, "ade20k_linear_head"),
    ):
        write(head_of(model(pretrained=False)), folders.cache / f"dinov2_vits14_{file}.pth")
    names: dict[str, Any] = {"images": images(40, 70, batch=1).float()}
    with pytest.raises(ValueError, match="Input image height 40 is not a multiple"):
        exec(example("hub.dinov2_vits14_lc"), names)  # a classifier is for whole patches
    names["images"] = images(42, 70, batch=1).float()
    exec(example("hub.dinov2_vits14_lc"), names)
    assert names["logits"].shape == (1, 1000)
    assert names["depth"].shape == names["linear"](names["images"]).shape == (1, 1, 42, 70)
    assert names["linear"].decode_head.max_depth == 10.0
    assert names["classes"].shape == (1, 42, 70)
    assert attempts == []
