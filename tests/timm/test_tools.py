"""What tools and clients made for timm's models do with ours, beside what they get of timm's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import create_model, ops, optimize_for_inference, use_backend
from tests.helpers.timm_peers import NAMES, SMALL, Pair, assert_close, images, make_pair

timm = pytest.importorskip("timm", reason="these are timm's tools, and timm is not installed")


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, num_classes=5)


# torch.fx


@torch.no_grad()
def test_features_by_the_names_of_nodes(pair: Pair) -> None:
    fx = pytest.importorskip("timm.models._features_fx")
    nodes = ["norm_pre", "blocks.0", "blocks.1.norm2", "blocks.2.attn", "blocks.3.mlp", "norm", "head"]
    extractors = [fx.create_feature_extractor(model, nodes) for model in pair]
    for size in ((70, 98), (28, 42), (518, 518)):
        x = images(*size, batch=1)
        ours, theirs = (extractor(x) for extractor in extractors)
        assert_close(ours, theirs)
        with use_backend("torch"):  # as a traced model runs
            assert torch.equal(ours["head"], pair.ours(x))
    with pytest.raises(ValueError, match="height 30 is not a multiple of patch height 14"):
        extractors[0](images(30, 28))


def test_a_graph_refuses_masks_and_trains() -> None:
    model = create_model(NAMES[1], **SMALL, drop_path_rate=0.3, dynamic_img_pad=True).train()
    graph, x = torch.fx.symbolic_trace(model), images(31, 40)
    with pytest.raises(ValueError, match="every token attends to all"):
        graph(x, torch.ones(5, 5))
    results = []
    for each in (model, graph):
        torch.manual_seed(0)
        results.append(each(x))
    assert torch.equal(*results)
    graph(x).sum().backward()
    assert graph.pos_embed.grad.abs().sum() > 0


# Attention weights


@pytest.mark.parametrize("method", ["fx", "hook"])
@torch.no_grad()
def test_attention_extract(pair: Pair, method: str) -> None:
    for model in pair:
        for block in model.blocks:
            block.attn.fused_attn = False
    x = images(42, 56)
    ours, theirs = (timm.utils.AttentionExtract(model, method=method)(x) for model in pair)
    assert_close(ours, theirs)
    assert len(theirs) == 4
    tokens = 12 + pair.theirs.num_prefix_tokens
    assert {weights.shape for weights in theirs.values()} == {(2, 2, tokens, tokens)}
    assert_close(pair.ours(x), pair.theirs(x))


@torch.no_grad()
def test_a_hook_on_the_dropout_of_attention_is_called_also_where_attention_is_fused(pair: Pair) -> None:
    x, seen = images(28, 42), []
    expected = pair.ours(x)
    hook = pair.ours.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(pair.ours(x), expected, atol=1e-5, rtol=0)
    hook.remove()
    assert torch.equal(pair.ours(x), expected)
    (weights,) = seen
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    block = pair.ours.blocks[1]
    qkv = block.attn.project_qkv(block.norm1(pair.ours.blocks[0](pair.ours.embed(x))))
    torch.testing.assert_close(weights, ops.attention_probabilities(qkv), atol=1e-6, rtol=0)


def test_attention_dropout_has_timms_distribution() -> None:
    """Of many draws the mean is what eval mode gives, and the spread is timm's, fused and in steps."""
    pair = make_pair(NAMES[0], attn_drop_rate=0.5)
    ours, theirs = pair.ours.blocks[0].attn.train(), pair.theirs.blocks[0].attn.train()
    x = torch.randn(1, 5, 128).expand(4000, -1, -1)
    with torch.no_grad():
        expected, spread = ours.eval()(x[:1]), theirs(x).std(0)
        ours.train()
        for ours.fused_attn in (True, False):
            out = ours(x)
            torch.testing.assert_close(out.mean(0), expected[0], atol=0.1 * spread.max().item(), rtol=0)
            torch.testing.assert_close(out.std(0), spread, atol=0, rtol=0.15)


@torch.no_grad()
def test_replaced_parts_of_attention_are_followed(pair: Pair) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    for model in pair:
        model.blocks[0].attn.q_norm = model.blocks[2].attn.k_norm = norm
        model.blocks[1].attn.fused_attn = False
    for size in ((28, 42), (56, 28)):
        assert_close(pair.ours(images(*size)), pair.theirs(images(*size)))
    block, x = pair.ours.blocks[0], torch.randn(2, 5, 128)
    for block.attn.fused_attn in (True, False):  # sequences of several lengths, packed
        for ours, alone in zip(block([x, x[:1, :3]]), (block(x), block(x[:1, :3])), strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)
    weights = pair.theirs.blocks[0].attn
    weights.fused_attn, seen = False, []
    weights.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    weights(x)
    assert_close(ops.attention_probabilities(block.attn.project_qkv(x)), seen[0])
    with pytest.raises(TypeError, match=r"blocks.0.attn.q_norm is a LayerNorm"):
        optimize_for_inference(pair.ours)


def _forward_of_a_client(attention: Any, x: Tensor) -> Tensor:
    """Attention as people write it anew for timm's module."""
    batch, tokens, channels = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) if attention.fused_attn else None
    return attention.proj_drop(attention.proj(out.transpose(1, 2).reshape(batch, tokens, channels)))


@torch.no_grad()
def test_attention_that_a_client_computes_itself(pair: Pair) -> None:
    for block in pair.ours.blocks:
        block.attn.forward = lambda x, attention=block.attn: _forward_of_a_client(attention, x)
    assert_close(pair.ours(images(28, 42)), pair.theirs(images(28, 42)))


