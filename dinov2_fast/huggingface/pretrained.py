"""Loading and saving models as transformers does: a folder or hub repository with config.json and weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2_fast.base_module import Dinov2Module
from dinov2_fast.errors import InvalidTypeError, InvalidValueError, WeightsError
from dinov2_fast.huggingface.configuration import Dinov2Config, refuse_upload
from dinov2_fast.layouts import plain_key
from dinov2_fast.logs import log_once, logger
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.convert import convert_state_dict
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import as_dtype, fill
from dinov2_fast.weights.sources import SourceOptions, find_checkpoint, find_config

HEAD = "classifier."

# Arguments of transformers' from_pretrained that change nothing here, or nothing that is done otherwise.
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
# device_map values with which transformers places a model by itself.
_PLACEMENTS = {"auto", "balanced", "balanced_low_0", "sequential"}

Model = TypeVar("Model", bound="PreTrainedModel")


class PreTrainedModel(Dinov2Module):
    """What the models of this face share: a config, loading and saving, gradient checkpointing."""

    config_class: ClassVar[type[Dinov2Config]] = Dinov2Config
    base_model_prefix: ClassVar[str] = "dinov2"
    main_input_name: ClassVar[str] = "pixel_values"
    input_modalities: ClassVar[tuple[str, ...]] = ("image",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    config: Dinov2Config
    name_or_path: str

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
            pretrained_model_name_or_path: folder with ``config.json`` and weights, or hub id such as
                ``facebook/dinov2-base``; None with `config` and `state_dict`.
            config: instead of the one beside the weights; a configuration or where one is.
            state_dict: weights in any layout instead of those of `pretrained_model_name_or_path`; they are copied.
            revision, cache_dir, token: of the hub: branch, tag or commit; the folder to keep files in; the access.
            subfolder: of the folder or repository.
            variant: of the weights: "fp16" reads ``model.fp16.safetensors``.
            dtype: of the parameters, also as a name ("bfloat16"); None or "auto" for the config's, or if it has none
                that of the weights. `torch_dtype` is the same.
            device: where the model goes; `device_map` with one device, or "auto", is the same.
            local_files_only: do not touch the network.
            ignore_mismatched_sizes: initialise a classification head of another number of labels than the weights' one,
                and adapt filters for another number of channels (`dinov2_fast.weights.channels`).
            output_loading_info: return the pair of the model and a dictionary of the keys that were missing,
                unexpected, or of another shape.
            **kwargs: fields of the config to override (``num_labels=10``, ``out_indices=[2, 5]``, …).

        A classification head that the weights lack is initialised, with a warning; one that the model has not is left
        out.

        Raises:
            WeightsError: the weights or the config cannot be found or read, or do not fit.
            TypeError: an argument that is none of these and no field of the config.
        """
        old_name = kwargs.pop("torch_dtype", None)
        dtype = dtype if dtype is not None else old_name
        device = _device(kwargs.pop("device_map", device))
        options = SourceOptions(revision, local_files_only, cache_dir, token, subfolder, variant)
        if state_dict is not None:
            state_dict = MappingProxyType(state_dict)  # a plain dictionary would be emptied
        elif pretrained_model_name_or_path is not None:
            checkpoint = find_checkpoint(str(pretrained_model_name_or_path), options)
            state_dict, config = open_weights(checkpoint.weights), config or checkpoint.config
        else:
            raise InvalidTypeError("There is nothing to load: give a folder, file or hub id, or state_dict and config.")
        config = cls._read_config(config, pretrained_model_name_or_path, options, kwargs)
        wanted = config.dtype if dtype in (None, "auto") else as_dtype(dtype)
        with torch.device("meta"):
            model = cls(config)
        head = _head_shapes(state_dict)
        if ignore_mismatched_sizes:
            state_dict = _without_misfit_head(state_dict, model)
        allowed_unexpected = (HEAD,) if config.use_mask_token else (HEAD, "mask_token")
        missing = fill(
            model,
            state_dict,
            device=device,
            dtype=wanted,
            allowed_missing=(HEAD,),
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
        # The annotation is the usual case's, as transformers' is.
        return (model, _loading_info(head, model, missing)) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def _read_config(
        cls,
        config: Any,
        pretrained_model_name_or_path: str | Path | None,
        options: SourceOptions,
        overrides: dict[str, Any],
    ) -> Dinov2Config:
        """A copy of `config`, or the one that is where it or else the name or path says, with `overrides`."""
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
            save_directory: made if it does not exist.
            is_main_process: False writes nothing.
            state_dict: weights to write instead of the model's own, in any layout (gathered by FSDP, for instance).
            variant: "fp16" writes ``model.fp16.safetensors``.
            safe_serialization, push_to_hub, max_shard_size, save_function, token, save_peft_format,
                save_original_format: accepted as transformers does; one safetensors file is written, here, by
                safetensors itself.

        The position interpolation is written too if it is not the default; transformers does not look at it.

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
        tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        name = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
        save_file(tensors, Path(save_directory) / name, metadata={"format": "pt"})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """What torch calls for each part of a larger module.

        The keys stay the names of the parameters, by which torch.distributed.checkpoint, functional_call and
        torch.export look them up.
        """
        if prefix not in ("", f"{self.base_model_prefix}.") and "transformers" in sys.modules:
            log_once(
                f"The state dict of a larger model names the weights of this {type(self).__name__} as dinov2_fast does "
                f"({prefix}blocks.0.…). The same model loads them back; transformers' own classes do not know these "
                "names, and would leave that part at random. Where transformers is to read what is saved, put its own "
                "backbone in and call dinov2_fast.accelerate(model) instead."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _position_interpolation_to_save(self) -> str | None:
        position_interpolation = self.base_model.position_interpolation
        if position_interpolation == "custom":
            logger.warning("Positions are resampled in a way that config.json cannot hold; the default is saved.")
        return (
            None
            if position_interpolation in ("custom", self.config.default_position_interpolation)
            else position_interpolation
        )

    def initialise_head(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Gives a classification head that no checkpoint filled its initial values."""

    @property
    def base_model(self) -> Any:
        """The model without a head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the floating-point parameters."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of scalars in the parameters; `exclude_embeddings` is of word embeddings, which there are none of."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, unless told otherwise, the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Accepted as transformers does; outputs are the same with each, and `use_backend` says which kernel runs."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: this is no language model."""
        return False

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each block's activations in the backward pass; the keyword arguments are accepted, not needed.

        Raises:
            ValueError: `every_n_layers` is not 1, or `offload` is True.
        """
        if every_n_layers != 1 or offload:
            raise InvalidValueError("Every block is checkpointed, on its device: leave out every_n_layers and offload.")
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_checkpointing(False)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its name from transformers 5.23 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its name from transformers 5.23 on."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(isinstance(m, DinoVisionTransformer) and m.grad_checkpointing for m in self.modules())

    def _set_checkpointing(self, enable: bool) -> None:
        for module in self.modules():
            if isinstance(module, DinoVisionTransformer):
                module.set_grad_checkpointing(enable)

    def _checkpoint_as_configured(self) -> None:
        """Honours ``config.gradient_checkpointing``, which is not saved, as in transformers."""
        if self.config.__dict__.pop("gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return next(m.patch_embed for m in self.modules() if isinstance(m, DinoVisionTransformer))

    def get_output_embeddings(self) -> None:
        """None: no output is tied to the embedding."""

    def enable_input_require_grads(self) -> None:
        """Makes what the patch embedding returns require gradients, also where the model's weights are frozen."""
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        self._require_grads_hook.remove()


def _head_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a classification head."""
    keys = [key for key in state_dict if plain_key(key).startswith(HEAD)]
    return {plain_key(key): tuple(state_dict[key].shape) for key in keys}


def _loading_info(head: dict[str, tuple[int, ...]], model: nn.Module, missing: list[str]) -> dict[str, Any]:
    """What transformers calls so; only a classification head, whose shapes in the weights are `head`, may misfit."""
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    mismatched = {(key, head[key], own[key]) for key in head.keys() & own.keys() if head[key] != own[key]}
    return {
        "missing_keys": set(missing) - head.keys(),
        "unexpected_keys": head.keys() - own.keys(),
        "mismatched_keys": mismatched,
        "error_msgs": [],
    }


def _refuse_unknown(kwargs: Mapping[str, Any], config: Dinov2Config | None) -> None:
    """Raises for arguments that are not in `config`, which else a typing error, or a secret, would slip into."""
    asked = (name for name, value in kwargs.items() if value is not None and value is not False)
    unknown = sorted(name for name in asked if name not in _WITHOUT_EFFECT and not hasattr(config, name))
    if not unknown:
        return
    if config is None:
        raise InvalidTypeError(f"{', '.join(unknown)} cannot be set together with config; set it in the config.")
    raise InvalidTypeError(
        f"from_pretrained has no argument {', '.join(unknown)}, nor is that a field of {type(config).__name__}; leave "
        "it out, or look for another spelling."
    )


class _Without(Mapping[str, Tensor]):
    """A state dict without some of its keys; tensors are read from the source when asked for."""

    def __init__(self, source: Mapping[str, Tensor], left_out: set[str]) -> None:
        self._source = source
        self._keys = [key for key in source if key not in left_out]

    def __getitem__(self, key: str) -> Tensor:
        return self._source[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _without_misfit_head(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """`state_dict` without its classification head, if that is of another number of labels than the model's."""
    own = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith(HEAD)}
    theirs = {key: plain_key(key) for key in state_dict if plain_key(key).startswith(HEAD)}
    misfit = any(plain in own and state_dict[key].shape != own[plain] for key, plain in theirs.items())
    return _Without(state_dict, set(theirs)) if misfit else state_dict


def _device(device: Any) -> Any:
    if isinstance(device, Mapping):
        places = {str(place) for place in device.values()}
        if len(places) != 1:
            raise InvalidValueError(
                f"The model runs on one device; device_map {dict(device)} would spread it over several."
            )
        device = next(iter(device.values()))
    if device in _PLACEMENTS:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
