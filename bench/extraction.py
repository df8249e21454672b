"""From JPEG files to features, decoding included: images per second, and the share of the time that the device works.

All implementations read the same files of 500 x 375 pixels, cut at random from examples/images. The files have just
been written, so reading them does not wait for a disk. A pass reads all files and ends with the class tokens in host
memory, float32 (images, hidden), in the order of the files. Ours is what `dinov2-fast extract` runs: it also writes
shards and computes means of the patch tokens. A peer has its own preprocessing, in a DataLoader with as many workers.
Whole passes run in turn, A B C B C A, and a row has the median.

In every pass the features of a sample are compared with those of our model on that implementation's pixels, and each
image must be nearest to itself. `floor_share` is the share of a pass in which the device works: the time of the forward
passes alone, divided by that of the pass.

`decoding` in the `versions` of our row is the number of images per second that our workers decode without a model,
starting them included. It shows whether decoding limits our extraction.
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
from bench.peers import OURS, TIMM, TRANSFORMERS, Peer, load_ours
from bench.records import Row
from bench.tasks import AccuracyCheck, Models, Scenario, Task, Variant, print_rows, unmeasured
from dinov2_fast import load_features, optimize_for_inference
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import decode_all
from dinov2_fast.extraction.compute import without_normalization
from dinov2_fast.extraction.extract import extract

SIZE = (500, 375)  # width and height of the files
SOURCES = Path(__file__).parents[1] / "examples" / "images"
CORES = os.cpu_count() or 1
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
# On a GPU, S waits for images and L keeps the device busy. On a CPU, as many workers as `dinov2-fast extract` has.
DEFAULTS = {
    "cpu": {"models": "S", "images": 32, "batch": 8, "workers": min(8, max(1, CORES // 2))},
    "cuda": {"models": "S,L", "images": 8192, "batch": 256, "workers": min(16, CORES)},
}

Features = NDArray[np.float32]  # (images, hidden)


def make_images(folder: Path, count: int) -> list[str]:
    """Writes JPEG files, the same in every run: random parts of photographs, with colours of random strength.

    Without the change of colours, parts of one photograph are so similar that their features could be confused.
    """
    photographs = [Image.open(path).convert("RGB") for path in sorted(SOURCES.glob("*.jpg"))]

    def write(index: int) -> str:
        generator, photograph = random.Random(index), photographs[index % len(photographs)]
        share, (width, height) = generator.uniform(0.4, 1), photograph.size
        left, top = generator.uniform(0, (1 - share) * width), generator.uniform(0, (1 - share) * height)
        box = (left, top, left + share * width, top + share * height)
        strengths = [generator.uniform(0.2, 1) for _ in "RGB"]
        table = [round(strength * value) for strength in strengths for value in range(256)]
        path = folder / f"{index:06}.jpg"
        photograph.resize(SIZE, Image.Resampling.BICUBIC, box).point(table).save(path, quality=90)
        return str(path)

    with ThreadPoolExecutor(CORES) as pool:  # Pillow releases the GIL
        return list(pool.map(write, range(count)))


class Pipeline(NamedTuple):
    """One implementation's way from files to features."""

    forward: Callable[[Tensor], Any]  # runs a batch on the device
    pixels: Callable[[list[str]], Tensor]  # files to the model's input (images, 3, height, width), float32
    features: Callable[[list[str]], Features]  # a whole pass over files


def our_pipeline(scenario: Scenario, models: Models, workers: int) -> Pipeline:
    """Our extraction, as the command runs it."""
    options = {"outputs": "all", "allow_slow": True, "follow_weights": False}
    engine = optimize_for_inference(models.ours, scenario.precision, **options)

    def features(paths: list[str]) -> Features:
        with tempfile.TemporaryDirectory() as folder:
            done = extract(paths, engine, out=folder, batch_size=scenario.batch, workers=workers)
            if done.failures:
                raise ValueError(f"{done.failures} images have no features")
            return load_features(done.folder)["cls"]

    return Pipeline(engine.forward_features, our_pixels, features)


def our_pixels(paths: list[str]) -> Tensor:
    processor = Dinov2ImageProcessor()
    return torch.from_numpy(np.stack([decode(ImageSource(path), processor).pixels for path in paths]))


def peer_pipeline(peer: Peer, scenario: Scenario, models: Models, workers: int) -> Pipeline:
    """A peer fed by a DataLoader, from pinned memory on a GPU. Features stay on the device until the end of a pass."""
    model, pixels = models.get(peer, scenario.dtype), partial(load_batch, preprocessing_of(peer, scenario))
    placement, on_gpu = {"device": models.device, "dtype": scenario.dtype}, models.device.type == "cuda"

    def features(paths: list[str]) -> Features:
        batches = DataLoader(paths, scenario.batch, num_workers=workers, pin_memory=on_gpu, collate_fn=pixels)
        xs = (x.to(**placement, non_blocking=True) for x in batches)
        return torch.cat([peer.result(model, x, scenario.output).float() for x in xs]).cpu().numpy()

    return Pipeline(model, pixels, features)


def load_batch(transform: Callable[[Image.Image], Tensor], paths: list[str]) -> Tensor:
    """The preprocessed images of files (images, 3, height, width)."""
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def preprocessing_of(peer: Peer, scenario: Scenario) -> Callable[[Image.Image], Tensor]:
    """A peer's own preprocessing."""
    if peer.name == "transformers":  # the class follows from the checkpoints' preprocessor_config.json
        from transformers import AutoImageProcessor

        with tempfile.TemporaryDirectory() as folder:
            Dinov2ImageProcessor().save_pretrained(folder)
            processor = AutoImageProcessor.from_pretrained(folder)
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]
    import timm  # its configuration for this resolution does not crop a margin

    pretrained, size = timm.get_pretrained_cfg(scenario.config.timm_name), {"img_size": scenario.resolution}
    return timm.data.create_transform(**timm.data.resolve_data_config(size, pretrained_cfg=pretrained.to_dict()))


