"""Loading takes no more memory than the weights and one copy of the largest tensor, whatever the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast import DinoVisionTransformer
from tests.helpers import checkpoints
from tests.helpers.weight_folders import write

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc/self/status"
)

MARGIN = 8 << 20  # bytes: what Python and the allocator take beside the tensors
CASES = {
    "facebook.safetensors": None,
    "huggingface.safetensors": None,
    "teacher.pth": None,
    "huggingface.safetensors in half": "bfloat16",
}

# One process imports the package; each case runs in a fork of it, whose peak is its own. There a small file of the same
# kind is loaded first, so that what the code itself takes is resident before the measurement.
SCRIPT = """
import json, os, sys
import torch
from dinov2_fast import load

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

load(sys.argv[1])
for small, path, dtype in json.loads(sys.argv[2]):
    sys.stdout.flush()
    if os.fork():
        assert os.wait()[1] == 0
        continue
    dtype = dtype and getattr(torch, dtype)
    load(small, dtype=dtype)
    before = status("VmRSS")
    model = load(path, dtype=dtype)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    print(json.dumps([status("VmHWM") - before, sum(sizes)]), flush=True)
    os._exit(0)
"""


def write_checkpoint(folder: Path, **sizes: int) -> dict[str, torch.Tensor]:
    """Writes weights of these sizes, as three files; in all but one, query, key and value have to be joined."""
    arguments: dict[str, Any] = {"img_size": 28, "patch_size": 14, "init_values": 1.0, "block_chunks": 0, **sizes}
    with torch.device("meta"):
        shapes = DinoVisionTransformer(**arguments).state_dict()
    weights = {key: torch.full(tensor.shape, 0.5) for key, tensor in shapes.items()}
    write(weights, folder / "facebook.safetensors")
    split = checkpoints.huggingface(weights)
    write(split, folder / "huggingface.safetensors")
    write({f"teacher.{key}": tensor for key, tensor in split.items()}, folder / "teacher.pth")
    return weights


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[int, int]], int]:
    """For each case the growth at the peak and the size of the model, in bytes; and the largest tensor."""
    folder = tmp_path_factory.mktemp("memory")
    write_checkpoint(folder / "small", embed_dim=64, depth=1, num_heads=1)
    weights = write_checkpoint(folder, embed_dim=1280, depth=4, num_heads=20)
    files = {case: case.split()[0] for case in CASES}
    jobs = [(str(folder / "small" / files[case]), str(folder / files[case]), CASES[case]) for case in CASES]
    command = [sys.executable, "-c", SCRIPT, str(folder / "small" / "teacher.pth"), json.dumps(jobs)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    for path in folder.glob("*.*"):
        path.unlink()
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return dict(zip(CASES, lines, strict=True)), max(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("case", CASES)
def test_loading_takes_the_weights_and_one_tensor(case: str, measured: tuple[dict[str, tuple[int, int]], int]) -> None:
    growth, size = measured[0][case]
    largest = measured[1]
    assert size > (300 << 20 if CASES[case] is None else 150 << 20)  # large beside the margin
    cast = 0 if CASES[case] is None else largest // 2  # the largest tensor once more, in the new dtype
    assert growth <= size + largest + cast + MARGIN
    assert growth > 0.95 * size  # the weights are there, so the measurement works
