"""torch.compile, torch.export and ONNX: one graph, standard operators, any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export import Dim

from tests.helpers.small_models import KINDS_TO_COMPILE, small

SHAPES = [(2, 3, 70, 70), (1, 3, 56, 98), (3, 3, 126, 84), (2, 3, 28, 28)]
# One patch a side is left out: torch.export specialises on a size of one.
ROWS, COLUMNS = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
DYNAMIC = {"x": {0: Dim("batch", min=1, max=64), 2: 14 * ROWS, 3: 14 * COLUMNS}}


@pytest.fixture(params=KINDS_TO_COMPILE)
def model(request):
    torch._dynamo.reset()
    return small(**KINDS_TO_COMPILE[request.param])


def close(ours, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compile_is_one_graph_for_every_batch_and_size(model) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    compiled(torch.randn(6, 3, 42, 56))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in [(2, 42, 56), (3, 42, 56), (5, 98, 56), (7, 126, 84), (4, 70, 70)]:
            x = torch.randn(batch, 3, height, width)
            close(compiled(x), model(x))


def test_compile_with_dynamic_batch_trains(model) -> None:
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x, mask = torch.randn(batch, 3, 42, 42), torch.rand(batch, 9) < 0.5
        gradients = []
        for module in (compiled, model):
            model.zero_grad()
            module(x, mask, is_training=True)["x_norm_patchtokens"].pow(2).sum().backward()
            gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_compile_of_the_other_methods() -> None:
    torch._dynamo.reset()
    model, x = small(num_register_tokens=2), torch.randn(2, 3, 42, 56)
    layers = torch.compile(model.get_intermediate_layers, fullgraph=True, backend="eager")
    for ours, expected in zip(layers(x, n=2, reshape=True), model.get_intermediate_layers(x, 2, True), strict=True):
        close(ours, expected)
    both = [x, torch.randn(1, 3, 28, 28)]
    features = torch.compile(model.forward_features, fullgraph=True, backend="eager")(both)
    for ours, expected in zip(features, model.forward_features(both), strict=True):
        close(ours["x_norm_patchtokens"], expected["x_norm_patchtokens"])


@pytest.mark.slow
@torch.no_grad()
def test_compile_with_inductor(model) -> None:
    compiled = torch.compile(model, fullgraph=True)
    for batch in (2, 3, 4):
        x = torch.randn(batch, 3, 42, 56)
        close(compiled(x), model(x))


@torch.no_grad()
def test_export_is_dynamic_and_holds_only_aten_operators(model) -> None:
    program = torch.export.export(model, (torch.randn(2, 3, 70, 56),), dynamic_shapes=DYNAMIC)
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten", node.target
            assert "interpolate" not in str(node.target)
            assert "upsample" not in str(node.target)
    for shape in SHAPES:
        x = torch.randn(shape)
        close(program.module()(x), model(x))


@torch.no_grad()
def test_onnx_runs_every_size(model, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 3, 70, 56),), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for shape in SHAPES:
        x = torch.randn(shape)
        (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert np.abs(ours - model(x).numpy()).max() < 1e-5
