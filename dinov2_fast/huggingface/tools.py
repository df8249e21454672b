"""`ToolMethods`: the methods that transformers' tools (Trainer, pipelines, PEFT) call on a model.

Those that concern language models, or choices that this package makes elsewhere, exist and change nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from dinov2_fast.base_module import Dinov2Module
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.huggingface.configuration import Dinov2Config


class ToolMethods(Dinov2Module):
    """The part of `PreTrainedModel` besides loading and saving."""

    config_class: ClassVar[type[Dinov2Config]] = Dinov2Config
    base_model_prefix: ClassVar[str] = "dinov2"
    main_input_name: ClassVar[str] = "pixel_values"
    input_modalities: ClassVar[tuple[str, ...]] = ("image",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    config: Dinov2Config
    name_or_path: str

    @property
    def base_model(self) -> Any:
        """The model without a head."""
        return getattr(self, self.base_model_prefix, self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of scalars in the parameters. `exclude_embeddings` is for word embeddings and has no effect."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, with `return_buffers`, the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Has no effect: the outputs are the same with each. Choose kernels with `dinov2_fast.use_backend`."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: this is not a language model."""
        return False

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes each block's activations in the backward pass. `gradient_checkpointing_kwargs` has no effect.

        Raises:
            ValueError: `every_n_layers` is not 1, or `offload` is True.
        """
        if every_n_layers != 1 or offload:
            raise InvalidValueError("Every block is checkpointed, on its device: leave out every_n_layers and offload.")
        self.base_model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.base_model.set_grad_checkpointing(False)

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
        return self.base_model.grad_checkpointing

    def _checkpoint_as_configured(self) -> None:
        """Applies ``config.gradient_checkpointing`` and, as in transformers, removes it from the config."""
        if self.config.__dict__.pop("gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.base_model.patch_embed

    def get_output_embeddings(self) -> None:
        """None: no output layer shares weights with the embedding."""

    def enable_input_require_grads(self) -> None:
        """Makes the output of the patch embedding require gradients, even if the model's weights are frozen."""
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        self._require_grads_hook.remove()
