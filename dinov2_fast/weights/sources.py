"""Where weights are: a file, a folder, the cache, the Hugging Face hub, the official server.

Nothing here touches the network unless the weights are in no cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.environment import cache_dir
from dinov2_fast.weights.errors import WeightsError
from dinov2_fast.weights.files import SAFETENSORS, TORCH

logger = logging.getLogger("dinov2_fast")

# What a folder or a hub repository may call its weights, best first.
FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_NAME = "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT_SECONDS = 20


class Checkpoint(NamedTuple):
    """A weights file on this disk, and the transformers config beside it if there is one."""

    weights: Path
    config: Path | None


def cached(backbone: BackboneConfig) -> Path | None:
    """The checkpoint of a backbone in the cache folder or torch.hub's, if it is there."""
    names = [backbone.file_stem + ending for ending in SAFETENSORS + TORCH]
    folders = [cache_dir(), Path(torch.hub.get_dir()) / "checkpoints"]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def find_backbone(backbone: BackboneConfig, local_files_only: bool = False) -> Checkpoint:
    """The weights of one of the eight backbones: from the cache, the hub, or the official server.

    Raises:
        WeightsError: not there and not to be fetched; says which file to put where.
    """
    path = cached(backbone)
    if path is not None:
        return Checkpoint(path, None)
    tried = [f"no {backbone.file_stem}.safetensors or .pth in {cache_dir()}"]
    try:
        return find_on_hub(backbone.huggingface_id, local_files_only=local_files_only)
    except WeightsError as error:
        tried.append(str(error))
    if not local_files_only:
        try:
            return Checkpoint(download(backbone.url, cache_dir() / f"{backbone.file_stem}.pth"), None)
        except WeightsError as error:
            tried.append(str(error))
    raise WeightsError(
        f"The weights of {backbone.name} are not on this machine and could not be fetched:\n  - "
        + "\n  - ".join(tried)
        + f"\nDownload {backbone.url} where there is a network and put it at "
        f"{cache_dir() / (backbone.file_stem + '.pth')} (the folder is set by DINOV2_FAST_CACHE), or give a file."
    )


def find_in_folder(folder: Path) -> Checkpoint:
    """The weights and config of a folder that `save_pretrained` wrote, or that holds one checkpoint.

    Raises:
        WeightsError: no weights, or several and none of the usual name.
    """
    config = folder / CONFIG_NAME
    found = [folder / name for name in FILE_NAMES if (folder / name).is_file()]
    if not found:
        found = sorted(path for path in folder.iterdir() if path.suffix in SAFETENSORS + TORCH)
        if len(found) != 1:
            what = "no checkpoint" if not found else f"{len(found)} checkpoints ({', '.join(p.name for p in found)})"
            raise WeightsError(f"{folder} holds {what}; one of {', '.join(FILE_NAMES)} was looked for.")
    return Checkpoint(found[0], config if config.is_file() else None)


def find_on_hub(repository: str, revision: str | None = None, local_files_only: bool = False) -> Checkpoint:
    """The weights and config of a Hugging Face hub repository, from its cache if they are there.

    Raises:
        WeightsError: not there, or no network.
    """
    import huggingface_hub

    reason = "it was not to be fetched"
    for only_cache in (True,) if local_files_only else (True, False):
        if not only_cache and not _hub_answers():
            reason = "the hub does not answer; is there a network?"
            break
        for name in FILE_NAMES:
            try:
                weights = Path(_hub_file(repository, name, revision, only_cache))
            except _HubMiss as error:
                reason = str(error)
                if error.final:
                    break
                continue
            if name.endswith(".index.json"):
                patterns = [name, CONFIG_NAME, name.removesuffix(".index.json").replace(".", "-*.")]
                huggingface_hub.snapshot_download(
                    repository, revision=revision, local_files_only=only_cache, allow_patterns=patterns
                )
            return Checkpoint(weights, _hub_config(repository, revision, only_cache))
    raise WeightsError(f"{repository} is not in the Hugging Face cache and could not be fetched ({reason})")


def _hub_answers() -> bool:
    """One short request, since the hub's client tries for half a minute before it gives up."""
    import httpx
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except (httpx.HTTPError, huggingface_hub.errors.OfflineModeIsEnabled):
        return False
    return True


class _HubMiss(Exception):
    """A file the hub does not give; `final` if no other file of the repository will come either."""

    def __init__(self, reason: str, final: bool) -> None:
        super().__init__(reason)
        self.final = final


def _hub_file(repository: str, name: str, revision: str | None, only_cache: bool) -> str:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=only_cache)
    except (errors.EntryNotFoundError, errors.LocalEntryNotFoundError) as error:
        network_failed = isinstance(error, errors.LocalEntryNotFoundError) and not only_cache
        raise _HubMiss(_first_line(error), final=network_failed) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, OSError) as error:
        raise _HubMiss(_first_line(error), final=True) from error


def _hub_config(repository: str, revision: str | None, only_cache: bool) -> Path | None:
    try:
        return Path(_hub_file(repository, CONFIG_NAME, revision, only_cache))
    except _HubMiss:
        return None  # a repository without config (timm's have another kind): sizes are read from the tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_checkpoint(name: str, revision: str | None = None, local_files_only: bool = False) -> Checkpoint:
    """The weights, and the config if there is one, of a file, a folder or a Hugging Face hub id.

    Raises:
        WeightsError: `name` is none of these, or the weights cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return find_in_folder(path)
    if path.is_file() or path.suffix in SAFETENSORS + TORCH:
        return Checkpoint(path, None)
    if _HUB_ID.fullmatch(name):
        return find_on_hub(name, revision, local_files_only)
    raise WeightsError(f"{name!r} is no file or folder here and no hub id (owner/name).")


def find_config(name: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The transformers ``config.json`` that `name` is, or that a folder or hub repository of that name holds.

    Raises:
        WeightsError: it is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / CONFIG_NAME
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.exists() and _HUB_ID.fullmatch(name):
        found = find_on_hub(name, revision, local_files_only).config
        if found is not None:
            return found
    raise WeightsError(f"No {CONFIG_NAME} was found for {name!r}.")


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetches `url` to `path`: into ``<path>.part``, checked, then renamed, so that `path` is whole or absent.

    Args:
        url: http, https or file address.
        path: where the file goes; its folder is made.
        sha256: expected digest (or its beginning); None where the publisher gives none.

    Raises:
        WeightsError: no answer, a short answer, or a wrong digest. No file is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    logger.info("Downloading %s to %s", url, path)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file, length=1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and part.stat().st_size != int(expected):
            raise WeightsError(f"{url} broke off after {part.stat().st_size} of {expected} bytes; try again")
        if sha256 is not None and not _digest(part).startswith(sha256):
            raise WeightsError(f"{url} has SHA-256 {_digest(part)}, expected {sha256}; it was removed")
        os.replace(part, path)
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(f"{url} could not be fetched ({_first_line(error)})") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
