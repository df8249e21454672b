"""The implementations that are compared, behind one interface: images in, all tokens or the class token out.

Every peer has the same weights, converted with this project's tools. `Peer.missing` says why a peer cannot run here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_fast
from bench import records
from dinov2_fast.configs import BACKBONES, BackboneConfig

OUTPUTS = ("all", "cls")


@dataclass(frozen=True, eq=False)
class Peer:
    """One implementation.

    Output "all" is all tokens after the final norm (batch, tokens, hidden), "cls" the class token (batch, hidden).
    """

    name: str  # the `implementation` of its rows
    # Builds a model in fp32 from ours, on the same device, with this rate of stochastic depth in all layers.
    build: Callable[[BackboneConfig, nn.Module, float], nn.Module]
    call: Mapping[str, Callable[[nn.Module, Tensor], Any]]  # by output: what is timed
    to_tensor: Mapping[str, Callable[[Any], Tensor]]  # by output: takes the tensor from the result of `call`
    position_interpolation: Callable[[BackboneConfig], str]
    missing: str | None = None  # why it cannot run here

    def result(self, model: nn.Module, x: Tensor, output: str) -> Tensor:
        return self.to_tensor[output](self.call[output](model, x))


def load_ours(config: BackboneConfig, device: torch.device) -> nn.Module:
    """Our model in fp32, in eval mode, with the same random weights in every run."""
    if config.name in BACKBONES:
        return dinov2_fast.load(config.name, weights="random:0", device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dinov2_fast.DinoVisionTransformer(**config.constructor_arguments()).to(device).eval()


def reason_not_installed(package: str) -> str | None:
    return None if records.version(package) else f"{package} is not installed"


def _ours(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
    if not drop_path:
        return copy.deepcopy(ours)
    arguments = config.constructor_arguments() | {"drop_path_rate": drop_path, "drop_path_uniform": True}
    return _with_weights(lambda: dinov2_fast.DinoVisionTransformer(**arguments), ours.state_dict())


def _with_weights(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """A model with copies of these weights. It skips the random initialisation, which would take most of the time."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return model


def _transformers(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
    import transformers

    kind = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    configuration = getattr(transformers, f"{kind}Config")(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        use_swiglu_ffn=config.ffn_layer != "mlp",
        image_size=518,
        patch_size=14,
        drop_path_rate=drop_path,
    )
    weights = dinov2_fast.convert_state_dict(ours.state_dict(), to="huggingface")
    copies = {name: weight.clone() for name, weight in weights.items()}
    transformers.utils.logging.disable_progress_bar()
    # Newer versions rename weights in memory, and only this method knows the new names.
    make, dtype = getattr(transformers, f"{kind}Model").from_pretrained, ours.cls_token.dtype
    return make(None, config=configuration, state_dict=copies, dtype=dtype).to(ours.cls_token.device)


def _timm(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
    import timm

    def make() -> nn.Module:
        sizes = {"embed_dim": config.embed_dim, "num_heads": config.num_heads, "drop_path_rate": drop_path}
        model = timm.create_model(config.timm_name.partition(".")[0], dynamic_img_size=True, **sizes)
        for block in model.blocks if drop_path else ():  # timm's own rate grows from 0 with depth
            block.drop_path1, block.drop_path2 = (timm.layers.DropPath(drop_path) for _ in range(2))
        return model

    return _with_weights(make, dinov2_fast.convert_state_dict(ours.state_dict(), to="timm"))


def _forward(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _forward_features(model: nn.Module, x: Tensor) -> Any:
    return model.forward_features(x)


def _identity(result: Tensor) -> Tensor:
    return result


def _tokens(features: dict[str, Tensor]) -> Tensor:
    keys = ("x_norm_regtokens", "x_norm_patchtokens")
    return torch.cat([features["x_norm_clstoken"][:, None], *(features[key] for key in keys)], dim=1)


OURS = Peer(
    "dinov2_fast",
    _ours,
    {"all": _forward_features, "cls": _forward},
    {"all": _tokens, "cls": _identity},
    lambda config: config.position_interpolation,
)
TRANSFORMERS = Peer(
    "transformers",
    _transformers,
    {"all": _forward, "cls": _forward},
    {"all": lambda output: output.last_hidden_state, "cls": lambda output: output.pooler_output},
    lambda config: "antialias" if config.num_register_tokens else "size",
    missing=reason_not_installed("transformers"),
)
TIMM = Peer(
    "timm",
    _timm,
    {"all": _forward_features, "cls": _forward},
    {"all": _identity, "cls": _identity},
    lambda config: "antialias",
    missing=reason_not_installed("timm"),
)
PEERS = (OURS, TRANSFORMERS, TIMM)


def _accelerated_peer(peer: Peer, inference: bool = False) -> Peer:
    """A peer's model with our blocks in it; with `inference` it runs in our engine."""

    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        return dinov2_fast.accelerate(peer.build(config, ours, drop_path).eval(), inference=inference)

    return replace(peer, name=OURS.name, build=build)


# By mode. Their rows have our name.
ACCELERATED_PEERS = {f"accelerated-{peer.name}": _accelerated_peer(peer) for peer in (TRANSFORMERS, TIMM)}
ACCELERATED_PEERS["engine-timm"] = _accelerated_peer(TIMM, inference=True)
