"""The eight DINOv2 backbones, as one table of plain values."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from dinov2_fast.errors import InvalidValueError

OFFICIAL_URL = "https://dl.fbaipublicfiles.com/dinov2"


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes and sources of one backbone. All have patches of 14 px, LayerScale and a position table for 518 px."""

    name: str  # the reference's torch.hub entry point
    embed_dim: int
    depth: int
    num_heads: int
    ffn_layer: str
    num_register_tokens: int
    huggingface_id: str
    timm_name: str

    @property
    def position_interpolation(self) -> str:
        """Position interpolation of the reference's model (:mod:`dinov2_fast.position_embeddings`)."""
        return "antialias" if self.num_register_tokens else "offset"

    @property
    def stem(self) -> str:
        """The beginning of the names of the official files, such as "dinov2_vits14_reg4"."""
        base = self.name.removesuffix("_reg")
        return f"{base}_reg{self.num_register_tokens}" if self.num_register_tokens else base

    @property
    def file_stem(self) -> str:
        """Name of the official checkpoint file, without its ending."""
        return f"{self.stem}_pretrain"

    @property
    def url(self) -> str:
        """Address of the official checkpoint."""
        return self._address(self.file_stem)

    def head_stem(self, head: str) -> str:
        """Name of an official head's file, without its ending. `head` is "linear4", "ade20k_linear" or similar."""
        return f"{self.stem}_{head}_head"

    def head_url(self, head: str) -> str:
        """Address of an official head."""
        return self._address(self.head_stem(head))

    def _address(self, file_stem: str) -> str:
        return f"{OFFICIAL_URL}/{self.name.removesuffix('_reg')}/{file_stem}.pth"

    def constructor_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :class:`dinov2_fast.DinoVisionTransformer` for this backbone."""
        return {
            "img_size": 518,
            "patch_size": 14,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": 4.0,
            "ffn_layer": self.ffn_layer,
            "init_values": 1.0,
            "block_chunks": 0,
            "num_register_tokens": self.num_register_tokens,
            "interpolate_antialias": self.num_register_tokens > 0,
            "interpolate_offset": 0.0 if self.num_register_tokens else 0.1,
        }


# letter, hidden, depth, heads, feed-forward, hub name
_SIZES = (
    ("s", 384, 12, 6, "mlp", "small"),
    ("b", 768, 12, 12, "mlp", "base"),
    ("l", 1024, 24, 16, "mlp", "large"),
    ("g", 1536, 40, 24, "swiglufused", "giant"),
)

BACKBONES: dict[str, BackboneConfig] = {
    f"dinov2_vit{letter}14{'_reg' if registers else ''}": BackboneConfig(
        name=f"dinov2_vit{letter}14{'_reg' if registers else ''}",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        ffn_layer=ffn_layer,
        num_register_tokens=registers,
        huggingface_id=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        timm_name=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
    )
    for registers in (0, 4)
    for letter, embed_dim, depth, num_heads, ffn_layer, size in _SIZES
}


def backbone(name: str) -> BackboneConfig:
    """The backbone called `name`. If there is none, the `ValueError` lists the nearest names."""
    if name in BACKBONES:
        return BACKBONES[name]
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"The backbones are {', '.join(BACKBONES)}."
    raise InvalidValueError(f"There is no DINOv2 backbone called {name!r}. {hint}")
