"""Packages and their folders; everything else about the distribution stands in pyproject.toml.

The folders `kernels` and `csrc` at the top level are installed inside the package, as `dinov2_fast.kernels` and
`dinov2_fast.csrc`: a top-level module named `kernels` would collide with another distribution of that name.
"""

import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

NOT_PACKAGES = ["*__pycache__"]

packages = find_namespace_packages(include=["dinov2_fast", "dinov2_fast.*"], exclude=NOT_PACKAGES)
package_dir = {}
for folder in ("kernels", "csrc"):
    if Path(folder).is_dir():
        package_dir[f"dinov2_fast.{folder}"] = folder
        below = find_namespace_packages(folder, exclude=NOT_PACKAGES)
        packages += [f"dinov2_fast.{folder}", *(f"dinov2_fast.{folder}.{name}" for name in below)]

print("dinov2_fast: pure Python build, without a CUDA extension", file=sys.stderr)
setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"": ["*.json"], "dinov2_fast.csrc": ["*.cu", "*.cuh", "*.cpp"]},
)
