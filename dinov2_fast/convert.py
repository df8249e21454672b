"""`convert_checkpoint`: writes a checkpoint in the layout of another implementation, and reads the file back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2_fast import huggingface
from dinov2_fast.configs import BACKBONES
from dinov2_fast.errors import WeightsError
from dinov2_fast.layouts import ConversionPlan
from dinov2_fast.weights.architecture import plan_weights, read_architecture
from dinov2_fast.weights.compare import compare_weights
from dinov2_fast.weights.convert import convert_state_dict
from dinov2_fast.weights.files import SAFETENSORS, TORCH, open_weights
from dinov2_fast.weights.save import check_target, move_into_place, part_of, save_weights
from dinov2_fast.weights.sources import Checkpoint, find_backbone, find_checkpoint, read_config

# How the readers of each layout resample positions for models without registers. With registers, all do as timm.
READERS = {"facebook": "offset", "huggingface": "size", "huggingface_memory": "size", "timm": "antialias"}


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` read and wrote."""

    source: Path
    summary: str  # layout, sizes and dtypes of the source, in one line
    written: Path  # the file with the weights
    compared: int  # tensors that were read back and have the same values as in the source
    lost: tuple[str, ...]  # what the new file lacks: the name of a tensor, or a phrase that says why
    img_size: Any  # the image size in pixels that the position table is for
    # How the readers of the old and of the new layout resample positions, where that differs. At image sizes other
    # than `img_size` the same weights then give other features.
    resampling: tuple[str, str] | None


def convert_checkpoint(
    source: str, target: str | os.PathLike[str], *, layout: str, overwrite: bool = False
) -> Conversion:
    """Writes a checkpoint in another layout, and compares what was written with the source. A file is whole or absent.

    Args:
        source: one of the eight names, a checkpoint file, a folder that holds one, or a hub id; in any layout.
        target: a file that ends in ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``. For the layout
            "huggingface", any other path is a folder for transformers' `from_pretrained`.
        layout: one of `dinov2_fast.layouts.LAYOUTS`.
        overwrite: replace what is there.

    Raises:
        FileExistsError: the file exists, or the folder is not empty, and `overwrite` is not set.
        NotADirectoryError: the target is a folder's, and there is a file of that name.
        ValueError: there is no such layout, or the target has another ending.
        WeightsError: the checkpoint cannot be found or read, or transformers has no such model, or the copy differs.
    """
    target = Path(target)
    is_file = target.suffix in SAFETENSORS + TORCH or layout != "huggingface"
    if is_file:
        check_target(target, overwrite=overwrite)
    else:
        _check_folder(target, overwrite)
    checkpoint = find_named(source)
    plan, architecture = open_checkpoint(checkpoint)
    summary = summary_of(plan, architecture)
    if is_file:
        written = save_weights(convert_state_dict(plan.source, to=layout), target, overwrite=overwrite)
    else:
        written = _write_folder(checkpoint, target)
    compared, lost = _read_back(plan, plan_weights(open_weights(written)))
    stated = None if checkpoint.config is None else read_config(checkpoint.config).get("position_interpolation")
    has_registers = architecture["num_register_tokens"] > 0
    old, new = ("antialias" if has_registers else READERS[each] for each in (plan.layout, layout))
    resampling = None if (stated or old) == new else (stated or old, new)
    return Conversion(checkpoint.weights, summary, written, compared, lost, architecture["img_size"], resampling)


def find_named(name: str) -> Checkpoint:
    """The checkpoint of one of the eight names, or a file, folder or hub id."""
    return find_backbone(BACKBONES[name]) if name in BACKBONES else find_checkpoint(name)


def open_checkpoint(checkpoint: Checkpoint) -> tuple[ConversionPlan, dict[str, Any]]:
    """The weights of a checkpoint in any layout, and the arguments of their backbone's constructor."""
    state_dict = open_weights(checkpoint.weights)
    return plan_weights(state_dict), read_architecture(state_dict, checkpoint.config)


def summary_of(plan: ConversionPlan, architecture: Mapping[str, Any]) -> str:
    """Layout, sizes and dtypes of a checkpoint, in one line."""
    dtypes, parameters = set(), 0
    for key in plan.recipes.keys() - plan.not_in_source:
        tensor = plan.read(key)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        parameters += tensor.numel()
    sizes = {key: architecture[key] for key in ("embed_dim", "depth", "ffn_layer", "num_register_tokens")}
    known = [name for name, config in BACKBONES.items() if config.constructor_arguments().items() >= sizes.items()]
    size = f"{sizes['embed_dim']} wide, {sizes['depth']} blocks, {sizes['num_register_tokens']} registers"
    return (
        f"layout {plan.layout}: {size}{f' ({known[0]})' if known else ''}, "
        f"{parameters / 1e6:.1f} M parameters in {', '.join(sorted(dtypes))}"
    )


