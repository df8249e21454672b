"""From JPEG files to features, decoding included: images per second, and the share of the time the device works.

All implementations read the same files of 500 x 375 pixels, cut at random from examples/images. They were just
written, so no disk is waited for. A pass reads all files and ends with the class tokens in host memory, float32
(images, hidden), in the order of the files. Ours is what `dinov2-fast extract` runs, with its shards and means of patch
tokens. A peer has its own preprocessing, in a DataLoader with as many workers. Whole passes run in turn, A B C B C A; a
row has the median.

In every pass the features of a sample are checked against our model on that implementation's pixels, and each image
must be nearest to itself. `floor_share` is the share of a pass in which the device works: the time of the forward
passes alone over that of the pass.

`decoding` in the `versions` of our row shows whether decoding limits our extraction: the images per second that its
workers decode without a model, their start included.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dinov2_fast.__main__ as command
from bench import harness, records
from bench.model import left, show
from bench.peers import OURS, TIMM, TRANSFORMERS, Peer, load_ours
from bench.tasks import Entrant, Judge, Models, Row, Setting
from dinov2_fast import load_features, optimize_for_inference
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import decode_all
from dinov2_fast.extraction.compute import without_normalization
from dinov2_fast.extraction.extract import extract

SIZE = (500, 375)  # of the files: width and height
SOURCES = Path(__file__).parents[1] / "examples" / "images"
CORES = os.cpu_count() or 1
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
# On a GPU a model that waits for images and one that keeps it busy; on a CPU as many workers as `dinov2-fast extract`.
DEFAULTS = {
    "cpu": {"models": "S", "images": 32, "batch": 8, "workers": min(8, max(1, CORES // 2))},
    "cuda": {"models": "S,L", "images": 8192, "batch": 256, "workers": min(16, CORES)},
}

Features = NDArray[np.float32]  # (images, hidden)


def make_images(folder: Path, count: int) -> list[str]:
    """Writes JPEG files, the same in every run: random parts of photographs, with colours of random strength.

    Without the change of colours, parts of one photograph are so alike that their features could be confused.
    """
    photographs = [Image.open(path).convert("RGB") for path in sorted(SOURCES.glob("*.jpg"))]

    def write(index: int) -> str:
        draw, photograph = random.Random(index), photographs[index % len(photographs)]
        share, (width, height) = draw.uniform(0.4, 1), photograph.size
        left, top = draw.uniform(0, (1 - share) * width), draw.uniform(0, (1 - share) * height)
        box = (left, top, left + share * width, top + share * height)
        strengths = [draw.uniform(0.2, 1) for _ in "RGB"]
        table = [round(strength * value) for strength in strengths for value in range(256)]
        path = folder / f"{index:06}.jpg"
        photograph.resize(SIZE, Image.Resampling.BICUBIC, box).point(table).save(path, quality=90)
        return str(path)

    with ThreadPoolExecutor(CORES) as pool:  # Pillow releases Python's lock
        return list(pool.map(write, range(count)))


class Pipeline(NamedTuple):
    """From files to features in one implementation."""

    forward: Callable[[Tensor], Any]  # of a batch on the device
    pixels: Callable[[list[str]], Tensor]  # of files, as the model gets them: (images, 3, height, width), float32
    features: Callable[[list[str]], Features]  # of files, in a whole pass


def ours(setting: Setting, models: Models, workers: int) -> Pipeline:
    """Our extraction, as the command runs it."""
    options = {"outputs": "all", "allow_slow": True, "follow_weights": False}
    engine = optimize_for_inference(models.ours, setting.precision, **options)

    def features(paths: list[str]) -> Features:
        with tempfile.TemporaryDirectory() as folder:
            done = extract(paths, engine, out=folder, batch_size=setting.batch, workers=workers)
            if done.failures:
                raise ValueError(f"{done.failures} images have no features")
            return load_features(done.folder)["cls"]

    return Pipeline(engine.forward_features, our_pixels, features)


def our_pixels(paths: list[str]) -> Tensor:
    processor = Dinov2ImageProcessor()
    return torch.from_numpy(np.stack([decode(ImageSource(path), processor).pixels for path in paths]))


def theirs(peer: Peer, setting: Setting, models: Models, workers: int) -> Pipeline:
    """A peer fed by a DataLoader, from pinned memory on a GPU; features stay on the device until the end."""
    model, pixels = models.get(peer, setting.dtype), partial(prepared, transform_of(peer, setting))
    to, on_gpu = {"device": models.device, "dtype": setting.dtype}, models.device.type == "cuda"

    def features(paths: list[str]) -> Features:
        batches = DataLoader(paths, setting.batch, num_workers=workers, pin_memory=on_gpu, collate_fn=pixels)
        xs = (x.to(**to, non_blocking=True) for x in batches)
        return torch.cat([peer.result(model, x, setting.output).float() for x in xs]).cpu().numpy()

    return Pipeline(model, pixels, features)


def prepared(transform: Callable[[Image.Image], Tensor], paths: list[str]) -> Tensor:
    """Images in files (images, 3, height, width)."""
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def transform_of(peer: Peer, setting: Setting) -> Callable[[Image.Image], Tensor]:
    """A peer's own preprocessing."""
    if peer.name == "transformers":  # it chooses the class by the checkpoints' preprocessor_config.json
        from transformers import AutoImageProcessor

        with tempfile.TemporaryDirectory() as folder:
            Dinov2ImageProcessor().save_pretrained(folder)
            processor = AutoImageProcessor.from_pretrained(folder)
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]
    import timm  # its configuration of the model for this resolution crops no margin

    pretrained, size = timm.get_pretrained_cfg(setting.config.timm_name), {"img_size": setting.resolution}
    return timm.data.create_transform(**timm.data.resolve_data_config(size, pretrained_cfg=pretrained.to_dict()))


