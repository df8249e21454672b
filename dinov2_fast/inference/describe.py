"""The text of ``print(engine)``: what an engine does, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from dinov2_fast.inference.backbone import FoldedBackbone
from dinov2_fast.inference.cuda_graphs import GraphCache
from dinov2_fast.inference.fp8 import HEADROOM, STATIC, weights_checksum
from dinov2_fast.inference.plan import Calibration, precision_name
from dinov2_fast.ops._fp8 import E4M3, E4M3_MAX
from dinov2_fast.ops.choices import format_choices


def describe_engine(model: nn.Module, backbone: Any, graphs: GraphCache) -> str:
    """The text, in some lines, for an engine that follows `model` and has this backbone and these CUDA graphs."""
    plan = backbone.plan
    held = next(parameter.dtype for parameter in model.parameters())
    interleaved = any(block.mlp.up.interleaved for block in backbone.blocks)
    deferred = any(block.deferred.end is not None for block in backbone.blocks)
    uint8, last = "normalised in the patch embedding", "computed in full"
    if backbone.patch_embed.proj_uint8 is None:
        uint8 = "not taken, since the model does not take 3 channels"
    if backbone.cls_only:
        last = "computed for the CLS token alone where nothing else is returned"
    lines = [
        f"weights: {precision_name(plan.dtype)}, folded in fp64 from {precision_name(held)} and rounded once",
        f"changes of the model: {'noticed at the next call' if plan.follow_weights else 'not noticed: call refresh()'}",
        *(_describe_e4m3(backbone, model) if plan.e4m3 else ()),
        f"folded: LayerScale into proj and {'w3' if backbone.gated else 'fc2'}"
        + (", rows of w12 interleaved" if interleaved else ""),
        f"uint8 images: {uint8}",
        f"residual stream: {precision_name(plan.residual_dtype)}, in place"
        + (", the norms add the biases" if deferred else ""),
        f"lists of images: packed, {f'up to {plan.max_tokens} tokens' if plan.max_tokens else 'all'} at a time",
        f"last block: {last} (outputs={plan.outputs!r})",
        f"CUDA graphs: {graphs.status(backbone)}",
        f"what runs on {backbone.cls_token.device}:",
        *(f"  {line}" for line in format_choices(backbone.backends())),
    ]
    title = f"Engine of a {type(model).__name__}: {len(backbone.blocks)} blocks of {backbone.embed_dim} channels"
    return "\n  ".join([title, *lines])


def _describe_e4m3(backbone: FoldedBackbone, model: nn.Module) -> list[str]:
    plan, blocks = backbone.plan, len(backbone.blocks)
    kept = [str(i) for i in range(blocks) if i in plan.skip_layers]
    lines = [
        "e4m3: qkv, proj and MLP" + (f", not in the blocks {', '.join(kept)}" if kept else "") + "; weights "
        "scaled by output feature, norms by their bound",
        f"calibration: {_describe_calibration(plan.calibration, blocks, model)}",
    ]
    in_e4m3 = [row for row in backbone.backends() if row.dtype == E4M3 and row.backend == "torch"]
    slow = [row.name for row in in_e4m3 if row.op != "attention"]  # its one more pass costs little
    if slow:
        others = "; use_backend(...) chooses others" if backbone.cls_token.is_cuda else ""
        lines.append(f"speed: no faster than bf16 here: torch's forms of {', '.join(slow)} compute in fp32{others}")
    return lines


def _describe_calibration(calibration: Calibration | None, blocks: int, model: nn.Module) -> str:
    clipped = f"attention and hidden activations are clipped at ±{E4M3_MAX * STATIC.hidden:g}"
    if calibration is None:
        return f"none: {clipped}; calibrate(images) measures what they need"
    if len(calibration.scales) != blocks:
        return f"made for {len(calibration.scales)} blocks and not used: {clipped}; call calibrate(images) again"
    made = f"on {calibration.images} images, for values up to at least {HEADROOM:g} times their largest"
    if calibration.checksum != weights_checksum(model):
        made += "; stale: the weights have changed since, call calibrate(images) again"
    return made
