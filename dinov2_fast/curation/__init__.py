"""Working on collections of images by their features."""
