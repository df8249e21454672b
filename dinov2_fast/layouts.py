"""State-dict layouts: the names and the packing of DINOv2 weights in each library, and how to read them as our own.

    "facebook"            this package's own: facebookresearch/dinov2, the official .pth files
    "huggingface"         transformers, on disk and on its hub (also in memory, at least until 5.17)
    "huggingface_memory"  newer versions of transformers, in memory (checked with 5.23)
    "timm"                timm, which has no mask token

Wrappers are removed: ``{"teacher": …}``, ``module.``, FSDP, ``torch.compile``, the reference's block chunks, and any
prefix that a larger model gives its only backbone (``backbone.``, ``pretrained.``, …). A key that belongs to no layout
keeps its name, so strict loading reports it.

Three kinds of names appear below. A *key* is a name in the source, a *plain name* is a key without wrappers and
prefixes, and an *own name* is the name of the tensor in this package's models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.logs import log_once, logger

LAYOUTS = ("facebook", "huggingface", "huggingface_memory", "timm")

# Own name -> their name, both without .weight or .bias. Several names: the own tensor is theirs joined along dim 0.
_HUGGINGFACE_TOP_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HUGGINGFACE_BLOCK_NAMES = {"ls1.gamma": ("layer_scale1.lambda1",), "ls2.gamma": ("layer_scale2.lambda1",)}
TOP_NAMES: dict[str, dict[str, str]] = {
    "facebook": {},
    "huggingface": _HUGGINGFACE_TOP_NAMES,
    "huggingface_memory": _HUGGINGFACE_TOP_NAMES,
    "timm": {"register_tokens": "reg_token"},
}
BLOCK_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "facebook": {},
    "huggingface": {
        **_HUGGINGFACE_BLOCK_NAMES,
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attn.proj": ("attention.output.dense",),
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
    },
    "huggingface_memory": {
        **_HUGGINGFACE_BLOCK_NAMES,
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    },
    "timm": {"mlp.w12": ("mlp.fc1",), "mlp.w3": ("mlp.fc2",)},
}
BLOCK_PREFIX = {"huggingface": "encoder.layer", "huggingface_memory": "encoder.layer"}

# The block names that distinguish "huggingface_memory" from "huggingface".
_ONLY_IN_MEMORY = {
    name
    for own, names in BLOCK_NAMES["huggingface_memory"].items()
    for name in names
    if name not in BLOCK_NAMES["huggingface"][own]
}

# Parts that wrappers add anywhere in a key, and prefixes that a larger model gives its backbone.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = {"teacher", "model", "backbone", "dinov2", "dinov2_with_registers"}
_TRAINING_HEADS = ("dino_head.", "ibot_head.")
_CLS_TOKENS = ("cls_token", "embeddings.cls_token")  # plain names; every backbone has one of them
_FIRST_BLOCKS = ("blocks.0.", "encoder.layer.0.")
_CLS_ENDINGS = tuple(f".{name}" for name in _CLS_TOKENS)
# The entries under which training scripts save weights, best first.
_AVERAGED = ("teacher", "state_dict_ema", "model_ema", "ema")
_LAST_STEP = ("model", "state_dict", "model_state_dict", "module", "backbone", "encoder", "student", "network", "net")
MAX_KEYS = 20_000  # of a state dict. The largest DINOv2 has 808 (in "huggingface_memory"); each takes time to examine.


class Recipe(NamedTuple):
    """How one own tensor is made: by `combine` from the source's tensors `keys`."""

    keys: tuple[str, ...]
    combine: Callable[..., Tensor]


@dataclass(frozen=True)
class ConversionPlan:
    """How to read a source in some layout as own tensors, one at a time.

    `recipes` are by own name. Those in `not_in_source` make a tensor that the source lacks; a model without that tensor
    can ignore them. Those in `beside` belong to a larger model, outside its backbone.
    """

    layout: str
    source: Mapping[str, Tensor]
    recipes: dict[str, Recipe]
    not_in_source: frozenset[str]
    beside: frozenset[str]

    @torch.no_grad()
    def read(self, key: str) -> Tensor:
        """The own tensor `key`. Only the tensors that it needs are read from the source."""
        keys, combine = self.recipes[key]
        return combine(*(self.source[k] for k in keys))


def plan_conversion(state_dict: Mapping[str, Any]) -> ConversionPlan:
    """Recognises the layout of `state_dict` and plans how to read the own tensors from it.

    Raises:
        ValueError: two keys name the same tensor, there are several backbones, or too many keys.
        TypeError: `state_dict` is not a dictionary, or its keys are not strings.
    """
    source = _unwrap(state_dict)
    if len(source) > MAX_KEYS:
        raise InvalidValueError(
            f"This state dict has {len(source)} keys. A DINOv2 has fewer than {MAX_KEYS}: give only its weights."
        )
    if not all(isinstance(key, str) for key in source):
        raise InvalidTypeError(f"The keys of a state dict must be strings, got {some_keys(source)}.")
    names, beside = _names_of_backbone(source)
    if len(names) < len(source):
        logger.info("Skipped %d keys that do not belong to the (teacher's) backbone.", len(source) - len(names))
    layout = recognise(names)
    recipes = _recipes(layout, names)
    has_mask_token = "mask_token" in recipes
    if layout == "timm":
        _complete_timm(recipes, source)
    not_in_source = frozenset() if has_mask_token else frozenset({"mask_token"} & recipes.keys())
    return ConversionPlan(layout, source, recipes, not_in_source, frozenset(beside & recipes.keys()))


