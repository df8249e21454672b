"""Where weights may lie, for tests: empty caches, a hub cache made by hand, a small backbone by name, no network."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dinov2_fast import BACKBONES, load
from dinov2_fast.configs import BackboneConfig

TINY = "dinov2_vitt14"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class WeightFolders(NamedTuple):
    """The folders that are searched, all empty and none of them yet made."""

    cache: Path
    torch_hub: Path
    huggingface: Path


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> WeightFolders:
    """Moves every cache into `folder`, for this test."""
    folders = WeightFolders(folder / "cache", folder / "torch" / "hub" / "checkpoints", folder / "huggingface")
    monkeypatch.setenv("DINOV2_FAST_CACHE", str(folders.cache))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folders.huggingface))
    return folders


def refuse_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every connection and name look-up fail; the list returned fills with the attempts."""
    attempts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(repr(args))
        raise OSError("the network is switched off for this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return attempts


def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> BackboneConfig:
    """A ninth backbone, small enough to be written to disk in a test; its name is `TINY`."""
    backbone = BackboneConfig(
        name=TINY,
        embed_dim=64,
        depth=2,
        num_heads=1,
        ffn_layer="mlp",
        num_register_tokens=0,
        huggingface_id="facebook/dinov2-tiny",
        timm_name="vit_tiny_patch14_dinov2.lvd142m",
    )
    monkeypatch.setitem(BACKBONES, TINY, backbone)
    return backbone


def tiny_weights(seed: int) -> dict[str, torch.Tensor]:
    """Weights of the tiny backbone, in the reference's layout."""
    return dict(load(TINY, weights=f"random:{seed}").state_dict())


def write(weights: dict[str, Any], path: Path) -> Path:
    """Saves weights in the format that the ending of `path` says; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def put_in_hub_cache(folders: WeightFolders, repository: str, folder: Path, revision: str = "main") -> None:
    """Makes the hub's cache hold the files of `folder` as that repository, as a download leaves them."""
    root = folders.huggingface / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(COMMIT)
