"""A transformer block of the engine: six steps, LayerScale folded away, the residual stream updated in place.

    x += proj(attention(qkv(norm1(x))))        gamma of LayerScale is in the weight and bias of proj
    x += down(act(up(norm2(x))))               and of down; act is GELU or SwiGLU, in the epilogue of up

Which implementation of a step runs is for the tables in `ops/` to say. Where proj and down have no room for a bias, x
lacks the biases so far, and the norms add them (:class:`Deferred`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.block import Block
from dinov2_fast.inference.fold import FoldedModule, FoldedNorm, Layout, expect, fold_linear, gamma_of
from dinov2_fast.layers import GELU, Attention, DropPath, Mlp, SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.ops.attention import ATTENTION
from dinov2_fast.ops.dispatch import BoundOp
from dinov2_fast.timm_layers import TimmAttention


def _plain_attention(attention: nn.Module, name: str) -> Attention:
    """`attention`, if it is softmax attention alone."""
    known: Attention = expect(attention, name, Attention, TimmAttention)
    if isinstance(known, TimmAttention):
        for norm in ("q_norm", "k_norm"):
            expect(getattr(known, norm), f"{name}.{norm}", nn.Identity)
    return known


class FoldedAttention(FoldedModule):
    """Self-attention, with the LayerScale behind it.

    `out_scale` is that of what `attend` gives in e4m3; None for the dtype of `qkv`.
    """

    out_scale: float | None = None

    def __init__(self, attention: Attention, gamma: Tensor | None, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = fold_linear(attention.qkv, f"{name}.qkv", dtype)
        self.proj = fold_linear(attention.proj, f"{name}.proj", dtype, gamma)
        self.bind()

    def bind(self) -> None:
        self._batch, self._varlen = BoundOp(ATTENTION, "batch"), BoundOp(ATTENTION, "varlen")

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., 3, heads, head_dim)."""
        return self._modules["qkv"].forward(x).unflatten(-1, (3, self.num_heads, -1))

    def add_to_(self, stream: Tensor, x: Tensor, seq_lens: tuple[int, ...] | None) -> None:
        """Adds the branch for the norm `x` to `stream`, both (batch, seq_len, hidden); see `Attention.forward`."""
        self._modules["proj"].add_to_(stream, self.attend(self.project_qkv(x), seq_lens).flatten(-2))

    def attend(self, qkv: Tensor, seq_lens: tuple[int, ...] | None) -> Tensor:
        """What `proj` reads, (batch, seq_len, heads, head_dim)."""
        if seq_lens is None:
            return self._batch(qkv, None, 0.0, self.out_scale)
        return self._varlen(qkv[0], seq_lens, 0.0, self.out_scale)[None]


class FoldedMlp(FoldedModule):
    """Feed-forward network, with the LayerScale behind it."""

    def __init__(self, mlp: nn.Module, gamma: Tensor | None, name: str, dtype: torch.dtype, interleaved: bool) -> None:
        super().__init__()
        expect(mlp, name, Mlp, SwiGLUFFN, SwiGLUFFNFused)
        self.gated = isinstance(mlp, SwiGLUFFN)
        if isinstance(mlp, SwiGLUFFN):
            self.up = fold_linear(mlp.w12, f"{name}.w12", dtype, interleaved=interleaved)
            self.down = fold_linear(mlp.w3, f"{name}.w3", dtype, gamma)
        elif isinstance(mlp, Mlp):
            expect(mlp.act, f"{name}.act", GELU)
            self.up = fold_linear(mlp.fc1, f"{name}.fc1", dtype)
            self.down = fold_linear(mlp.fc2, f"{name}.fc2", dtype, gamma)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        """Adds the branch for the norm `x` to `stream`, both (..., hidden)."""
        up = self._modules["up"]
        self._modules["down"].add_to_(stream, up.swiglu(x) if self.gated else up.gelu(x))


class Deferred(FoldedModule):
    """The biases that `proj` and `down` have left out of the residual stream where a block reads it, and at its end.

    Each is (hidden,), in fp32, or None for none.
    """

    def __init__(self, norm1: Tensor | None = None, norm2: Tensor | None = None, end: Tensor | None = None) -> None:
        super().__init__()
        for name, biases in (("norm1", norm1), ("norm2", norm2), ("end", end)):
            self.register_buffer(name, None if biases is None else biases.float())

    def restore_(self, x: Tensor) -> Tensor:
        """Adds to the stream `x` behind the block what it lacks there."""
        end = self._buffers["end"]
        return x if end is None else x.add_(end)


