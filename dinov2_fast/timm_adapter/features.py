"""``features_only=True``: a model that returns feature maps, and the description of those maps, with timm's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from dinov2_fast.timm_adapter.model import Indices, TimmVisionTransformer


class FeatureInfo:
    """The feature maps of a `FeatureGetter`: each block's module name, its channels and the patch size in pixels.

    Without `idx`, a method describes the blocks whose maps are returned. `idx` selects others, by one index or several.
    """

    def __init__(self, feature_info: Iterable[dict[str, Any]], out_indices: int | Sequence[int]) -> None:
        self.info = [{**entry, "index": i} for i, entry in enumerate(feature_info)]
        self.out_indices = tuple(range(-out_indices, 0)) if isinstance(out_indices, int) else tuple(out_indices)

    def from_other(self, out_indices: int | Sequence[int]) -> FeatureInfo:
        """The description for other blocks."""
        return FeatureInfo(deepcopy(self.info), out_indices)

    def get(self, key: str, idx: Indices = None) -> Any:
        """One entry, such as "num_chs"."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: Indices = None) -> Any:
        """Dictionaries of several entries, or of all."""
        if isinstance(idx, int):
            return {key: self.info[idx][key] for key in keys or self.info[idx]}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: Indices = None) -> Any:
        """Channels of each map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: Indices = None) -> Any:
        """Pixels of the image for each pixel of a map: the patch size."""
        return self.get("reduction", idx)

    def module_name(self, idx: Indices = None) -> Any:
        """Names of the blocks, as `named_modules` has them in the model."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class FeatureGetter(nn.Module):
    """A model whose forward pass returns a list of feature maps (batch, hidden, rows, columns), one per block chosen.

    All maps have the resolution of the patches, as in timm. The blocks after the last one chosen, the head and (unless
    `norm`) the norm are removed from `model`. For inference, replace `model` by its engine:
    ``features.model = optimize_for_inference(features.model)``.
    """

    def __init__(
        self,
        model: TimmVisionTransformer,
        out_indices: int | Sequence[int] = 4,
        output_fmt: str = "NCHW",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=not norm)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.model = model
        self.output_fmt = output_fmt
        self.norm = norm
        self.default_cfg = self.pretrained_cfg = model.default_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )
