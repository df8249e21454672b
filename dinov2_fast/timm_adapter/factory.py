"""`create_model` in place of ``timm.create_model``, for timm's eight DINOv2 names.

timm's scripts pass more arguments than a DINOv2 has. Some have no effect, some are accepted only with the value that is
true of every DINOv2, and all others are errors.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2_fast.base_module import NOT_SCRIPTABLE
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.data.image_processor import IMAGENET_MEAN, IMAGENET_STD
from dinov2_fast.errors import InvalidTypeError, InvalidValueError, WeightsError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.timm_adapter.features import FeatureGetter
from dinov2_fast.timm_adapter.model import TimmVisionTransformer
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import load

TAG = ".lvd142m"  # the ending of timm's names, for the published weights
TRAINED_SIZE = 518  # image size in pixels that the published position table is for

# Arguments of timm that this model lacks: those that have no effect, and those accepted with these values only.
WITHOUT_EFFECT = ("exportable", "no_jit")
ACCEPTED_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("scriptable", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "pre_norm", "fix_init"), (False,)),
    **dict.fromkeys(("pool_include_prefix", "patch_drop_rate", "proj_drop_rate"), (False,)),
    **dict.fromkeys(("class_token", "final_norm"), (True,)),
    "pos_embed": ("learn",),
    "weight_init": ("", "skip"),
    "attn_layer": ("", "attn"),
    "feature_cls": ("getter",),
}


def create_model(
    model_name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """A DINOv2 model by timm's name.

    Unlike timm's, the model by default takes images of any size that is a multiple of the patch size. It resamples its
    position table for each size, as timm does with ``dynamic_img_size=True``. The resampling is timm's. Models without
    registers resample differently in the reference: set ``model.position_interpolation = "offset"`` for that.

    Args:
        model_name: such as "vit_small_patch14_dinov2" or "vit_small_patch14_reg4_dinov2.lvd142m".
        pretrained: load the published weights. A classifier (`num_classes`) is initialised at random.
        checkpoint_path: a file to load afterwards, in any layout.
        features_only: return a `FeatureGetter`, whose forward pass returns feature maps.
        out_indices: for `features_only`, how many of the last blocks, or the indices of blocks, also negative.
        device, dtype: of the parameters; by default the CPU, and the dtype of the published weights or float32.
        pretrained_cfg: entries of `default_cfg` to replace, as a dictionary or timm's object; or the tag of the
            weights. `num_classes`, `global_pool` and `input_size` become arguments, and `pretrained` loads `file`.
        pretrained_cfg_overlay: more such entries.
        cache_dir: an error with `pretrained`, otherwise ignored.
        **kwargs: arguments of `TimmVisionTransformer`. None counts as not given. With `img_size` the published position
            table, for 518 pixels, is resampled as by `TimmVisionTransformer.set_input_size`. For another number of
            `in_chans` the published filters are summed or repeated, as in timm.

    Returns:
        A `TimmVisionTransformer` or `FeatureGetter` in training mode.

    Raises:
        TypeError: the model has no such argument; the message lists its arguments.
        ValueError: timm has no DINOv2 of this name (the message lists the nearest), or an argument has a wrong value.
        WeightsError: the weights cannot be found, downloaded or read, or do not fit.
    """
    config = _find(model_name)
    given_cfg = _given_cfg(config, pretrained_cfg, pretrained_cfg_overlay)
    arguments = _own_arguments(config, {**_arguments_in(given_cfg), **_given(kwargs)})
    if pretrained:
        _refuse_other_sources(config, given_cfg, cache_dir)
        model = _with_published_weights(config, arguments, given_cfg.get("file"))
    else:
        model = _build(config, arguments)
    if checkpoint_path:
        _load_checkpoint(model, Path(checkpoint_path).expanduser())
    model.to(device=device, dtype=dtype)
    model.default_cfg = model.pretrained_cfg = {**_data_config(config), **given_cfg}
    return FeatureGetter(model, out_indices) if features_only else model


def _find(model_name: str) -> BackboneConfig:
    named = {config.timm_name.removesuffix(TAG): config for config in BACKBONES.values()}
    plain = model_name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/").removesuffix(TAG)
    if plain in named:
        return named[plain]
    near = difflib.get_close_matches(plain, named, n=3, cutoff=0.5) or list(named)
    raise InvalidValueError(f"timm has no DINOv2 called {model_name!r}; did you mean {' or '.join(near)}?")


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _given_cfg(config: BackboneConfig, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """The entries of timm's `pretrained_cfg`, updated by those of `overlay`."""
    if isinstance(pretrained_cfg, str):
        if pretrained_cfg != TAG.removeprefix("."):
            raise InvalidValueError(
                f"{config.timm_name} has no weights tagged {pretrained_cfg!r}; leave pretrained_cfg out."
            )
        pretrained_cfg = None
    if is_dataclass(pretrained_cfg) and not isinstance(pretrained_cfg, type):
        pretrained_cfg = asdict(pretrained_cfg)
    return {**_given(pretrained_cfg or {}), **(overlay or {})}


