"""State-dict layouts: every way DINOv2 weights are named and packed, to and from the model's own.

    "facebook"            the model's own: facebookresearch/dinov2, the official .pth files
    "huggingface"         transformers, on disk and on its hub (in memory too until 5.17 at least)
    "huggingface_memory"  transformers' newer models in memory (checked with 5.23)
    "timm"                timm, which has no mask token

Wrappers are looked through: ``{"teacher": …}``, ``module.``, FSDP, ``torch.compile``, the reference's block chunks, and
whatever a larger model puts before the names of its one backbone (``backbone.``, ``pretrained.``, …). What belongs to
no layout keeps its name, so that strict loading reports it.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError

logger = logging.getLogger("dinov2_fast")

LAYOUTS = ("facebook", "huggingface", "huggingface_memory", "timm")

# Own name -> theirs, without the ending .weight or .bias. Several names: the own tensor is theirs, joined along dim 0.
_HUGGINGFACE_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HUGGINGFACE_BLOCK = {
    "ls1.gamma": ("layer_scale1.lambda1",),
    "ls2.gamma": ("layer_scale2.lambda1",),
}
_TOP: dict[str, dict[str, str]] = {
    "facebook": {},
    "huggingface": _HUGGINGFACE_TOP,
    "huggingface_memory": _HUGGINGFACE_TOP,
    "timm": {"register_tokens": "reg_token"},
}
_BLOCK: dict[str, dict[str, tuple[str, ...]]] = {
    "facebook": {},
    "huggingface": {
        **_HUGGINGFACE_BLOCK,
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attn.proj": ("attention.output.dense",),
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
    },
    "huggingface_memory": {
        **_HUGGINGFACE_BLOCK,
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    },
    "timm": {"mlp.w12": ("mlp.fc1",), "mlp.w3": ("mlp.fc2",)},
}
_BLOCK_PREFIX = {"huggingface": "encoder.layer", "huggingface_memory": "encoder.layer"}

# What only this layout has in its blocks: the names in memory that are not also names on disk.
_ONLY_IN_MEMORY = {
    name
    for own, names in _BLOCK["huggingface_memory"].items()
    for name in names
    if name not in _BLOCK["huggingface"][own]
}

# Parts of a key that wrappers add anywhere, and prefixes of a backbone inside a larger model.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = {"teacher", "model", "backbone", "dinov2", "dinov2_with_registers"}
_TRAINING_HEADS = ("dino_head.", "ibot_head.")
_CLS_TOKENS = ("cls_token", "embeddings.cls_token")  # its plain names: every backbone has one
_FIRST_BLOCKS = ("blocks.0.", "encoder.layer.0.")
_CLS_ENDINGS = tuple(f".{name}" for name in _CLS_TOKENS)
# What training scripts call the weights in a file that holds more, best first: averaged weights before the last ones.
_NESTED = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "ema",
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "backbone",
    "encoder",
    "student",
    "network",
    "net",
)
MAX_KEYS = 20_000  # of a state dict; the largest DINOv2 has 568, and each costs time to look at


class Recipe(NamedTuple):
    """How one own tensor is made: `combine` of the source's tensors `keys`."""

    keys: tuple[str, ...]
    combine: Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """How a source in some layout gives the tensors of the own layout, one at a time."""

    layout: str
    source: Mapping[str, Tensor]
    recipes: dict[str, Recipe]
    made_up: frozenset[str]  # keys of `recipes` that the source lacks, of no use to a model that lacks them too
    beside: frozenset[str]  # keys of `recipes` that a larger model has beside its backbone

    @torch.no_grad()
    def read(self, key: str) -> Tensor:
        """The own tensor `key`; a source that loads lazily loads only what it needs."""
        keys, combine = self.recipes[key]
        return combine(*(self.source[k] for k in keys))


