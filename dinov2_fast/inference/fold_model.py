"""Folds a model of any face into the modules of the engine."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from dinov2_fast.block import BlockChunk
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.huggingface.modeling import Dinov2PreTrainedBackbone
from dinov2_fast.inference.backbone import (
    FoldedBackbone,
    FoldedEncoder,
    FoldedTimmVisionTransformer,
    FoldedVisionTransformer,
)
from dinov2_fast.inference.block import FoldedBlock
from dinov2_fast.inference.checks import expect, refuse_edits, refuse_tensors
from dinov2_fast.inference.fold import FoldedNorm, clone_with_buffers, clone_without_tensors, layouts_for, rounded
from dinov2_fast.inference.fp8 import Fp8Block, scales_of
from dinov2_fast.inference.patch_embed import FoldedPatchEmbed
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.layers import LayerNorm, SwiGLUFFN
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.timm_adapter import TimmVisionTransformer


def fold_model(model: Any, plan: EnginePlan, device: torch.device) -> Any:
    """The folded form of a model of any face, for calls on `device`; it is on the model's device.

    Raises:
        TypeError: the model has hooks, replaced methods or parts that cannot be folded.
        ValueError: `skip_layers` names a block that does not exist.
    """
    refuse_edits(model)
    refuse_tensors(model)
    if isinstance(model, DinoVisionTransformer):
        return fold_backbone(model, plan, device)
    made = clone_without_tensors(model)
    for name, child in model.named_children():
        is_backbone = child is model.base_model
        folded = fold_backbone(child, plan, device) if is_backbone else clone_with_buffers(child, plan.dtype)
        made.add_module(name, folded)
    return made


def backbone_of(folded: Any) -> Any:
    """The backbone of a model or folded model of any face."""
    return folded if isinstance(folded, DinoVisionTransformer) else folded.base_model


@cache
def _folded_class(kind: Any) -> type[FoldedBackbone]:
    if kind is DinoVisionTransformer:
        return FoldedVisionTransformer
    if kind is TimmVisionTransformer:
        return FoldedTimmVisionTransformer
    return type(f"Folded{kind.__name__}", (FoldedEncoder, kind), {})


def fold_backbone(model: DinoVisionTransformer, plan: EnginePlan, device: torch.device) -> FoldedBackbone:
    """The folded backbone, of a subclass of the backbone's class."""
    kind: Any = type(model)
    made = clone_without_tensors(model, _folded_class(kind))
    made.plan, made._sizes = plan, {}
    made.gated = any(isinstance(module, SwiGLUFFN) for module in model.modules())
    made.layouts = layouts_for(plan, device, made.gated)
    made.cls_only = plan.outputs == "cls" or (plan.outputs == "auto" and _gives_cls_alone(model))
    for name in ("cls_token", "pos_embed", "register_tokens", "mask_token"):
        tensor = getattr(model, name)
        if tensor is not None:
            made.register_buffer(name, rounded(tensor.double(), torch.float32))
        else:
            setattr(made, name, None)
    made.patch_embed = FoldedPatchEmbed.of(model.patch_embed, plan)
    made.blocks = nn.ModuleList(_fold_blocks(model, made))
    made.chunked_blocks = False
    for name, child in model.named_children():
        if name in ("norm", "fc_norm") and type(child) in (LayerNorm, nn.LayerNorm):
            made.add_module(name, FoldedNorm(child, name, plan))
        elif name in ("pos_drop", "patch_drop", "norm_pre"):  # timm's, between embedding and blocks
            expect(child, name, nn.Identity, nn.Dropout)
        elif name not in ("patch_embed", "blocks"):
            made.add_module(name, clone_with_buffers(child, plan.dtype))
    return made


def _gives_cls_alone(model: DinoVisionTransformer) -> bool:
    """Whether the result of a plain call depends on the CLS token alone."""
    return not isinstance(model, Dinov2PreTrainedBackbone) and getattr(model, "global_pool", "token") == "token"


def _fold_blocks(model: DinoVisionTransformer, backbone: FoldedBackbone) -> list[FoldedBlock]:
    """The folded blocks of `model` for `backbone`. If one defers its biases, all do."""
    plan, layouts, named = backbone.plan, backbone.layouts, _named_blocks(model)
    missing = sorted(set(plan.skip_layers) - set(range(len(named))))
    if missing:
        raise InvalidValueError(
            f"skip_layers: there is no block {', '.join(map(str, missing))}; the blocks are 0 to {len(named) - 1}."
        )
    scales = scales_of(plan.calibration, len(named))
    folded: list[FoldedBlock] = []
    for i, (name, block) in enumerate(named):
        layout = layouts[plan.dtype]
        if not plan.e4m3 or i in plan.skip_layers:
            folded.append(FoldedBlock(block, name, plan, layout))
            continue
        for_cls = None
        if plan.outputs != "all" and i + 1 == len(named):
            for_cls = FoldedBlock(block, name, plan, layout)
            if layout.defers_bias:
                for_cls.defer_biases(None)
        folded.append(Fp8Block(block, name, plan, layouts[E4M3], scales[i], for_cls))
    if any(layouts[E4M3 if isinstance(block, Fp8Block) else plan.dtype].defers_bias for block in folded):
        deferred = None
        for made in folded:
            deferred = made.defer_biases(deferred)
    return folded


def _named_blocks(model: DinoVisionTransformer) -> list[tuple[str, nn.Module]]:
    """The blocks with their names, in one list also where the model groups them in chunks."""
    named: list[tuple[str, nn.Module]] = []
    for name, module in model.blocks.named_children():
        if isinstance(module, BlockChunk):
            inner = module.named_children()
            named += [(f"blocks.{name}.{i}", block) for i, block in inner if not isinstance(block, nn.Identity)]
        else:
            named.append((f"blocks.{name}", module))
    return named
