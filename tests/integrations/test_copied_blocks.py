"""Blocks of projects that copied DINOv2's and changed them are accelerated, or refused with a reason."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_fast import accelerate, acceleration_report, unaccelerate
from dinov2_fast.integrations.block import AcceleratedBlock
from tests.helpers.facebook_model import DropPath, LayerScale, Mlp
from tests.helpers.library_models import assert_same, filled, hub_model

DIM, HEADS = 64, 2


class Attention(nn.Module):
    """An attention with a module for dropout of its weights, as in older copies."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(DIM, DIM)
        self.proj_drop = nn.Dropout(0.0)

    def weights_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn_drop((self.scale * q @ k.transpose(-2, -1)).softmax(-1)), v

    def forward(self, x: Tensor) -> Any:
        weights, v = self.weights_and_values(x)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class WithWeights(Attention):
    """Also returns its weights."""

    def forward(self, x: Tensor) -> Any:
        weights, v = self.weights_and_values(x)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class WithNorms(Attention):
    """Has norms of queries and keys, and takes positions."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(DIM // HEADS), norm(DIM // HEADS)
        self.rope = None

    def forward(self, x: Tensor, pos: Any = None) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Recording(Attention):
    """Keeps its weights as an attribute."""

    def weights_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.last_weights, v = super().weights_and_values(x)
        return self.last_weights, v


class Block(nn.Module):
    """Has stochastic depth, but does not use it."""

    def __init__(self, attention: nn.Module | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6)
        self.attn = attention or Attention()
        self.ls1 = LayerScale(DIM)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6)
        self.mlp = Mlp(DIM)
        self.ls2 = LayerScale(DIM)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor, pos: Any = None, return_attention: bool = False) -> Any:
        branch = self.attn(self.norm1(x))
        branch, weights = branch if isinstance(branch, tuple) else (branch, None)
        x = x + self.ls1(branch)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return (x, weights) if return_attention else x


class WithoutScales(Block):
    """Has one stochastic depth for both branches, and no scales."""

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        del self.ls1, self.ls2, self.drop_path1, self.drop_path2, self.sample_drop_ratio
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Any:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PostNorm(Block):
    def forward(self, x: Tensor) -> Any:
        x = x + self.norm1(self.ls1(self.attn(x)))
        return x + self.norm2(self.ls2(self.mlp(x)))


class TanhGelu(Mlp):
    """Has an activation, but does not use it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Uncalled(Mlp):
    """Reads the weight of a linear that it does not call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(F.linear(x, self.fc1.weight, self.fc1.bias)))


def with_checkpoint(module: Any) -> Any:
    """Has `module` recomputed in the backward pass by a subclass of its class, as several projects do."""

    class CheckpointingWrapper(module.__class__):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)

    module.__class__ = CheckpointingWrapper
    return module


def with_mlp(mlp: nn.Module) -> Block:
    block = Block()
    block.mlp = mlp
    return block


def model_of(make: Callable[[], nn.Module]) -> Any:
    return filled(nn.Sequential(make(), make())).eval()


def tokens() -> Tensor:
    return torch.randn(3, 9, DIM, generator=torch.Generator().manual_seed(0))


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "dropout as a module": Block,
    "attention that returns its weights": lambda: Block(WithWeights()),
    "identities for norms of queries and keys": lambda: Block(WithNorms(lambda size: nn.Identity())),
    "no scales": lambda: WithoutScales(drop_path=0.2),
    "a wrapper around the block": lambda: with_checkpoint(Block()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_copies_that_compute_the_same_are_accelerated(name: str) -> None:
    model = model_of(ACCEPTED[name])
    stock = copy.deepcopy(model)
    accelerate(model)
    assert all(isinstance(block, AcceleratedBlock) for block in model)
    assert acceleration_report(model).groups[0].reasons == ()
    with torch.no_grad():
        assert_same(model(tokens()), stock(tokens()))
        for asked in ({"return_attention": True}, {"pos": torch.zeros(1)}):
            if name == "dropout as a module":
                assert_same(model[0](tokens(), **asked), stock[0](tokens(), **asked))
    outputs = []
    for each in (model.train(), stock.train(), copy.deepcopy(model)):
        torch.manual_seed(1)
        outputs.append(each(tokens()))
    assert_same(outputs[0], outputs[1])
    assert_same(outputs[2], outputs[1])
    assert [type(block) for block in unaccelerate(model)] == [type(block) for block in stock]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stochastic depth that is not used": (
        lambda: Block(drop_path=0.05),
        "in training mode its forward computes something else than a block of DINOv2",
    ),
    "norms of queries and keys": (lambda: Block(WithNorms()), "its attention has q_norm and k_norm"),
    "weights that are kept": (lambda: Block(Recording()), "a call sets attn.last_weights, which our code would not"),
    "norms after the branches": (PostNorm, "in eval mode its forward computes something else"),
    "GELU by tanh": (lambda: with_mlp(TanhGelu(DIM)), "its mlp computes something else than that of DINOv2"),
    "a wrapper around the mlp": (
        lambda: with_mlp(with_checkpoint(Mlp(DIM))),
        "in training mode it calls mlp.fc1 2 times, mlp.fc2 2 times, unlike our code",
    ),
    "a wrapper around the attention": (
        lambda: Block(with_checkpoint(Attention())),
        "in training mode it calls attn.proj 2 times, attn.qkv 2 times, unlike our code",
    ),
    "a linear that is not called": (lambda: with_mlp(Uncalled(DIM)), "in eval mode it calls mlp.fc1 0 times, unlike"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_copies_that_compute_something_else_are_refused_with_what_differs(name: str) -> None:
    make, reason = REFUSED[name]
    model = model_of(make)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=reason):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    assert vars(model[0].attn).keys() == vars(make().attn).keys()  # type: ignore[union-attr, arg-type]


def test_a_wrapper_that_recomputes_still_does() -> None:
    model = accelerate(model_of(lambda: with_checkpoint(Block())))
    calls: list[int] = []
    model[0].mlp.fc1.register_forward_hook(lambda module, args, output: calls.append(1))
    model(tokens().requires_grad_()).sum().backward()
    assert len(calls) == 2


def test_hooks_on_the_dropout_of_attention_weights_see_them() -> None:
    model = model_of(Block)
    stock = copy.deepcopy(model)
    accelerate(model)
    seen: list[Tensor] = []
    for each in (model, stock):
        each[0].attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
        each(tokens())
    assert_same(*seen)
    reason = "its attn runs its own code: it drops attention weights, or its attention dropout has hooks"
    assert reason in str(acceleration_report(model))


def test_hooks_on_an_attention_that_returns_its_weights_see_both() -> None:
    model = model_of(lambda: Block(WithWeights()))
    stock = copy.deepcopy(model)
    accelerate(model)
    seen: list[Any] = []
    for each in (model, stock):
        each[0].attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert_same(model(tokens()), stock(tokens()))
    assert_same(*seen)


def test_dropout_of_weights_that_is_switched_on_in_eval_mode_drops_them() -> None:
    model = model_of(Block)
    stock = copy.deepcopy(model)
    accelerate(model)
    outputs = []
    for each in (model, stock):
        each[0].attn.attn_drop.p = 0.5
        each[0].attn.attn_drop.train()
        torch.manual_seed(1)
        outputs.append(each(tokens()))
    assert_same(*outputs)
    assert (outputs[0] - stock.eval()(tokens())).abs().max() > 1e-3


def test_a_trial_draws_no_random_numbers_and_calls_no_hooks_and_reads_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU was seeded"))
    model = model_of(Block)
    calls: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: calls.append(1))
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(2))
    state = torch.get_rng_state()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    accelerate(model.to("meta"))
    everywhere.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert all(isinstance(block, AcceleratedBlock) for block in model)


class Quantised(nn.Module):
    """A linear whose weight is flat and of integers, so that it is no matrix to multiply by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.step).round().to(torch.int8).flatten())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.step * self.weight.view(self.out_features, -1), self.bias)  # type: ignore[operator]


