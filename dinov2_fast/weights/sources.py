"""Finding weights: in a file, a folder, a cache, on the Hugging Face hub or the official server.

The network is used only if the weights are in no cache. What cannot be found or read is a `WeightsError`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.environment import cache_dir
from dinov2_fast.errors import WeightsError
from dinov2_fast.logs import logger
from dinov2_fast.weights.files import INDEX_ENDING, SAFETENSORS, TORCH, is_pickle, shards
from dinov2_fast.weights.run_folders import find_teacher
from dinov2_fast.weights.save import part_of

# The usual names of weights in a folder or a hub repository, best first.
FILE_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ENDINGS = (*SAFETENSORS, *TORCH, ".pth.tar")  # of checkpoints with other names
CONFIG_NAME = "config.json"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TIMEOUT_SECONDS = 20

Result = TypeVar("Result")


class SourceOptions(NamedTuple):
    """Which files of a folder or hub repository to use, with the options of transformers' `from_pretrained`."""

    revision: str | None = None
    local_files_only: bool = False
    cache_dir: str | Path | None = None  # None: the hub's own
    token: str | bool | None = None  # None: of the user who is logged in
    subfolder: str | None = None
    variant: str | None = None  # "fp16": model.fp16.safetensors

    def weights_names(self) -> tuple[str, ...]:
        """The names that the weights may have, best first. A variant must be a single file."""
        if self.variant is None:
            return FILE_NAMES
        return (f"model.{self.variant}.safetensors", f"pytorch_model.{self.variant}.bin")


_DEFAULT_OPTIONS = SourceOptions()


class Checkpoint(NamedTuple):
    """A weights file on this machine, and the ``config.json`` of the folder or repository that it was found in."""

    weights: Path
    config: Path | None


def find_cached(stem: str) -> Path | None:
    """The file `stem`, with any ending of a checkpoint, in the cache folder or torch.hub's; None if there is none."""
    names = [stem + ending for ending in SAFETENSORS + TORCH]
    folders = [cache_dir(), Path(torch.hub.get_dir()) / "checkpoints"]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def find_backbone(backbone: BackboneConfig, local_files_only: bool = False) -> Checkpoint:
    """The weights of one of the eight backbones, from a cache, the hub or the official server.

    If all fail, the `WeightsError` says which file to put where.
    """
    found = find_cached(backbone.file_stem)
    if found is not None:
        return Checkpoint(found, None)
    path = cache_dir() / f"{backbone.file_stem}.pth"
    tried = [f"no {backbone.file_stem}.safetensors or .pth in {cache_dir()}"]
    try:
        return find_on_hub(backbone.huggingface_id, SourceOptions(local_files_only=local_files_only))
    except WeightsError as error:
        tried.append(str(error))
    if not local_files_only:
        try:
            return Checkpoint(download(backbone.url, path), None)
        except WeightsError as error:
            tried.append(str(error))
    raise WeightsError(
        f"The weights of {backbone.name} are not on this machine and could not be downloaded:\n  - "
        + "\n  - ".join(tried)
        + f"\nDownload {backbone.url} on a machine with a network and put it at {path} (DINOV2_FAST_CACHE sets the "
        "folder), or give a file."
    )


def find_head(backbone: BackboneConfig, head: str, local_files_only: bool = False) -> Path:
    """The file of a published head ("linear4", "nyu_dpt", "ade20k_linear", …), from a cache or the official server."""
    stem, url = backbone.head_stem(head), backbone.head_url(head)
    found = find_cached(stem)
    if found is not None:
        return found
    path = cache_dir() / f"{stem}.pth"
    try:
        if local_files_only:
            raise WeightsError("local_files_only is set")
        return download(url, path)
    except WeightsError as error:
        raise WeightsError(
            f"The head {stem} is not on this machine and could not be downloaded ({error}).\nDownload {url} on a "
            f"machine with a network and put it at {path} (DINOV2_FAST_CACHE sets the folder)."
        ) from error


def find_in_folder(folder: Path, options: SourceOptions) -> Checkpoint:
    """The weights and config in a folder that `save_pretrained` wrote, or that holds one checkpoint.

    In the folder of a pretraining run, or of one of its checkpoints, they are those of the newest teacher.
    """
    if not folder.is_dir():
        raise WeightsError(f"There is no folder {folder}; check subfolder.")
    teacher = find_teacher(folder)
    if teacher is not None:
        return Checkpoint(teacher, teacher.with_name(CONFIG_NAME))
    config = folder / CONFIG_NAME
    names = options.weights_names()
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
        if len(found) != 1 or options.variant is not None:
            what = "no checkpoint" if not found else f"{len(found)} checkpoints ({', '.join(p.name for p in found)})"
            raise WeightsError(f"{folder} holds {what}; expected one of {', '.join(names)}.")
    return Checkpoint(found[0], config if config.is_file() else None)


def find_on_hub(repository: str, options: SourceOptions) -> Checkpoint:
    """The weights and config of a Hugging Face hub repository, from its cache if possible."""
    return _from_hub(_checkpoint_on_hub, repository, options)