def _arguments_in(cfg: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model that timm reads from a `pretrained_cfg`."""
    arguments = {name: cfg.get(name) for name in ("num_classes", "global_pool")}
    channels, *img_size = cfg.get("input_size") or (None,)
    return _given({**arguments, "in_chans": channels, "img_size": tuple(img_size) or None})


def _refuse_other_sources(config: BackboneConfig, cfg: dict[str, Any], cache_dir: Any) -> None:
    published = (None, config.url, "timm/", f"timm/{config.timm_name}")
    others = [name for name in ("url", "hf_hub_id", "state_dict") if cfg.get(name) not in published]
    if others and not cfg.get("file"):
        raise InvalidValueError(
            f"pretrained_cfg names other weights ({', '.join(others)}). Give a file instead, as its entry `file` or as "
            "checkpoint_path."
        )
    if cache_dir is not None:
        raise InvalidValueError(
            "cache_dir is not used: set the environment variables DINOV2_FAST_CACHE and, for the hub, HF_HUB_CACHE."
        )


def _own_arguments(config: BackboneConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `TimmVisionTransformer` among `given`. Raises for those that this model cannot honour."""
    if given.get("scriptable"):
        raise InvalidTypeError(f"scriptable=True: {NOT_SCRIPTABLE}")
    accepted = {
        **ACCEPTED_VALUES,
        "reg_tokens": (config.num_register_tokens,),
        "no_embed_class": (config.num_register_tokens > 0,),
        "act_layer": ("gelu",) if config.ffn_layer == "mlp" else ("silu", nn.SiLU),
    }
    given = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    given = {name: value for name, value in given.items() if not any(value == v for v in accepted.get(name, ()))}
    signatures = (inspect.signature(kind.__init__) for kind in (TimmVisionTransformer, DinoVisionTransformer))
    not_arguments = {"self", "kwargs"}
    if config.ffn_layer != "mlp" or isinstance(given.get("act_layer"), str):
        not_arguments.add("act_layer")  # SwiGLU has its own, and names of activations are timm's
    known = [name for signature in signatures for name in signature.parameters if name not in not_arguments]
    unknown = [f"{name}={value!r}" for name, value in given.items() if name not in known]
    if unknown:
        raise InvalidTypeError(
            f"create_model does not take {', '.join(unknown)}. Its models take {', '.join(known)}. Give your own "
            "weights as checkpoint_path; `dinov2_fast.load` says where published weights are searched."
        )
    return given


def _build(config: BackboneConfig, arguments: dict[str, Any]) -> TimmVisionTransformer:
    timm_has = {"init_values": 1e-5, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return TimmVisionTransformer(**{**config.constructor_arguments(), **timm_has, **arguments})


def _with_published_weights(
    config: BackboneConfig, arguments: dict[str, Any], file: str | None
) -> TimmVisionTransformer:
    """The model with the tensors that `load` read. It is built without storage, so the weights are in memory once."""
    with torch.device("meta"):
        model = _build(config, {**arguments, "num_classes": 0, "img_size": TRAINED_SIZE})
    if isinstance(model.norm, nn.Identity):
        raise InvalidValueError(
            f"The published weights normalise before pooling: give fc_norm=False with "
            f"global_pool={model.global_pool!r}."
        )
    backbone = load(config.name, weights=file, in_chans=arguments.get("in_chans", 3))
    model.load_state_dict(backbone.state_dict(), assign=True)
    model.loaded_from = backbone.loaded_from
    model.set_input_size(arguments.get("img_size"))
    model.reset_classifier(arguments.get("num_classes", 0))
    return model


def _load_checkpoint(model: TimmVisionTransformer, path: Path) -> None:
    try:
        model.load_state_dict(open_weights(path))
    except WeightsError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    model.loaded_from = str(path)


def _data_config(config: BackboneConfig) -> dict[str, Any]:
    """The entries that ``timm.data.resolve_model_data_config`` and timm's scripts read."""
    return {
        "architecture": config.timm_name.removesuffix(TAG),
        "tag": TAG.removeprefix("."),
        "num_classes": 0,
        "input_size": (3, TRAINED_SIZE, TRAINED_SIZE),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": tuple(IMAGENET_MEAN),
        "std": tuple(IMAGENET_STD),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
