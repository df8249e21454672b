"""From pictures to features: finding and reading pictures safely, and extraction into shards."""

from dinov2_fast.extraction.files import ImageError, ReadError
from dinov2_fast.extraction.images import read_image
from dinov2_fast.extraction.inputs import list_images

__all__ = ["ImageError", "ReadError", "list_images", "read_image"]
