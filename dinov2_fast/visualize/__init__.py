"""Drawing what a model finds in images: patch features as colours, attention maps, nearest neighbours.

The names below draw arrays, without a model. `show.show` runs a model or reads stored features, and writes the sheets.
"""

from dinov2_fast.visualize.pca import PcaBasis, pca_rgb
from dinov2_fast.visualize.sheet import Tile, attention_rgb, attention_strips, neighbour_strips, pca_strips, save_sheet

__all__ = [
    "PcaBasis",
    "Tile",
    "attention_rgb",
    "attention_strips",
    "neighbour_strips",
    "pca_rgb",
    "pca_strips",
    "save_sheet",
]
