"""A transformer block of the engine: six steps, LayerScale folded away, the residual stream updated in place.

    x += proj(attention(qkv(norm1(x))))        gamma of LayerScale is in the weight and bias of proj
    x += down(act(up(norm2(x))))               and of down; act is GELU or SwiGLU, in the epilogue of up

`NormFreeBlock` has the norms in qkv and up, too, which then read the stream itself. Which implementation of a step
runs is for the tables in `ops/` to say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.block import Block
from dinov2_fast.inference.fold import (
    BareNorm,
    FoldedModule,
    FoldedNorm,
    expect,
    fold_linear,
    fold_norm_linear,
    gamma_of,
)
from dinov2_fast.layers import GELU, Attention, DropPath, Mlp, SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.ops.attention_pool import cls_attention
from dinov2_fast.ops.linear import interleave
from dinov2_fast.timm_layers import TimmAttention


def _plain_attention(attention: nn.Module, name: str) -> Attention:
    """`attention`, if it is softmax attention alone."""
    known: Attention = expect(attention, name, Attention, TimmAttention)
    if isinstance(known, TimmAttention):
        for norm in ("q_norm", "k_norm"):
            expect(getattr(known, norm), f"{name}.{norm}", nn.Identity)
    return known


class FoldedAttention(FoldedModule):
    """Self-attention, with the LayerScale behind it."""

    def __init__(self, attention: Attention, gamma: Tensor | None, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = fold_linear(attention.qkv, f"{name}.qkv", dtype)
        self.proj = fold_linear(attention.proj, f"{name}.proj", dtype, gamma)

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., 3, heads, head_dim)."""
        return self._modules["qkv"].forward(x).unflatten(-1, (3, self.num_heads, -1))

    def add_to_(self, stream: Tensor, x: Tensor, seq_lens: tuple[int, ...] | None) -> None:
        """Adds the branch for the norm `x` to `stream`, both (batch, seq_len, hidden); see `Attention.forward`."""
        self._modules["proj"].add_to_(stream, self.attend(self.project_qkv(x), seq_lens).flatten(-2))

    def attend(self, qkv: Tensor, seq_lens: tuple[int, ...] | None) -> Tensor:
        """What `proj` reads, (batch, seq_len, heads, head_dim)."""
        return ops.attention(qkv) if seq_lens is None else ops.attention_varlen(qkv[0], seq_lens)[None]


