"""``dinov2-fast convert``: a checkpoint in another implementation's layout."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2_fast.layouts import ConversionPlan
    from dinov2_fast.weights.sources import Checkpoint

LAYOUTS = ("facebook", "huggingface", "huggingface_memory", "timm")
# Who reads a layout resamples positions so, for models without registers; with registers all do it as timm.
READERS = {
    "facebook": "offset",
    "huggingface": "size",
    "huggingface_memory": "size",
    "timm": "antialias",
}
DESCRIPTION = """\
Writes a DINOv2 checkpoint in the layout of another implementation. The layout
it is in now is recognised; nothing in it is executed.

IN is a checkpoint file, a folder that holds one, a Hugging Face hub id, or one
of the eight names such as dinov2_vits14. OUT is a file: safetensors if it ends
so, PyTorch's format if it ends in .pth. With --to huggingface OUT may be a
folder instead, which transformers' from_pretrained then reads (config.json and
model.safetensors).

The file is whole or absent. Once written it is read back and compared with IN,
tensor by tensor; what the new layout cannot hold is listed as lost.
"""
EPILOG = """\
layouts:
  facebook            Meta's code: torch.hub, the official .pth files
  huggingface         transformers, on disk
  huggingface_memory  a state dict of transformers' newer models in memory
  timm                timm, which has no mask token

examples:
  dinov2-fast convert dinov2_vits14 small.safetensors --to timm
  dinov2-fast convert teacher_checkpoint.pth my-model/ --to huggingface
  dinov2-fast convert facebook/dinov2-base base.pth --to facebook

Exit codes: 0 done, 1 not possible (nothing is written), 2 wrong usage.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint in another implementation's layout",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="the checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="the file, or with --to huggingface the folder, to write")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts; 0."""
    from dinov2_fast.weights.architecture import plan_weights, read_architecture
    from dinov2_fast.weights.files import SAFETENSORS, TORCH, open_weights

    is_file = Path(args.target).suffix in SAFETENSORS + TORCH
    _check_target(Path(args.target), is_file, args.to, args.overwrite)
    checkpoint = find(args.source)
    state_dict = open_weights(checkpoint.weights)
    architecture = read_architecture(state_dict, checkpoint.config)
    plan = plan_weights(state_dict)
    print(f"Read:     {checkpoint.weights}\n          {describe(plan, architecture)}")
    written = _write_file(state_dict, args) if is_file else _write_folder(checkpoint, Path(args.target))
    print(f"Written:  {written}, {written.stat().st_size / 1e6:.1f} MB, layout {args.to}")
    _report_losses(plan, plan_weights(open_weights(written)))
    was, will_be = READERS[plan.layout], READERS[args.to]
    if was != will_be and not architecture["num_register_tokens"]:
        print(
            f"Note:     readers resample positions differently (of the old layout {was!r}, of the new {will_be!r}):\n"
            f"          at other sizes than {architecture['img_size']} px the same weights give other features."
        )
    return 0


def find(name: str) -> Checkpoint:
    """The checkpoint called `name`: one of the eight, a file, a folder or a hub id.

    Raises:
        WeightsError: it cannot be had.
    """
    from dinov2_fast.configs import BACKBONES
    from dinov2_fast.weights.sources import find_backbone, find_checkpoint

    return find_backbone(BACKBONES[name]) if name in BACKBONES else find_checkpoint(name)


def describe(plan: ConversionPlan, architecture: dict[str, Any]) -> str:
    """Layout, sizes and dtypes of a checkpoint, in one line."""
    from dinov2_fast.configs import BACKBONES

    dtypes, parameters = set(), 0
    for key in plan.recipes.keys() - plan.not_in_source:
        tensor = plan.read(key)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        parameters += tensor.numel()
    sizes = {key: architecture[key] for key in ("embed_dim", "depth", "ffn_layer", "num_register_tokens")}
    known = [name for name, config in BACKBONES.items() if config.constructor_arguments().items() >= sizes.items()]
    what = f"{sizes['embed_dim']} wide, {sizes['depth']} blocks, {sizes['num_register_tokens']} registers"
    return (
        f"layout {plan.layout}: {what}{f' ({known[0]})' if known else ''}, "
        f"{parameters / 1e6:.1f} M parameters in {', '.join(sorted(dtypes))}"
    )


