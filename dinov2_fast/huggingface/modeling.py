"""`Dinov2Model`, `Dinov2ForImageClassification`, `Dinov2Backbone` and the three with registers.

Signatures, outputs and numerics are transformers'; the computation is `DinoVisionTransformer`'s, which these classes
extend, so their parameters and modules have its names (`save_pretrained` writes transformers').
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.attention_features import QKV
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.huggingface.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2_fast.huggingface.outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from dinov2_fast.huggingface.pretrained import PreTrainedModel
from dinov2_fast.layers import GELU, Dropout, LayerNorm, LayerScale, check_is_tensor
from dinov2_fast.model import DinoVisionTransformer

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}

Layers = bool | Collection[int] | None  # all, none, or those of chosen blocks


class Dinov2PreTrainedBackbone(PreTrainedModel, DinoVisionTransformer):
    """A `DinoVisionTransformer` built from a config, with transformers' initialisation and dropouts."""

    def __init__(self, config: Dinov2Config) -> None:
        config = self.config_class.of(config)
        if config.hidden_act not in _ACTIVATIONS:
            raise InvalidValueError(
                f"There is no hidden_act {config.hidden_act!r}; choose one of {', '.join(_ACTIVATIONS)}."
            )
        self.config = config  # first, since the constructor initialises the weights by it
        DinoVisionTransformer.__init__(
            self, act_layer=_ACTIVATIONS[config.hidden_act], **config.constructor_arguments()
        )
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        if not config.use_mask_token:
            self.register_parameter("mask_token", None)
        for block in self.blocks:
            block.subset_threshold = 1.0  # transformers drops branches of single images at every rate
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

        Rows and columns of pixels beyond the last whole patch are left out, as transformers does.
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
            hidden_states: which to keep: 0 is `x`, i the output of the i-th block.
            output_attentions: for which blocks to compute the attention weights.
            blocks: how many to run; None for all.

        Returns:
            The last block's output before the norm; the hidden states kept, by index; and the attention weights (batch,
            heads, seq_len, seq_len) of the blocks asked for, None for the others. The fast attention keeps no weights:
            they are computed anew from a block's input.
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
            attention_mask: must be None, every token attends to all.
            output_attentions: also the attention weights, of all blocks or of those with these indices. They are
                computed beside the attention itself, so no gradient of the other outputs reaches them.
            output_hidden_states: also the input of every block and the output of the last.
            return_dict: False for a plain tuple. These three default to the config's.
            **kwargs: other arguments of transformers' models, which have no effect on this one.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch, tokens, hidden) after the norm, in the order CLS,
            registers, patches; `pooler_output` (batch, hidden), its CLS token.
        """
        _refuse_masks(attention_mask, kwargs)
        wanted = _Wanted(self.config, output_attentions, output_hidden_states, return_dict)
        tokens = self.embed(pixel_values, bool_masked_pos)
        every = range(len(self.blocks) + 1) if wanted.hidden_states else ()
        x, hidden_states, attentions = self.encode(tokens, every, wanted.attentions)
        x = self.norm(x)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            hidden_states=tuple(hidden_states.values()) or None,
            attentions=attentions,
        )
        return output if wanted.dictionary else output.to_tuple()


class Dinov2ForImageClassification(PreTrainedModel):
    """The model with a linear classifier on the CLS token and the mean of the patch tokens."""

    backbone_class: ClassVar[type[Dinov2Model]] = Dinov2Model

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config = self.config_class.of(config)
        self.num_labels = config.num_labels
        self.add_module(self.base_model_prefix, self.backbone_class(config))
        self.name_or_path = config.name_or_path
        inputs = 2 * config.hidden_size
        self.classifier = nn.Linear(inputs, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self._init_classifier()

    def init_weights(self) -> None:
        """transformers' initialisation, from torch's global generator."""
        self.base_model.init_weights()
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.classifier, nn.Linear):
            nn.init.trunc_normal_(self.classifier.weight, std=self.config.initializer_range)
            nn.init.zeros_(self.classifier.bias)

    def initialise_head(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.classifier.to_empty(device=device).float()
        self._init_classifier()  # in float32, since trunc_normal_ puts outliers into a bfloat16 tensor
        self.classifier.to(dtype)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: Layers = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Classifies a batch of images; see `Dinov2Model.forward` for the arguments not listed.

        Args:
            labels: class indices (batch,), or targets as `config.problem_type` wants them (set from them if None:
                "regression" for one label, "single_label_classification" for integers, else
                "multi_label_classification").
            num_items_in_batch: divide the summed cross entropy by this, for gradient accumulation.

        Returns:
            `ImageClassifierOutput`: `loss` (a scalar, if labels were given) and `logits` (batch, num_labels).
        """
        wanted = _Wanted(self.config, output_attentions, output_hidden_states, return_dict)
        features = self.base_model(
            pixel_values,
            attention_mask=attention_mask,
            output_attentions=wanted.attentions,
            output_hidden_states=wanted.hidden_states,
            return_dict=True,
            **kwargs,
        )
        patches = features.last_hidden_state[:, 1 + self.base_model.num_register_tokens :]
        logits = self.classifier(torch.cat([features.pooler_output, patches.mean(dim=1)], dim=1))
        output = ImageClassifierOutput(
            loss=None if labels is None else _loss(logits, labels, self.config, num_items_in_batch),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
        )
        return output if wanted.dictionary else output.to_tuple()

    def attention_maps(self, *args: Any, **kwargs: Any) -> Tensor:
        """`DinoVisionTransformer.attention_maps` of the backbone."""
        return self.base_model.attention_maps(*args, **kwargs)

    def qkv_features(self, *args: Any, **kwargs: Any) -> QKV:
        """`DinoVisionTransformer.qkv_features` of the backbone."""
        return self.base_model.qkv_features(*args, **kwargs)


