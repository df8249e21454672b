"""Triton kernels and their launchers, installed as `dinov2_fast.kernels`: one file per op, tensors in, tensors out.

This file holds no code: a library that looks for a package named `kernels` may import it when the top level of the
checkout is on `sys.path`.
"""
