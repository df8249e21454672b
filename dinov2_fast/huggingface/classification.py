"""`Dinov2ForImageClassification`, also with registers: a linear classifier on the model, with transformers' loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.attention_features import QKV
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.huggingface.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2_fast.huggingface.modeling import Dinov2Model, Dinov2WithRegistersModel
from dinov2_fast.huggingface.outputs import ImageClassifierOutput, Layers, OutputOptions
from dinov2_fast.huggingface.pretrained import PreTrainedModel


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
        self._init_classifier()  # in float32: trunc_normal_ puts outliers into a bfloat16 tensor
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
        """Classifies a batch of images. See `Dinov2Model.forward` for the arguments that are not listed.

        Args:
            labels: class indices (batch,), or the targets for `config.problem_type`. If that is None it is set:
                "regression" for one label, "single_label_classification" for integers, otherwise
                "multi_label_classification".
            num_items_in_batch: for gradient accumulation, the number by which the summed cross entropy is divided.

        Returns:
            `ImageClassifierOutput`: `loss` (a scalar, if labels were given) and `logits` (batch, num_labels).
        """
        options = OutputOptions(self.config, output_attentions, output_hidden_states, return_dict)
        features = self.base_model(
            pixel_values,
            attention_mask=attention_mask,
            output_attentions=options.attentions,
            output_hidden_states=options.hidden_states,
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
        return output if options.dictionary else output.to_tuple()

    def attention_maps(self, *args: Any, **kwargs: Any) -> Tensor:
        """`DinoVisionTransformer.attention_maps` of the backbone."""
        return self.base_model.attention_maps(*args, **kwargs)

    def qkv_features(self, *args: Any, **kwargs: Any) -> QKV:
        """`DinoVisionTransformer.qkv_features` of the backbone."""
        return self.base_model.qkv_features(*args, **kwargs)


class Dinov2WithRegistersForImageClassification(Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with register tokens. The mean of the patches does not include them."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"
    backbone_class = Dinov2WithRegistersModel


def _loss(logits: Tensor, labels: Tensor, config: Dinov2Config, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The loss for ``config.problem_type``, which is set according to the labels if it is None."""
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