class FoldedBlock(FoldedModule):
    """One block.

    Args:
        block: the model's.
        name: of it, for errors.
        dtype: of the linears and what they read.
        stream: of the residual stream.
        layout: of the linears.
    """

    def __init__(self, block: Any, name: str, dtype: torch.dtype, stream: torch.dtype, layout: Layout) -> None:
        super().__init__()
        expect(block, name, Block)
        for part in ("drop_path1", "drop_path2"):
            expect(getattr(block, part), f"{name}.{part}", DropPath, nn.Identity)
        attention = _plain_attention(block.attn, f"{name}.attn")
        self.norm1 = FoldedNorm(block.norm1, f"{name}.norm1", dtype, stream)
        self.attn = FoldedAttention(attention, gamma_of(block.ls1, f"{name}.ls1"), f"{name}.attn", dtype)
        self.norm2 = FoldedNorm(block.norm2, f"{name}.norm2", dtype, stream)
        self.mlp = FoldedMlp(block.mlp, gamma_of(block.ls2, f"{name}.ls2"), f"{name}.mlp", dtype, layout.interleaved)
        self.deferred, self.deferred_alone = Deferred(), Deferred()

    def defer_biases(self, before: Tensor | None) -> Tensor | None:
        """Takes the biases out of `proj` and `down`.

        Args:
            before: the sum of those that the blocks before have left out of the stream, (hidden,), fp64, or None.

        Returns:
            The same behind this block.
        """
        own = [_take_bias(linear) for linear in (self.attn.proj, self.mlp.down)]
        norm2 = _sum(before, own[0])
        end = _sum(norm2, own[1])
        self.deferred, self.deferred_alone = Deferred(before, norm2, end), Deferred(None, own[0], _sum(*own))
        return end

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for the residual stream `x` (batch, seq_len, hidden), which is left as it is."""
        return self.deferred_alone.restore_(self.update_(x.clone(), None, self.deferred_alone))

    def update_(self, x: Tensor, seq_lens: tuple[int, ...] | None = None, deferred: Deferred | None = None) -> Tensor:
        """Adds both branches to the stream `x` in place.

        The norms add the biases that `x` lacks, by default those that all blocks up to here have left out. Behind the
        block `x` lacks `deferred.end`. With `seq_lens`, `x` (1, total_tokens, hidden) holds sequences of those lengths.
        """
        parts = self._modules
        lacking = (deferred or parts["deferred"])._buffers
        parts["attn"].add_to_(x, parts["norm1"].forward(x, lacking["norm1"]), seq_lens)
        parts["mlp"].add_to_(x, parts["norm2"].forward(x, lacking["norm2"]))
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
        self.mlp.add_to_(row, self.norm2(row, self.deferred_alone.norm2))
        return self.deferred_alone.restore_(row)

    def op_names(self) -> dict[torch.dtype, set[str]]:
        """The forms of ops that it runs in each dtype, but for the CLS token's own."""
        linears = {"linear.none", "linear.swiglu" if self.mlp.gated else "linear.gelu", "linear.residual"}
        return {self.norm1.dtype: {"layer_norm.plain", "attention.batch", "attention.varlen", *linears}}


def _take_bias(linear: Any) -> Tensor | None:
    """The bias of a folded linear, which then has none: the rounded bias, in fp64 for the sums."""
    bias, linear.bias = linear.bias, None
    return None if bias is None else bias.double()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def cls_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """What a block's attention gives the first token (CLS), before the output projection.

    Args:
        x: (batch, seq_len, hidden), the residual stream that enters the block.
        norm_weight, norm_bias, eps: of the block's first norm; (hidden,).
        qkv_weight: (3 * hidden, hidden), the packed projection.
        qkv_bias: (3 * hidden,) or None.
        num_heads: heads within each of queries, keys and values.
        backend: the implementation of `attention_pool` to use instead of the default.

    Returns:
        (batch, hidden).
    """
    hidden = x.shape[-1]
    heads = (num_heads, hidden // num_heads)
    query_weight, key_weight, value_weight = qkv_weight.unflatten(0, (3, *heads)).unbind()  # (heads, head_dim, hidden)
    query_bias, value_bias = (None, None) if qkv_bias is None else (qkv_bias[:hidden], qkv_bias[2 * hidden :])

    cls = F.layer_norm(x[:, 0], (hidden,), norm_weight, norm_bias, eps)
    query = F.linear(cls, query_weight.flatten(0, 1), query_bias).unflatten(-1, heads) * heads[1] ** -0.5
    absorbed = torch.einsum("bhd,hdi->bhi", query, key_weight)
    pooled = ops.attention_pool(x, absorbed, norm_weight, norm_bias, eps, backend=backend)
    out = torch.einsum("bhi,hdi->bhd", pooled, value_weight).flatten(1)
    return out if value_bias is None else out + value_bias