@torch.no_grad()
def convert_state_dict(state_dict: Mapping[str, Any], *, to: str, block_chunks: int = 0) -> dict[str, Tensor]:
    """The weights of `state_dict`, in whatever layout it is, in the layout `to`.

    Args:
        state_dict: weights in any layout, wrapped or not; a classification head (``classifier.*``) goes along.
        to: "facebook", "huggingface" (what transformers loads from disk), "huggingface_memory" or "timm".
        block_chunks: for "facebook": name the blocks as a model with so many `block_chunks` does.

    Returns:
        A new dictionary. Tensors are copied only where the layouts pack them differently. Converting back gives the
        same bits, with two exceptions: timm has no mask token (it becomes zeros), and for models with registers timm
        keeps the CLS token's position added into the CLS token.

    Raises:
        ValueError: unknown `to`, or `block_chunks` with another layout.
        KeyError: the weights are in no known layout.
    """
    if to not in LAYOUTS:
        raise InvalidValueError(f"There is no layout {to!r}; choose one of {', '.join(LAYOUTS)}.")
    if block_chunks and to != "facebook":
        raise InvalidValueError(f"Only the layout 'facebook' has block chunks, not {to!r}.")
    plan = plan_conversion(state_dict)
    for needed in ("cls_token", "pos_embed"):
        if needed not in plan.recipes:
            raise KeyError(
                f"These are no DINOv2 weights in a layout known here: no {needed} among {some_keys(plan.source)}."
            )
    own = {key: plan.read(key) for key in plan.recipes}
    if to == "timm":
        own = _merge_cls_position(own)
    converted: dict[str, Tensor] = {}
    prefix = _classifier_prefix(own) if to.startswith("huggingface") else ""
    for key, tensor in own.items():
        names = _names_in(to, key, block_chunks, _depth(own))
        parts = [tensor] if len(names) == 1 else [part.clone() for part in tensor.chunk(len(names))]
        for name, part in zip(names, parts, strict=True):
            converted[name if name.startswith("classifier.") else prefix + name] = part
    return converted


def plan_conversion(state_dict: Mapping[str, Any]) -> Plan:
    """Recognises the layout of `state_dict` and says how to read the own tensors from it.

    Raises:
        ValueError: two of its keys name the same tensor.
        TypeError: it is no dictionary of names.
    """
    source = _unwrap(state_dict)
    if len(source) > MAX_KEYS:
        raise InvalidValueError(
            f"A state dict of {len(source)} keys is none of a DINOv2, which has fewer than {MAX_KEYS}."
        )
    if not all(isinstance(key, str) for key in source):
        raise InvalidTypeError(f"The keys of a state dict are names, but these are {some_keys(source)}.")
    names, beside = _names_of_backbone(source)
    if len(names) < len(source):
        logger.info("Left out what is not the (teacher's) backbone: %d keys.", len(source) - len(names))
    layout = recognise(names)
    recipes = _recipes(layout, names)
    has_mask_token = "mask_token" in recipes
    if layout == "timm":
        _complete_timm(recipes, source)
    made_up = frozenset() if has_mask_token else frozenset({"mask_token"} & recipes.keys())
    return Plan(layout, source, recipes, made_up, frozenset(beside & recipes.keys()))


