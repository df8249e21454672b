"""Filters of a patch embedding, adapted to images with another number of channels."""

from __future__ import annotations

from torch import Tensor

from dinov2_fast.logs import log_once


def adapt_filters(filters: Tensor, in_chans: int) -> Tensor:
    """The filters of a patch embedding for another number of channels, as timm adapts them.

    For one channel the filters are summed, so a gray image gives the same result as three equal channels. For other
    numbers they are repeated in turn and scaled, so that images of equal channels give the same result as before. A
    warning is logged once.

    Args:
        filters: (hidden, channels, height, width).
        in_chans: channels of the images.

    Returns:
        (hidden, in_chans, height, width) in the dtype of `filters`, computed in float32; `filters` itself if the number
        of channels is the same.
    """
    if filters.ndim != 4 or filters.shape[1] in (0, in_chans):
        return filters
    channels = filters.shape[1]
    if in_chans == 1:
        adapted, how = filters.float().sum(dim=1, keepdim=True), "summed"
    else:
        repeats = -(-in_chans // channels)
        adapted = filters.float().repeat(1, repeats, 1, 1)[:, :in_chans] * (channels / in_chans)
        how = f"repeated in turn and scaled by {channels}/{in_chans}"
    log_once(f"The filters for {channels} channels are {how} for images of {in_chans}.")
    return adapted.to(filters.dtype)
