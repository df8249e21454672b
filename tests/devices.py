"""Where the tests of the kernels run: on a GPU if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpreting() -> bool:
    if find_spec("triton") is None:
        return False
    from dinov2_fast.kernels import common

    return common.interpreting()


def round_bf16_in_the_interpreter() -> None:
    """Triton's interpreter cuts fp32 off to bf16; with this it rounds to nearest even, as a GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy()

    interpreter._convert_float = rounding


runs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreting(), reason="kernels need a GPU, or TRITON_INTERPRET=1"
)
BACKENDS = ["torch", pytest.param("triton", marks=runs_triton)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers on the device under test, the same on every device."""
    return (scale * torch.randn(*shape) + shift).to(DEVICE, dtype)


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients, by every input that is there, of the outputs weighted with fixed random numbers."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    given = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], weights))
    return [None if x is None else next(given) for x in leaves]