class Dinov2Backbone(Dinov2PreTrainedBackbone):
    """Feature maps of chosen stages, for detection and segmentation frameworks; see `Dinov2Config.out_features`."""

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
        """`forward`; transformers' detection models call this name."""
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
        """Feature maps of a batch of images; see `Dinov2Model.forward` for the arguments.

        Returns:
            `BackboneOutput`: `feature_maps`, one for each of `out_features`, (batch, hidden, rows, columns) of patches;
            with ``config.reshape_hidden_states=False`` (batch, tokens, hidden) with CLS and registers. Normalised if
            ``config.apply_layernorm``.
        """
        _refuse_masks(attention_mask, kwargs)
        wanted = _Wanted(self.config, output_attentions, output_hidden_states, return_dict)
        stages = [self.stage_names.index(name) for name in self.out_features]
        kept = range(len(self.stage_names)) if wanted.hidden_states else stages
        needed = None if wanted.hidden_states or wanted.attentions else max(stages, default=0)
        _, hidden_states, attentions = self.encode(self.embed(pixel_values), kept, wanted.attentions, blocks=needed)
        assert pixel_values is not None  # else `embed` raised
        output = BackboneOutput(
            feature_maps=tuple(self._feature_map(hidden_states[stage], self.grid(pixel_values)) for stage in stages),
            hidden_states=tuple(hidden_states.values()) if wanted.hidden_states else None,
            attentions=attentions,
        )
        return output if wanted.dictionary else output.to_tuple()

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


class Dinov2WithRegistersForImageClassification(Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with register tokens, which the mean of the patches leaves out."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"
    backbone_class = Dinov2WithRegistersModel


class Dinov2WithRegistersBackbone(Dinov2Backbone):
    """`Dinov2Backbone` with register tokens."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"


class _Wanted:
    """What a call asks for; what it leaves open is the config's."""

    def __init__(self, config: Dinov2Config, attentions: Layers, hidden_states: bool | None, dictionary: bool | None):
        self.attentions = config.output_attentions if attentions is None else attentions
        self.hidden_states = bool(config.output_hidden_states if hidden_states is None else hidden_states)
        self.dictionary = config.return_dict if dictionary is None else dictionary


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
            "attention_mask and head_mask are not supported: every token attends to all, in every head."
        )


def _loss(logits: Tensor, labels: Tensor, config: Dinov2Config, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The loss for ``config.problem_type``, which is set from the labels if it is None."""
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    labels = labels.to(logits.device)
    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if config.num_labels == 1 else F.mse_loss(logits, labels)
    if config.problem_type == "single_label_classification":
        logits, labels = logits.view(-1, config.num_labels), labels.view(-1)
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
    if config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise InvalidValueError(
        f"There is no problem_type {config.problem_type!r}; choose regression, single_label_classification or "
        "multi_label_classification."
    )
