"""The ops in fp64, written from their formulas and independently of the package, and the rule that results must obey.

The rule (both at once), with `torch_result` plain PyTorch's in the dtype under test:
    max|y - ref| <= 2 max|torch - ref| + ulp(max|ref|)
    ||y - ref||  <= 2 ||torch - ref|| + ||ref|| 2^-p        p = 4 for e4m3, 8 for bf16, 11 for fp16, 24 for fp32
For fp64 results p is 49, since the reference is rounded too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = {torch.float8_e4m3fn: 4, torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 49}


def assert_obeys_rule(y: Tensor, ref: Tensor, torch_result: Tensor, largest_error: float = 2.0) -> float:
    """Fails if `y` is further from `ref`, which has a wider dtype, than the rule allows.

    Args:
        largest_error: the factor of the first bound.

    Returns:
        The largest error of an element, relative to the largest element of `ref`.
    """
    found, wanted = (y.shape, y.dtype), (ref.shape, torch_result.dtype)
    assert found == wanted, f"the result is {found}, torch's {wanted}"
    if ref.numel() == 0:
        return 0.0
    ref = ref.double()
    wrong, usual, bits = y.double() - ref, torch_result.double() - ref, _BITS[y.dtype]
    largest, worst, usually = (x.abs().max().item() for x in (ref, wrong, usual))
    ulp = 2.0 ** (math.floor(math.log2(max(largest, 1e-300))) + 1 - bits)
    assert worst <= largest_error * usually + ulp, f"an element is {worst:.3g} off, torch's worst {usually:.3g}"
    size, error, usual_error = (x.norm().item() for x in (ref, wrong, usual))
    assert error <= 2 * usual_error + size * 2.0**-bits, f"the error's norm is {error:.3g}, torch's {usual_error:.3g}"
    return worst / max(largest, 1e-300)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.double()
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + eps) ** 0.5 * weight.double() + bias.double()


def add_residual(residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    out = residual.double().clone()
    for image in range(residual.shape[0]):
        scale = 1.0 if drop_scale is None else drop_scale[image].item()
        out[image] += branch[image].double() * scale * (1.0 if gamma is None else gamma.double())
    return out


def scatter_add_residual(residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float) -> Tensor:
    out = residual.double().clone()
    for row, image in enumerate(index.tolist()):
        out[image] += branch[row].double() * scale * (1.0 if gamma is None else gamma.double())
    return out


def gelu(x: Tensor) -> Tensor:
    x = x.double()
    return x * 0.5 * torch.erfc(-x / math.sqrt(2.0))


def swiglu(x12: Tensor) -> Tensor:
    hidden = x12.shape[-1] // 2
    gate, value = x12[..., :hidden].double(), x12[..., hidden:].double()
    return gate / (1.0 + torch.exp(-gate)) * value


def attention_probabilities(qkv: Tensor) -> Tensor:
    q, k, _ = qkv.double().unbind(2)  # (batch, seq_len, heads, head_dim)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(qkv.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def attention(qkv: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", attention_probabilities(qkv), qkv[:, :, 2].double())


def e4m3_position(x: Tensor) -> Tensor:
    """The positions of e4m3 numbers in the ordered list of all of them, counted from zero."""
    code = x.view(torch.uint8).int()
    return torch.where(code >= 128, 128 - code, code)  # both zeros at 0


def e4m3_steps(y: Tensor, expected: Tensor) -> Tensor:
    """The distance of two e4m3 tensors in representable numbers, element by element."""
    return (e4m3_position(y) - e4m3_position(expected)).abs()


def patches(images: Tensor, patch_size: int, padded_to: int) -> Tensor:
    values = images.double() - 128 * (images.dtype == torch.uint8)
    columns = torch.nn.functional.unfold(values, patch_size, stride=patch_size).mT  # (batch, patches, c * p * p)
    out = torch.zeros(*columns.shape[:2], padded_to, dtype=torch.float64, device=images.device)
    out[..., : columns.shape[2]] = columns
    return out


def attention_pool(x: Tensor, absorbed: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = layer_norm(x, weight, bias, eps)
    scores = torch.einsum("bjd,bhd->bhj", y, absorbed.double())
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhj,bjd->bhd", weights / weights.sum(-1, keepdim=True), y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.einsum("...i,oi->...o", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pairs = linear(x, weight, bias).unflatten(-1, (-1, 2))  # (..., hidden, gate and value)
    return pairs[..., 0] / (1.0 + torch.exp(-pairs[..., 0])) * pairs[..., 1]


def attention_lse(qkv: Tensor) -> Tensor:
    q, k, _ = qkv.double().unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(qkv.shape[-1])
    largest = scores.amax(-1, keepdim=True)
    return (torch.exp(scores - largest).sum(-1, keepdim=True).log() + largest)[..., 0]