def _from_hub(find: Callable[[str, SourceOptions], Result], repository: str, options: SourceOptions) -> Result:
    """The result of `find` in the hub's cache or, if it is not there, on the hub."""
    with contextlib.suppress(_HubMissError):
        return find(repository, options._replace(local_files_only=True))
    if options.local_files_only:
        reason = "local_files_only is set"
    elif not _hub_answers():
        reason = "the hub does not answer: there is no network, or HF_HUB_OFFLINE is set"
    else:
        try:
            return find(repository, options)
        except _HubMissError as error:
            reason = str(error)
    raise WeightsError(f"{repository} is not in the Hugging Face cache and could not be downloaded ({reason})")


def _checkpoint_on_hub(repository: str, options: SourceOptions) -> Checkpoint:
    names = options.weights_names()
    for name in names:
        try:
            weights = _hub_file(name, repository, options)
        except _HubMissError as error:
            if error.final or name == names[-1]:
                raise
            continue
        if name.endswith(INDEX_ENDING):
            for shard in shards(weights):
                _hub_file(shard.name, repository, options)
        try:
            return Checkpoint(weights, _hub_file(CONFIG_NAME, repository, options))
        except _HubMissError:
            return Checkpoint(weights, None)  # sizes are then read from the tensors
    raise AssertionError(names)


def _hub_answers() -> bool:
    """Whether the hub answers one short request: its client takes half a minute to give up."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except _http_errors():  # the client's offline mode is an OSError
        return False
    return True


def _http_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when there is no answer: it uses httpx, and httpx2 from huggingface_hub 2 on."""
    return OSError, *(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


class _HubMissError(Exception):
    """A file that the hub does not provide; `final` if it will not provide the repository's other files either."""

    def __init__(self, reason: str, final: bool) -> None:
        super().__init__(reason)
        self.final = final


def _hub_file(name: str, repository: str, options: SourceOptions) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    path = f"{options.subfolder}/{name}" if options.subfolder else name
    where: dict[str, Any] = {"revision": options.revision, "cache_dir": options.cache_dir}
    try:
        if options.local_files_only:  # hf_hub_download sends a request even with local_files_only=True
            found = huggingface_hub.try_to_load_from_cache(repository, path, **where)
            if isinstance(found, str):
                return Path(found)
            raise _HubMissError(f"there is no {path}", final=False)
        return Path(huggingface_hub.hf_hub_download(repository, path, token=options.token, **where))
    except errors.EntryNotFoundError as error:
        network_failed = isinstance(error, errors.LocalEntryNotFoundError)
        raise _HubMissError(_first_line(error), final=network_failed) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise _HubMissError(_first_line(error), final=True) from error
    except _http_errors() as error:
        raise _HubMissError(_first_line(error), final=True) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_checkpoint(name: str, options: SourceOptions = _DEFAULT_OPTIONS) -> Checkpoint:
    """The weights of a file, or the weights and config (None if there is none) of a folder or Hugging Face hub id."""
    _refuse_empty(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return find_in_folder(path / (options.subfolder or ""), options)
    if path.is_file() or path.suffix in SAFETENSORS + TORCH:
        return Checkpoint(path, None)
    if _HUB_ID.fullmatch(name):
        return find_on_hub(name, options)
    raise WeightsError(f"{name!r} is no file or folder here, and no hub id (owner/name).")


def _refuse_empty(name: str) -> None:
    """Raises for an empty name, which as a path would be the current folder."""
    if not name.strip():
        raise WeightsError("The name of the model is empty. Give a file, a folder (. for this one) or a hub id.")


def find_config(name: str, options: SourceOptions = _DEFAULT_OPTIONS, file_name: str = CONFIG_NAME) -> Path:
    """The JSON file `name`, or the file `file_name` in a folder or hub repository `name`."""
    _refuse_empty(name)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / (options.subfolder or "") / file_name
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.exists() and _HUB_ID.fullmatch(name):
        return _from_hub(partial(_hub_file, file_name), name, options)
    raise WeightsError(f"No {file_name} was found for {name!r}.")


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a ``config.json``."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}). Check its permissions and its disk.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise WeightsError(f"{path} holds a {type(fields).__name__}, not the fields of a configuration.")
    return fields


def download(url: str, path: Path) -> Path:
    """Downloads `url` to a temporary file, checks it and renames it, so that `path` is complete or absent.

    Args:
        url: an http, https or file address.
        path: of the new file. Its folder is made.

    Raises:
        WeightsError: there is no answer, or the file is incomplete or damaged. No file is left.
    """
    part = part_of(path)
    logger.info("Downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file, length=1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and part.stat().st_size != int(expected):
            raise WeightsError(f"{url} ended after {part.stat().st_size} of {expected} bytes; try again")
        if path.suffix in TORCH and not _is_whole(part):
            raise WeightsError(f"{url} is damaged or no PyTorch file; it was removed")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: malformed headers
        raise WeightsError(f"{url} could not be downloaded ({_first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # usually it has been renamed
            part.unlink()
    return path


def _is_whole(path: Path) -> bool:
    """Whether this is a PyTorch file whose archive passes its checksums, not a web page for instance."""
    if not zipfile.is_zipfile(path):  # files older than the archive format have no checksums
        return is_pickle(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises whatever the damage causes
        return False
