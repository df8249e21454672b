"""A transformer block of the engine, which updates the residual stream x in place.

    x += proj(attention(qkv(norm1(x))))        LayerScale is folded into the weight and bias of proj
    x += down(act(up(norm2(x))))               and of down; act is GELU or SwiGLU, in the epilogue of up

The tables in `ops/` say which implementation runs each step. Where proj and down run without a bias, x lacks the biases
of all steps so far, and the norms add them (:class:`DeferredBiases`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.block import Block
from dinov2_fast.inference.checks import expect
from dinov2_fast.inference.fold import FoldedModule, FoldedNorm, LinearLayout, fold_linear, gamma_of
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.layers import GELU, Attention, DropPath, Mlp, SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.ops.attention import ATTENTION
from dinov2_fast.ops.dispatch import BoundOp
from dinov2_fast.timm_adapter.layers import TimmAttention


class FoldedAttention(FoldedModule):
    """Self-attention without norms of queries and keys, with the LayerScale behind it folded in."""

    out_scale: float | None = None  # of the output of `attend`, which is then in e4m3; None for the dtype of `qkv`

    def __init__(self, attention: Any, gamma: Tensor | None, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        expect(attention, name, Attention, TimmAttention)
        if isinstance(attention, TimmAttention):
            for norm in ("q_norm", "k_norm"):
                expect(getattr(attention, norm), f"{name}.{norm}", nn.Identity)
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
        """Adds the attention's output for the normalised `x` to `stream`, both (batch, seq_len, hidden)."""
        self._modules["proj"].add_to_(stream, self.attend(self.project_qkv(x), seq_lens).flatten(-2))

    def attend(self, qkv: Tensor, seq_lens: tuple[int, ...] | None) -> Tensor:
        """Softmax attention, (batch, seq_len, heads, head_dim); `seq_lens` as in `Attention.forward`."""
        if seq_lens is None:
            return self._batch(qkv, None, 0.0, self.out_scale)
        return self._varlen(qkv[0], seq_lens, 0.0, self.out_scale)[None]


class FoldedMlp(FoldedModule):
    """Feed-forward network, with the LayerScale behind it folded in."""

    def __init__(self, mlp: nn.Module, gamma: Tensor | None, name: str, dtype: torch.dtype, interleaved: bool) -> None:
        super().__init__()
        expect(mlp, name, Mlp, SwiGLUFFN, SwiGLUFFNFused)
        self.gated = isinstance(mlp, SwiGLUFFN)
        if isinstance(mlp, Mlp):
            expect(mlp.act, f"{name}.act", GELU)
        up, down = linears_of(mlp)
        self.up = fold_linear(getattr(mlp, up), f"{name}.{up}", dtype, interleaved=self.gated and interleaved)
        self.down = fold_linear(getattr(mlp, down), f"{name}.{down}", dtype, gamma)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        """Adds the network's output for the normalised `x` to `stream`, both (..., hidden)."""
        up = self._modules["up"]
        self._modules["down"].add_to_(stream, up.swiglu(x) if self.gated else up.gelu(x))


def linears_of(mlp: nn.Module) -> tuple[str, str]:
    """The names of an MLP's two linears."""
    return ("w12", "w3") if isinstance(mlp, SwiGLUFFN) else ("fc1", "fc2")


class DeferredBiases(FoldedModule):
    """Sums of the biases of `proj` and `down` that the residual stream lacks, at three places of a block.

    The places are the input of `norm1`, the input of `norm2` and the `end` of the block. Each sum is (hidden,), in
    fp32, or None if the stream lacks none.
    """

    def __init__(self, norm1: Tensor | None = None, norm2: Tensor | None = None, end: Tensor | None = None) -> None:
        super().__init__()
        for name, biases in (("norm1", norm1), ("norm2", norm2), ("end", end)):
            self.register_buffer(name, None if biases is None else biases.float())

    def restore_(self, x: Tensor) -> Tensor:
        """Adds the biases that the stream `x` lacks at the end of the block."""
        end = self._buffers["end"]
        return x if end is None else x.add_(end)