def huggingface_model(checkpoint: Checkpoint) -> Any:
    """A checkpoint in any layout as a model of the Hugging Face face, a classifier if it has transformers' head.

    The configuration is the one beside the weights, or made from the sizes of the tensors.

    Raises:
        WeightsError: transformers has no such model, or the weights do not fit it.
    """
    from dinov2_fast import huggingface
    from dinov2_fast.weights.architecture import plan_weights, read_architecture
    from dinov2_fast.weights.files import open_weights

    state_dict = open_weights(checkpoint.weights)
    architecture = read_architecture(state_dict, checkpoint.config)
    plan = plan_weights(state_dict)
    labels = plan.read("classifier.weight").shape[0] if "classifier.weight" in plan.recipes else None
    kind = "Dinov2WithRegisters" if architecture["num_register_tokens"] else "Dinov2"
    model_class = getattr(huggingface, f"{kind}ForImageClassification" if labels else f"{kind}Model")
    config: Any = checkpoint.config
    if config is None or not _is_transformers(config):
        config = model_class.config_class(**_config_fields(architecture), **({"num_labels": labels} if labels else {}))
    return model_class.from_pretrained(checkpoint.weights, config=config)


def _is_transformers(config: Path) -> bool:
    """Whether a ``config.json`` is transformers'; timm's repositories have one of their own."""
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") in ("dinov2", "dinov2_with_registers")


def _config_fields(architecture: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers' configuration for the constructor arguments of a backbone."""
    from dinov2_fast.errors import WeightsError

    needed = {"proj_bias": True, "ffn_bias": True, "init_values": 1.0}
    other = [name for name, value in needed.items() if architecture[name] != value]
    mlp_ratio = _whole_mlp_ratio(architecture)
    if other or mlp_ratio is None or architecture["ffn_layer"] not in ("mlp", "swiglufused"):
        raise WeightsError(
            "transformers has no such DINOv2: its models have LayerScale, biases, and a feed-forward network of a "
            "whole multiple of the width in every block. Give OUT as a file to have the tensors in its layout anyway."
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


def _whole_mlp_ratio(architecture: dict[str, Any]) -> int | None:
    """The whole ratio, which transformers wants, that gives the same feed-forward network; None if there is none."""

    def hidden(ratio: float) -> int:
        size = int(architecture["embed_dim"] * ratio)
        return (int(size * 2 / 3) + 7) // 8 * 8 if architecture["ffn_layer"] == "swiglufused" else size

    whole = round(architecture["mlp_ratio"])
    return whole if hidden(whole) == hidden(architecture["mlp_ratio"]) else None


def _check_target(target: Path, is_file: bool, layout: str, overwrite: bool) -> None:
    from dinov2_fast.weights.save import check_target

    if is_file or layout != "huggingface":
        check_target(target, overwrite=overwrite)
    elif target.is_file():
        raise NotADirectoryError(f"{str(target)!r} is a file; a folder is written, unless OUT ends in .safetensors.")
    elif not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"The folder {str(target)!r} is not empty; choose another, or add --overwrite.")


def _write_file(state_dict: Any, args: argparse.Namespace) -> Path:
    from dinov2_fast.weights.convert import convert_state_dict
    from dinov2_fast.weights.save import save_weights

    return save_weights(convert_state_dict(state_dict, to=args.to), args.target, overwrite=args.overwrite)


def _write_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    from dinov2_fast.weights.save import move_into_place, part_of

    part = part_of(folder)
    try:
        huggingface_model(checkpoint).save_pretrained(part)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            move_into_place(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder / "model.safetensors"


def _report_losses(before: ConversionPlan, after: ConversionPlan) -> None:
    """What is not in the new file, and what is there with other values."""
    from dinov2_fast.errors import WeightsError
    from dinov2_fast.weights.compare import compare_weights

    difference = compare_weights(before, after)
    lost = list(difference.only_in_a)
    if "mask_token" in after.not_in_source - before.not_in_source:
        lost.append("mask_token, which timm's models do not have (it is zeros when it is read back)")
    if after.layout == "timm" and before.layout != "timm" and "register_tokens" in after.recipes:
        lost.append("the CLS token's position as a tensor of its own: timm's models have it added into the CLS token")
    for what in lost:
        print(f"Lost:     {what}")
    if difference.different or difference.misshapen:
        wrong = ", ".join(difference.different + difference.misshapen)
        raise WeightsError(f"The file does not hold what was read; delete it. These tensors differ: {wrong}.")
    print(f"Checked:  {difference.compared} tensors read back from the file have the same bits")
