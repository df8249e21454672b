"""Accelerated models work in PEFT, and in transformers' trainer, pipeline and models for dense prediction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import accelerate, acceleration_report, unaccelerate
from tests.helpers.library_models import (
    SIZE,
    assert_same,
    assert_same_gradients,
    filled,
    gradients,
    images,
    tensors,
    timm_model,
    transformers_model,
)
from tests.helpers.library_models import transformers_model as hf

MODELS = {
    "transformers": lambda: transformers_model("Dinov2", "Model"),
    "transformers-swiglu": lambda: transformers_model("Dinov2WithRegisters", "Model", use_swiglu_ffn=True),
    "timm": lambda: timm_model("vit_small_patch14_reg4_dinov2"),
}


def lora(model: nn.Module, **settings: Any) -> Any:
    """`model` with LoRA beside every linear of the blocks, with seeded weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


def run(model: Any) -> Any:
    return model(images())


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_trains_and_merges_as_in_the_untouched_model(name: str, first: str) -> None:
    pytest.importorskip(name.split("-")[0])
    build = lambda: filled(MODELS[name]()).eval()  # noqa: E731
    untouched = lora(build())
    model = accelerate(lora(build())) if first == "adapters" else lora(accelerate(build()))
    assert model.state_dict().keys() == untouched.state_dict().keys()
    with torch.no_grad():
        assert_same(run(model), run(untouched))
        with model.disable_adapter(), untouched.disable_adapter():
            assert_same(run(model), run(untouched))
    found = gradients(model.train(), run)
    assert {name for name, gradient in found.items() if gradient is not None and "lora_" not in name} == set()
    assert_same_gradients(found, gradients(untouched.train(), run))
    merged, expected = (each.eval().merge_and_unload() for each in (model, untouched))
    with torch.no_grad():
        assert_same(run(merged), run(expected))
        assert_same(run(accelerate(merged, inference=True)), run(expected))
        assert torch.equal(tensors(run(unaccelerate(merged)))[0], tensors(run(expected))[0])


class Labelled(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight images of two classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels + index % 2, "labels": torch.tensor(index % 2)}


def fine_tune(model: Any, folder: Path, **settings: Any) -> list[float]:
    """The losses of six steps of transformers' trainer, whose checkpoint is loaded and compared."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=5,
        **settings,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Labelled())
    trainer.train()
    saved = type(model).from_pretrained(folder / "checkpoint-6").state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_trainer_of_transformers(
    settings: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # transformers 4.57 leaves it as bf16 sets it
    build = lambda: filled(transformers_model("Dinov2", "ForImageClassification", drop_path=0.1))  # noqa: E731
    expected = fine_tune(build(), tmp_path / "untouched", **settings)
    model = accelerate(build())
    losses = fine_tune(model, tmp_path / "accelerated", **settings)
    assert str(acceleration_report(model)) == "dinov2.encoder.layer: 2 of 2 Dinov2Layer accelerated"
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=2e-2 if "bf16" in settings else 1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("inference", [False, True])
def test_the_pipeline_of_transformers(inference: bool, answered: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    model = filled(hf("Dinov2", "Model")).eval()
    processor = transformers.BitImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70})
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)

    def features(model: nn.Module) -> Tensor:
        pipeline = transformers.pipeline("image-feature-extraction", model, image_processor=processor, device="cpu")
        return torch.tensor(pipeline(Image.fromarray(pixels)))

    wanted = features(model)
    assert_same(features(accelerate(model, inference=inference)), wanted)
    assert len(answered) == int(inference)


def _dense_model(name: str) -> Any:
    """A model for dense prediction of transformers on four stages of a `Dinov2Backbone`."""
    import transformers

    reshaped = name == "UperNet"
    stages = {"num_hidden_layers": 4, "out_indices": [0, 1, -2, -1], "reshape_hidden_states": reshaped}
    backbone = hf("Dinov2", "Backbone", **stages).config
    if reshaped:
        settings = {"hidden_size": 16, "pool_scales": [1], "use_auxiliary_head": False}
        config = transformers.UperNetConfig(backbone_config=backbone, **settings)
        return transformers.UperNetForSemanticSegmentation(config)
    sizes = {"patch_size": 14, "reassemble_hidden_size": 128, "neck_hidden_sizes": [8] * 4}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, fusion_hidden_size=8, **sizes)
    return transformers.DepthAnythingForDepthEstimation(config)


@pytest.mark.parametrize("name", ["UperNet", "DepthAnything"])
def test_models_for_dense_prediction_take_our_backbone_and_accelerated_ones(name: str, answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model = filled(_dense_model(name)).eval()
    x = images(1, 70, 98)
    with torch.no_grad():
        wanted = model(x)
        assert_same(accelerate(copy.deepcopy(model))(x), wanted, 1e-4)
        assert not answered
        assert_same(accelerate(copy.deepcopy(model), inference=True)(x), wanted, 1e-4)
        assert answered
        ours = dinov2_fast.Dinov2Backbone(model.backbone.config).eval()
        ours.load_state_dict(model.backbone.state_dict())
        model.backbone = ours
        assert_same(model(x), wanted, 1e-4)
