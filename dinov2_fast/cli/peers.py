"""The implementations that a checkpoint is verified against, as functions from images to tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dinov2_fast.convert import huggingface_model
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

    from dinov2_fast.weights.compare import Tokens
    from dinov2_fast.weights.sources import Checkpoint

PEERS = ("transformers", "timm")


@dataclass(frozen=True)
class Peer:
    """A model of another implementation: its tokens after the last norm, and what it is in words."""

    tokens: Callable[[Tensor], Tokens]
    description: str


def is_peer(name: str) -> bool:
    """Whether `name` is ``transformers`` or ``timm``, with or without a model after a colon."""
    return name.partition(":")[0] in PEERS


def load_peer(name: str, checkpoint: Checkpoint, device: Any) -> Peer:
    """The implementation that `name` asks for, in fp32 and eval mode.

    Args:
        name: ``transformers`` or ``timm`` for that library with the weights of `checkpoint`; ``transformers:MODEL`` or
            ``timm:MODEL`` for one that it loads itself.
        checkpoint: in any layout.
        device: where it goes.

    Raises:
        ValueError: the library is not installed.
    """
    library, _, model = name.partition(":")
    try:
        return (_transformers if library == "transformers" else _timm)(model, checkpoint, device)
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"{error.name} is not installed: pip install {library}.") from error


def _transformers(name: str, checkpoint: Checkpoint, device: Any) -> Peer:
    import transformers

    model: Any
    if name:
        model = transformers.AutoModel.from_pretrained(name)
    else:
        with tempfile.TemporaryDirectory() as folder:
            huggingface_model(checkpoint).save_pretrained(folder)
            model = transformers.AutoModel.from_pretrained(folder)
    model = model.eval().float().to(device)
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)

    def tokens(pixels: Tensor) -> Tokens:
        output = model(pixels).last_hidden_state
        return output[:, 0], output[:, first_patch:]

    return Peer(tokens, _described("transformers", transformers.__version__, type(model).__name__, name))


def _timm(name: str, checkpoint: Checkpoint, device: Any) -> Peer:
    import timm

    model: Any = timm.create_model(name, pretrained=True, dynamic_img_size=True) if name else _timm_with(checkpoint)
    model = model.eval().float().to(device)

    def tokens(pixels: Tensor) -> Tokens:
        output = model.forward_features(pixels)
        return output[:, 0], output[:, model.num_prefix_tokens :]

    return Peer(tokens, _described("timm", timm.__version__, type(model).__name__, name))


def _timm_with(checkpoint: Checkpoint) -> Any:
    """timm's model of the sizes of a checkpoint, with its weights."""
    import timm

    from dinov2_fast.layouts import convert_state_dict
    from dinov2_fast.weights.architecture import read_architecture
    from dinov2_fast.weights.files import open_weights

    state_dict = open_weights(checkpoint.weights)
    sizes = read_architecture(state_dict, checkpoint.config)
    weights = convert_state_dict(state_dict, to="timm")
    gated, registers = sizes["ffn_layer"] == "swiglufused", sizes["num_register_tokens"]
    first_linear = weights["blocks.0.mlp.fc1.weight"].shape[0]  # of both halves of a gated network
    model = timm.create_model(
        f"vit_{'giant' if gated else 'small'}_patch14{'_reg4' if registers else ''}_dinov2",
        dynamic_img_size=True,
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        mlp_ratio=first_linear / sizes["embed_dim"],
        reg_tokens=registers,
    )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in model.state_dict()})
    return model


def _described(library: str, version: str, kind: str, name: str) -> str:
    return f"{library} {version}, {kind}, {name if name else 'with the weights of A'}"
