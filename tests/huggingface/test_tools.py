"""The models and the image processor inside Hugging Face's own tools: Trainer, pipelines, PEFT, composite models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BitImageProcessorPil, Trainer, TrainingArguments

from dinov2_fast import Dinov2ImageProcessor
from dinov2_fast.errors import WeightsError
from dinov2_fast.huggingface import BaseModelOutputWithPooling, Dinov2Config, Dinov2ForImageClassification
from tests.helpers.documents import example
from tests.helpers.huggingface_peers import (
    FAMILIES,
    assert_close,
    both,
    images,
    make_pair,
    our_class,
    their_class,
    worst,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "num_labels": 3}
PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.jpg"))[:2]


# Trainer


class Labelled(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": images(56, batch=1, seed=i)[0], "labels": i % 3}


def make_trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    """A Trainer as README makes it."""
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=4, eval_steps=2, save_steps=2, eval_strategy="steps",
        logging_steps=1, learning_rate=1e-3, seed=0, use_cpu=True, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    names = {"transformers": transformers, "model": model, "arguments": arguments}
    names |= {"training": Labelled(), "validation": Labelled()}
    exec(example("transformers.Trainer"), names)
    return names["trainer"]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(56)).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_trains_as_it_trains_transformers(family: str, tmp_path: Path) -> None:
    pair = make_pair(family, "ForImageClassification", **SMALL)
    trainers = [make_trainer(side, tmp_path / str(i)) for i, side in enumerate(pair)]
    for trainer in trainers:
        trainer.train()
    ours, theirs = map(losses, trainers)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert worst(logits(pair.ours), logits(pair.theirs)) < 2e-3
    assert trainers[0].evaluate()["eval_loss"] == pytest.approx(trainers[1].evaluate()["eval_loss"], abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=["plain", "bf16"])
def test_checkpoints_of_trainer_are_loaded_by_both(settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    model = make_pair(family, "ForImageClassification", **SMALL).ours
    trainer = make_trainer(model, tmp_path, load_best_model_at_end=True, **settings)
    assert model.is_gradient_checkpointing is False
    trainer.train()
    assert model.is_gradient_checkpointing is bool(settings)
    trainer.save_model(str(tmp_path / "best"))
    best = Path(trainer.state.best_model_checkpoint)
    for folder in (best, tmp_path / "best"):
        ours = our_class(family, "ForImageClassification").from_pretrained(folder)
        theirs, report = their_class(family, "ForImageClassification").from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert ours.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in ours.state_dict().items())
        assert_close(logits(ours), logits(theirs))


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    whole = make_pair("Dinov2", "ForImageClassification", **SMALL).ours
    resumed = copy.deepcopy(whole)
    make_trainer(whole, tmp_path / "whole").train()
    trainer = make_trainer(resumed, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_trainer_that_saves_weights_alone_is_explained(tmp_path: Path) -> None:
    model = make_pair("Dinov2", "ForImageClassification", **SMALL).ours
    trainer = make_trainer(model, tmp_path)
    trainer.processing_class = None
    trainer.save_model(str(tmp_path / "weights"))
    with pytest.raises(WeightsError, match=r"No config\.json .* Trainer calls it where it is given processing_class=m"):
        Dinov2ForImageClassification.from_pretrained(tmp_path / "weights")
    loaded = Dinov2ForImageClassification.from_pretrained(tmp_path / "weights", config=model.config)
    assert torch.equal(logits(loaded), logits(model))


# Pipelines


@pytest.mark.parametrize("processor", [Dinov2ImageProcessor, BitImageProcessorPil])
@pytest.mark.parametrize(
    ("task", "kind", "arguments"),
    [
        ("image-classification", "ForImageClassification", {"top_k": 3}),
        ("image-feature-extraction", "Model", {}),
        ("image-feature-extraction", "Model", {"pool": True, "return_tensors": True}),
    ],
    ids=["classes", "features", "pooled"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_run_the_model(family: str, task: str, kind: str, arguments: dict[str, Any], processor: Any) -> None:
    settings = Dinov2ImageProcessor(size=64, crop_size=56).settings()
    images = [Image.open(path) for path in PHOTOGRAPHS]
    results = []
    for model, preprocess in zip(
        make_pair(family, kind, **SMALL), (processor(**settings), BitImageProcessorPil(**settings)), strict=True
    ):
        pipeline = transformers.pipeline(task, model=model, image_processor=preprocess, device="cpu")
        repr(pipeline)  # asks the model what it takes
        results.append([numbers(result) for result in pipeline(images, batch_size=2, **arguments)])
    (ours, our_labels), (theirs, their_labels) = (map(list, zip(*result, strict=True)) for result in results)
    assert our_labels == their_labels
    assert_close(torch.stack(ours), torch.stack(theirs))


def numbers(result: Any) -> tuple[Tensor, list[str]]:
    """What a pipeline gives for one image: its numbers, and the labels in their order."""
    if isinstance(result, list) and isinstance(result[0], dict):
        return torch.tensor([entry["score"] for entry in result]), [entry["label"] for entry in result]
    return torch.as_tensor(result), []


def test_a_saved_pipeline_is_loaded_by_transformers(tmp_path: Path) -> None:
    model = make_pair("Dinov2", "ForImageClassification", **SMALL).ours
    processor = Dinov2ImageProcessor(size=64, crop_size=56)
    ours = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    ours.save_pretrained(tmp_path, safe_serialization=True)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    again = BitImageProcessorPil.from_pretrained(tmp_path)
    theirs = transformers.pipeline("image-classification", model=loaded, image_processor=again, device="cpu")
    image = Image.open(PHOTOGRAPHS[0])
    assert numbers(ours(image))[1] == numbers(theirs(image))[1]
    assert_close(numbers(ours(image))[0], numbers(theirs(image))[0])


def test_outputs_are_known_to_transformers() -> None:
    ours, theirs = both(make_pair("Dinov2", **SMALL), images(56))
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, transformers.utils.ModelOutput)
    assert type(ours) is BaseModelOutputWithPooling
    for twin in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is BaseModelOutputWithPooling
        assert torch.equal(twin.pooler_output, ours.pooler_output)


# PEFT


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_and_merge(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_pair(family, "ForImageClassification", **SMALL).ours
    before = logits(copy.deepcopy(model))
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc2"], modules_to_save=["classifier"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    assert_close(logits(adapted), before, 1e-6)
    trainer = make_trainer(adapted, tmp_path, gradient_checkpointing=True)
    trainer.processing_class = None
    trainer.train()
    trained = logits(adapted)
    assert worst(trained, before) > 1e-2
    fresh = make_pair(family, "ForImageClassification", **SMALL).ours
    assert_close(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "checkpoint-4")), trained, 1e-6)
    assert_close(logits(adapted.merge_and_unload()), trained, 1e-5)


def test_adapter_names_of_transformers_are_refused_by_peft() -> None:
    """query, key and value are one linear here; README names the targets."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(make_pair("Dinov2", **SMALL).ours, config)


# Composite models


def test_a_config_may_be_part_of_another(tmp_path: Path) -> None:
    """A composite configuration checks that its part is of transformers' class; it takes the fields of ours."""
    fields = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56}
    config = Dinov2Config(**fields, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    composite = transformers.DepthAnythingConfig(backbone_config=config.to_dict(), reassemble_hidden_size=32)
    assert isinstance(composite.backbone_config, transformers.Dinov2Config)
    assert Dinov2Config.of(composite.backbone_config).constructor_arguments() == config.constructor_arguments()
    assert composite.backbone_config.out_indices == [1, 2, 3, 4]
    assert not composite.backbone_config.reshape_hidden_states
