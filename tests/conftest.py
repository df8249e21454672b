"""What every test runs under: fixed seeds, true fp32, and one torch thread in each parallel worker."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests import devices


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # set by pytest-xdist in its workers
        torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions on a GPU in fp32, for which the tolerances are made
    if devices.interpreting():
        devices.make_the_interpreter_strict()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
