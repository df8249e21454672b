"""Loading and saving models as transformers does: a folder or hub repository with config.json and weights."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2_fast.huggingface.configuration import Dinov2Config
from dinov2_fast.layouts import convert_state_dict, log_once, plain_key
from dinov2_fast.model import AnyLayout, DinoVisionTransformer
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import as_dtype, fill
from dinov2_fast.weights.sources import find_checkpoint

logger = logging.getLogger("dinov2_fast")

HEAD = "classifier."

# Arguments of transformers' from_pretrained that change nothing here, or nothing that is done otherwise.
_WITHOUT_EFFECT = {"attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only"}
# device_map values with which transformers places a model by itself.
_PLACEMENTS = {"auto", "balanced", "balanced_low_0", "sequential"}

Model = TypeVar("Model", bound="PreTrainedModel")


class PreTrainedModel(AnyLayout):
    """What the models of this face share: a config, loading and saving, gradient checkpointing."""

    config_class: ClassVar[type[Dinov2Config]] = Dinov2Config
    base_model_prefix: ClassVar[str] = "dinov2"
    main_input_name: ClassVar[str] = "pixel_values"
    supports_gradient_checkpointing: ClassVar[bool] = True
    config: Dinov2Config

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        config: Dinov2Config | str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Model:
        """A model in eval mode with the weights of a folder, a file or a hub repository, in any layout.

        Args:
            name_or_path: folder with ``config.json`` and weights, or hub id such as ``facebook/dinov2-base``.
            config: instead of the one beside the weights; a configuration or where one is.
            revision: branch, tag or commit on the hub.
            dtype: of the parameters, also as a name ("bfloat16"); None or "auto" for the config's, or if it has none
                that of the weights. `torch_dtype` is the same.
            device: where the model goes; `device_map` with one device, or "auto", is the same.
            local_files_only: do not touch the network.
            ignore_mismatched_sizes: initialise a classification head of another number of labels than the weights' one,
                and adapt filters for another number of channels (`dinov2_fast.weights.channels`).
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
        checkpoint = find_checkpoint(str(name_or_path), revision, local_files_only)
        if config is not None and not isinstance(config, str | Path):
            config = copy.deepcopy(cls.config_class.of(config))
            _refuse_unknown(kwargs, None)
        else:
            where = config or checkpoint.config or name_or_path
            read = cls.config_class.from_pretrained(where, revision=revision, local_files_only=local_files_only)
            _refuse_unknown(kwargs, read)
            overrides = {name: value for name, value in kwargs.items() if hasattr(read, name)}
            config = cls.config_class.from_dict(read.to_dict(), **overrides)
        wanted = config.dtype if dtype in (None, "auto") else as_dtype(dtype)
        with torch.device("meta"):
            model = cls(config)
        state_dict = open_weights(checkpoint.weights)
        if ignore_mismatched_sizes:
            state_dict = _without_misfit_head(state_dict, model)
        may_leave = (HEAD,) if config.use_mask_token else (HEAD, "mask_token")
        missing = fill(
            model,
            state_dict,
            device=device,
            dtype=wanted,
            may_miss=(HEAD,),
            may_leave=may_leave,
            adapt_channels=ignore_mismatched_sizes,
        )
        if missing:
            logger.warning(
                "%s has no %s that fits: the classification head is initialised at random, train it.",
                name_or_path,
                ", ".join(missing),
            )
            model.initialise_head(device=device or "cpu", dtype=model.dtype)
        config.dtype = model.dtype
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors`` in transformers' layout into `folder`.

        ``transformers.AutoModel.from_pretrained(folder)`` and this class's `from_pretrained` load it.

        Args:
            folder: made if it does not exist.
            is_main_process: False writes nothing.
            state_dict: weights to write instead of the model's own, in any layout (gathered by FSDP, for instance).
            safe_serialization, push_to_hub, max_shard_size: accepted as transformers does; one safetensors file is
                written, here.

        The position dialect is written too if it is not the default; transformers does not look at it.

        Raises:
            ValueError: `safe_serialization` is False or `push_to_hub` True.
        """
        if not safe_serialization:
            raise ValueError("Only safetensors files are written; call with safe_serialization=True.")
        if push_to_hub:
            raise ValueError("Nothing is uploaded here; save to a folder and upload that with huggingface_hub.")
        if not is_main_process:
            return
        self.config.position_dialect = self._dialect_to_save()
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)
        tensors = convert_state_dict(self.state_dict() if state_dict is None else state_dict, to="huggingface")
        if not self.config.use_mask_token:
            tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("mask_token")}
        tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

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

    def _dialect_to_save(self) -> str | None:
        dialect = self.base_model.position_dialect
        if dialect == "custom":
            logger.warning("Positions are resampled in a way that config.json cannot hold; the default is saved.")
        return None if dialect in ("custom", self.config.default_dialect) else dialect

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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of scalars in the parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each block's activations in the backward pass; the keyword arguments are accepted, not needed."""
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(isinstance(m, DinoVisionTransformer) and m.grad_checkpointing for m in self.modules())

    def _set_checkpointing(self, enable: bool) -> None:
        for module in self.modules():
            if isinstance(module, DinoVisionTransformer):
                module.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return next(m.patch_embed for m in self.modules() if isinstance(m, DinoVisionTransformer))


def _refuse_unknown(kwargs: Mapping[str, Any], config: Dinov2Config | None) -> None:
    """Raises for arguments that are not in `config`, which else a typing error, or a secret, would slip into."""
    asked = (name for name, value in kwargs.items() if value is not None and value is not False)
    unknown = sorted(name for name in asked if name not in _WITHOUT_EFFECT and not hasattr(config, name))
    if not unknown:
        return
    if config is None:
        raise TypeError(f"{', '.join(unknown)} cannot be set together with config; set it in the config.")
    raise TypeError(
        f"from_pretrained has no argument {', '.join(unknown)}, nor is that a field of {type(config).__name__}. Access "
        "to the hub is set by its own environment variables (HF_TOKEN, HF_HOME)."
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
            raise ValueError(f"The model runs on one device; device_map {dict(device)} would spread it over several.")
        device = next(iter(device.values()))
    if device in _PLACEMENTS:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
