"""torch.jit.trace, the ONNX exporter built on it, and torch.fx: graphs of every face that compute what models do."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dinov2_fast
from dinov2_fast.ops.dispatch import use_backend
from dinov2_fast.weights.load import RandomWeights
from tests.helpers.small_models import KINDS_TO_COMPILE, small

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
SHAPES = [(2, 3, 70, 98), (1, 3, 28, 56), (2, 3, 70, 70), (3, 3, 140, 98)]  # the third is that of the position table
# What torch says of any model whose code looks at sizes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def huggingface(task: str, registers: str = "", **fields: Any) -> nn.Module:
    config = getattr(dinov2_fast, f"Dinov2{registers}Config")(**SIZES, **fields)
    return getattr(dinov2_fast, f"Dinov2{registers}{task}")(config)


def timm_face(kind: str) -> nn.Module:
    return dinov2_fast.create_model(
        f"vit_{kind}_dinov2", embed_dim=32, depth=2, num_heads=2, img_size=70, num_classes=3
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda arguments=arguments: small(**arguments) for kind, arguments in KINDS_TO_COMPILE.items()},
    "Dinov2Model": lambda: huggingface("Model"),
    "Dinov2WithRegistersModel": lambda: huggingface("Model", "WithRegisters"),
    "Dinov2ForImageClassification": lambda: huggingface("ForImageClassification", num_labels=3),
    "Dinov2Backbone": lambda: huggingface("Backbone", out_indices=[1, 2]),
    "timm": lambda: timm_face("small_patch14"),
    "timm-reg4": lambda: timm_face("small_patch14_reg4"),
    "timm-giant": lambda: timm_face("giant_patch14"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """In eval mode, with random weights no part of which is trivial."""
    made = MODELS[request.param]()
    made.load_state_dict(dict(RandomWeights(made, 0)))
    return made.eval()


def tensors(output: Any) -> list[Tensor]:
    return pytree.tree_leaves(output)


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_computes(graph: Callable[[Tensor], Any], model: nn.Module, atol: float = 1e-5) -> None:
    for shape in SHAPES:
        x = images(shape)
        with torch.no_grad():
            ours, expected = tensors(graph(x)), tensors(model(x))
        assert max(tensor.abs().max() for tensor in expected) > 0.05
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0)


# TorchScript


def test_jit_trace_with_gradients_recorded(model: Any) -> None:
    """torch.jit.trace traces again without gradients, and compares the two graphs."""
    assert torch.is_grad_enabled()
    traced = torch.jit.trace(model, images(SHAPES[0]), strict=not hasattr(model, "config"))
    assert_computes(traced, model)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_computes(torch.jit.load(buffer), model)


def test_a_traced_model_returns_transformers_dictionary_or_tuple() -> None:
    model, x = huggingface("Model").eval(), images(SHAPES[0])
    traced = torch.jit.trace(model, x, strict=False)
    assert list(traced(x)) == ["last_hidden_state", "pooler_output"]
    model.config.return_dict = False
    assert isinstance(torch.jit.trace(model, x)(x), tuple)


def test_jit_trace_under_no_grad_overwrites_nothing_that_the_graph_keeps(model: Any) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(model, images(SHAPES[0]), strict=not hasattr(model, "config"))
    assert "gelu_(" not in str(traced.inlined_graph)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["alone", "inside another module"])
def test_jit_script_is_refused_in_a_sentence(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile this model.* Use torch.jit.trace"):
        torch.jit.script(wrap(small()))


# The exporter built on the trace


def test_the_legacy_onnx_exporter(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "model.onnx"
    axes = {"pixels": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        model, images(SHAPES[0]), path, dynamo=False, opset_version=17, input_names=["pixels"], dynamic_axes=axes
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not that the sizes of outputs, which have no names here, are free
    session = onnxruntime.InferenceSession(path, options)
    assert [each.name for each in session.get_inputs()] == ["pixels"]
    assert_computes(lambda x: [torch.from_numpy(output) for output in session.run(None, {"pixels": x.numpy()})], model)


# torch.fx


@pytest.mark.parametrize("kind", KINDS_TO_COMPILE)
def test_fx_traces_the_reference_s_face(kind: str) -> None:
    model = small(**KINDS_TO_COMPILE[kind])
    graph = torch.fx.symbolic_trace(model, {"masks": None, "is_training": False})
    assert_computes(graph, model, atol=0.0)
    whole = torch.fx.symbolic_trace(model, {"masks": None, "is_training": True})
    x = images(SHAPES[0])
    assert torch.equal(whole(x, None, True)["x_prenorm"], model.forward_features(x)["x_prenorm"])


def test_an_fx_graph_keeps_the_checks_and_holds_standard_ops() -> None:
    model = small()
    with use_backend("triton", strict=True):
        graph = torch.fx.symbolic_trace(model, {"masks": None, "is_training": False})
    with pytest.raises(ValueError, match="height 30 is not a multiple of patch height 14"):
        graph(images((1, 3, 30, 28)))
    with pytest.raises(TypeError, match="takes a tensor"):
        graph([1])
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    ours = {function.__name__ for function in called if getattr(function, "__module__", "").startswith("dinov2_fast")}
    assert ours == {
        "check_is_tensor",
        "check_images",
        "position_grid",
        "resample_position_embeddings",
        "PositionInterpolation",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_computes(graph, model, atol=0.0)
