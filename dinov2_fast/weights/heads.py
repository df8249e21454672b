"""The published heads: small official files that complete a backbone to a classifier, depth estimator or segmenter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.environment import cache_dir
from dinov2_fast.weights.errors import WeightsError
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.sources import download, find_cached

logger = logging.getLogger("dinov2_fast")


def find_head(backbone: BackboneConfig, head: str, local_files_only: bool = False) -> Path:
    """The file of a published head: in the cache folder or torch.hub's, or from the official server.

    Args:
        backbone: the one that the head was trained on.
        head: as its file is called: "linear4", "nyu_dpt", "ade20k_linear", …
        local_files_only: do not touch the network.

    Raises:
        WeightsError: not there and not to be fetched; says which file to put where.
    """
    stem, url = backbone.head_stem(head), backbone.head_url(head)
    found = find_cached(stem)
    if found is not None:
        return found
    path = cache_dir() / f"{stem}.pth"
    try:
        if local_files_only:
            raise WeightsError("only local files were to be used")
        return download(url, path)
    except WeightsError as error:
        raise WeightsError(
            f"The head {stem} is not on this machine and could not be fetched ({error}).\nDownload {url} where there "
            f"is a network and put it at {path} (the folder is set by DINOV2_FAST_CACHE)."
        ) from error


def load_head(head: nn.Module, path: Path, prefix: str = "") -> None:
    """Gives a head its weights from a file.

    Args:
        head: the module to fill; nothing of it changes if the weights do not fit.
        path: a checkpoint; training frameworks' files, which hold the weights as "state_dict", are looked into.
        prefix: what the head's keys in the file begin with; other keys are left out, and those the head lacks.

    Raises:
        WeightsError: the file cannot be read, or lacks a tensor of the head.
    """
    content = open_weights(path)
    nested = content.get("state_dict")
    source = nested if isinstance(nested, Mapping) else content
    own = head.state_dict()
    given = {key: source[prefix + key] for key in own if prefix + key in source}
    # How many batches a batch norm has seen is of no use to its results, and not every file has it.
    missing = [prefix + key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    misshapen = [
        f"{prefix}{key} {tuple(getattr(tensor, 'shape', ()))} where the head has {tuple(own[key].shape)}"
        for key, tensor in given.items()
        if not isinstance(tensor, Tensor) or tensor.shape != own[key].shape
    ]
    if missing or misshapen:
        raise WeightsError(f"{path}: " + layouts.misfit("a head of the reference", missing, [], misshapen))
    if len(source) > len(given):
        logger.info("Left out %d keys of %s that are not the head's.", len(source) - len(given), path)
    head.load_state_dict({**own, **given})