def huggingface_model(checkpoint: Checkpoint) -> Any:
    """A checkpoint as a model of :mod:`dinov2_fast.huggingface`; a classifier if it has transformers' head.

    The configuration is that beside the weights, or is made from the sizes of the tensors. The dtype is the tensors'.

    Raises:
        WeightsError: transformers has no such model, or the weights do not fit it.
    """
    plan, architecture = open_checkpoint(checkpoint)
    labels = plan.read("classifier.weight").shape[0] if "classifier.weight" in plan.recipes else None
    kind = "Dinov2WithRegisters" if architecture["num_register_tokens"] else "Dinov2"
    model_class = getattr(huggingface, f"{kind}ForImageClassification" if labels else f"{kind}Model")
    config: Any = checkpoint.config
    if config is None or not _is_transformers(config):
        config = model_class.config_class(**_config_fields(architecture), **({"num_labels": labels} if labels else {}))
    else:
        config = model_class.config_class.from_pretrained(config)
        config.dtype = None  # the model keeps that of the weights
    return model_class.from_pretrained(checkpoint.weights, config=config)


def _is_transformers(config: Path) -> bool:
    """Whether a ``config.json`` is transformers'; timm's repositories have one of their own."""
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") in ("dinov2", "dinov2_with_registers")


def _config_fields(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of transformers' configuration for the constructor arguments of a backbone."""
    needed = {"proj_bias": True, "ffn_bias": True, "init_values": 1.0}
    other = [name for name, value in needed.items() if architecture[name] != value]
    mlp_ratio = _whole_mlp_ratio(architecture)
    if other or mlp_ratio is None or architecture["ffn_layer"] not in ("mlp", "swiglufused"):
        raise WeightsError(
            "transformers has no such DINOv2: its models have LayerScale, biases, and a feed-forward network of a "
            "whole multiple of the width in every block. Give a file as the target to write the tensors in its layout "
            "anyway."
        )
    fields = {
        "hidden_size": architecture["embed_dim"],
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "mlp_ratio": mlp_ratio,
        "image_size": architecture["img_size"],
        "patch_size": architecture["patch_size"],
        "num_channels": architecture["in_chans"],
        "qkv_bias": architecture["qkv_bias"],
        "use_swiglu_ffn": architecture["ffn_layer"] == "swiglufused",
    }
    registers = architecture["num_register_tokens"]
    return {**fields, "num_register_tokens": registers} if registers else fields


def _whole_mlp_ratio(architecture: Mapping[str, Any]) -> int | None:
    """The whole ratio, which transformers needs, that gives the same feed-forward network; None if there is none."""

    def hidden(ratio: float) -> int:
        size = int(architecture["embed_dim"] * ratio)
        return (int(size * 2 / 3) + 7) // 8 * 8 if architecture["ffn_layer"] == "swiglufused" else size

    whole = round(architecture["mlp_ratio"])
    return whole if hidden(whole) == hidden(architecture["mlp_ratio"]) else None


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise NotADirectoryError(
            f"{str(folder)!r} is a file, and a folder would be written; to write a file, give a name that ends in "
            ".safetensors."
        )
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"The folder {str(folder)!r} is not empty; choose another, or add --overwrite (overwrite=True)."
        )


def _write_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    part = part_of(folder)
    try:
        huggingface_model(checkpoint).save_pretrained(part)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            move_into_place(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder / "model.safetensors"


def _read_back(before: ConversionPlan, after: ConversionPlan) -> tuple[int, tuple[str, ...]]:
    """How many tensors of the new file have the same values, and what the file lacks; other values are an error."""
    difference = compare_weights(before, after)
    if difference.different or difference.misshapen:
        wrong = ", ".join(difference.different + difference.misshapen)
        raise WeightsError(f"The file does not hold what was read; delete it. These tensors differ: {wrong}.")
    lost = list(difference.only_in_a)
    if "mask_token" in after.not_in_source - before.not_in_source:
        lost.append("mask_token, which timm's models do not have (it is zeros when it is read back)")
    if after.layout == "timm" and before.layout != "timm" and "register_tokens" in after.recipes:
        lost.append("the CLS token's position as a separate tensor: timm's models have it added to the CLS token")
    return difference.compared, tuple(lost)
