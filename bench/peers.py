"""The implementations that are compared, behind one interface: pictures in, all tokens after the final norm out.

Every peer gets the same weights, converted with this project's tools. A peer that is not installed is named as missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_fast
from bench import records
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.huggingface import Dinov2Config, Dinov2WithRegistersConfig


@dataclass(frozen=True)
class Peer:
    """One implementation.

    `build` makes a model from ours, `forward` runs it (this is what is timed), `tokens` takes (batch, tokens, hidden)
    from what it returns, `dialect` is how it resamples positions.
    """

    name: str
    package: str | None
    build: Callable[[BackboneConfig, nn.Module], nn.Module]
    forward: Callable[[nn.Module, Tensor], Any]
    tokens: Callable[[Any], Tensor]
    dialect: Callable[[BackboneConfig], str]

    @property
    def installed(self) -> bool:
        return self.package is None or records.version(self.package) is not None


def _ours(config: BackboneConfig, model: nn.Module) -> nn.Module:
    return model


def _forward_features(model: nn.Module, x: Tensor) -> Any:
    return model.forward_features(x)


def _our_tokens(features: dict[str, Tensor]) -> Tensor:
    keys = ("x_norm_regtokens", "x_norm_patchtokens")
    return torch.cat([features["x_norm_clstoken"][:, None], *(features[key] for key in keys)], dim=1)


def _transformers(config: BackboneConfig, model: nn.Module) -> nn.Module:
    import transformers

    kind = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    ours = Dinov2WithRegistersConfig if config.num_register_tokens else Dinov2Config
    fields = ours(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        use_swiglu_ffn=config.ffn_layer != "mlp",
        image_size=518,
        patch_size=14,
    ).to_dict()
    peer = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**fields))
    peer.load_state_dict(dinov2_fast.convert_state_dict(model.state_dict(), to="huggingface"))
    return peer


def _timm(config: BackboneConfig, model: nn.Module) -> nn.Module:
    import timm

    peer = timm.create_model(config.timm_name.partition(".")[0], dynamic_img_size=True)
    peer.load_state_dict(dinov2_fast.convert_state_dict(model.state_dict(), to="timm"))
    return peer


PEERS = (
    Peer("dinov2_fast", None, _ours, _forward_features, _our_tokens, lambda config: config.dialect),
    Peer(
        "transformers",
        "transformers",
        _transformers,
        lambda model, x: model(x),
        lambda output: output.last_hidden_state,
        lambda config: "antialias" if config.num_register_tokens else "size",
    ),
    Peer("timm", "timm", _timm, _forward_features, lambda tokens: tokens, lambda config: "antialias"),
)