class FoldedMlp(FoldedModule):
    """Feed-forward network, with the LayerScale behind it."""

    def __init__(self, mlp: nn.Module, gamma: Tensor | None, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        expect(mlp, name, Mlp, SwiGLUFFN, SwiGLUFFNFused)
        self.gated = isinstance(mlp, SwiGLUFFN)
        if isinstance(mlp, SwiGLUFFN):
            self.up = fold_linear(mlp.w12, f"{name}.w12", dtype, order=interleave)
            self.down = fold_linear(mlp.w3, f"{name}.w3", dtype, gamma)
        elif isinstance(mlp, Mlp):
            expect(mlp.act, f"{name}.act", GELU)
            self.up = fold_linear(mlp.fc1, f"{name}.fc1", dtype)
            self.down = fold_linear(mlp.fc2, f"{name}.fc2", dtype, gamma)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        """Adds the branch for the norm `x` to `stream`, both (..., hidden)."""
        up = self._modules["up"]
        self._modules["down"].add_to_(stream, up.swiglu(x) if self.gated else up.gelu(x))


class FoldedBlock(FoldedModule):
    """One block.

    Args:
        block: the model's.
        name: of it, for errors.
        dtype: of the linears and what they read.
        stream: of the residual stream.
    """

    def __init__(self, block: Any, name: str, dtype: torch.dtype, stream: torch.dtype) -> None:
        super().__init__()
        expect(block, name, Block)
        for part in ("drop_path1", "drop_path2"):
            expect(getattr(block, part), f"{name}.{part}", DropPath, nn.Identity)
        attention = _plain_attention(block.attn, f"{name}.attn")
        self.norm1 = FoldedNorm(block.norm1, f"{name}.norm1", dtype, stream)
        self.attn = FoldedAttention(attention, gamma_of(block.ls1, f"{name}.ls1"), f"{name}.attn", dtype)
        self.norm2 = FoldedNorm(block.norm2, f"{name}.norm2", dtype, stream)
        self.mlp = FoldedMlp(block.mlp, gamma_of(block.ls2, f"{name}.ls2"), f"{name}.mlp", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for the residual stream `x` (batch, seq_len, hidden), which is left as it is."""
        return self.update_(x.clone())

    def row_statistics(self, x: Tensor) -> Tensor | None:
        """What `update_` needs to know of the stream and keeps up to date, made anew; None: nothing."""
        return None

    def update_(self, x: Tensor, seq_lens: tuple[int, ...] | None = None, statistics: Tensor | None = None) -> Tensor:
        """`forward`, in place; with `seq_lens`, `x` (1, total_tokens, hidden) holds sequences of those lengths.

        `statistics` are those that the block before has left, or None.
        """
        self._modules["attn"].add_to_(x, self._modules["norm1"].forward(x), seq_lens)
        self._modules["mlp"].add_to_(x, self._modules["norm2"].forward(x))
        return x

    def first_token(self, x: Tensor) -> Tensor:
        """The CLS token alone of the block's output, (batch, hidden), without computing the others.

        The keys and values of the other tokens are never made, see `ops.attention_pool`.
        """
        norm, qkv = self.norm1, self.attn.qkv
        weight, bias = norm.weight.to(norm.dtype), norm.bias.to(norm.dtype)
        out = cls_attention(x.to(norm.dtype), weight, bias, norm.eps, qkv.weight, qkv.bias, self.attn.num_heads)
        row = x[:, 0].clone()
        self.attn.proj.add_to_(row, out)
        self.mlp.add_to_(row, self.norm2(row))
        return row

    def op_names(self) -> set[str]:
        """The ops that it runs, but for the CLS token's own."""
        activation = "linear_swiglu" if self.mlp.gated else "linear_gelu"
        return {"layer_norm", "linear", "attention", "attention_varlen", activation, "linear_residual_"}


class NormFreeBlock(FoldedBlock):
    """A block whose norms are folded into qkv and up, so that no pass over the stream makes them.

    The linears that write the stream leave the statistics of its rows, by which those that read it divide their
    products. What needs a norm of its own, the CLS token alone or the weights of attention, gets a bare one.

    Args:
        block, name, dtype: as for `FoldedBlock`; the stream is in `dtype` as well.
        for_cls: whether the block runs for the CLS token alone at times.
    """

    def __init__(self, block: Any, name: str, dtype: torch.dtype, for_cls: bool) -> None:
        super().__init__(block, name, dtype, dtype)
        self.for_cls = for_cls
        self.norm1 = BareNorm(block.norm1, f"{name}.norm1", dtype, dtype)
        self.norm2 = BareNorm(block.norm2, f"{name}.norm2", dtype, dtype)
        self.attn.qkv = fold_norm_linear(block.attn.qkv, f"{name}.attn.qkv", dtype, block.norm1)
        up, order = ("w12", interleave) if self.mlp.gated else ("fc1", None)
        self.mlp.up = fold_norm_linear(getattr(block.mlp, up), f"{name}.mlp.{up}", dtype, block.norm2, order)

    def row_statistics(self, x: Tensor) -> Tensor:
        return ops.row_statistics(x)

    def update_(self, x: Tensor, seq_lens: tuple[int, ...] | None = None, statistics: Tensor | None = None) -> Tensor:
        attn, mlp = self.attn, self.mlp
        if statistics is None:
            statistics = self.row_statistics(x)
        qkv = attn.qkv(x, statistics).unflatten(-1, (3, attn.num_heads, -1))
        attn.proj.add_with_statistics_(x, statistics, attn.attend(qkv, seq_lens).flatten(-2))
        up: Any = mlp.up  # a NormLinear
        hidden = up.swiglu(x, statistics) if mlp.gated else up.gelu(x, statistics)
        mlp.down.add_with_statistics_(x, statistics, hidden)
        return x

    def op_names(self) -> set[str]:
        activation = "norm_linear_swiglu" if self.mlp.gated else "norm_linear_gelu"
        names = {"row_statistics", "norm_linear", activation, "linear_residual_statistics_"}
        names |= {"attention", "attention_varlen"}
        return names | super().op_names() if self.for_cls else names
