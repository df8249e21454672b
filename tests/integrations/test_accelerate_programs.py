"""Accelerated models inside other people's programs: PEFT's adapters and transformers' trainer, as released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate, accelerated, restore
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

MODELS = {
    "transformers": lambda: transformers_model("Dinov2", "Model"),
    "transformers-swiglu": lambda: transformers_model("Dinov2WithRegisters", "Model", use_swiglu_ffn=True),
    "timm": lambda: timm_model("vit_small_patch14_reg4_dinov2"),
}


def lora(model: nn.Module, **settings: Any) -> Any:
    """With LoRA beside every linear of the blocks, its weights seeded."""
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
        assert torch.equal(tensors(run(restore(merged)))[0], tensors(run(expected))[0])


class Labelled(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight images of two classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels + index % 2, "labels": torch.tensor(index % 2)}


def fine_tune(model: Any, folder: Path, **settings: Any) -> list[float]:
    """The losses of some steps of transformers' trainer; what it saved is loaded and compared."""
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
def test_the_trainer_of_transformers(settings: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    build = lambda: filled(transformers_model("Dinov2", "ForImageClassification", drop_path=0.1))  # noqa: E731
    expected = fine_tune(build(), tmp_path / "untouched", **settings)
    model = accelerate(build())
    losses = fine_tune(model, tmp_path / "accelerated", **settings)
    assert str(accelerated(model)) == "dinov2.encoder.layer: 2 of 2 Dinov2Layer accelerated"
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=2e-2 if "bf16" in settings else 1e-4)
    assert losses[-1] < losses[0]
