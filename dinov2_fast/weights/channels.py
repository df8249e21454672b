"""Published weights for images of another number of channels."""

from __future__ import annotations

from torch import Tensor

from dinov2_fast.layouts import log_once


def adapt_filters(filters: Tensor, in_chans: int) -> Tensor:
    """The filters of a patch embedding for another number of channels, as timm adapts them.

    One channel takes the sum over all: a gray image gives what it gave as three equal channels. For more, or fewer, the
    filters are repeated in turn and scaled so that equal channels give what they gave. It is logged once.

    Args:
        filters: (hidden, channels, height, width).
        in_chans: channels of the images.

    Returns:
        (hidden, in_chans, height, width) in the same dtype, computed in float32; `filters` if nothing changes.
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
