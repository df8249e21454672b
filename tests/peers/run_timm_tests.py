"""Runs timm's own tests of models on the models of `dinov2_fast.create_model`.

    git clone --depth 1 --branch v1.0.28 https://github.com/huggingface/pytorch-image-models timm_sources
    python tests/peers/run_timm_tests.py --checkout timm_sources

These are the tests of tests/test_models.py that take one of timm's DINOv2 names, with images of 98 pixels and four
blocks in each model, to fit a small machine. They import the installed timm. `LEFT_OUT` says which do not apply, and
why.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm

import dinov2_fast
from dinov2_fast.base_module import NOT_SCRIPTABLE

INPUT_SIZE = (3, 98, 98)
NAMES = {config.timm_name.partition(".")[0] for config in dinov2_fast.BACKBONES.values()}
LEFT_OUT = {
    "test_model_forward_torchscript": NOT_SCRIPTABLE,
    "test_model_forward_fx_torchscript": "A graph of torch.fx contains the checks of its input, which are Python code.",
    "test_model_load_pretrained": "It downloads the published weights.",
}


class OnlyOurs:
    """A pytest plugin that deselects tests of other models and skips those of `LEFT_OUT`."""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        others = [item for item in items if not is_ours(model_name(item))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_ours(model_name(item))]
        for item in items:
            if item.originalname in LEFT_OUT:
                item.add_marker(pytest.mark.skip(reason=LEFT_OUT[item.originalname]))


def model_name(item: Any) -> str:
    """The model that a test is parametrised with; empty for tests of one model, none of which is DINOv2."""
    return item.callspec.params.get("model_name", "") if hasattr(item, "callspec") else ""


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in NAMES


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """`dinov2_fast.create_model` for a small model, with its image size in `default_cfg`."""
    overlay = {"input_size": INPUT_SIZE}
    return dinov2_fast.create_model(name, pretrained, pretrained_cfg_overlay=overlay, **{"depth": 4, **kwargs})


def run(checkout: Path) -> int:
    get_value = timm.get_pretrained_cfg_value
    timm.create_model = create_model
    timm.get_pretrained_cfg_value = lambda name, key: INPUT_SIZE if key == "input_size" else get_value(name, key)
    os.chdir(checkout)
    arguments = ["-q", "-rs", "--disable-warnings", "-p", "no:cacheprovider", "tests/test_models.py"]
    return int(pytest.main(arguments, plugins=[OnlyOurs()]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="folder with timm's sources and its tests/")
    arguments = parser.parse_args()
    if arguments.checkout is None:
        print("Skipped: timm's wheel has no tests; give a checkout with --checkout.")
        return 0
    if not (arguments.checkout / "tests" / "test_models.py").is_file():
        parser.error(f"There is no tests/test_models.py in {arguments.checkout}; give a clone of timm's repository.")
    return run(arguments.checkout)


if __name__ == "__main__":
    sys.exit(main())
