"""From pictures to features: finding and reading pictures safely, and extraction into shards."""

from dinov2_fast.extraction.images import ImageError, read_image
from dinov2_fast.extraction.inputs import list_images

__all__ = ["ImageError", "list_images", "read_image"]
