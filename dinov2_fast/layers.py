"""The parts of DINOv2: patch embedding, attention, feed-forward networks, LayerScale, stochastic depth.

Module and parameter names are the reference's (facebookresearch/dinov2, dinov2/layers). The computation is in `ops/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.torch_private import has_any_global_hook, is_traced


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


# In a graph of torch.fx a check is one node. It stays in the graph and raises when the graph runs.
@torch.fx.wrap
@torch.fx.node.has_side_effect
def check_is_tensor(x: object) -> None:
    """Raises `TypeError` if `x` is not a tensor."""
    if not isinstance(x, Tensor):
        raise InvalidTypeError(
            f"The model takes a tensor (batch, channels, height, width), got {type(x).__name__}. "
            "Dinov2ImageProcessor turns images and arrays into one."
        )


@torch.fx.wrap
@torch.fx.node.has_side_effect
def check_images(x: Tensor, in_chans: int, patch_size: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raises `ValueError` or `TypeError` if `x` is not a batch of images with `in_chans` channels and whole patches."""
    if x.ndim != 4:
        raise InvalidValueError(
            f"The model takes a batch of images (batch, {in_chans}, height, width), got a tensor of shape "
            f"{tuple(x.shape)}." + (" Add a batch dimension with x[None]." if x.ndim == 3 else "")
        )
    if not x.is_floating_point():
        raise InvalidTypeError(
            f"The model takes normalised floating-point images, got {x.dtype}. "
            "Use dinov2_fast.Dinov2ImageProcessor, or divide by 255 and normalise."
        )
    if x.shape[1] != in_chans:
        raise InvalidValueError(f"The model takes {in_chans} channels, got {x.shape[1]} (shape {tuple(x.shape)}).")
    for name, size, patch, step in zip(("height", "width"), x.shape[2:], patch_size, stride, strict=True):
        if (size % patch != 0 and (size - patch) % step != 0) or size < patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            nearest = f"{below} or {above}" if below else f"{above}"
            raise InvalidValueError(
                f"Input image {name} {size} is not a multiple of patch {name} {patch}. Resize, crop or pad "
                f"it to {nearest}."
            )


