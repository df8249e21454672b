"""Loading and saving models as transformers does: a folder or hub repository with config.json and weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from dinov2_fast.huggingface.configuration import Dinov2Config
from dinov2_fast.layouts import convert_state_dict
from dinov2_fast.model import AnyLayout, DinoVisionTransformer
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import fill
from dinov2_fast.weights.sources import find_checkpoint

logger = logging.getLogger("dinov2_fast")

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
        config: Dinov2Config | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Model:
        """A model in eval mode with the weights of a folder, a file or a hub repository, in any layout.

        Args:
            name_or_path: folder with ``config.json`` and weights, or hub id such as ``facebook/dinov2-base``.
            config: instead of the one beside the weights.
            revision: branch, tag or commit on the hub.
            dtype: of the parameters, also as a name ("bfloat16"); None or "auto" for that of the weights. `torch_dtype`
                is the same.
            device: where the model goes; `device_map` with one device, or "auto", is the same.
            local_files_only: do not touch the network.
            **kwargs: fields of the config to override (``num_labels=10``, ``out_indices=[2, 5]``, …).

        Raises:
            WeightsError: the weights or the config cannot be found or read, or do not fit. A classification head that
                is missing is initialised, and one that is left over ignored, with a warning.
        """
        dtype = _dtype(kwargs.pop("torch_dtype", dtype))
        device = _device(kwargs.pop("device_map", device))
        if kwargs.pop("attn_implementation", None) is not None:
            logger.info("attn_implementation is ignored: dinov2_fast.use_backend chooses how attention is computed.")
        checkpoint = find_checkpoint(str(name_or_path), revision, local_files_only)
        if config is None:
            beside = checkpoint.config or name_or_path
            config = cls.config_class.from_pretrained(
                beside, revision=revision, local_files_only=local_files_only, **kwargs
            )
        with torch.device("meta"):
            model = cls(config)
        state_dict = open_weights(checkpoint.weights)
        head = ("classifier.",)
        missing = fill(model, state_dict, device=device, dtype=dtype, may_miss=head, may_leave=head)
        if missing:
            logger.warning("%s has no %s: initialised at random, train it.", name_or_path, ", ".join(missing))
            model.initialise_head(device=device or "cpu", dtype=model.dtype)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` in transformers' layout into `folder`.

        ``transformers.AutoModel.from_pretrained(folder)`` and this class's `from_pretrained` load it.
        """
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)
        tensors = convert_state_dict(self.state_dict(), to="huggingface")
        tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    def initialise_head(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Gives a classification head that no checkpoint filled its initial values."""

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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"There is no dtype {dtype!r}; give one such as torch.bfloat16 or 'bfloat16'.")
    return named


def _device(device: Any) -> Any:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, dict):
        if list(device) != [""]:
            raise ValueError(f"The model runs on one device; device_map {device} would spread it over several.")
        return device[""]
    return device
