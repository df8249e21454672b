"""A backbone of the engine: the model's own class, on folded blocks and a folded patch embedding.

Being of the model's class it has its methods, arguments and outputs; what differs is how tokens are made and run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.block import _pack, _unpack
from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.huggingface.modeling import Dinov2Model, Dinov2PreTrainedBackbone
from dinov2_fast.inference import cuda_graphs, packing
from dinov2_fast.inference.block import FoldedBlock
from dinov2_fast.inference.fold import (
    FoldedLinear,
    FoldedModule,
    FoldedNorm,
    Layout,
    expect,
    fold_normalization,
    frozen,
    hollow,
    layout_for,
    rounded,
)
from dinov2_fast.inference.fp8 import Calibration, Fp8Block, scales_of
from dinov2_fast.layers import LayerNorm, PatchEmbed, SwiGLUFFN, check_is_tensor
from dinov2_fast.model import BlockChunk, DinoVisionTransformer, _check_masks
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.choices import BackendChoice, backend_choices
from dinov2_fast.timm_adapter import TimmVisionTransformer, _refuse_masks
from dinov2_fast.timm_layers import TimmPatchEmbed, check_img_size, pad_to_patches
from dinov2_fast.torch_private import is_traced

ALIGNMENT = 16  # a patch's values are padded to a multiple of this, for the loads of matrix kernels (588 to 592)
CACHED_SIZES = 16  # sizes of images whose position embeddings are kept


@dataclass(frozen=True)
class Plan:
    """What the engine was asked for.

    `dtype` is that of linears and activations, `stream` of the residual stream; `outputs` is "auto", "cls" or "all";
    `mean` and `std` are those with which uint8 images are normalised; `max_tokens` of a list run at a time, None
    for all. With `e4m3` the linears of blocks are in e4m3, but for the blocks `skip_layers`, with the scales of
    `calibration`. With `follow_weights` changes of the model are noticed.
    """

    dtype: torch.dtype
    stream: torch.dtype
    outputs: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_tokens: int | None = None
    e4m3: bool = False
    skip_layers: tuple[int, ...] = ()
    calibration: Calibration | None = None
    cuda_graphs: bool | str = "auto"
    follow_weights: bool = True


class FoldedPatchEmbed(FoldedModule, PatchEmbed):
    """The patch embedding as one matrix product, for normalised images and for uint8 ones as they are decoded."""

    proj: FoldedLinear  # type: ignore[assignment]  # a convolution in the model
    stride: Any = None  # of the model's convolution, (down, across)
    proj_uint8: FoldedLinear | None  # with the normalisation folded in; None if that is for other channels

    @classmethod
    def of(cls, module: nn.Module, plan: Plan) -> FoldedPatchEmbed:
        convolution = _plain_convolution(expect(module, "patch_embed", PatchEmbed, TimmPatchEmbed))
        made = hollow(module, cls)
        made.in_chans, made.stride = convolution.in_channels, module.stride
        weight, bias = convolution.weight.double(), convolution.bias
        padded_to = -(-weight[0].numel() // ALIGNMENT) * ALIGNMENT
        rows = F.pad(weight.flatten(1), (0, padded_to - weight[0].numel()))
        constant = torch.zeros(len(rows)).to(rows) if bias is None else bias.double()
        made.proj = FoldedLinear(rounded(rows, plan.dtype), rounded(constant, torch.float32))
        made.proj_uint8 = None
        if len(plan.mean) == made.in_chans:
            mean, std = (torch.tensor(values).to(rows) for values in (plan.mean, plan.std))
            folded = fold_normalization(weight.detach(), bias, mean, std, plan.dtype, padded_to=padded_to)
            made.proj_uint8 = FoldedLinear(folded[0], rounded(folded[1], torch.float32))
        return made

    def folded(self, x: Tensor) -> FoldedLinear:
        """The projection for images of the dtype of `x`.

        Raises:
            ValueError: uint8 images, but mean and std are those of another number of channels.
        """
        if x.dtype != torch.uint8:
            return self.proj
        if self.proj_uint8 is None:
            raise InvalidValueError(
                f"uint8 images of {self.in_chans} channels need mean and std of {self.in_chans} values: give them to "
                "optimize_for_inference."
            )
        return self.proj_uint8

    def project(self, x: Tensor) -> Tensor:
        """Patches without the bias, which `folded` holds: (batch, patches, hidden)."""
        self.check(torch.empty(x.shape, device="meta") if x.dtype == torch.uint8 else x)
        weight = self.folded(x).weight
        rows = ops.patches(x, self.patch_size[0], stride=self.stride, padded_to=weight.shape[1], dtype=weight.dtype)
        return ops.linear(rows, weight, None)

    def forward(self, x: Tensor) -> Tensor:
        patches, bias = self.project(x), self.folded(x).bias
        return patches if bias is None else patches + bias.to(patches.dtype)


def _plain_convolution(module: PatchEmbed) -> nn.Conv2d:
    """The convolution of a patch embedding that is a matrix product of patches.

    Raises:
        TypeError: it is not.
    """
    convolution = expect(module.proj, "patch_embed.proj", nn.Conv2d)
    expect(module.norm, "patch_embed.norm", nn.Identity)
    size = module.patch_size
    cuts = convolution.kernel_size == size and size[0] == size[1]
    plain = convolution.padding == (0, 0) and convolution.dilation == (1, 1) and convolution.groups == 1
    if not (cuts and plain and (module.flatten_embedding or type(module) is TimmPatchEmbed)):
        raise InvalidTypeError(f"patch_embed.proj is {convolution}; the engine needs square patches of {size}.")
    return convolution


class FoldedBackbone(DinoVisionTransformer):
    """What a folded backbone of any face does differently; see :func:`fold_backbone`.

    `cls_only` says whether a call that needs the CLS token alone runs the last block for it alone.
    """

    cls_only: bool
    gated: bool  # whether the MLPs have SwiGLU
    plan: Plan
    layouts: dict[torch.dtype, Layout]  # of linears, by the dtype of their operands
    _sizes: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        check_is_tensor(x)
        patches = self.patch_embed.project(x)  # type: ignore[operator]
        first, positions, biased = self._tokens_of_size(x, patches.shape[1])
        tokens = patches + biased
        if masks is not None:
            if self.mask_token is None:
                raise InvalidValueError("masks were given, but this model has no mask token.")
            masked = (self.mask_token + positions).to(tokens.dtype)
            tokens = torch.where(_check_masks(masks, tokens).unsqueeze(-1), masked, tokens)
        return torch.cat((first.expand(len(x), -1, -1), tokens), dim=1)

    def _tokens_of_size(self, x: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """What tokens are made of for images of one size.

        Returns:
            CLS with its position and the registers, (1, 1 + registers, hidden), and positions with the bias of the
            projection, (patches, hidden), in the dtype of the stream; between them positions alone, in fp32.
        """
        height, width = x.shape[-2:]
        if is_traced():
            return self._make_tokens(x, patches)
        key = (height, width, x.dtype == torch.uint8, self.cls_token.device)
        if cuda_graphs.is_captured(x):
            return cuda_graphs.held(self._sizes.get(key)) or self._make_tokens(x, patches)
        if key not in self._sizes:
            if len(self._sizes) >= CACHED_SIZES:
                self._sizes.clear()
            with torch.inference_mode(False), torch.no_grad():
                made = self._make_tokens(x, patches)
            if x.is_cuda:
                torch.cuda.current_stream(x.device).synchronize()  # calls on other streams will read them, too
            self._sizes[key] = made
        return self._sizes[key]

    def _make_tokens(self, x: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        height, width = x.shape[-2:]
        positions = self.interpolate_pos_encoding(self.cls_token.expand(1, 1 + patches, -1), height, width)
        positions = positions.expand(1, 1 + patches, -1)  # a method that somebody set may leave that to broadcasting
        first = self.cls_token + positions[:, :1]
        if self.register_tokens is not None:
            first = torch.cat((first, self.register_tokens), dim=1)
        biased = positions[0, 1:] + self.patch_embed.folded(x).bias  # type: ignore[operator]
        return first.to(self.plan.stream), positions[0, 1:], biased.to(self.plan.stream)

    def _run_blocks(self, x: Any) -> Any:
        """The blocks in place: nobody else holds what `prepare_tokens_with_masks` returns."""
        return _update_list(x, self.blocks) if isinstance(x, list) else _update_(x, self.blocks)

    def _run_for_cls(self, x: Tensor) -> Tensor:
        """The CLS token after the last block, (batch, 1, hidden)."""
        *blocks, last = self.blocks
        return last.first_token(_update_(x, blocks)).unsqueeze(1)

    def _run_list_for_cls(self, x_list: list[Tensor]) -> Tensor:
        """The CLS tokens of all batches after the last block, (images, hidden)."""
        *blocks, last = self.blocks
        return torch.cat([last.first_token(x) for x in _update_list(x_list, blocks)])

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[dict[str, Tensor | None]]:
        return packing.forward_features_list(self, x_list, masks_list)

    def cls_tokens(self, x_list: list[Tensor]) -> list[Tensor]:
        """The normalised CLS tokens of each batch of a list, (batch, hidden); see :mod:`.packing`."""
        return packing.cls_tokens(self, x_list)

    def backends(self) -> list[BackendChoice]:
        """Which implementation of each op of the engine runs, and why."""
        device, dtype = self.cls_token.device, self.plan.dtype
        names = {dtype: {"patches", "linear.none", "layer_norm.plain"}, E4M3: set()}
        if self.cls_only:
            names[dtype].add("attention_pool")
        for block in self.blocks:
            for of, found in block.op_names().items():
                names[of] |= found
        return [row for of in names for row in backend_choices(device, of) if row.name in names[row.dtype]]


def _update_(x: Tensor, blocks: Any, seq_lens: tuple[int, ...] | None = None) -> Tensor:
    """Runs the first blocks in place, and adds at the end what they have left out of the stream."""
    for block in blocks:
        block.update_(x, seq_lens)
    return blocks[-1].deferred.restore_(x) if blocks else x


def _update_list(x_list: list[Tensor], blocks: Any) -> list[Tensor]:
    """`_update_` of batches that differ in length, as one sequence."""
    if len(x_list) == 1:
        return [_update_(x_list[0], blocks)]
    packed, seq_lens = _pack(x_list)
    if seq_lens:  # there may be empty batches alone
        _update_(packed, blocks, seq_lens)
    return _unpack(packed, [x.shape for x in x_list])


class FoldedVisionTransformer(FoldedBackbone):
    """The reference's face."""

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        if is_training or not self.cls_only:
            return super().forward(x, masks, is_training)
        if isinstance(x, list):
            raise InvalidTypeError(
                "A list of batches has one result for each: use cls_tokens, forward_features, or is_training=True."
            )
        x = self._run_for_cls(self.prepare_tokens_with_masks(x, masks))
        return self.head(self.norm(x)[:, 0])


