"""`load`: a DINOv2 backbone with its weights, from a name, a file, a folder or a hub id."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.configs import BACKBONES, backbone
from dinov2_fast.errors import InvalidValueError, WeightsError
from dinov2_fast.logs import log_once, logger
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.architecture import plan_weights, read_architecture, read_tensor
from dinov2_fast.weights.files import SafetensorsFiles, open_weights
from dinov2_fast.weights.sources import Checkpoint, SourceOptions, find_backbone, find_checkpoint

# The classifiers of transformers, timm and the reference. A backbone does not need them.
HEADS = ("classifier.", "head.", "linear_head.")


def load(
    name_or_path: str | Path,
    *,
    pretrained: bool = True,
    seed: int = 0,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    position_interpolation: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """A DINOv2 backbone in eval mode.

    The model is built without storage and filled tensor by tensor, so the peak memory is that of the weights and one
    tensor. Only the backbone is loaded: a classification head, or other parts of a larger model, are skipped.

    Published weights are searched in the folder of ``DINOV2_FAST_CACHE`` (by default ``~/.cache/dinov2_fast``), in
    torch.hub's and in the cache of the Hugging Face hub, and then downloaded from the hub or the official server.

    Args:
        name_or_path: one of the eight names (``dinov2_vits14`` … ``dinov2_vitg14_reg``), a checkpoint file in any
            layout, a folder that holds one, or a Hugging Face hub id (``facebook/dinov2-base``, ``timm/…``). The folder
            of a pretraining run gives the teacher of its newest checkpoint. For a file, or without ``config.json``,
            heads of 64 channels are assumed; `num_heads` changes that.
        pretrained: False gives a model of one of the eight names random weights instead of the published ones.
        seed: of the random weights, from 0 to 2147483647. They depend only on it.
        weights: for one of the eight names, a file to load instead of the published weights. ``"random:SEED"`` is the
            same as ``pretrained=False, seed=SEED``.
        device: of the parameters; the CPU by default.
        dtype: of the parameters, also as a name ("bfloat16"); the checkpoint's by default.
        position_interpolation: how positions are resampled: "offset", "size" or "antialias". The default is what
            ``config.json`` says, or else the reference's for this kind of model.
        revision: of the hub repository.
        local_files_only: do not use the network.
        **kwargs: arguments of `DinoVisionTransformer` to override, such as `drop_path_rate` or `block_chunks`. For
            another number of `in_chans` the filters are adapted (`adapt_filters`). `img_size` gives the image size
            that the position table is for; it is needed only if the table is not square.

    Raises:
        WeightsError: the weights cannot be found, downloaded or read, or do not fit.
        ValueError: there is no such name (the message lists the nearest), `seed`, `dtype` or `position_interpolation`,
            `weights` is given together with ``pretrained=False``, or `seed` without it.
    """
    name = str(name_or_path)
    random_seed = _random_seed(weights, pretrained, seed)
    if random_seed is not None:
        source = f"random:{random_seed}"
        arguments = backbone(name).constructor_arguments()
    else:
        checkpoint = _find(name, weights, revision, local_files_only)
        source = str(checkpoint.weights)
        state_dict: Mapping[str, Any] = open_weights(checkpoint.weights)
        known = backbone(name).constructor_arguments() if name in BACKBONES else None
        arguments = known or read_architecture(state_dict, checkpoint.config, kwargs.get("img_size"))
    model = _on_meta({**arguments, **kwargs})
    if random_seed is not None:
        state_dict = RandomWeights(model, random_seed)
    if position_interpolation is not None:
        model.position_interpolation = position_interpolation
    fill(
        model,
        state_dict,
        device=device,
        dtype=as_dtype(dtype),
        allowed_unexpected=HEADS,
        adapt_channels="in_chans" in kwargs,
    )
    model.loaded_from = source
    return model.eval()


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that `dtype` is or names ("bfloat16", "torch.bfloat16"); None for None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise InvalidValueError(f"There is no dtype {dtype!r}; give one such as torch.bfloat16 or 'bfloat16'.")
    return named


def _find(name: str, weights: str | Path | None, revision: str | None, local_files_only: bool) -> Checkpoint:
    if weights is not None:
        backbone(name)
        return Checkpoint(Path(weights).expanduser(), None)
    if name and name not in BACKBONES and (Path(name).expanduser().exists() or "/" in name or "." in name):
        return find_checkpoint(name, SourceOptions(revision, local_files_only))
    return find_backbone(backbone(name), local_files_only)


def _on_meta(arguments: dict[str, Any]) -> DinoVisionTransformer:
    with torch.device("meta"):
        return DinoVisionTransformer(**arguments)


def fill(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    allowed_missing: tuple[str, ...] = (),
    allowed_misshapen: tuple[str, ...] = (),
    allowed_unexpected: tuple[str, ...] = (),
    adapt_channels: bool = False,
) -> list[str]:
    """Gives a model on the meta device its parameters, one at a time, from weights in any layout.

    Args:
        state_dict: the weights. A plain dictionary is emptied meanwhile, to save memory.
        device, dtype: of the parameters; by default the CPU and the dtype of the weights.
        allowed_missing: prefixes of the model's keys that the weights may lack.
        allowed_misshapen: prefixes of the model's keys that count as missing if the weights have another shape.
        allowed_unexpected: prefixes of other keys that the weights may have. The parts of a larger model outside its
            backbone are always allowed.
        adapt_channels: allow weights for another number of channels (`adapt_filters`).

    Returns:
        The missing keys, whose parameters are still on the meta device. Other misfits are a `WeightsError`.
    """
    plan = plan_weights(state_dict)
    emptied = plan.source if isinstance(state_dict, dict) and isinstance(plan.source, dict) else None
    own = {layouts.plain_key(key): (key, tensor) for key, tensor in model.state_dict().items()}
    missing = [key for plain, (key, _) in own.items() if plain not in plan.recipes]
    fatal = [key for key in missing if not key.startswith(allowed_missing)]
    left_over = [plain for plain in plan.recipes if plain not in own and plain not in plan.not_in_source]
    unexpected = [plain for plain in left_over if not plain.startswith(allowed_unexpected) and plain not in plan.beside]
    if len(left_over) > len(unexpected):
        logger.info("Skipped %d keys that the model does not have, such as %s.", len(left_over), left_over[0])
    misshapen = []
    for plain, (key, like) in own.items():
        if plain not in plan.recipes:
            continue
        tensor = read_tensor(plan, plain)
        if adapt_channels and plain == "patch_embed.proj.weight":
            tensor = adapt_filters(tensor, like.shape[1])
        if tensor.shape == like.shape:
            # A mapping other than a dictionary may return tensors mapped from a file; joined tensors are new.
            is_borrowed = emptied is None and len(plan.recipes[plain].keys) == 1
            _set_parameter(model, key, tensor, device, dtype, is_borrowed)
        elif key.startswith(allowed_misshapen):
            missing.append(key)
        else:
            misshapen.append(f"{key} {tuple(tensor.shape)} where the model has {tuple(like.shape)}")
        if emptied is not None:
            for source_key in plan.recipes[plain].keys:
                del emptied[source_key]
    if fatal or unexpected or misshapen:
        raise WeightsError(layouts.misfit(plan.layout, fatal, unexpected, misshapen))
    if isinstance(plan.source, SafetensorsFiles):
        plan.source.check_unchanged()
    return missing


def adapt_filters(filters: Tensor, in_chans: int) -> Tensor:
    """The filters (hidden, channels, height, width) of a patch embedding for `in_chans` channels, as timm adapts them.

    For one channel the filters are summed, so a gray image gives the same result as three equal channels. For other
    numbers they are repeated in turn and scaled, so that images of equal channels give the same result as before. It is
    computed in float32, and a warning is logged once. For the same number of channels `filters` itself is returned.
    """
    if filters.ndim != 4 or filters.shape[1] in (0, in_chans):
        return filters
    channels = filters.shape[1]
    if in_chans == 1:
        adapted, how = filters.float().sum(dim=1, keepdim=True), "summed"
    else:
        repeats = -(-in_chans // channels)
        adapted = filters.float().repeat(1, repeats, 1, 1)[:, :in_chans] * (channels / in_chans)
        how = f"repeated in turn and scaled by {channels}/{in_chans}"
    log_once(f"The filters for {channels} channels are {how} for images of {in_chans}.")
    return adapted.to(filters.dtype)


def _set_parameter(
    model: nn.Module,
    key: str,
    tensor: Tensor,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    is_borrowed: bool,
) -> None:
    """Sets the model's parameter `key`. A borrowed tensor, whose storage is the source's, is copied."""
    if tensor.is_meta:
        raise WeightsError(f"{key} has no values: it was saved from the meta device. Save the weights again.")
    placed = tensor.to(device=device or "cpu", dtype=dtype or tensor.dtype)
    path, _, name = key.rpartition(".")
    parameter = nn.Parameter(_with_own_storage(placed, is_borrowed and placed is tensor))
    model.get_submodule(path).register_parameter(name, parameter)


def _with_own_storage(tensor: Tensor, is_borrowed: bool) -> Tensor:
    """`tensor`, contiguous. It is copied if it is borrowed, or if it would keep a larger storage in memory."""
    is_part = not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if is_borrowed or is_part else tensor.contiguous()


class RandomWeights(Mapping[str, Tensor]):
    """Random weights with the statistics of a trained model, for a model on the meta device.

    Each tensor depends only on the seed, its name (without block chunks) and shape. LayerScale, norms and biases are
    random too, so that every part of the computation changes the result.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        self._seed = seed

    def __getitem__(self, key: str) -> Tensor:
        # A CRC because torch's CPU generator uses only 32 bits of its seed.
        own_seed = zlib.crc32(f"{self._seed} {layouts.plain_key(key)}".encode())
        generator = torch.Generator().manual_seed(own_seed)
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


def _random_seed(weights: str | Path | None, pretrained: bool, seed: int) -> int | None:
    """The seed of the random weights that the caller asks for; None if the weights are not random."""
    if not pretrained and weights is not None:
        raise InvalidValueError(f"weights={str(weights)!r} and pretrained=False exclude each other: give one of them.")
    if pretrained and seed:
        raise InvalidValueError(f"seed={seed} is for random weights: give pretrained=False with it.")
    source = str(weights) if pretrained else f"random:{seed}"
    if not source.startswith("random:"):
        return None
    text = source.removeprefix("random:")
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise InvalidValueError(
            f"Random weights are random:SEED with a seed from 0 to 2147483647 (in Python also pretrained=False, "
            f"seed=SEED), got {source!r}."
        )
    return int(text)
