"""The package without its optional dependencies, such as triton: everything runs on torch alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HIDE = """
import importlib.abc, importlib.util, sys

OPTIONAL = {"triton", "xformers", "transformers", "timm", "torchvision"}

class HideOptional(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, HideOptional())
for name in OPTIONAL:
    try:
        importlib.util.find_spec(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is not hidden")
"""

USE = """
import torch, dinov2_fast
from dinov2_fast import Dinov2Config, Dinov2Model
from dinov2_fast.cli import main

x = torch.randn(2, 3, 28, 42)
model = dinov2_fast.DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1)
model.train()
model(x, is_training=True)["x_norm_patchtokens"].sum().backward()
model.forward_features([x, x[:, :, :, :28]])
config = Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28)
assert Dinov2Model(config)(x, output_attentions=True).attentions[0].shape == (2, 1, 7, 7)
assert main(["info"]) == 0
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_model_runs_and_info_says_what_is_missing() -> None:
    run = run_python(HIDE + USE)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^ *layer_norm +torch  ", run.stdout, re.MULTILINE)


def test_stubs_of_optional_packages_count_as_missing() -> None:
    """Code written for Meta's model puts such stubs into `sys.modules`, so that the package is not imported."""
    stubs = "import sys, types\nfor name in ('xformers', 'triton'):\n    sys.modules[name] = types.ModuleType(name)\n"
    imports = "import dinov2_fast.ops.attention\nfrom dinov2_fast.ops._backends import is_installed\n"
    check = "assert not is_installed('xformers') and not is_installed('triton') and is_installed('torch')"
    run = run_python(f"import torch\n{stubs}{imports}{check}")
    assert run.returncode == 0, run.stderr
