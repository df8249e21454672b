"""The published heads: small official files that turn a backbone into a classifier, depth estimator or segmenter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.environment import cache_dir
from dinov2_fast.errors import WeightsError
from dinov2_fast.logs import logger
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.sources import download, find_cached


def find_head(backbone: BackboneConfig, head: str, local_files_only: bool = False) -> Path:
    """The file of a published head, from the cache folder, torch.hub's cache or the official server.

    Args:
        backbone: the backbone that the head was trained on.
        head: the head's part of the file name: "linear4", "nyu_dpt", "ade20k_linear", …
        local_files_only: do not use the network.

    Raises:
        WeightsError: the file is not on this machine and could not be downloaded; says which file to put where.
    """
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


def load_head(head: nn.Module, path: Path, prefix: str = "") -> None:
    """Gives a head its weights from a file.

    Args:
        head: the module to fill. It stays unchanged if the weights do not fit.
        path: a checkpoint, also of a training framework, with the weights under "state_dict".
        prefix: the prefix of the head's keys in the file. All other keys are skipped.

    Raises:
        WeightsError: the file cannot be read, or lacks a tensor of the head.
    """
    content = open_weights(path)
    nested = content.get("state_dict")
    source = nested if isinstance(nested, Mapping) else content
    own = head.state_dict()
    given = {key: source[prefix + key] for key in own if prefix + key in source}
    # The number of batches that a batch norm has seen does not change its output, and not every file has it.
    missing = [prefix + key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    misshapen = [
        f"{prefix}{key} {tuple(getattr(tensor, 'shape', ()))} where the head has {tuple(own[key].shape)}"
        for key, tensor in given.items()
        if not isinstance(tensor, Tensor) or tensor.shape != own[key].shape
    ]
    if missing or misshapen:
        raise WeightsError(f"{path}: " + layouts.misfit("a head of the reference", missing, [], misshapen))
    if len(source) > len(given):
        logger.info("Skipped %d keys of %s that do not belong to the head.", len(source) - len(given), path)
    head.load_state_dict({**own, **given})
