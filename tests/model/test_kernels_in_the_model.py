"""The whole model on the Triton kernels: golden data, gradients, training, and what it says of itself."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops.dispatch import use_backend
from tests import reference
from tests.helpers import golden
from tests.helpers.devices import DEVICE, poisoned_memory, runs_triton
from tests.helpers.golden import TOLERANCE

pytestmark = runs_triton


def _model(name: str, **kwargs) -> tuple[DinoVisionTransformer, dict[str, Tensor]]:
    arguments, weights, tensors = golden.load_case(name)
    model = DinoVisionTransformer(**arguments, **kwargs)
    model.load_state_dict(weights)
    return model.eval().to(DEVICE), {key: value.to(DEVICE) for key, value in tensors.items()}


@pytest.mark.golden
@pytest.mark.parametrize("name", golden.cases("facebook"))
@torch.no_grad()
def test_golden_features(name: str) -> None:
    model, tensors = _model(name)
    with use_backend("triton", strict=True), poisoned_memory():
        for i in (0, 3):  # the native size and a single patch
            features = model.forward_features(tensors[f"{i}.input"], tensors[f"{i}.mask"])
            torch.testing.assert_close(features["x_prenorm"], tensors[f"{i}.masked_prenorm"], atol=TOLERANCE, rtol=0)
        features = model.forward_features([tensors["0.input"][:1], tensors["3.input"]], [None, None])
    for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"):
        torch.testing.assert_close(features[0][key], tensors[f"0.{key}"][:1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(features[1][key], tensors[f"3.{key}"], atol=TOLERANCE, rtol=0)


def _bernoulli_of_the_cpu_(x: Tensor, p: float = 0.5) -> Tensor:
    return x.copy_(torch.empty(x.shape).bernoulli(p))


def _gradients(model: nn.Module, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(4)  # of stochastic depth, which drops some branches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bernoulli_", _bernoulli_of_the_cpu_)  # on a GPU fp64 draws others than fp32 and bf16
        features = model(images, is_training=True)
    loss = torch.zeros((), device=DEVICE, dtype=next(model.parameters()).dtype)
    for part in features if isinstance(features, list) else [features]:
        for key in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
            weight = torch.randn(part[key].shape, generator=torch.Generator().manual_seed(2))
            loss = loss + (part[key] * weight.to(part[key])).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("facebook_mlp", {}),
        ("facebook_swiglu", {"drop_path_rate": 0.09, "drop_path_uniform": True}),
        ("facebook_reg4", {"drop_path_rate": 0.5, "drop_path_uniform": True}),
    ],
    ids=["plain", "swiglu, scaled branches", "registers, subsets"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_every_parameter_obey_the_rule(name: str, kwargs: dict, dtype: torch.dtype) -> None:
    model, tensors = _model(name, **kwargs)
    model.train().to(dtype)
    images = tensors["0.input"].to(dtype)
    found = {}
    for backend in ("torch", "triton"):
        with use_backend(backend, strict=True), poisoned_memory():
            found[backend] = _gradients(model, images)
    exact = _gradients(copy.deepcopy(model).double(), images.double())
    assert found["triton"].keys() == exact.keys()
    off, whole = (torch.cat([(exact[key] - less * found["torch"][key]).flatten() for key in exact]) for less in (1, 0))
    assert off.norm() < 0.1 * whole.norm(), "the same branches are dropped"
    for key, ref in exact.items():
        reference.assert_obeys_rule(found["triton"][key], ref, found["torch"][key])


def test_gradients_of_lists_with_subsets_obey_the_rule() -> None:
    model, tensors = _model("facebook_mlp", drop_path_rate=0.5, drop_path_uniform=True)
    model.train()
    images = [tensors["0.input"], tensors["3.input"]]
    found = {}
    for backend in ("torch", "triton"):
        with use_backend(backend, strict=True):
            found[backend] = _gradients(model, images)
    exact = _gradients(copy.deepcopy(model).double(), [x.double() for x in images])
    for key, ref in exact.items():
        # torch's worst element of a small gradient depends on the CPU's products: 1.2e-8 on one, 2e-8 on another.
        reference.assert_obeys_rule(found["triton"][key], ref, found["torch"][key], largest_error=4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, tensors = _model("facebook_mlp")
    images = tensors["3.input"]
    with use_backend("triton", strict=True):
        plain = _gradients(model.train(), images)
        model.set_grad_checkpointing()
        recomputed = _gradients(model, images)
    for key, gradient in plain.items():
        assert torch.equal(recomputed[key], gradient)


def test_fifty_steps_of_training_follow_torch() -> None:
    images = torch.randn(50, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    images[:, 1] += 0.5  # what there is to learn
    targets = torch.tensor([0, 1], device=DEVICE)
    losses: dict[str, list[float]] = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = DinoVisionTransformer(
            img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1, init_values=0.5, drop_path_rate=0.2
        )
        model.head = nn.Linear(64, 2)
        model.train().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        with use_backend(backend, strict=True):
            for batch in images:
                loss = nn.functional.cross_entropy(model(batch), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert sum(losses["torch"][-10:]) < 0.5 * sum(losses["torch"][:10])
    torch.testing.assert_close(torch.tensor(losses["triton"]), torch.tensor(losses["torch"]), atol=1e-3, rtol=1e-3)


def test_the_model_is_compiled_whole_with_gradients() -> None:
    model, tensors = _model("facebook_mlp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use_backend("triton", strict=True):
        eager = model(tensors["3.input"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(tensors["3.input"])
        torch.testing.assert_close(out, eager, atol=1e-5, rtol=0)
        both = [torch.autograd.grad(y.sum(), model.blocks[0].norm1.weight)[0] for y in (out, eager)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_autocast_gives_the_dtypes_and_values_of_torch() -> None:
    model, tensors = _model("facebook_swiglu")
    features = {}
    for backend in ("torch", "triton"):
        with use_backend(backend, strict=True), torch.autocast(DEVICE, dtype=torch.bfloat16):
            features[backend] = model.forward_features(tensors["3.input"])
    for key in ("x_norm_clstoken", "x_prenorm"):
        ours, theirs = features["triton"][key], features["torch"][key]
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


def test_the_model_reports_the_backends_that_run() -> None:
    model, _ = _model("facebook_mlp")
    assert re.search(r"layer_norm +torch ", str(model))
    with use_backend("triton", strict=True):
        text = str(model)
        chosen = {row.name: row.backend for row in model.backends()}
    assert re.search(r"layer_norm +triton +was asked for", text)
    assert set(chosen.values()) == {"triton"}
    assert {"layer_norm.add", "activation.gelu", "attention.varlen", "residual.gather"} <= chosen.keys()
    assert not any(name.startswith("linear") for name in chosen)