# The steps between images and features


def _in_steps(model: Any, x: Tensor) -> Tensor:
    """The forward pass as clients write it."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return model.fc_norm(model.norm(model.blocks(x)))


@pytest.mark.parametrize("arguments", [{}, {"dynamic_img_size": False}, {"dynamic_img_pad": True}], ids=str)
@torch.no_grad()
def test_every_step(arguments: dict[str, bool]) -> None:
    pair = make_pair(NAMES[1], img_size=(70, 98), **arguments)
    sizes = {"dynamic_img_pad": [(31, 40), (70, 98)], "dynamic_img_size": [(70, 98)]}
    for size in sizes.get(next(iter(arguments), ""), [(28, 42), (70, 98), (98, 70)]):
        x = images(*size)
        assert_close(pair.ours.patch_embed(x), pair.theirs.patch_embed(x))
        assert_close(pair.ours._pos_embed(pair.ours.patch_embed(x)), pair.theirs._pos_embed(pair.theirs.patch_embed(x)))
        assert_close(_in_steps(pair.ours, x), _in_steps(pair.theirs, x))
        assert_close(pair.ours(x), pair.theirs(x))
        assert_close(pair.ours.prepare_tokens_with_masks(x), pair.ours.embed(x))
        for embed in (pair.ours.patch_embed, pair.theirs.patch_embed):
            assert (
                embed.dynamic_feat_size(size) == tuple(side // 14 for side in x.shape[2:])
                or "dynamic_img_pad" in arguments
            )
        assert pair.ours.patch_embed.dynamic_feat_size(size) == pair.theirs.patch_embed.dynamic_feat_size(size)


@torch.no_grad()
def test_overlapping_patches() -> None:
    model, x = create_model(NAMES[1], **SMALL).eval(), images(70, 98)
    model.stride = 7
    assert model.patch_embed.dynamic_feat_size((70, 98)) == model.grid(x) == model.patch_embed(x).shape[1:3] == (9, 13)
    graph = torch.fx.symbolic_trace(model)
    for size in ((70, 98), (28, 42)):
        assert torch.equal(graph(images(*size)), model(images(*size)))


def test_a_model_for_one_size_refuses_others() -> None:
    model = create_model(NAMES[0], **SMALL, img_size=(70, 98), dynamic_img_size=False).eval()
    engine = optimize_for_inference(model)
    torch.testing.assert_close(engine(images(70, 98)), model(images(70, 98)), atol=1e-4, rtol=0)
    for each in (model, engine):
        with pytest.raises(
            ValueError, match=r"takes images of 70 x 98 pixels, got 98 x 70. Leave dynamic_img_size out"
        ):
            each(images(98, 70))
    model.set_input_size((98, 70))
    assert model(images(98, 70)).shape == (2, 128)


@pytest.mark.parametrize("part", ["patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "head_drop"])
def test_hooks_on_every_part_are_called(part: str) -> None:
    model, calls = create_model(NAMES[0], **SMALL), []
    getattr(model, part).register_forward_hook(lambda *_: calls.append(part))
    model(images(28, 28))
    assert calls == [part]


@pytest.mark.parametrize("part", ["patch_drop", "norm_pre"])
@torch.no_grad()
def test_parts_that_do_nothing_may_be_replaced(part: str) -> None:
    pair = make_pair(NAMES[0])
    for model in pair:
        setattr(model, part, nn.LayerNorm(128))
    assert_close(pair.ours.forward_intermediates(images(28, 42)), pair.theirs.forward_intermediates(images(28, 42)))
    with pytest.raises(TypeError, match=f"{part} is a LayerNorm"):
        optimize_for_inference(pair.ours)


def test_dropout_of_positions() -> None:
    model = create_model(NAMES[0], **SMALL, pos_drop_rate=0.5)
    dropped = (model._pos_embed(model.patch_embed(images(56, 56))) == 0).float().mean()
    assert 0.45 < dropped < 0.55
    assert (model.eval()._pos_embed(model.patch_embed(images(56, 56))) != 0).all()


READ: dict[str, Callable[[Any], Any]] = {
    "parameters": lambda model: len(list(model.parameters())),
    "registers": lambda model: None if model.reg_token is None else model.reg_token.shape,
    "no_embed_class": lambda model: model.no_embed_class,
    "pool_include_prefix": lambda model: model.pool_include_prefix,
    "attn_pool": lambda model: model.attn_pool,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "feat_ratio": lambda model: (model.patch_embed.feat_ratio(), model.patch_embed.feat_ratio(as_scalar=False)),
    "grid": lambda model: (model.patch_embed.grid_size, model.patch_embed.num_patches, model.patch_embed.img_size),
    "strict": lambda model: (model.patch_embed.strict_img_size, model.patch_embed.dynamic_img_pad),
    "attention": lambda model: [
        (block.attn.head_dim, block.attn.scale, block.attn.fused_attn, block.attn.attn_drop.p) for block in model.blocks
    ],
    "nothing": lambda model: [
        type(module) for module in (model.norm_pre, model.patch_drop, model.blocks[0].attn.q_norm, model.blocks)
    ],
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("dynamic_img_size", [True, False])
def test_attributes_that_are_read(what: str, dynamic_img_size: bool) -> None:
    for name in NAMES:
        pair = make_pair(name, dynamic_img_size=dynamic_img_size, attn_drop_rate=0.25)
        assert READ[what](pair.ours) == READ[what](pair.theirs)
