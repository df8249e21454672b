"""Decoding pictures in order, here or in worker processes, with bounded memory."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from dinov2_fast.extraction.images import MAX_PIXELS, ImageError, read_image
from dinov2_fast.image_processor import Dinov2ImageProcessor, Pixels


@dataclass(frozen=True)
class Decoded:
    """One picture: its size as stored (EXIF rotation applied) and pixel values (3, height, width), or why not."""

    width: int | None = None
    height: int | None = None
    pixels: Pixels | None = None
    error: str | None = None


def decode(path: str, processor: Dinov2ImageProcessor, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Reads and processes one picture; what is wrong with it stands in `error`, nothing is raised for it."""
    try:
        image = read_image(path, max_pixels)
    except ImageError as error:
        return Decoded(error=str(error))
    try:
        return Decoded(*image.size, pixels=processor(image, return_tensors=None).pixel_values[0])
    except (ValueError, MemoryError) as error:
        return Decoded(*image.size, error=f"cannot be processed: {error}")


def decode_all(
    paths: Iterable[str],
    processor: Dinov2ImageProcessor,
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Decoded, None, None]:
    """Decodes in the order of `paths`; with `workers` processes, at most `ahead` pictures before they are asked for.

    The processes are spawned: a script that calls this needs the usual ``if __name__ == "__main__":``. Close the
    iterator to stop them early.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker died, killed by the system for instance.
    """
    if not workers:
        for path in paths:
            yield decode(path, processor, max_pixels)
        return
    waiting: deque[Future[Decoded]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for path in paths:
            with _interrupt_blocked():
                waiting.append(pool.submit(decode, path, processor, max_pixels))
            if len(waiting) >= max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which would make each print a traceback; here it is only delayed."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
