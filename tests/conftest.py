"""Settings of every test: fixed seeds, true fp32, one torch thread in each parallel worker, and a working GPU."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast import environment
from dinov2_fast.ops import dispatch
from tests.helpers import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "a checkout of facebookresearch/dinov2, which tests of pretraining run beside ours"
    parser.addoption("--reference-path", type=Path, help=text)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # set by pytest-xdist in its workers
        torch.set_num_threads(1)
        config.pluginmanager.register(EndWorkerAfterCudaError())
    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions on a GPU in fp32, for which the tolerances are made
    if devices.interpreting():
        devices.make_the_interpreter_strict()
    if environment.backend_setting():  # a test that fell back to torch would say nothing about the kernels
        dispatch.set_backend(environment.backend_setting(), strict=True)


class EndWorkerAfterCudaError:
    """Ends a pytest-xdist worker after a test that failed with a CUDA error, so that a new worker takes its place.

    After an illegal memory access every later CUDA call of the process fails, and with it every later test. The worker
    ends when its report has been sent; xdist adds that it crashed during that test, and gives the remaining tests to
    other workers.
    """

    ERRORS = re.compile(r"CUDA( error)?: |Error \[CUDA\]: ")  # of csrc or torch, of Triton

    def __init__(self) -> None:
        self.failed = False

    def pytest_exception_interact(self, call: pytest.CallInfo[None]) -> None:
        self.failed |= self.ERRORS.search(str(call.excinfo.value)) is not None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.failed:
            os._exit(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A very small DINOv2 in a file."""
    torch.manual_seed(0)
    model = dinov2_fast.DinoVisionTransformer(
        img_size=518, patch_size=14, embed_dim=64, depth=1, num_heads=1, init_values=1.0, block_chunks=0
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return str(path)
