"""`Dinov2Model` and `Dinov2Backbone`, also with registers.

Signatures, outputs and numerics are transformers'. The classes extend `DinoVisionTransformer`, so their parameters and
modules have its names. `save_pretrained` writes transformers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.huggingface.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2_fast.huggingface.outputs import BackboneOutput, BaseModelOutputWithPooling, Layers, OutputOptions
from dinov2_fast.huggingface.pretrained import PreTrainedModel
from dinov2_fast.layers import GELU, Dropout, LayerNorm, LayerScale, check_is_tensor
from dinov2_fast.model import DinoVisionTransformer

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class Dinov2PreTrainedBackbone(PreTrainedModel, DinoVisionTransformer):
    """A `DinoVisionTransformer` built from a config, with transformers' initialisation and dropouts."""

    def __init__(self, config: Dinov2Config) -> None:
        config = self.config_class.of(config)
        if config.hidden_act not in _ACTIVATIONS:
            raise InvalidValueError(
                f"There is no hidden_act {config.hidden_act!r}; choose one of {', '.join(_ACTIVATIONS)}."
            )
        self.config = config  # before the constructor, which initialises the weights and reads it
        DinoVisionTransformer.__init__(
            self, act_layer=_ACTIVATIONS[config.hidden_act], **config.constructor_arguments()
        )
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        if not config.use_mask_token:
            self.register_parameter("mask_token", None)
        for block in self.blocks:
            block.subset_threshold = 1.0  # transformers computes the branches of all images at every rate
            block.attn.attn_drop = config.attention_probs_dropout_prob
            block.attn.proj_drop = Dropout(config.hidden_dropout_prob)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.eps = config.layer_norm_eps
        self.name_or_path = config.name_or_path
        self._checkpoint_as_configured()

    def init_weights(self) -> None:
        """transformers' initialisation, from torch's global generator."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.config.layerscale_value)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        nn.init.trunc_normal_(self.cls_token, std=std)

    def embed(self, pixel_values: Tensor | None, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Images (batch, channels, height, width) of any size as tokens (batch, 1 + registers + patches, hidden).

        As in transformers, rows and columns of pixels beyond the last whole patch are ignored.
        """
        if pixel_values is None:
            raise InvalidValueError("pixel_values is missing: give a batch of images (batch, channels, height, width).")
        check_is_tensor(pixel_values)
        if pixel_values.ndim == 4:
            rows, columns = self.grid(pixel_values)
            if rows < 1 or columns < 1:
                raise InvalidValueError(
                    f"The images are {tuple(pixel_values.shape[2:])} pixels, smaller than one patch of "
                    f"{self.patch_size}."
                )
            (down, across), patch = self.stride, self.patch_size
            height, width = rows * down + (patch - down), columns * across + (patch - across)
            pixel_values = pixel_values[:, :, :height, :width]
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.patch_embed.proj.weight.dtype)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise InvalidValueError("bool_masked_pos was given, but the config has use_mask_token=False.")
            bool_masked_pos = bool_masked_pos.bool()
        return self.embedding_dropout(self.prepare_tokens_with_masks(pixel_values, bool_masked_pos))

    def encode(
        self, x: Tensor, hidden_states: Collection[int], output_attentions: Layers, blocks: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor], tuple[Tensor | None, ...] | None]:
        """Runs the (first `blocks`) blocks on tokens.

        Args:
            x: (batch, tokens, hidden), from `embed`.
            hidden_states: which hidden states to keep: 0 is `x`, i the output of the i-th block.
            output_attentions: the blocks whose attention weights to compute.
            blocks: how many blocks to run; None for all.

        Returns:
            The last block's output before the norm; the hidden states kept, by index; and the attention weights (batch,
            heads, seq_len, seq_len) of the chosen blocks, None for the others. The fast attention does not keep its
            weights, so they are computed again from the block's input.
        """
        asked = _asked_layers(output_attentions, len(self.blocks))
        kept = {0: x} if 0 in hidden_states else {}
        attentions: list[Tensor | None] = []
        for i, block in enumerate(self.blocks[:blocks]):
            if i in asked:
                attentions.append(ops.attention_probabilities(block.attn.project_qkv(block.norm1(x))))
            elif asked:
                attentions.append(None)
            x = self._call(block, x)
            if i + 1 in hidden_states:
                kept[i + 1] = x
        return x, kept, tuple(attentions) if asked else None