def test_blocks_with_quantised_linears_are_accelerated() -> None:
    model = model_of(Block)
    for block in model:
        block.mlp.fc1, block.attn.qkv = Quantised(block.mlp.fc1), Quantised(block.attn.qkv)
    stock = copy.deepcopy(model)
    accelerate(model)
    assert acceleration_report(model).groups[0].accelerated == 2
    with torch.no_grad():
        assert_same(model(tokens()), stock(tokens()))


def test_blocks_that_differ_by_their_weights_only_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov2_fast.integrations import block_check

    tried: list[nn.Module] = []
    try_block = block_check._try_block
    monkeypatch.setattr(block_check, "_try_block", lambda block: tried.append(block) or try_block(block))
    accelerate(filled(hub_model(depth=4)))
    assert len(tried) == 1


def test_a_backbone_in_a_plain_list_is_named() -> None:
    class Client(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = [hub_model()]

    with pytest.raises(TypeError, match="keeps a DinoVisionTransformer in backbone, a plain list, so it is not a sub"):
        accelerate(Client())


def test_layers_of_another_model_of_transformers_are_accelerated() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "EomtConfig"):
        pytest.skip("this transformers has no Eomt")
    from transformers.models.eomt.modeling_eomt import EomtLayer

    config = transformers.EomtConfig(hidden_size=DIM, num_attention_heads=HEADS, attn_implementation="sdpa")
    model = model_of(lambda: EomtLayer(config))
    stock = copy.deepcopy(model)
    accelerate(model)
    mask = torch.zeros(3, 1, 9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
    with torch.no_grad():
        assert_same(model(tokens()), stock(tokens()))
        if "attention_mask" in inspect.signature(EomtLayer.forward).parameters:  # from 5.0 on
            assert_same(model[0](tokens(), attention_mask=mask), stock[0](tokens(), attention_mask=mask))
