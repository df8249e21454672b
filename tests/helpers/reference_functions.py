"""What single files of the reference compute: masks, schedules, parameter groups.

    python -m tests.helpers.reference_functions --reference-path FOLDER     # a checkout of facebookresearch/dinov2

writes ``tests/golden/pretraining/functions.json`` anew. The files run as they are, each by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from dinov2_fast import DinoVisionTransformer
from dinov2_fast.pretraining.config import HeadConfig
from dinov2_fast.pretraining.heads import DinoHead

GOLDEN = Path(__file__).parents[1] / "golden" / "pretraining" / "functions.json"
GRIDS = (2, 7, 16, 37)  # rows and columns of patches
DEPTH, LAYER_DECAY, PATCH_EMBED_MULTIPLIER = 3, 0.9, 0.2
CHUNKS = (0, 1)  # blocks by themselves, or all in one chunk: blocks.0.2.…
# base_value, final_value, total_iters, warmup_iters, start_warmup_value
SCHEDULES: dict[str, tuple[float, float, int, int, float]] = {
    "learning_rate": (0.004, 1e-6, 12, 4, 0.0),
    "weight_decay": (0.04, 0.4, 12, 0, 0.0),
    "momentum": (0.992, 1.0, 7, 0, 0.0),
    "one_step_of_warmup": (0.5, 0.1, 5, 1, 0.0),
    "temperature": (0.07, 0.07, 5, 5, 0.04),
}


def reference_file(request: pytest.FixtureRequest, name: str) -> ModuleType:
    """A file of the checkout that --reference-path names, such as "utils/utils.py"; without one the test is skipped."""
    path = request.config.getoption("--reference-path", None)
    if path is None:
        pytest.skip("no --reference-path was given")
    return load_file(path, name)


def load_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_file", path / "dinov2" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mask(masking: ModuleType, n_masked: int, grid: int, seed: int) -> NDArray[np.bool_]:
    """A mask of the reference's generator, which is made as in its train.py."""
    size, patch_size = 14 * grid, 14
    largest = 0.5 * size // patch_size * size // patch_size
    generator = masking.MaskingGenerator(input_size=(grid, grid), max_num_patches=largest)
    random.seed(seed)
    return np.asarray(generator(n_masked))


def mask_digest(grid: int, make_mask: Callable[[int, int, int], NDArray[np.bool_]]) -> str:
    """A SHA-256 of 100 masks with 0 to 0.7 of the patches; `make_mask` takes that number, the grid and a seed."""
    masks = [make_mask(int(0.007 * seed * grid**2), grid, seed) for seed in range(100)]
    return hashlib.sha256(np.packbits(np.stack(masks)).tobytes()).hexdigest()


def schedule(utils: ModuleType, name: str) -> list[float]:
    """The values of the steps of a case, and of one step after the last."""
    base, final, total, warmup, start = SCHEDULES[name]
    scheduler = utils.CosineScheduler(base, final, total, warmup_iters=warmup, start_warmup_value=start)
    return [float(scheduler[step]) for step in range(total + 1)]


def network(depth: int = DEPTH, **arguments: Any) -> nn.ModuleDict:
    """A backbone with heads, without memory for its parameters."""
    defaults = {"embed_dim": 64, "num_heads": 1, "init_values": 0.1, "num_register_tokens": 1, "block_chunks": 0}
    with torch.device("meta"):
        backbone = DinoVisionTransformer(depth=depth, **{**defaults, **arguments})
        heads = {name: DinoHead(64, HeadConfig(8, 8, 8)) for name in ("dino_head", "ibot_head")}
    return nn.ModuleDict({"backbone": backbone, **heads})


def multipliers(param_groups: ModuleType, network: nn.ModuleDict) -> dict[str, list[Any]]:
    """Of each parameter the multipliers of learning rate and weight decay, and whether it is of a last layer."""
    found = {}
    for child_name, child in network.items():
        for group in param_groups.get_params_groups_with_decay(child, LAYER_DECAY, PATCH_EMBED_MULTIPLIER):
            values = [group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"]]
            found[f"{child_name}.{group['name']}"] = values
    return found


def load_golden() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text(encoding="utf-8")))


def write(path: Path) -> None:
    masking, utils, groups = (
        load_file(path, f"{name}.py") for name in ("data/masking", "utils/utils", "utils/param_groups")
    )
    drawn = mask(masking, 24, 7, 3)
    golden = {
        "mask": ["".join(".#"[patch] for patch in row) for row in drawn.astype(int)],
        "masks": {str(grid): mask_digest(grid, lambda *case: mask(masking, *case)) for grid in GRIDS},
        "schedules": {name: schedule(utils, name) for name in SCHEDULES},
        "multipliers": {str(chunks): multipliers(groups, network(block_chunks=chunks)) for chunks in CHUNKS},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-path", type=Path, required=True, help="a checkout of facebookresearch/dinov2")
    write(parser.parse_args().reference_path)
