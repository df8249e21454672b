"""A block in training and when watched: hooks, stochastic depth, gradient checkpointing, packed lists."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dinov2_fast.layers import Attention, Dropout, DropPath, LayerNorm, LayerScale
from tests.helpers.small_models import small


@pytest.mark.parametrize("name", ["norm1", "attn", "attn.qkv", "ls1", "norm2", "mlp", "mlp.act", "ls2", "drop_path1"])
def test_a_hook_on_any_module_fires_and_changes_nothing(name: str) -> None:
    model, x = small(drop_path_rate=0.05), torch.randn(2, 3, 42, 42)
    expected, seen = model(x), []
    block = model.blocks[1]
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(x)
    assert seen
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    handle.remove()
    model(x)
    assert len(seen) == (2 if name == "drop_path1" else 1)


@pytest.mark.parametrize("name", ["ls1", "norm2", "ls2"])
def test_a_hook_may_replace_an_output_and_a_module_may_be_replaced(name: str) -> None:
    model, x = small(), torch.randn(2, 3, 42, 42)
    expected = model(x)
    hooked, replaced = copy.deepcopy(model), copy.deepcopy(model)
    hooked.blocks[1].get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    old = replaced.blocks[1].get_submodule(name)
    replaced.blocks[1].set_submodule(name, nn.Sequential(old, _Double()))
    assert (hooked(x) - expected).abs().max() > 1e-3
    torch.testing.assert_close(replaced(x), hooked(x), atol=1e-5, rtol=0)


class _Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["ls1", "norm2", "ls2"])
def test_a_forward_set_on_a_module_is_run(name: str) -> None:
    model, x = small(), torch.randn(2, 3, 42, 42)
    hooked = copy.deepcopy(model)
    hooked.blocks[1].get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    module = model.blocks[1].get_submodule(name)
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(model(x), hooked(x), atol=1e-5, rtol=0)


def test_a_global_hook_sees_every_module() -> None:
    model, x, names = small(), torch.randn(1, 3, 28, 28), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    model(x)
    handle.remove()
    assert (names.count("LayerScale"), names.count("LayerNorm")) == (6, 7)


@pytest.mark.parametrize("name", ["mlp.fc1", "mlp.act"])
@torch.no_grad()
def test_what_a_hook_saw_of_the_feed_forward_is_not_overwritten(name: str) -> None:
    model, x, seen = small(), torch.randn(2, 3, 42, 42), []

    def note(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.extend((value, value.clone()) for value in (*args, output))

    expected = model(x)
    model.blocks[1].get_submodule(name).register_forward_hook(note)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert len(seen) == 2
    assert all(torch.equal(value, copied) for value, copied in seen)


@torch.no_grad()
def test_without_gradients_the_gelu_takes_no_memory_of_its_own() -> None:
    mlp, x = small().blocks[0].mlp, torch.randn(1, 9, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mlp(x)
    assert "aten::gelu_" in {event.key for event in profile.key_averages()}
    with torch.enable_grad():
        torch.testing.assert_close(mlp(x), mlp.fc2(nn.functional.gelu(mlp.fc1(x))), atol=1e-6, rtol=0)


def test_a_backward_hook_on_layer_scale_fires() -> None:
    model, seen = small(), []
    model.blocks[0].ls1.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs))
    model(torch.randn(1, 3, 28, 28)).sum().backward()
    assert seen


def test_every_parameter_gets_a_gradient_and_it_is_right() -> None:
    model = small(num_register_tokens=2).double()
    x, mask = torch.randn(2, 3, 42, 56, dtype=torch.float64), torch.rand(2, 12) < 0.5
    names = ["mask_token", "cls_token", "register_tokens", "pos_embed", "blocks.1.ls1.gamma", "blocks.2.norm2.weight"]
    seed = torch.randn(2, 1 + 2 + 12, 32, dtype=torch.float64)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        features = torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (x, mask), {"is_training": True}
        )
        return (features["x_prenorm"] * seed).sum()

    parameters = dict(model.named_parameters())
    assert torch.autograd.gradcheck(loss, [parameters[name] for name in names], fast_mode=True)
    loss(*(parameters[name] for name in names)).backward()
    unused = {name for name, p in parameters.items() if p.grad is None}
    assert unused == {"norm.weight", "norm.bias"}  # x_prenorm comes before the final norm


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.9])
def test_stochastic_depth_keeps_the_expectation(rate: float) -> None:
    block = small(drop_path_rate=rate, drop_path_uniform=True, depth=1).blocks[0].double()
    nn.init.zeros_(block.ls2.gamma)  # leaves one branch, so that the expectation is exact
    x = torch.randn(10, 4, 32, dtype=torch.float64)
    full = block.eval()(x)
    block.train()
    runs = torch.stack([block(x) for _ in range(600)])
    dropped = (runs == x).flatten(2).all(-1).double().mean().item()
    subset = max(int(10 * (1 - rate)), 1) / 10
    assert dropped == pytest.approx(1 - subset if rate > 0.1 else rate, abs=0.03)
    scale = (1 / subset) if rate > 0.1 else 1 / (1 - rate)
    kept = runs[(runs != x).flatten(2).any(-1)] - x.expand_as(runs)[(runs != x).flatten(2).any(-1)]
    branch = (full - x).expand_as(runs)[(runs != x).flatten(2).any(-1)]
    torch.testing.assert_close(kept, branch * scale, atol=1e-9, rtol=0)


def test_stochastic_depth_runs_the_branch_on_the_subset_only() -> None:
    block = small(drop_path_rate=0.5, drop_path_uniform=True, depth=1).blocks[0].train()
    batches = []
    block.attn.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    block(torch.randn(8, 4, 32))
    assert batches == [4]


@pytest.mark.parametrize("watched", [False, True])
def test_lists_in_training_drop_in_each_batch_by_itself(watched: bool) -> None:
    block = small(drop_path_rate=0.5, drop_path_uniform=True, depth=1).blocks[0].double().train()
    nn.init.zeros_(block.ls2.gamma)
    if watched:
        block.ls1.register_forward_hook(lambda module, args, output: None)
    x_list = [torch.randn(4, 5, 32, dtype=torch.float64), torch.randn(6, 3, 32, dtype=torch.float64)]
    full = [block.eval()(x) for x in x_list]
    for out, x, whole, subset in zip(block.train()(x_list), x_list, full, (2, 3), strict=True):
        changed = (out != x).flatten(1).any(-1)
        assert changed.sum() == subset
        torch.testing.assert_close((out - x)[changed], 2 * (whole - x)[changed], atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(rate: float, chunks: int) -> None:
    model = small(drop_path_rate=rate, block_chunks=chunks).train()
    inputs = [torch.randn(4, 3, 28, 42), torch.randn(2, 3, 42, 42)]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        sum(f["x_norm_clstoken"].pow(2).sum() for f in model.forward_features(inputs)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_checkpointing_keeps_fewer_activations() -> None:
    def saved(enable: bool) -> int:
        model = small().train()
        model.set_grad_checkpointing(enable)
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(2, 3, 56, 56))
        return count

    assert saved(True) < saved(False) / 3


def test_packed_lists_give_the_gradients_of_single_batches() -> None:
    model = small().double()
    inputs = [torch.randn(2, 3, 28, 42, dtype=torch.float64), torch.randn(1, 3, 56, 14, dtype=torch.float64)]
    loss = sum(f["x_norm_patchtokens"].pow(3).sum() for f in model.forward_features(inputs))
    together = torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight)[0]
    alone = sum(model.forward_features(x)["x_norm_patchtokens"].pow(3).sum() for x in inputs)
    torch.testing.assert_close(torch.autograd.grad(alone, model.blocks[0].attn.qkv.weight)[0], together)


def test_layers_by_themselves() -> None:
    x = torch.randn(4, 3, 8)
    assert torch.equal(LayerScale(8, init_values=torch.arange(8.0))(x), x * torch.arange(8.0))
    in_place = x.clone()
    assert LayerScale(8, 0.5, inplace=True).requires_grad_(False)(in_place) is in_place
    assert torch.equal(LayerNorm(8)(x), nn.LayerNorm(8)(x))
    drop = DropPath(0.5)
    assert torch.equal(drop.eval()(x), x)
    out = drop.train()(x)
    assert all(torch.equal(o, 2 * p) or not o.any() for o, p in zip(out, x, strict=True))
    assert not DropPath(1.0).train()(x).any()


def test_the_factor_of_attention_follows_from_its_sizes() -> None:
    attention = Attention(dim=48, num_heads=3)
    assert attention.scale == 16**-0.5
    with pytest.raises(AttributeError, match="scale"):
        attention.scale = 0.1  # the op would not see it


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_is_that_of_torch(p: float, training: bool) -> None:
    x, results = torch.randn(4, 8), []
    for kind in (nn.Dropout, Dropout):
        torch.manual_seed(0)
        results.append(kind(p).train(training)(x))
    assert torch.equal(*results)
