"""Where tests of kernels run (on a GPU if there is one, else in Triton's interpreter), and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import extension
from dinov2_fast.ops.implementation import tensors_of
from dinov2_fast.torch_private import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Other layouts of a matrix
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "misaligned": lambda x: F.pad(x, (1, 1))[..., 1:-1],
}


class LargestTensor(TorchDispatchMode):
    """Inside, `elements` is the number of elements of the largest tensor that an operation has returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors_of([result]))])
        return result


def interpreting() -> bool:
    if find_spec("triton") is None:
        return False
    from dinov2_fast.kernels import common

    return common.interpreting()


def make_the_interpreter_strict() -> None:
    """Removes two differences between Triton's interpreter and a GPU.

    The interpreter truncates fp32 to bf16; with this it rounds to nearest even, as a GPU does. A masked load without
    `other` gives 0 in the interpreter and anything on a GPU; with this it gives NaN, or -1 for integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy()

    def load(builder: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        if other is None:
            dtype = pointers.get_element_ty()
            unknown = np.full(pointers.data.shape, 255, np.uint8)
            unknown = np.repeat(unknown[..., None], interpreter._get_np_dtype(dtype).itemsize, -1)
            unknown = unknown.view(interpreter._get_np_dtype(dtype)).reshape(pointers.data.shape)
            other = interpreter.TensorHandle(unknown, dtype)
        return masked_load(builder, pointers, mask, other, *args, **kwargs)

    masked_load = interpreter.InterpreterBuilder.create_masked_load
    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_masked_load = load


runs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreting(), reason="kernels need a GPU, or TRITON_INTERPRET=1"
)
fakes_cuda = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a torch that is built for CUDA"
)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a GPU: `make test` deselects it, and a machine without one skips it."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")(test))


BACKENDS = ["torch", pytest.param("triton", marks=[runs_triton, pytest.mark.triton])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def has_extension() -> bool:
    """Whether the CUDA extension runs on the device under test; on a CPU only the one of `tests.cuda_on_host` does."""
    return extension.load().reason is None and extension.is_built_for(DEVICE)


runs_cuda = pytest.mark.skipif(
    not has_extension(), reason="needs the CUDA extension and a GPU, or -p tests.cuda_on_host"
)


GUARD = 256  # bytes before and after each output


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Allocates outputs of kernels between guards, and fills both with NaN (every bit set).

    An element that is never written then shows as NaN. A guard that is overwritten fails the test.
    """
    buffers: list[tuple[Tensor, int]] = []

    plain = Tensor.new_empty

    def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # Triton's interpreter copies its arguments to the host
            return plain(like, *size, dtype=dtype, **rest)
        dtype, shape = dtype or like.dtype, torch.Size(size if isinstance(size[0], int) else size[0])
        used = shape.numel() * dtype.itemsize
        buffer = torch.full((used + 2 * GUARD,), 255, dtype=torch.uint8, device=like.device)
        buffers.append((buffer, used))
        return buffer[GUARD : GUARD + used].view(dtype).view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda x, **_: new_empty(x, x.shape))
        yield
    for buffer, used in buffers:
        assert (buffer[:GUARD] == 255).all(), "written before the beginning of an output"
        assert (buffer[GUARD + used :] == 255).all(), "written after the end of an output"


def skip_without_opcheck() -> None:
    """`torch.library.opcheck` imports a package that a GPU machine's own Python may lack."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest, which is not installed")


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """Runs `torch.library.opcheck`, and compares the strides of fake and real outputs, as opcheck does on a GPU."""
    skip_without_opcheck()
    torch.library.opcheck(op, arguments)
    with torch.no_grad():
        real = op(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    for a, b in zip(tensors_of([real]), tensors_of([fake]), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def assert_compiles_whole(block: Callable[..., Tensor], arguments: Sequence[Tensor]) -> None:
    """Asserts that `block` compiles to one graph and gives its eager results, in inference mode too."""
    eager = block(*arguments)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), eager)
    with torch.inference_mode():
        assert torch.equal(block(*arguments), eager)
        torch.testing.assert_close(compiled(*arguments), eager)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers on the device under test, the same on every device."""
    return (scale * torch.randn(*shape) + shift).to(DEVICE, dtype)


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the outputs, weighted with fixed random numbers, for each input that is not None."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    given = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], weights))
    return [None if x is None else next(given) for x in leaves]
