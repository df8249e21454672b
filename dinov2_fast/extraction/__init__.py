"""From images to a folder of features."""
