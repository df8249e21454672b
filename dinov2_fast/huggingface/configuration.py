"""`Dinov2Config` and `Dinov2WithRegistersConfig`: transformers' fields, defaults and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.huggingface.config_fields import check_fields
from dinov2_fast.layers import to_pair
from dinov2_fast.position_embeddings import position_interpolation
from dinov2_fast.weights.load import as_dtype
from dinov2_fast.weights.sources import CONFIG_NAME, SourceOptions, find_config, read_config

Size = int | Sequence[int]

# Fields that are written to config.json only where they differ from this.
_UNWRITTEN: dict[str, Any] = {
    "architectures": None,
    "dtype": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "position_interpolation": None,
}


class Dinov2Config:
    """Sizes and settings of a Dinov2 model. The arguments and defaults are transformers'.

    One argument is new: `position_interpolation` ("offset", "size", "antialias") sets how positions are resampled; None
    does it as transformers does for this kind of model. Other keyword arguments are kept as attributes. In training,
    `hidden_dropout_prob` applies to the embedded tokens and to the output of each attention, as in transformers, at
    least until 5.17 (in 5.23 only to the embedded tokens).

    Raises:
        ValueError: a field has a wrong type or is out of range, two contradict each other, or a stage does not exist.
    """

    model_type: ClassVar[str] = "dinov2"
    default_position_interpolation: ClassVar[str] = "size"
    _commit_hash: ClassVar[str | None] = None  # transformers' pipelines ask for it

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: Size = 224,
        patch_size: Size = 14,
        num_channels: int = 3,
        qkv_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_swiglu_ffn: bool = False,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        use_mask_token: bool = True,
        **kwargs: Any,
    ) -> None:
        check_fields({**locals(), **kwargs}, type(self))
        # int and float are converted below because transformers rejects a config.json with the wrong type.
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = int(mlp_ratio) if mlp_ratio == int(mlp_ratio) else mlp_ratio
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = float(initializer_range)
        self.layer_norm_eps = float(layer_norm_eps)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.qkv_bias = qkv_bias
        self.layerscale_value = float(layerscale_value)
        self.drop_path_rate = drop_path_rate
        self.use_swiglu_ffn = use_swiglu_ffn
        self.apply_layernorm = apply_layernorm
        self.reshape_hidden_states = reshape_hidden_states
        self.use_mask_token = use_mask_token
        self._set_labels(kwargs)
        self.architectures: list[str] | None = kwargs.pop("architectures", None)
        old_name = kwargs.pop("torch_dtype", None)
        self.dtype: torch.dtype | None = as_dtype(kwargs.pop("dtype", old_name))
        self.output_attentions: bool = kwargs.pop("output_attentions", False)
        self.output_hidden_states: bool = kwargs.pop("output_hidden_states", False)
        self.problem_type: str | None = kwargs.pop("problem_type", None)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise InvalidValueError("single_label_classification needs at least two labels; for one, use regression.")
        self.return_dict: bool = kwargs.pop("return_dict", True)
        self.position_interpolation: str | None = kwargs.pop("position_interpolation", None)
        if self.position_interpolation is not None:
            position_interpolation(self.position_interpolation)
        self._name_or_path = str(kwargs.pop("name_or_path", ""))
        for name in ("model_type", "stage_names", "transformers_version"):
            kwargs.pop(name, None)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, num_hidden_layers + 1))]
        self._set_stages(out_features, out_indices)

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from, or "". It is not saved in ``config.json``."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name: str) -> None:
        self._name_or_path = str(name)

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` by its older name."""
        return self.return_dict

    # Labels

    def _set_labels(self, kwargs: dict[str, Any]) -> None:
        id2label = kwargs.pop("id2label", None)
        num_labels = kwargs.pop("num_labels", None)
        label2id = kwargs.pop("label2id", None)
        if id2label is not None and num_labels not in (None, len(id2label)):
            id2label = label2id = None
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            return
        self.id2label = {int(index): label for index, label in id2label.items()}
        self.label2id = label2id or {label: index for index, label in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        """Number of outputs of the classification head. Setting it names them LABEL_0, LABEL_1, …"""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    # Stages of a backbone

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that `Dinov2Backbone` returns: "stem" is the embedding, "stageN" the N-th block."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self._set_stages(names, None)

    @property
    def out_indices(self) -> list[int]:
        """The same stages as indices into `stage_names`. Negative indices are kept as given."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int]) -> None:
        self._set_stages(None, indices)

    def _set_stages(self, names: list[str] | None, indices: Sequence[int] | None) -> None:
        stages, count = self.stage_names, len(self.stage_names)
        if names is None and indices is None:
            indices = [count - 1]
        if indices is not None:
            outside = [i for i in indices if not -count <= i < count]
            if outside:
                raise InvalidValueError(
                    f"out_indices {outside} do not exist; the stages are 0 to {count - 1} ({stages})."
                )
            from_indices = [stages[i] for i in indices]
            if names is not None and list(names) != from_indices:
                raise InvalidValueError(
                    f"out_features {list(names)} and out_indices {list(indices)} name different stages."
                )
            names = from_indices
        assert names is not None
        unknown = [name for name in names if name not in stages]
        if unknown:
            raise InvalidValueError(f"out_features {unknown} do not exist; the stages are {stages}.")
        in_order = [stage for stage in stages if stage in names]
        if list(names) != in_order:
            raise InvalidValueError(f"Stages must be distinct and in order: {in_order}, got {list(names)}.")
        self._out_features = list(names)
        self._out_indices = list(indices) if indices is not None else [stages.index(name) for name in names]

    def constructor_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `DinoVisionTransformer`. Raises `ValueError` if no model has such sizes."""
        if self.hidden_size % self.num_attention_heads:
            raise InvalidValueError(
                f"The hidden size {self.hidden_size} is not a multiple of the number of attention heads "
                f"{self.num_attention_heads}."
            )
        resample = position_interpolation(self.position_interpolation or self.default_position_interpolation)
        return {
            "img_size": to_pair(self.image_size),
            "patch_size": _square(self.patch_size),
            "in_chans": self.num_channels,
            "embed_dim": self.hidden_size,
            "depth": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "drop_path_rate": self.drop_path_rate,
            "drop_path_uniform": True,
            "init_values": 1.0,
            "ffn_layer": "swiglufused" if self.use_swiglu_ffn else "mlp",
            "block_chunks": 0,
            "num_register_tokens": getattr(self, "num_register_tokens", 0),
            "interpolate_antialias": resample.antialias,
            "interpolate_offset": resample.offset,
        }

    # config.json

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved in ``config.json``. Some are left out where they have their defaults."""
        fields = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        fields = {name: value for name, value in fields.items() if name not in _UNWRITTEN or value != _UNWRITTEN[name]}
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        fields["out_features"], fields["out_indices"] = self.out_features, self.out_indices
        fields["model_type"] = self.model_type
        return fields

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **overrides: Any) -> Dinov2Config:
        """A configuration from the fields of a ``config.json``.

        Raises:
            ValueError: the fields belong to another model, or their values do not fit together.
        """
        kind = fields.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise InvalidValueError(
                f"This is the configuration of a {kind!r} model; {cls.__name__} is for {cls.model_type!r}."
            )
        stale: set[str] = set()
        if {"out_features", "out_indices", "num_hidden_layers"} & overrides.keys():
            stale |= {"out_features", "out_indices"}
        if {"id2label", "num_labels"} & overrides.keys():
            stale |= {"label2id"}
        kept = {name: value for name, value in fields.items() if name not in stale}
        return cls(**{**kept, **overrides})

    @classmethod
    def of(cls, config: Any) -> Dinov2Config:
        """`config` itself, or this class's copy of transformers' configuration.

        Raises:
            TypeError: it is not a configuration, or is that of another model.
        """
        if getattr(config, "model_type", None) != cls.model_type or not hasattr(config, "to_dict"):
            got = f"{type(config).__module__}.{type(config).__qualname__}"
            raise InvalidTypeError(f"Give a {cls.__name__}, or transformers' own; got a {got}.")
        if isinstance(config, cls):
            return config
        own = cls.from_dict({**config.to_dict(), "problem_type": None})
        own.problem_type = config.problem_type  # only now: then any number of labels is accepted, as in transformers
        return own

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        trust_remote_code: bool | None = None,
        **overrides: Any,
    ) -> Dinov2Config:
        """The configuration in a folder, a ``config.json``, or a hub repository; `overrides` replace fields.

        Args:
            revision, cache_dir, token: for the hub: branch, tag or commit; where files are kept; the access token.
            local_files_only: do not use the network.
            subfolder: of the folder or repository.
            trust_remote_code: accepted as in transformers. No code is ever loaded.

        Raises:
            WeightsError: there is no ``config.json``, or it is damaged.
            ValueError: it belongs to another model, or the values do not fit together.
        """
        path = find_config(
            str(pretrained_model_name_or_path), SourceOptions(revision, local_files_only, cache_dir, token, subfolder)
        )
        fields = read_config(path)
        try:
            return cls.from_dict(fields, **overrides)
        except (ValueError, TypeError) as error:
            raise InvalidValueError(f"{path}: {error}") from error

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Writes ``config.json`` into `save_directory`. The folder is made if it does not exist.

        Raises:
            ValueError: `push_to_hub` is True.
        """
        refuse_upload(push_to_hub)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(self.to_json_string(), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class Dinov2WithRegistersConfig(Dinov2Config):
    """`Dinov2Config` of a model with register tokens. As in transformers, the default `patch_size` is 16."""

    model_type = "dinov2_with_registers"
    default_position_interpolation = "antialias"
    num_register_tokens: int

    def __init__(self, *, patch_size: Size = 16, num_register_tokens: int = 4, **kwargs: Any) -> None:
        super().__init__(patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)
        self.use_mask_token = True  # transformers has no such field here: these models always have a mask token

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["use_mask_token"]
        return fields


def _square(size: Size) -> int:
    height, width = to_pair(size)
    if height != width:
        raise InvalidValueError(f"Patches must be square, got patch_size {size}.")
    return height


def refuse_upload(push_to_hub: bool) -> None:
    if push_to_hub:
        raise InvalidValueError("push_to_hub is not supported: save to a folder and upload it with huggingface_hub.")