class Dinov2Model(Dinov2PreTrainedBackbone):
    """The bare model: all tokens after the final norm."""

    def forward(  # type: ignore[override]  # transformers' signature, not the reference's
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: Layers = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of a batch of images.

        Args:
            pixel_values: (batch, channels, height, width), floating point, cast to the dtype of the weights.
            bool_masked_pos: (batch, patches), True where the mask token replaces a patch.
            attention_mask: must be None: every token attends to all tokens.
            output_attentions: also return the attention weights, of all blocks or of those with these indices. They are
                computed separately, so `retain_grad` on them sees no gradient of the other outputs.
            output_hidden_states: also return the input of every block and the output of the last.
            return_dict: False for a plain tuple. The config has the defaults of these three.
            **kwargs: other arguments of transformers' models. They have no effect.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch, tokens, hidden) after the norm, in the order CLS,
            registers, patches; `pooler_output` (batch, hidden), its CLS token.
        """
        _refuse_masks(attention_mask, kwargs)
        options = OutputOptions(self.config, output_attentions, output_hidden_states, return_dict)
        tokens = self.embed(pixel_values, bool_masked_pos)
        every = range(len(self.blocks) + 1) if options.hidden_states else ()
        x, hidden_states, attentions = self.encode(tokens, every, options.attentions)
        x = self.norm(x)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            hidden_states=tuple(hidden_states.values()) or None,
            attentions=attentions,
        )
        return output if options.dictionary else output.to_tuple()


class Dinov2Backbone(Dinov2PreTrainedBackbone):
    """Returns feature maps of chosen stages, for detection and segmentation; see `Dinov2Config.out_features`."""

    has_attentions: ClassVar[bool] = True
    backbone_type: ClassVar[str] = "transformers"

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.stage_names = config.stage_names
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @property
    def out_features(self) -> list[str]:
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int]) -> None:
        self.config.out_indices = indices

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every stage."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    @property
    def channels(self) -> list[int]:
        """Channels of the stages returned."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` by the name that transformers' detection models call."""
        return self(*args, **kwargs)

    def forward(  # type: ignore[override]  # transformers' signature, not the reference's
        self,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: Layers = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Feature maps of a batch of images. See `Dinov2Model.forward` for the arguments.

        Returns:
            `BackboneOutput`: `feature_maps` has one map of patches (batch, hidden, rows, columns) for each of
            `out_features`, normalised if ``config.apply_layernorm``. With ``config.reshape_hidden_states=False`` a map
            is (batch, tokens, hidden) and includes CLS and registers.
        """
        _refuse_masks(attention_mask, kwargs)
        options = OutputOptions(self.config, output_attentions, output_hidden_states, return_dict)
        stages = [self.stage_names.index(name) for name in self.out_features]
        kept = range(len(self.stage_names)) if options.hidden_states else stages
        needed = None if options.hidden_states or options.attentions else max(stages, default=0)
        _, hidden_states, attentions = self.encode(self.embed(pixel_values), kept, options.attentions, blocks=needed)
        assert pixel_values is not None  # else `embed` raised
        output = BackboneOutput(
            feature_maps=tuple(self._feature_map(hidden_states[stage], self.grid(pixel_values)) for stage in stages),
            hidden_states=tuple(hidden_states.values()) if options.hidden_states else None,
            attentions=attentions,
        )
        return output if options.dictionary else output.to_tuple()

    def _feature_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.config.apply_layernorm:
            x = self.norm(x)
        if self.config.reshape_hidden_states:
            x = x[:, 1 + self.num_register_tokens :].unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
        return x


class Dinov2WithRegistersModel(Dinov2Model):
    """`Dinov2Model` with register tokens."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"


class Dinov2WithRegistersBackbone(Dinov2Backbone):
    """`Dinov2Backbone` with register tokens."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"


def _asked_layers(layers: Layers, depth: int) -> set[int]:
    if layers is None or isinstance(layers, bool):
        return set(range(depth)) if layers else set()
    outside = [i for i in layers if not -depth <= i < depth]
    if outside:
        raise InvalidValueError(f"output_attentions asks for blocks {outside}; the blocks are 0 to {depth - 1}.")
    return {i % depth for i in layers}


def _refuse_masks(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None or kwargs.get("head_mask") is not None:
        raise InvalidValueError(
            "attention_mask and head_mask are not supported: every token attends to all tokens, in every head."
        )
