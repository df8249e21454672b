"""`load`: a DINOv2 backbone with its weights, from a name, a file, a folder or a hub id."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.configs import BACKBONES, backbone
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.errors import WeightsError
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.sources import Checkpoint, find_backbone, find_checkpoint

HEAD_DIM = 64  # of every published DINOv2


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    dialect: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """A DINOv2 backbone in eval mode.

    Memory: the model is built without storage and filled tensor by tensor, so this takes the weights and one tensor.

    Args:
        name_or_path: one of the eight names (``dinov2_vits14`` … ``dinov2_vitg14_reg``), a checkpoint file in any
            layout, a folder that holds one, or a Hugging Face hub id (``facebook/dinov2-base``, ``timm/…``).
        weights: for a name: a file to take instead of the published weights, or ``"random:SEED"`` for random weights
            that depend on the seed alone.
        device: where the model goes; default the CPU.
        dtype: of the parameters; default that of the checkpoint.
        dialect: how positions are resampled ("offset", "size", "antialias"); default as the reference does for this
            kind of model.
        revision: of the hub repository.
        local_files_only: do not touch the network.
        **kwargs: arguments of `DinoVisionTransformer` to override, such as `drop_path_rate` or `block_chunks`.

    Raises:
        WeightsError: the weights cannot be found, fetched, read, or do not fit.
        ValueError: unknown name (the message lists the nearest) or dialect.
    """
    name = str(name_or_path)
    if weights is not None and str(weights).startswith("random:"):
        arguments = backbone(name).constructor_arguments()
        state_dict: Mapping[str, Any] = RandomWeights(_on_meta({**arguments, **kwargs}), _seed(str(weights)))
    else:
        checkpoint = _find(name, weights, revision, local_files_only)
        state_dict = open_weights(checkpoint.weights)
        known = backbone(name).constructor_arguments() if name in BACKBONES else None
        arguments = known or read_architecture(state_dict, checkpoint.config)
    model = _on_meta({**arguments, **kwargs})
    fill(model, state_dict, device=device, dtype=dtype)
    if dialect is not None:
        model.position_dialect = dialect
    return model.eval()


def _find(name: str, weights: str | Path | None, revision: str | None, local_files_only: bool) -> Checkpoint:
    if weights is not None:
        backbone(name)
        return Checkpoint(Path(weights).expanduser(), None)
    if name in BACKBONES:
        return find_backbone(BACKBONES[name], local_files_only)
    if Path(name).expanduser().exists() or "/" in name or "." in name:
        return find_checkpoint(name, revision, local_files_only)
    backbone(name)  # raises, with the nearest names
    raise AssertionError(name)


def _on_meta(arguments: dict[str, Any]) -> DinoVisionTransformer:
    with torch.device("meta"):
        return DinoVisionTransformer(**arguments)


def fill(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    may_miss: tuple[str, ...] = (),
    may_leave: tuple[str, ...] = (),
) -> list[str]:
    """Gives a model on the meta device its parameters, one at a time, from weights in any layout.

    Args:
        model: built on the meta device.
        state_dict: weights in any layout; if a plain dictionary, it is emptied on the way to save memory.
        device, dtype: of the parameters; default the CPU and the weights' own.
        may_miss, may_leave: beginnings of the model's keys that may be missing, and of others that may be left over.

    Returns:
        The missing keys; these parameters are still on the meta device.

    Raises:
        WeightsError: the weights do not fit.
    """
    plan = layouts.plan_conversion(state_dict)
    own = {layouts.plain_key(key): (key, tensor) for key, tensor in model.state_dict().items()}
    missing = [key for plain, (key, _) in own.items() if plain not in plan.recipes]
    unexpected = [plain for plain in plan.recipes if plain not in own and not plain.startswith(may_leave)]
    fatal = [key for key in missing if not key.startswith(may_miss)]
    if fatal or unexpected:
        raise WeightsError(layouts.misfit(plan.layout, fatal, unexpected, []))
    for plain, (key, like) in own.items():
        if plain not in plan.recipes:
            continue
        tensor = plan.read(plain)
        if tensor.shape != like.shape:
            wrong = f"{key} {tuple(tensor.shape)} where the model has {tuple(like.shape)}"
            raise WeightsError(layouts.misfit(plan.layout, [], [], [wrong]))
        _set_parameter(model, key, tensor.to(device=device or "cpu", dtype=dtype or tensor.dtype))
        if isinstance(plan.source, dict):
            for source_key in plan.recipes[plain].keys:
                plan.source[source_key] = plan.source[source_key].to("meta")
    return missing


def _set_parameter(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, name = key.rpartition(".")
    model.get_submodule(path).register_parameter(name, nn.Parameter(tensor))


def read_architecture(state_dict: Mapping[str, Any], config: Path | None = None) -> dict[str, Any]:
    """Constructor arguments of the backbone these weights belong to, from the shapes of its tensors.

    Args:
        state_dict: weights in any layout.
        config: a transformers ``config.json``, for the number of heads (otherwise heads of 64 channels are assumed).

    Raises:
        WeightsError: not the weights of a DINOv2.
    """
    plan = layouts.plan_conversion(state_dict)
    required = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    absent = [key for key in required if key not in plan.recipes]
    if absent:
        raise WeightsError(f"These are not the weights of a DINOv2 backbone: {', '.join(absent)} not found.")
    embed_dim, in_chans, patch_size, _ = plan.read("patch_embed.proj.weight").shape
    swiglu = "blocks.0.mlp.w12.weight" in plan.recipes
    registers = plan.read("register_tokens").shape[1] if "register_tokens" in plan.recipes else 0
    heads = json.loads(config.read_text()).get("num_attention_heads") if config else None
    return {
        "img_size": patch_size * math.isqrt(plan.read("pos_embed").shape[1] - 1),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in plan.recipes if key.startswith("blocks.")),
        "num_heads": heads or max(embed_dim // HEAD_DIM, 1),
        "mlp_ratio": 4.0 if swiglu else plan.read("blocks.0.mlp.fc1.weight").shape[0] / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in plan.recipes,
        "ffn_layer": "swiglufused" if swiglu else "mlp",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in plan.recipes else None,
        "block_chunks": 0,
        "num_register_tokens": registers,
        "interpolate_antialias": registers > 0,
        "interpolate_offset": 0.0 if registers else 0.1,
    }


class RandomWeights(Mapping[str, Tensor]):
    """Random weights with the statistics of a trained model, for a model on the meta device.

    Each tensor depends on the seed and its name alone. LayerScale, norms and biases are not at their initial values, so
    that no part of the computation is trivial.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        self._seed = seed

    def __getitem__(self, key: str) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed << 32) + zlib.crc32(key.encode()))
        noise = torch.randn(self._shapes[key], generator=generator)
        if key.endswith("gamma"):
            return 0.3 * noise.abs() + 0.1
        if "norm" in key:
            return 0.1 * noise + (1.0 if key.endswith("weight") else 0.0)
        if key == "pos_embed":
            return 0.1 * noise
        return noise / math.sqrt(math.prod(noise.shape[1:])) if key.endswith("weight") else 0.02 * noise

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _seed(weights: str) -> int:
    text = weights.removeprefix("random:")
    if not text.isdigit() or int(text) >= 1 << 31:
        raise ValueError(
            f"Random weights are asked for as random:SEED with a seed from 0 to 2147483647, got {weights!r}."
        )
    return int(text)