def class_tokens(pixels: Tensor, batch: int, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of pixels, on the CPU: what a pass should give."""
    x = pixels.to(next(model.parameters()).device, dtype)
    return {"the features": torch.cat([model(part) for part in x.split(batch)]).cpu()}


def error(features: Features, shape: tuple[int, int], sample: Sequence[int], judge: Judge, peer: Peer) -> float:
    """The largest error of an element in a sample of rows. It raises if the features are wrong."""
    if features.shape != shape or features.dtype != np.float32 or not np.isfinite(features).all():
        raise ValueError(f"the features are {features.shape} {features.dtype}, not finite float32 {shape}")
    found, exact = torch.tensor(features[sample]), judge.expected(peer)[0]["the features"]
    # In bf16 the rule alone could take one image for another.
    mine, right = (nn.functional.normalize(x.double() - x.double().mean(dim=0), dim=1) for x in (found, exact))
    if wrong := int(((mine @ right.T).argmax(dim=1) != torch.arange(len(found))).sum()):
        raise ValueError(f"the order is wrong: {wrong} of {len(found)} images have the features of others")
    return float(judge.verdict(peer, {"the features": found})["outputs_max_error"])


@torch.inference_mode()
def measure(setting: Setting, entrants: list[Entrant], paths: list[str], options: Namespace) -> list[Row]:
    """A row for each implementation; whole passes run in turn."""
    harness.keep_freed_memory()
    device = torch.device(options.device)
    models = Models(setting.config, load_ours(setting.config, device))
    # The sample has more images than a batch, spread over all, with both ends.
    places = np.linspace(0, len(paths) - 1, min(len(paths), setting.batch + 1), dtype=int)
    sample = [paths[place] for place in places]
    pipelines: dict[Peer, Pipeline] = {}
    judges: dict[Peer, Judge] = {}
    rows = {peer: setting.row(peer, mode) for peer, mode in entrants}
    rows = {peer: row | (records.missing(peer.missing) if peer.missing else {}) for peer, row in rows.items()}
    passes: dict[Peer, list[tuple[float, float]]] = {peer: [] for peer in rows if not peer.missing}

    def begin(peer: Peer) -> None:
        make = ours if peer is OURS else partial(theirs, peer)
        pipelines[peer] = make(setting, models, options.workers)
        judges[peer] = Judge(setting, models, partial(class_tokens, pipelines[peer].pixels(sample), setting.batch))
        pipelines[peer].features(sample)  # libraries plan and load at first

    def go_on(peer: Peer) -> None:
        start = time.perf_counter()
        features = pipelines[peer].features(paths)
        seconds = time.perf_counter() - start
        shape = len(paths), setting.config.embed_dim
        passes[peer].append((seconds, error(features, shape, places, judges[peer], peer)))

    for turn in range(options.passes + 1):
        order = list(passes)
        for peer in (order[(turn + place) % len(order)] for place in range(len(order))):
            try:
                (go_on if turn else begin)(peer)
            except Exception as exception:  # what stops one must not stop the others
                del passes[peer]
                records.stop([rows[peer]], exception, device)
    for peer, taken in passes.items():
        seconds, errors = zip(*taken, strict=True)
        several = seconds if len(seconds) > 1 else 2 * seconds
        fast, median, slow = (len(paths) / each for each in harness.quantiles(several))
        rows[peer] |= {"value": median, "p20": slow, "p80": fast, "unit": "images/s", "outputs_max_error": max(errors)}
        about = {"workers": options.workers, "images": len(paths), "pillow": records.version("pillow")}
        rows[peer]["versions"] = about | ({"decoding": decoding_alone(paths, options.workers)} if peer is OURS else {})
        x = pipelines[peer].pixels(sample[: setting.batch]).to(device, setting.dtype)
        of_an_image = harness.warm_up(partial(pipelines[peer].forward, x), device) / len(x)
        rows[peer]["floor_share"] = of_an_image * median
    return list(rows.values())


def decoding_alone(paths: list[str], workers: int) -> float:
    """Images per second that the workers of our extraction decode without a model."""
    start = time.perf_counter()
    for _ in decode_all(map(ImageSource, paths), without_normalization(Dinov2ImageProcessor()), workers=workers):
        pass
    return len(paths) / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = records.Recorder("extraction", options)
    print(recorder)
    with tempfile.TemporaryDirectory() as folder, recorder.until_lost():
        images = cache(partial(make_images, Path(folder), options.images))
        for config in options.models:
            setting = Setting("extraction", config, 224, options.batch, "cls", PRECISION[options.device])
            entrants = [(OURS, "engine"), *((peer, "eager") for peer in (TRANSFORMERS, TIMM))]
            if going := left(recorder, setting, entrants, None):
                rows = measure(setting, going, images(), options)
                recorder.keep(rows)
                show(f"{config.name}, {setting}, {options.images} JPEG files, {options.workers} workers", rows)
    return recorder.finish()


def _parse(arguments: list[str] | None) -> Namespace:
    parser = harness.parser("extraction", __doc__)
    parser.add_argument("--images", type=int, help="files")
    parser.add_argument("--workers", type=int, help="processes that decode")
    parser.add_argument("--batch", type=int, help="images")
    parser.add_argument("--passes", type=int, default=3, help="of each (default: %(default)s)")
    return harness.parse(parser, arguments, **DEFAULTS)


if __name__ == "__main__":
    __spec__ = command.__spec__  # spawned workers import the main module, and the command's imports little
    sys.exit(main())