class FoldedBlock(FoldedModule):
    """One block, with `layout` for its linears."""

    def __init__(self, block: Any, name: str, plan: EnginePlan, layout: LinearLayout) -> None:
        super().__init__()
        expect(block, name, Block)
        for part in ("drop_path1", "drop_path2"):
            expect(getattr(block, part), f"{name}.{part}", DropPath, nn.Identity)
        self.norm1 = FoldedNorm(block.norm1, f"{name}.norm1", plan)
        self.attn = FoldedAttention(block.attn, gamma_of(block.ls1, f"{name}.ls1"), f"{name}.attn", plan.dtype)
        self.norm2 = FoldedNorm(block.norm2, f"{name}.norm2", plan)
        gamma = gamma_of(block.ls2, f"{name}.ls2")
        self.mlp = FoldedMlp(block.mlp, gamma, f"{name}.mlp", plan.dtype, layout.interleaved)
        self.deferred = DeferredBiases()  # of all blocks up to this one
        self.deferred_alone = DeferredBiases()  # of this block, for calls of it alone

    def defer_biases(self, before: Tensor | None) -> Tensor | None:
        """Takes the biases out of `proj` and `down`, and keeps their sums for the norms.

        `before` is the sum of the biases that the blocks before this one left out, (hidden,), fp64, or None. The result
        is the same sum after this block.
        """
        own = [_take_bias(linear) for linear in (self.attn.proj, self.mlp.down)]
        norm2 = _sum(before, own[0])
        end = _sum(norm2, own[1])
        self.deferred = DeferredBiases(before, norm2, end)
        self.deferred_alone = DeferredBiases(None, own[0], _sum(*own))
        return end

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for the residual stream `x` (batch, seq_len, hidden), which is not written to."""
        return self.deferred_alone.restore_(self.update_(x.clone(), None, self.deferred_alone))

    def update_(
        self, x: Tensor, seq_lens: tuple[int, ...] | None = None, deferred: DeferredBiases | None = None
    ) -> Tensor:
        """Adds both branches in place to `x` (batch, seq_len, hidden), or with `seq_lens` (1, total_tokens, hidden).

        Before, `x` lacks the biases `deferred`, by default those of all blocks up to this one; after, `deferred.end`.
        """
        parts = self._modules
        lacking = (deferred or parts["deferred"])._buffers
        parts["attn"].add_to_(x, parts["norm1"].forward(x, lacking["norm1"]), seq_lens)
        parts["mlp"].add_to_(x, parts["norm2"].forward(x, lacking["norm2"]))
        return x

    def first_token(self, x: Tensor) -> Tensor:
        """The CLS token of the block's output, (batch, hidden), without computing the other tokens."""
        out = cls_attention(x.to(self.norm1.dtype), self.norm1, self.attn)
        row = x[:, 0].clone()
        self.attn.proj.add_to_(row, out)
        self.mlp.add_to_(row, self.norm2(row, self.deferred_alone.norm2))
        return self.deferred_alone.restore_(row)

    def op_names(self) -> dict[torch.dtype, set[str]]:
        """The forms of ops that the block runs, by dtype, without those for the CLS token alone."""
        linears = {"linear.none", "linear.swiglu" if self.mlp.gated else "linear.gelu", "linear.residual"}
        return {self.norm1.dtype: {"layer_norm.plain", "attention.batch", "attention.varlen", *linears}}


def _take_bias(linear: Any) -> Tensor | None:
    """Removes the bias of a folded linear and returns it, as it was rounded, in fp64."""
    bias, linear.bias = linear.bias, None
    return None if bias is None else bias.double()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def cls_attention(x: Tensor, norm: Any, attention: Any) -> Tensor:
    """The output of a block's attention for the first token (CLS), before the output projection, (batch, hidden).

    `x` (batch, seq_len, hidden) is the input of `norm`, which precedes the attention. Keys and values are not computed,
    see `ops.attention_pool`.
    """
    hidden, weight, bias = x.shape[-1], attention.qkv.weight, attention.qkv.bias
    heads = (attention.num_heads, hidden // attention.num_heads)
    query_weight, key_weight, value_weight = weight.unflatten(0, (3, *heads)).unbind()  # (heads, head_dim, hidden)
    query_bias, value_bias = (None, None) if bias is None else (bias[:hidden], bias[2 * hidden :])

    norm_weight, norm_bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    cls = F.layer_norm(x[:, 0], (hidden,), norm_weight, norm_bias, norm.eps)
    query = F.linear(cls, query_weight.flatten(0, 1), query_bias).unflatten(-1, heads) * heads[1] ** -0.5
    absorbed = torch.einsum("bhd,hdi->bhi", query, key_weight)
    pooled = ops.attention_pool(x, absorbed, norm_weight, norm_bias, norm.eps)
    out = torch.einsum("bhi,hdi->bhd", pooled, value_weight).flatten(1)
    return out if value_bias is None else out + value_bias
