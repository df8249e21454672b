"""Pretraining of a backbone from images alone, by the method of DINOv2 (Oquab et al., arXiv:2304.07193)."""
