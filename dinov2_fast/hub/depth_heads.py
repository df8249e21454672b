"""The heads of depth estimators, linear and DPT. Both take pairs (map, CLS token) of some blocks, before the last norm.

The names of parameters are the reference's (facebookresearch/dinov2, dinov2/hub/depth/decode_heads.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.hub.pixels import resize

BlockOutputs = Sequence[tuple[Tensor, Tensor]]  # per block: (batch, hidden, rows, columns), (batch, hidden)


class LinearDepthHead(nn.Module):
    """A linear layer on the patch and CLS tokens, whose outputs weight depths: the reference's BNHead.

        p = relu(linear(tokens)) + 0.1,    depth = sum(p * bins) / sum(p)

    with 256 depths `bins`, evenly spaced from `min_depth` to `max_depth`. Source: Bhat et al., AdaBins,
    arXiv:2011.14141.

    Args:
        embed_dim, layers: channels of a token, and number of blocks whose tokens it takes.
        min_depth, max_depth: in metres.
        upsample: rows and columns of the depth map per row and column of patches.
    """

    def __init__(
        self, embed_dim: int, layers: int, min_depth: float, max_depth: float, n_bins: int = 256, upsample: int = 4
    ) -> None:
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.n_bins = n_bins
        self.upsample = upsample
        self.conv_depth = nn.Conv2d(2 * embed_dim * layers, n_bins, kernel_size=1)

    def forward(self, inputs: BlockOutputs) -> Tensor:
        """The depth map (batch, 1, upsample * rows, upsample * columns), in metres."""
        parts = [part for x, cls_token in inputs for part in (x, cls_token[:, :, None, None].expand_as(x))]
        # The reference resizes before this layer, for the same result at 16 times the work.
        logits = self.conv_depth(torch.cat(parts, dim=1))
        logits = resize(logits, [self.upsample * size for size in logits.shape[2:]])
        weights = logits.relu() + 0.1
        bins = torch.linspace(self.min_depth, self.max_depth, self.n_bins, dtype=logits.dtype, device=logits.device)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", weights, bins)[:, None]


class DPTHead(nn.Module):
    """The decoder of a dense prediction transformer: maps of four blocks at four scales, fused from coarse to fine.

    `min_depth` is added to the depth, in metres. Source: Ranftl et al., arXiv:2103.13413.
    """

    def __init__(self, embed_dim: int, min_depth: float, max_depth: float, channels: int = 256) -> None:
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.conv_depth = HeadDepth(channels)
        widths = [embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        self.reassemble_blocks = ReassembleBlocks(embed_dim, widths)
        self.convs = nn.ModuleList([_conv(width, channels, 3, bias=False) for width in widths])
        self.fusion_blocks = nn.ModuleList([FeatureFusionBlock(channels, is_first=i == 0) for i in range(len(widths))])
        self.project = _conv(channels, channels, 3)

    def forward(self, inputs: BlockOutputs) -> Tensor:
        """The depth map (batch, 1, 32 * ceil(rows / 2), 32 * ceil(columns / 2)), in metres."""
        maps = self.reassemble_blocks(inputs)
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        x: Tensor | None = None
        for block in self.fusion_blocks:
            x = block(maps.pop(), x)
        return self.conv_depth(self.project(x).relu()).relu() + self.min_depth


class ReassembleBlocks(nn.Module):
    """Joins the CLS token to each patch token, and resizes the maps of four blocks by 4, 2, 1 and 1/2."""

    def __init__(self, embed_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, _, last = widths
        self.projects = nn.ModuleList([_conv(embed_dim, width, 1) for width in widths])
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
                nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, kernel_size=3, stride=2, padding=1),
            ]
        )
        self.readout_projects = nn.ModuleList(
            [nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.GELU()) for _ in widths]
        )

    def forward(self, inputs: BlockOutputs) -> list[Tensor]:
        parts = zip(inputs, self.readout_projects, self.projects, self.resize_layers, strict=True)
        return [resize_layer(project(_read_out(readout, *pair))) for pair, readout, project, resize_layer in parts]


def _read_out(readout: nn.Module, x: Tensor, cls_token: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)  # (batch, patches, hidden)
    tokens = readout(torch.cat((tokens, cls_token[:, None].expand_as(tokens)), dim=-1))
    return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class FeatureFusionBlock(nn.Module):
    """Adds a finer map to the map fused so far, and doubles rows and columns. The first block has no fused map."""

    def __init__(self, channels: int, is_first: bool) -> None:
        super().__init__()
        self.project = _conv(channels, channels, 1)
        self.res_conv_unit1 = None if is_first else ResidualConvUnit(channels)
        self.res_conv_unit2 = ResidualConvUnit(channels)

    def forward(self, finer: Tensor, x: Tensor | None) -> Tensor:
        if self.res_conv_unit1 is None or x is None:
            x = finer
        else:
            x = x + self.res_conv_unit1(finer if finer.shape == x.shape else resize(finer, x.shape[2:]))
        x = F.interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


class ResidualConvUnit(nn.Module):
    """``x + conv2(relu(conv1(relu(x))))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, bias=False)
        self.conv2 = _conv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class HeadDepth(nn.Module):
    """Three convolutions to one channel. Rows and columns are doubled after the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def _conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """A convolution that keeps rows and columns, as the submodule `conv`; initialised as in the reference."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv))