def class_tokens(pixels: Tensor, batch: int, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The class tokens of pixels, on the CPU: what a pass should return."""
    x = pixels.to(next(model.parameters()).device, dtype)
    return {"the features": torch.cat([model(part) for part in x.split(batch)]).cpu()}


def largest_error(
    features: Features, shape: tuple[int, int], sample: Sequence[int], check: AccuracyCheck, peer: Peer
) -> float:
    """The largest error of an element in a sample of rows. AssertionError or ValueError if the features are wrong."""
    if features.shape != shape or features.dtype != np.float32 or not np.isfinite(features).all():
        raise ValueError(f"the features are {features.shape} {features.dtype}, not finite float32 {shape}")
    found, expected = torch.tensor(features[sample]), check.expected(peer)[0]["the features"]
    # In bf16 the rule alone could take one image for another.
    centred = (x.double() - x.double().mean(dim=0) for x in (found, expected))
    a, b = (nn.functional.normalize(x, dim=1) for x in centred)
    nearest = (a @ b.T).argmax(dim=1)
    if wrong := int((nearest != torch.arange(len(found))).sum()):
        raise ValueError(f"the order is wrong: {wrong} of {len(found)} images have the features of others")
    return float(check.check(peer, {"the features": found})["outputs_max_error"])


@torch.inference_mode()
def measure_scenario(scenario: Scenario, variants: list[Variant], paths: list[str], options: Namespace) -> list[Row]:
    """A row for each implementation. Whole passes run in turn."""
    harness.keep_freed_memory()
    device = torch.device(options.device)
    models = Models(scenario.config, load_ours(scenario.config, device))
    # The sample has one image more than a batch. It is spread over all images and includes both ends.
    indices = np.linspace(0, len(paths) - 1, min(len(paths), scenario.batch + 1), dtype=int)
    sample = [paths[index] for index in indices]
    pipelines: dict[Peer, Pipeline] = {}
    checks: dict[Peer, AccuracyCheck] = {}
    rows = {peer: row for (peer, _), row in Task(scenario, models).rows(variants).items()}
    passes: dict[Peer, list[tuple[float, float]]] = {peer: [] for peer in rows if not peer.missing}

    def prepare(peer: Peer) -> None:
        make_pipeline = our_pipeline if peer is OURS else partial(peer_pipeline, peer)
        pipelines[peer] = make_pipeline(scenario, models, options.workers)
        expected = partial(class_tokens, pipelines[peer].pixels(sample), scenario.batch)
        checks[peer] = AccuracyCheck(scenario, models, expected)
        pipelines[peer].features(sample)  # libraries plan and load at first

    def timed_pass(peer: Peer) -> None:
        start = time.perf_counter()
        features = pipelines[peer].features(paths)
        seconds = time.perf_counter() - start
        shape = len(paths), scenario.config.embed_dim
        passes[peer].append((seconds, largest_error(features, shape, indices, checks[peer], peer)))

    for turn in range(options.passes + 1):
        order = list(passes)
        for peer in (order[(turn + place) % len(order)] for place in range(len(order))):
            try:
                (timed_pass if turn else prepare)(peer)
            except Exception as exception:  # the failure of one must not stop the others
                del passes[peer]
                records.record_failure(rows[peer], exception, device)
    for peer, seconds_and_errors in passes.items():
        seconds, errors = zip(*seconds_and_errors, strict=True)
        rows[peer] |= harness.speed(seconds, "images/s", len(paths)) | {"outputs_max_error": max(errors)}
        versions = {"workers": options.workers, "images": len(paths), "pillow": records.version("pillow")}
        if peer is OURS:
            versions["decoding"] = decoding_alone(paths, options.workers)
        x = pipelines[peer].pixels(sample[: scenario.batch]).to(device, scenario.dtype)
        seconds_per_image = harness.warm_up(partial(pipelines[peer].forward, x), device) / len(x)
        rows[peer] |= {"versions": versions, "floor_share": seconds_per_image * rows[peer]["value"]}
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
    with tempfile.TemporaryDirectory() as folder, recorder.stop_when_lost():
        images = cache(partial(make_images, Path(folder), options.images))
        for config in options.models:
            scenario = Scenario("extraction", config, 224, options.batch, "cls", PRECISION[options.device])
            variants = [(OURS, "engine"), *((peer, "eager") for peer in (TRANSFORMERS, TIMM))]
            if variants := unmeasured(recorder, scenario, variants, None):
                rows = measure_scenario(scenario, variants, images(), options)
                recorder.keep(rows)
                print_rows(f"{config.name}, {scenario}, {options.images} JPEG files, {options.workers} workers", rows)
    return recorder.finish()


def _parse(arguments: list[str] | None) -> Namespace:
    parser = harness.make_parser("extraction", __doc__)
    parser.add_argument("--images", type=int, help="number of files")
    parser.add_argument("--workers", type=int, help="number of processes that decode")
    parser.add_argument("--batch", type=int, help="batch size")
    parser.add_argument("--passes", type=int, default=3, help="of each implementation (default: %(default)s)")
    return harness.parse_options(parser, arguments, **DEFAULTS)


if __name__ == "__main__":
    __spec__ = command.__spec__  # spawned workers import the main module, and that of the command imports little
    sys.exit(main())