def _names_of_backbone(source: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """The key of `source` for each plain name, and the plain names of a larger model's tensors outside its backbone."""
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
    """The prefix of the only backbone among these plain names, "" if there is no backbone."""
    names = list(names)
    of_cls_tokens = {_without_ending(name) for name in names if name.endswith(_CLS_ENDINGS)}
    of_blocks = {name.partition(block)[0] for block in _FIRST_BLOCKS for name in names if block in name}
    found = sorted(of_cls_tokens & of_blocks)
    if len(found) > 1:
        raise InvalidValueError(
            f"This state dict holds several backbones, under {some_keys(found)}: give the tensors of one of them."
        )
    return found[0] if found else ""


def _without_ending(cls_key: str) -> str:
    """The prefix of a CLS token's key."""
    return cls_key.removesuffix("cls_token").removesuffix("embeddings.")


def some_keys(keys: Iterable[Any]) -> str:
    """The first of these keys, for a message."""
    first = list(itertools.islice(keys, 6))
    return ", ".join(map(str, first[:5])) + (", …" if len(first) > 5 else "")


def plain_key(key: str) -> str:
    """`key` without wrappers, the backbone's prefixes and block chunks."""
    parts = _parts(key)
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    if len(parts) > 2 and parts[0] == "blocks" and parts[2].isdigit():
        del parts[1]
    return ".".join(parts)


def recognise(keys: Iterable[str]) -> str:
    """The layout, one of `LAYOUTS`, of weights with these plain names."""
    keys = set(keys)
    if any(key.startswith(("embeddings.", "encoder.layer.", "layernorm.")) for key in keys):
        in_memory = any(f".{name}." in key for key in keys for name in _ONLY_IN_MEMORY)
        return "huggingface_memory" if in_memory else "huggingface"
    if "reg_token" in keys:
        return "timm"
    # A timm model without registers is known only by what it lacks. That says nothing about a part of a model.
    is_whole = keys >= {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"}
    is_facebook = "mask_token" in keys or "register_tokens" in keys or any(".mlp.w12." in key for key in keys)
    return "timm" if is_whole and not is_facebook else "facebook"


def misfit(layout: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """The error message for weights that do not fit a model."""
    lines = [f"The weights do not fit this model (recognised layout: {layout})."]
    for title, keys in (("Missing", missing), ("Unexpected", unexpected), ("Wrong shape", misshapen)):
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            lines.append(f"{title} ({len(keys)}): {shown}.")
    return "\n  ".join(lines)


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise InvalidTypeError(f"A state dict must be a dictionary of tensors, got a {type(state_dict).__name__}.")
    for name in _AVERAGED + _LAST_STEP:
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
    """The recipes by own name; `names` gives the source's key for each plain name."""
    recipes: dict[str, Recipe] = {}

    def add(own: str, keys: tuple[str, ...]) -> None:
        if own in recipes:
            raise InvalidValueError(_doubled(recipes[own].keys[0], keys[0], own))
        recipes[own] = Recipe(keys, _same if len(keys) == 1 else _join)

    top = {theirs: own for own, theirs in TOP_NAMES[layout].items()}
    in_blocks = {} if layout == "timm" else BLOCK_NAMES[layout]  # timm's are ambiguous: see `_complete_timm`
    block = {their: (own, theirs) for own, theirs in in_blocks.items() for their in theirs}
    prefix = BLOCK_PREFIX.get(layout, "blocks")
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+?)(\.weight|\.bias)?$")
    for name, key in names.items():
        match = pattern.match(name)
        if match is None:
            stem, ending = split_ending(name)
            add(top.get(name) or (top[stem] + ending if stem in top else name), (key,))
            continue
        index, stem, ending = match[1], match[2], match[3] or ""
        own, theirs = block.get(stem, (stem, (stem,)))
        siblings = [f"{prefix}.{index}.{their}{ending}" for their in theirs]
        if not all(sibling in names for sibling in siblings):
            add(name, (key,))  # some parts are absent, so this one keeps its name
        elif stem == theirs[0]:
            add(f"blocks.{index}.{own}{ending}", tuple(names[sibling] for sibling in siblings))
    return recipes


def _doubled(key: str, other: str, name: str) -> str:
    return f"The keys {key!r} and {other!r} both name the tensor {name!r}."


def split_ending(name: str) -> tuple[str, str]:
    """`name` without .weight or .bias, and that ending or ""."""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _join(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _complete_timm(recipes: dict[str, Recipe], source: Mapping[str, Tensor]) -> None:
    """Recipes for what timm stores differently.

    SwiGLU has the names of an MLP, models with registers have no CLS position, and there is no mask token.
    """
    first, second = (recipes.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first and second and source[first.keys[0]].shape[:1].numel() == 2 * source[second.keys[0]].shape[1:].numel():
        for own, (theirs,) in BLOCK_NAMES["timm"].items():
            for key in [key for key in recipes if f".{theirs}." in key]:
                recipes[key.replace(theirs, own)] = recipes.pop(key)
    if "register_tokens" in recipes and "pos_embed" in recipes:
        recipes["pos_embed"] = Recipe(recipes["pos_embed"].keys, _prepend_zero)
    if "mask_token" not in recipes and "cls_token" in recipes:
        cls_token = source[recipes["cls_token"].keys[0]]
        recipes["mask_token"] = Recipe((), partial(_no_mask_token, cls_token))


def _no_mask_token(cls_token: Tensor) -> Tensor:
    log_once("These weights come from timm and have no mask token: it is set to zeros.")
    return torch.zeros_like(cls_token[0])


def _prepend_zero(positions: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
