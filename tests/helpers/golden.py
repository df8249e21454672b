"""The golden cases of ``tests/golden``: small models and what the reference implementations compute with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4  # of the worst element against the reference; measured 4e-6
INPUTS = range(4)
FOLDER = Path(__file__).parents[1] / "golden"
_SHARED = ("embed_dim", "num_heads", "depth", "patch_size", "img_size", "init_values")
_OWN = ("ffn_layer", "num_register_tokens", "interpolate_offset", "interpolate_antialias", "block_chunks")


def cases(prefix: str = "") -> list[str]:
    """Names of the cases, in the order of ``golden.json``; `prefix` "facebook" or "timm" for those it made."""
    return [name for name in _description()["cases"] if name.startswith(prefix)]


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """One case.

    Returns:
        The arguments of `DinoVisionTransformer` for its model; its weights, with the keys of their maker; and its
        inputs and outputs by the names that the README beside the files lists, such as ``0.input``.
    """
    description = _description()
    case = description["cases"][name]
    arguments = {key: description[key] for key in _SHARED}
    arguments |= {key: case[key] for key in _OWN} if name.startswith("facebook") else _timm_arguments(name)
    content = load_file(FOLDER / f"{name}.safetensors")
    prefix = "weights."
    weights = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    tensors = {key: value for key, value in content.items() if not key.startswith(prefix)}
    return arguments, weights, tensors


def huggingface_fields(arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The Hugging Face family of a case's model, and the fields of its configuration."""
    family = "Dinov2WithRegisters" if arguments["num_register_tokens"] else "Dinov2"
    return family, {
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "use_swiglu_ffn": arguments["ffn_layer"] != "mlp",
    }


def timm_model(name: str) -> Any:
    """timm's own model of a ``timm_…`` case, in eval mode, with random weights; needs timm."""
    import timm

    description = _description()
    sizes = {key: description[key] for key in ("embed_dim", "depth", "num_heads", "img_size")}
    if name.endswith("swiglu"):  # rounded up to a multiple of 8, as the reference does
        sizes["mlp_ratio"] = 688 / description["embed_dim"]
    return timm.create_model(description["cases"][name]["timm_model"], dynamic_img_size=True, **sizes).eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def _description() -> dict[str, Any]:
    return json.loads((FOLDER / "golden.json").read_text())


def _timm_arguments(name: str) -> dict[str, Any]:
    return {
        "ffn_layer": "swiglufused" if name.endswith("swiglu") else "mlp",
        "num_register_tokens": 4 if "reg4" in name else 0,
        "interpolate_offset": 0.0,
        "interpolate_antialias": True,
        "block_chunks": 0,
    }
