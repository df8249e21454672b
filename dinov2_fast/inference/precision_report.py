"""How close an engine's features are to those in fp32, block by block, on the user's images: `Engine.report`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.backbone import FoldedBackbone

TIE = 1e-6  # neighbours whose cosines differ by at most this count as equally near


@dataclass(frozen=True)
class LayerAgreement:
    """How close the features of one precision are to those in fp32, after one layer.

    The layer is "block i", whose output goes through the last norm as in `get_intermediate_layers`, or "final", the
    result of a plain call before any head. The CLS token of "final" is from a last block that ran for it alone, if the
    engine does that.
    """

    layer: str
    precision: str  # that is compared with fp32
    cls_mean: float  # of the cosines between the CLS tokens of the same image
    cls_worst: float  # the smallest of them
    patch_mean: float  # the same for the patch tokens at the same place
    patch_worst: float
    neighbours: float  # share of images with the same nearest CLS token as in fp32; NaN for fewer than three images


@dataclass(frozen=True, repr=False)
class PrecisionReport:
    """The result of `Engine.report`; its repr is a table."""

    rows: tuple[LayerAgreement, ...]  # by block and precision, "final" last
    images: int  # the number of images compared

    def __repr__(self) -> str:
        lines = [
            f"Cosine to the features in fp32 (same neighbour: of the CLS tokens of {self.images} images)",
            f"{'layer':<10}{'precision':<11}{'CLS mean':>10}{'worst':>10}{'patches mean':>14}{'worst':>10}"
            f"{'same neighbour':>16}",
        ]
        for row in self.rows:
            same = "-" if math.isnan(row.neighbours) else f"{row.neighbours:.1%}"
            lines.append(
                f"{row.layer:<10}{row.precision:<11}{row.cls_mean:>10.5f}{row.cls_worst:>10.5f}"
                f"{row.patch_mean:>14.5f}{row.patch_worst:>10.5f}{same:>16}"
            )
        return "\n".join(lines)


@dataclass
class _Sums:
    """The data of one row, collected over batches."""

    cls: list[Tensor] = field(default_factory=list)  # (batch, hidden), fp32
    exact_cls: list[Tensor] = field(default_factory=list)
    patch_sum: float = 0.0
    patch_count: int = 0
    patch_worst: float = math.inf

    def add(self, cls: Tensor, exact_cls: Tensor, patches: Tensor, exact_patches: Tensor) -> None:
        self.cls.append(cls.to(torch.float32, copy=True))  # a view would keep all tokens in memory
        self.exact_cls.append(exact_cls.clone())
        cosine = F.cosine_similarity(patches.float(), exact_patches, dim=-1)
        self.patch_sum += cosine.sum(dtype=torch.float64).item()
        self.patch_count += cosine.numel()
        self.patch_worst = torch.minimum(cosine.new_tensor(self.patch_worst), cosine.min()).item()  # keeps NaN

    def row(self, layer: str, precision: str) -> LayerAgreement:
        cls, exact = torch.cat(self.cls), torch.cat(self.exact_cls)
        cosine = F.cosine_similarity(cls, exact, dim=-1)
        of_cls = cosine.mean().item(), cosine.min().item()
        of_patches = self.patch_sum / self.patch_count, self.patch_worst
        return LayerAgreement(layer, precision, *of_cls, *of_patches, same_neighbours(cls, exact))


def same_neighbours(cls: Tensor, exact: Tensor) -> float:
    """The share of images whose nearest neighbour in `cls` is a nearest neighbour in `exact`, both (images, hidden)."""
    if len(cls) < 3:
        return math.nan
    itself = torch.eye(len(cls), dtype=torch.bool, device=cls.device)
    found, wanted = (
        (F.normalize(x.double()) @ F.normalize(x.double()).T).masked_fill(itself, -math.inf) for x in (cls, exact)
    )
    of_found = wanted.gather(1, found.argmax(1, keepdim=True))[:, 0]
    return (of_found >= wanted.amax(1) - TIE).float().mean().item()


def compare_precisions(
    exact: FoldedBackbone, others: Mapping[str, FoldedBackbone], batches: Iterable[Tensor]
) -> PrecisionReport:
    """Runs images through backbones block by block and compares their tokens after each with those of `exact`.

    The names of the other backbones are their precisions; `exact` is in fp32.
    """
    sums: dict[tuple[str, str], _Sums] = {}
    images, last = 0, len(exact.blocks) - 1
    for batch in batches:
        if len(batch) == 0:
            continue
        images += len(batch)
        streams = {name: backbone.embed(batch) for name, backbone in others.items()}
        stream = exact.embed(batch)
        for i in range(last + 1):
            stream, wanted_cls, wanted = _step(exact, i, stream)
            for name, backbone in others.items():
                before = streams[name]
                streams[name], cls, patches = _step(backbone, i, before)
                sums.setdefault((f"block {i}", name), _Sums()).add(cls, wanted_cls, patches, wanted)
                if i == last:
                    cls = _cls_alone(backbone, before) if backbone.cls_only else cls
                    sums.setdefault(("final", name), _Sums()).add(cls, wanted_cls, patches, wanted)
    if images == 0:
        raise InvalidValueError("report needs at least one image.")
    order = sorted(sums, key=lambda key: key[0] == "final")
    return PrecisionReport(tuple(sums[key].row(*key) for key in order), images)


def _step(backbone: FoldedBackbone, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stream after block `i`; its CLS token and patch tokens after the last norm, (batch, …, hidden)."""
    x = backbone.blocks[i](x)
    normed = backbone.norm(x)
    return x, normed[:, 0], normed[:, 1 + backbone.num_register_tokens :]


def _cls_alone(backbone: FoldedBackbone, x: Tensor) -> Tensor:
    """The CLS token that the last block computes alone from the stream `x`, after the last norm."""
    return backbone.norm(backbone.blocks[-1].first_token(x).unsqueeze(1))[:, 0]