def _names_of_backbone(source: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """The key of `source` for each plain name, and the names of what a larger model has beside its backbone."""
    has_teacher = any(_is_teacher(key) for key in source)
    names: dict[str, str] = {}
    for key in source:
        name = plain_key(key)
        if name.startswith(_TRAINING_HEADS) or (has_teacher and not _is_teacher(key)):
            continue
        if name in names:
            raise InvalidValueError(_doubled(names[name], key, name))
        names[name] = key
    anchor = next((names[name] for name in _CLS_TOKENS if name in names), None)
    if anchor is not None:
        prefix = _without_ending(".".join(_parts(anchor)))
        return names, {name for name, key in names.items() if not ".".join(_parts(key)).startswith(prefix)}
    prefix = _unknown_prefix(names)
    inside = {plain_key(name.removeprefix(prefix)): key for name, key in names.items() if name.startswith(prefix)}
    outside = {name: key for name, key in names.items() if not name.startswith(prefix)}
    return {**outside, **inside}, set(outside)


def _unknown_prefix(names: Iterable[str]) -> str:
    """What stands before the names of the one backbone among these plain names; "" if there is none.

    Raises:
        ValueError: there are several.
    """
    names = list(names)
    of_cls_tokens = {_without_ending(name) for name in names if name.endswith(_CLS_ENDINGS)}
    of_blocks = {name.partition(block)[0] for block in _FIRST_BLOCKS for name in names if block in name}
    found = sorted(of_cls_tokens & of_blocks)
    if len(found) > 1:
        raise InvalidValueError(
            f"This state dict holds several backbones, under {some_keys(found)}: give the tensors of one."
        )
    return found[0] if found else ""


def _without_ending(cls_key: str) -> str:
    """What stands before the name of a CLS token in `cls_key`."""
    return cls_key.removesuffix("cls_token").removesuffix("embeddings.")


def some_keys(keys: Iterable[Any]) -> str:
    """The first few of these keys, for a message."""
    first = list(itertools.islice(keys, 6))
    return ", ".join(map(str, first[:5])) + (", …" if len(first) > 5 else "")


def plain_key(key: str) -> str:
    """`key` without wrappers, prefixes of the backbone and block chunks."""
    parts = _parts(key)
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    if len(parts) > 2 and parts[0] == "blocks" and parts[2].isdigit():
        del parts[1]
    return ".".join(parts)


def recognise(keys: Iterable[str]) -> str:
    """The layout of weights with these (plain) keys: one of `LAYOUTS`."""
    keys = set(keys)
    if any(key.startswith(("embeddings.", "encoder.layer.", "layernorm.")) for key in keys):
        in_memory = any(f".{name}." in key for key in keys for name in _ONLY_IN_MEMORY)
        return "huggingface_memory" if in_memory else "huggingface"
    if "reg_token" in keys:
        return "timm"
    # Without registers, all that tells a whole timm model is what it has not; a part of a model tells nothing.
    is_whole = keys >= {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"}
    is_facebook = "mask_token" in keys or "register_tokens" in keys or any(".mlp.w12." in key for key in keys)
    return "timm" if is_whole and not is_facebook else "facebook"


def misfit(layout: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """The message for weights that do not fit a model."""
    lines = [f"The weights do not fit this model (recognised layout: {layout})."]
    for title, keys in (("Missing", missing), ("Unexpected", unexpected), ("Wrong shape", misshapen)):
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            lines.append(f"{title} ({len(keys)}): {shown}.")
    return "\n  ".join(lines)


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise InvalidTypeError(f"A state dict is a dictionary of tensors, not a {type(state_dict).__name__}.")
    for name in _NESTED:
        inner = state_dict.get(name)
        if isinstance(inner, Mapping):
            found = _unwrap(inner)
            if any(isinstance(value, Tensor) for value in found.values()):
                return found
    return state_dict


def _parts(key: str) -> list[str]:
    return [part for part in key.split(".") if part not in _WRAPPERS]


def _is_teacher(key: str) -> bool:
    return _parts(key)[:1] == ["teacher"]


def _recipes(layout: str, names: Mapping[str, str]) -> dict[str, Recipe]:
    """Recipes from plain names to own names, where `names` gives the source's key of each plain name."""
    recipes: dict[str, Recipe] = {}

    def add(own: str, keys: tuple[str, ...]) -> None:
        if own in recipes:
            raise InvalidValueError(_doubled(recipes[own].keys[0], keys[0], own))
        recipes[own] = Recipe(keys, _same if len(keys) == 1 else _join)

    top = {theirs: own for own, theirs in _TOP[layout].items()}
    block = {their: (own, theirs) for own, theirs in _BLOCK[layout].items() for their in theirs if layout != "timm"}
    prefix = _BLOCK_PREFIX.get(layout, "blocks")
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+?)(\.weight|\.bias)?$")
    for name, key in names.items():
        match = pattern.match(name)
        if match is None:
            stem, ending = _split_ending(name)
            add(top.get(name) or (top[stem] + ending if stem in top else name), (key,))
            continue
        index, stem, ending = match[1], match[2], match[3] or ""
        own, theirs = block.get(stem, (stem, (stem,)))
        siblings = [f"{prefix}.{index}.{their}{ending}" for their in theirs]
        if not all(sibling in names for sibling in siblings):
            add(name, (key,))  # a part alone makes no own tensor: it keeps its name
        elif stem == theirs[0]:
            add(f"blocks.{index}.{own}{ending}", tuple(names[sibling] for sibling in siblings))
    return recipes


def _doubled(key: str, other: str, name: str) -> str:
    return f"The keys {key!r} and {other!r} both name the tensor {name!r}."


def _split_ending(name: str) -> tuple[str, str]:
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _join(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _complete_timm(recipes: dict[str, Recipe], source: Mapping[str, Tensor]) -> None:
    """What timm packs otherwise: SwiGLU under the names of an MLP, positions without CLS, no mask token."""
    first, second = (recipes.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first and second and source[first.keys[0]].shape[:1].numel() == 2 * source[second.keys[0]].shape[1:].numel():
        for own, (theirs,) in _BLOCK["timm"].items():
            for key in [key for key in recipes if f".{theirs}." in key]:
                recipes[key.replace(theirs, own)] = recipes.pop(key)
    if "register_tokens" in recipes and "pos_embed" in recipes:
        recipes["pos_embed"] = Recipe(recipes["pos_embed"].keys, _prepend_zero)
    if "mask_token" not in recipes:
        cls_token = source[recipes["cls_token"].keys[0]]
        recipes["mask_token"] = Recipe((), partial(_no_mask_token, cls_token))


def _no_mask_token(cls_token: Tensor) -> Tensor:
    log_once("These weights have no mask token, as timm's: it is set to zeros.")
    return torch.zeros_like(cls_token[0])


def _prepend_zero(positions: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)


def _merge_cls_position(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's registers models have no CLS position: it goes into the CLS token. No mask token either."""
    own = {key: tensor for key, tensor in own.items() if key != "mask_token"}
    if "register_tokens" in own:
        positions = own["pos_embed"]
        own["cls_token"] = own["cls_token"] + positions[:, :1]
        own["pos_embed"] = positions[:, 1:].clone()
    return own


def _names_in(layout: str, key: str, block_chunks: int, depth: int) -> list[str]:
    """What `layout` calls the own tensor `key`; several names for one that it keeps in parts."""
    match = re.match(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?$", key)
    if match is None:
        stem, ending = _split_ending(key)
        top = _TOP[layout]
        return [top.get(key) or (top[stem] + ending if stem in top else key)]
    index, stem, ending = match[1], match[2], match[3] or ""
    prefix = _BLOCK_PREFIX.get(layout, "blocks")
    if block_chunks:
        prefix = f"blocks.{int(index) // max(depth // block_chunks, 1)}"
    return [f"{prefix}.{index}.{name}{ending}" for name in _BLOCK[layout].get(stem, (stem,))]


def _depth(own: Mapping[str, Tensor]) -> int:
    return 1 + max((int(key.split(".")[1]) for key in own if key.startswith("blocks.")), default=-1)


def _classifier_prefix(own: Mapping[str, Tensor]) -> str:
    if not any(key.startswith("classifier.") for key in own):
        return ""
    return "dinov2_with_registers." if "register_tokens" in own else "dinov2."


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Logs a warning, the first time only."""
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)
