"""Loading and saving models as in transformers: from and to a folder or hub repository with config.json and weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError, InvalidValueError, WeightsError
from dinov2_fast.huggingface.configuration import Dinov2Config, refuse_upload
from dinov2_fast.huggingface.tools import ToolMethods
from dinov2_fast.layouts import plain_key
from dinov2_fast.logs import log_once, logger
from dinov2_fast.weights.convert import convert_state_dict
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import as_dtype, fill
from dinov2_fast.weights.save import save_weights
from dinov2_fast.weights.sources import SourceOptions, find_checkpoint, find_config

HEAD = "classifier."

# Arguments of transformers' from_pretrained that are accepted and have no effect.
_WITHOUT_EFFECT = {
    "attn_implementation",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
# Values of device_map with which transformers chooses the devices.
_PLACEMENTS = {"auto", "balanced", "balanced_low_0", "sequential"}

Model = TypeVar("Model", bound="PreTrainedModel")


class PreTrainedModel(ToolMethods):
    """The base class of the models in this folder: a config, loading and saving, and the methods of `ToolMethods`."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        config: Dinov2Config | str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Model:
        """A model in eval mode with the weights of a folder, a file or a hub repository, in any layout.

        Args:
            pretrained_model_name_or_path: a folder with ``config.json`` and weights, a hub id such as
                ``facebook/dinov2-base``, or with `config` a file of weights; None with `config` and `state_dict`.
            config: a configuration, or the path or name of one, instead of the one beside the weights.
            state_dict: weights in any layout instead of those of `pretrained_model_name_or_path`. They are copied.
            revision: branch, tag or commit on the hub.
            cache_dir: the folder in which files of the hub are kept.
            token: the access token for the hub.
            subfolder: of the folder or repository.
            variant: of the weights; "fp16" reads ``model.fp16.safetensors``.
            dtype: of the parameters, also as a name ("bfloat16"). None or "auto" is the config's dtype or, if it has
                none, that of the weights. `torch_dtype` is the same.
            device: of the parameters. `device_map` with one device is the same; "auto" is a GPU or else the CPU.
            local_files_only: do not use the network.
            ignore_mismatched_sizes: initialise a classification head that has another number of labels than the
                weights, and adapt filters to another number of channels (`dinov2_fast.weights.load.adapt_filters`).
            output_loading_info: return a pair: the model, and a dictionary of the keys that were missing, unexpected or
                of another shape.
            **kwargs: fields of the config to override (``num_labels=10``, ``out_indices=[2, 5]``, …).

        A classification head that the weights lack is initialised, with a warning. One that the model lacks is skipped.

        Raises:
            WeightsError: the weights or the config cannot be found or read, or do not fit.
            ValueError: the config is another model's, a field or the dtype is wrong, or there are several devices.
            TypeError: an argument is none of these and no field of the config.
        """
        old_name = kwargs.pop("torch_dtype", None)
        dtype = dtype if dtype is not None else old_name
        device = _device(kwargs.pop("device_map", device))
        options = SourceOptions(revision, local_files_only, cache_dir, token, subfolder, variant)
        if state_dict is not None:
            state_dict = MappingProxyType(state_dict)  # `fill` would empty a plain dictionary
        elif pretrained_model_name_or_path is not None:
            checkpoint = find_checkpoint(str(pretrained_model_name_or_path), options)
            state_dict, config = open_weights(checkpoint.weights), config or checkpoint.config
        else:
            raise InvalidTypeError("There is nothing to load. Give a folder, file or hub id, or state_dict and config.")
        config = cls._read_config(config, pretrained_model_name_or_path, options, kwargs)
        wanted = config.dtype if dtype in (None, "auto") else as_dtype(dtype)
        with torch.device("meta"):
            model = cls(config)
        head = _head_shapes(state_dict)
        allowed_unexpected = (HEAD,) if config.use_mask_token else (HEAD, "mask_token")
        missing = fill(
            model,
            state_dict,
            device=device,
            dtype=wanted,
            allowed_missing=(HEAD,),
            allowed_misshapen=(HEAD,) if ignore_mismatched_sizes else (),
            allowed_unexpected=allowed_unexpected,
            adapt_channels=ignore_mismatched_sizes,
        )
        if missing:
            logger.warning(
                "%s has no %s that fits: the classification head is initialised at random, train it.",
                pretrained_model_name_or_path,
                ", ".join(missing),
            )
            model.initialise_head(device=device or "cpu", dtype=model.dtype)
        config.dtype = model.dtype
        config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path or "")
        model.eval()
        # As in transformers, the annotation is that of the usual case.
        return (model, _loading_info(head, model, missing)) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def _read_config(
        cls,
        config: Any,
        pretrained_model_name_or_path: str | Path | None,
        options: SourceOptions,
        overrides: dict[str, Any],
    ) -> Dinov2Config:
        """A copy of `config`, or the configuration found at `config` or the model's path, with `overrides`."""
        if config is None and pretrained_model_name_or_path is None:
            raise InvalidTypeError(
                "A state_dict alone is not enough: give a config, or the pretrained_model_name_or_path of one."
            )
        if config is not None and not isinstance(config, str | Path):
            _refuse_unknown(overrides, None)
            return copy.deepcopy(cls.config_class.of(config))
        try:
            path = find_config(str(config or pretrained_model_name_or_path), options)
        except WeightsError as error:
            raise WeightsError(
                f"{error} Give config, or save with save_pretrained (transformers' Trainer calls it where it is given "
                "processing_class=model)."
            ) from error
        read = cls.config_class.from_pretrained(path)
        _refuse_unknown(overrides, read)
        overrides = {name: value for name, value in overrides.items() if hasattr(read, name)}
        return cls.config_class.from_dict(read.to_dict(), **overrides)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        save_function: Callable[..., Any] | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors`` in transformers' layout into `save_directory`.

        ``transformers.AutoModel.from_pretrained(save_directory)`` and this class's `from_pretrained` load it.

        Args:
            save_directory: the folder. It is made if it does not exist.
            is_main_process: False writes nothing.
            state_dict: weights to write instead of the model's own, in any layout (gathered by FSDP, for instance).
            variant: "fp16" writes ``model.fp16.safetensors``.
            safe_serialization, push_to_hub, max_shard_size, save_function, token, save_peft_format,
                save_original_format: accepted as in transformers. One local file in safetensors is always written.

        The position interpolation is written too if it is not the default. transformers ignores it.

        Raises:
            ValueError: `safe_serialization` is False or `push_to_hub` True.
        """
        if not safe_serialization:
            raise InvalidValueError("Only safetensors files are written; call with safe_serialization=True.")
        refuse_upload(push_to_hub)
        if not is_main_process:
            return
        self.config.position_interpolation = self._position_interpolation_to_save()
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(save_directory)
        tensors = convert_state_dict(self.state_dict() if state_dict is None else state_dict, to="huggingface")
        if not self.config.use_mask_token:
            tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("mask_token")}
        name = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
        save_weights(tensors, Path(save_directory) / name, overwrite=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Warns once if this is part of a larger module and transformers is loaded; torch calls it for each part.

        The keys stay the names of the parameters: torch.distributed.checkpoint, functional_call and torch.export need
        them.
        """
        if prefix not in ("", f"{self.base_model_prefix}.") and "transformers" in sys.modules:
            log_once(
                f"This {type(self).__name__} is part of a larger model, whose state dict has dinov2_fast's names for "
                f"it ({prefix}blocks.0.…). The same model can load them. transformers' own classes do not know these "
                "names and would initialise that part at random. To save for transformers, use its own backbone and "
                "call dinov2_fast.accelerate(model) instead."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _position_interpolation_to_save(self) -> str | None:
        name = self.base_model.position_interpolation
        if name == "custom":
            logger.warning("config.json cannot hold this model's way of resampling positions; the default is saved.")
        return None if name in ("custom", self.config.default_position_interpolation) else name

    def initialise_head(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Gives a classification head that no checkpoint filled its initial values."""


def _head_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the classification head in these weights."""
    keys = [key for key in state_dict if plain_key(key).startswith(HEAD)]
    return {plain_key(key): tuple(state_dict[key].shape) for key in keys}


def _loading_info(head: dict[str, tuple[int, ...]], model: nn.Module, missing: list[str]) -> dict[str, Any]:
    """transformers' loading info. Only a classification head may misfit; `head` has its shapes in the weights."""
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    mismatched = {(key, head[key], own[key]) for key in head.keys() & own.keys() if head[key] != own[key]}
    return {
        "missing_keys": set(missing) - head.keys(),
        "unexpected_keys": head.keys() - own.keys(),
        "mismatched_keys": mismatched,
        "error_msgs": [],
    }


def _refuse_unknown(kwargs: Mapping[str, Any], config: Dinov2Config | None) -> None:
    """Raises for arguments that `config` lacks: a misspelt argument, or a secret, would be saved with it."""
    asked = (name for name, value in kwargs.items() if value is not None and value is not False)
    unknown = sorted(name for name in asked if name not in _WITHOUT_EFFECT and not hasattr(config, name))
    if not unknown:
        return
    if config is None:
        raise InvalidTypeError(f"{', '.join(unknown)} cannot be given together with config; set it in the config.")
    raise InvalidTypeError(
        f"{', '.join(unknown)} is no argument of from_pretrained and no field of {type(config).__name__}. Remove it, "
        "or check the spelling."
    )


def _device(device: Any) -> Any:
    if isinstance(device, Mapping):
        places = {str(place) for place in device.values()}
        if len(places) != 1:
            raise InvalidValueError(
                f"The model runs on one device, but device_map {dict(device)} has several. Give one device."
            )
        device = next(iter(device.values()))
    if device in _PLACEMENTS:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