class FoldedEncoder(FoldedBackbone, Dinov2PreTrainedBackbone):
    """The Hugging Face face."""

    def encode(
        self, x: Tensor, hidden_states: Collection[int], output_attentions: Any, blocks: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor], tuple[Tensor | None, ...] | None]:
        if hidden_states or output_attentions or blocks is not None:
            return super().encode(x, hidden_states, output_attentions, blocks)
        return self._run_for_cls(x) if self.cls_only else self._run_blocks(x), {}, None


class FoldedTimmVisionTransformer(FoldedBackbone, TimmVisionTransformer):
    """timm's face."""

    def embed(self, x: Tensor) -> Tensor:
        check_is_tensor(x)
        padded = self.dynamic_img_pad and any(size % self.patch_size for size in x.shape[-2:])
        if padded and x.dtype == torch.uint8:
            raise InvalidValueError(
                f"uint8 images of {tuple(x.shape[-2:])} pixels cannot be padded to multiples of {self.patch_size}: "
                "timm pads after normalising. Give normalised images, or other sizes."
            )
        if not self.dynamic_img_size:
            check_img_size(x, self.patch_embed.img_size)
        return self.prepare_tokens_with_masks(pad_to_patches(x, self.patch_embed.patch_size) if padded else x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]  # timm's signature
        if not self.cls_only:
            return super().forward(x, attn_mask, is_causal)
        _refuse_masks(attn_mask, is_causal)
        return self.forward_head(self.norm(self._run_for_cls(self.embed(x))))

    def _refuse_surgery(self, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError("This changes the model: call it there, and the engine will follow.")

    reset_classifier = set_input_size = prune_intermediate_layers = _refuse_surgery


@cache
def _folded_class(kind: Any) -> type[FoldedBackbone]:
    if kind is DinoVisionTransformer:
        return FoldedVisionTransformer
    if kind is TimmVisionTransformer:
        return FoldedTimmVisionTransformer
    return type(f"Folded{kind.__name__}", (FoldedEncoder, kind), {})


def layouts_for(plan: Plan, device: torch.device, gated: bool) -> dict[torch.dtype, Layout]:
    """What the linears that would run now want, by the dtype of their operands; `gated` models have SwiGLU."""
    dtypes = (plan.dtype, E4M3) if plan.e4m3 else (plan.dtype,)
    return {dtype: layout_for(device, dtype, plan.stream, gated) for dtype in dtypes}


def fold_backbone(model: DinoVisionTransformer, plan: Plan, device: torch.device) -> FoldedBackbone:
    """The backbone of the engine for `model`, of a subclass of its class.

    Args:
        model: the model's backbone.
        plan: what to make of it.
        device: where it will run; the result is on that of the model.

    Raises:
        TypeError: a part of the model is not one that can be folded.
    """
    kind: Any = type(model)
    made = hollow(model, _folded_class(kind))
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
    made.blocks = nn.ModuleList(_fold_blocks(model, plan, made.layouts))
    made.chunked_blocks = False
    for name, child in model.named_children():
        if name in ("norm", "fc_norm") and type(child) in (LayerNorm, nn.LayerNorm):
            made.add_module(name, FoldedNorm(child, name, plan.dtype, plan.stream))
        elif name in ("pos_drop", "patch_drop", "norm_pre"):  # of timm's, between embedding and blocks
            expect(child, name, nn.Identity, nn.Dropout)
        elif name not in ("patch_embed", "blocks"):
            made.add_module(name, frozen(child, plan.dtype))
    return made


def _gives_cls_alone(model: DinoVisionTransformer) -> bool:
    """Whether what a plain call returns is made of the CLS token alone."""
    return not isinstance(model, Dinov2Model) and getattr(model, "global_pool", "token") == "token"


def _fold_blocks(model: DinoVisionTransformer, plan: Plan, layouts: dict[torch.dtype, Layout]) -> list[FoldedBlock]:
    """The blocks, in one list also where the model groups them. If one defers its biases, all do."""
    named = []
    for name, module in model.blocks.named_children():
        if isinstance(module, BlockChunk):
            inner = module.named_children()
            named += [(f"{name}.{i}", block) for i, block in inner if not isinstance(block, nn.Identity)]
        else:
            named.append((name, module))
    missing = sorted(set(plan.skip_layers) - set(range(len(named))))
    if missing:
        raise InvalidValueError(
            f"skip_layers: there is no block {', '.join(map(str, missing))}; the blocks are 0 to {len(named) - 1}."
        )
    scales = scales_of(plan.calibration, len(named))
    folded: list[FoldedBlock] = []
    for i, (name, block) in enumerate(named):
        arguments, layout = (block, f"blocks.{name}", plan.dtype, plan.stream), layouts[plan.dtype]
        if not plan.e4m3 or i in plan.skip_layers:
            folded.append(FoldedBlock(*arguments, layout))
            continue
        for_cls = None
        if plan.outputs != "all" and i + 1 == len(named):
            for_cls = FoldedBlock(*arguments, layout)
            if layout.defers_bias:
                for_cls.defer_biases(None)
        folded.append(Fp8Block(*arguments, layouts[E4M3], scales[i], for_cls))
    if any(layouts[E4M3 if isinstance(block, Fp8Block) else plan.dtype].defers_bias for block in folded):
        left_out = None
        for made in folded:
            left_out = made.defer_biases(left_out)
    return folded
