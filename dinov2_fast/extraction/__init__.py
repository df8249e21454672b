"""From files to features: safe reading of pictures, and extraction into a Parquet file."""

from dinov2_fast.extraction.images import ImageError, list_images, read_image

__all__ = ["ImageError", "list_images", "read_image"]