def check_masks(masks: Tensor, x: Tensor) -> Tensor:
    """`masks` if it is a bool mask for the patches `x` (batch, patches, hidden); raises otherwise."""
    if masks.shape != x.shape[:2]:
        raise InvalidValueError(
            f"masks must be (batch, patches) = {tuple(x.shape[:2])} for these images, got {tuple(masks.shape)}."
        )
    if masks.dtype != torch.bool:
        raise InvalidTypeError(f"masks must be bool (True: replace the patch by the mask token), got {masks.dtype}.")
    return masks


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to a token: (batch, channels, H, W) -> (batch, patches, hidden).

    There are ``(H - patch_size) // stride + 1`` rows of patches, or H / patch_size without overlap. The same holds for
    columns. With ``flatten_embedding=False`` the result is (batch, rows, columns, hidden).

    Raises (in `forward`):
        ValueError: the number of dimensions or channels is wrong, or a side is not a multiple of the patch size.
        TypeError: the tensor holds integers.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = to_pair(img_size)
        self.patch_size = to_pair(patch_size)
        self.patches_resolution = (
            self.img_size[0] // self.patch_size[0],
            self.img_size[1] // self.patch_size[1],
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next, down and across: that of `proj`. See `DinoVisionTransformer.stride`."""
        return to_pair(getattr(self.proj, "stride", self.patch_size))

    @stride.setter
    def stride(self, stride: int | tuple[int, int]) -> None:
        steps = to_pair(stride)
        if not all(1 <= step <= patch for step, patch in zip(steps, self.patch_size, strict=True)):
            raise InvalidValueError(f"stride={stride} is out of range: take 1 to the patch size, {self.patch_size}.")
        self.proj.stride = steps

    def check(self, x: Tensor) -> None:
        """Raises if `x` is not a batch of images that this model takes."""
        in_chans = getattr(self.proj, "in_channels", self.in_chans)  # users replace `proj` for other channels
        check_images(x, in_chans, self.patch_size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        x = self.proj(x)  # (batch, hidden, rows, columns)
        if not self.flatten_embedding:
            return self.norm(x.permute(0, 2, 3, 1))
        return self.norm(x.flatten(2).transpose(1, 2))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class computes: it has a hook, or a `forward` of its own."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in module.__dict__ or has_any_global_hook()


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, computed by the op `layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    """Multiplies each channel by a learned `gamma` (hidden,)."""

    def __init__(self, dim: int, init_values: float | Tensor = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.gamma.copy_(torch.as_tensor(self.init_values, device=self.gamma.device).expand_as(self.gamma))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth per image: zeroes a branch with probability `drop_prob`, else divides it by 1 - `drop_prob`."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def scale(self, x: Tensor) -> Tensor | None:
        """The factor of each image, (batch,); None if nothing is dropped."""
        if not self.training or not self.drop_prob:
            return None
        keep = 1 - self.drop_prob
        scale = x.new_empty(x.shape[0]).bernoulli_(keep)
        return scale / keep if keep > 0 else scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale.view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Dropout(nn.Dropout):
    """`nn.Dropout` that calls torch only if it drops something: the call takes the host as long as a small linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training and self.p else x


class GELU(nn.GELU):
    """The exact GELU, computed by the op `activation`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.activation(x, "gelu")


def attend(qkv: Tensor, dropout_p: float, seq_lens: tuple[int, ...] | None) -> Tensor:
    """Attention of (batch, seq_len, 3, heads, head_dim); with `seq_lens`, of packed sequences in a batch of one."""
    if seq_lens is None:
        return ops.attention(qkv, dropout_p=dropout_p)
    return ops.attention(qkv[0], seq_lens=seq_lens, dropout_p=dropout_p)[None]


class Attention(nn.Module):
    """Multi-head self-attention. `qkv` projects to queries, keys and values, each with all heads."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InvalidValueError(
                f"The hidden size {dim} is not a multiple of the number of attention heads {num_heads}."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop: Any = attn_drop  # the rate, as in the reference; timm has a module
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = Dropout(proj_drop)

    @property
    def scale(self) -> float:
        """The factor of the scores, 1 / sqrt(head_dim). It cannot be set."""
        return (self.dim // self.num_heads) ** -0.5

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., 3, heads, head_dim)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.dim // self.num_heads))

    def forward(self, x: Tensor, seq_lens: tuple[int, ...] | None = None) -> Tensor:
        """Attention within each image of `x` (batch, seq_len, hidden).

        With `seq_lens`, `x` is (1, total_tokens, hidden) and holds sequences of those lengths, one after the other.
        """
        return self.proj_drop(self.proj(self.attend(self.project_qkv(x), seq_lens).flatten(-2)))

    def attend(self, qkv: Tensor, seq_lens: tuple[int, ...] | None = None) -> Tensor:
        """The input of `proj` (batch, seq_len, heads, head_dim), from the output of `project_qkv`."""
        return attend(qkv, self.attn_drop if self.training else 0.0, seq_lens)


MemEffAttention = Attention  # the reference's name for the class its models use


class Mlp(nn.Module):
    """Linear, activation, linear, with dropout after both linears. The activation is the exact GELU by default."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop = Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        fc1, act, drop = self.fc1, self.act, self.drop
        hidden = fc1(x)
        hidden = ops.activation(hidden, "gelu", overwrite=True) if _owns_hidden(fc1, act) else act(hidden)
        return drop(self.fc2(drop(hidden)))


def _owns_hidden(fc1: nn.Module, act: nn.Module) -> bool:
    """Whether only this module has the output of `fc1`, so that the GELU may overwrite it.

    On a CPU that saved 6 % of a forward pass (ViT-S, 518 px, batch 1, 2 cores of an AMD EPYC), because new pages for
    the largest tensor of a block are slow to get.
    """
    plain = type(fc1) is nn.Linear and type(act) is GELU
    recorded = torch.is_grad_enabled() or is_traced()
    return plain and not recorded and not has_hooks(fc1) and not has_hooks(act)


class SwiGLUFFN(nn.Module):
    """Gated feed-forward network: ``w3(silu(x1) * x2)``, where x1 and x2 are the halves of ``w12(x)``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,  # no effect, as in the reference
        drop: float = 0.0,  # no effect, as in the reference
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(ops.activation(self.w12(x), "swiglu"))


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` with a hidden size of two thirds of `hidden_features`, rounded up to a multiple of 8."""

    def __init__(self, in_features: int, hidden_features: int | None = None, **kwargs: Any) -> None:
        hidden_features = (int((hidden_features or in_features) * 2 / 3) + 7) // 8 * 8
        super().__init__(in_features, hidden_features, **kwargs)


def _no_ffn(**kwargs: Any) -> nn.Module:
    return nn.Identity()


FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,  # as in the reference, which uses the fused class for both names
    "swiglufused": SwiGLUFFNFused,
    "identity": _no_ffn,
}
