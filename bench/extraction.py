"""From JPEG files to features, decoding included: pictures per second, and the share of the time the device works.

The files are 500 x 375, cut at random from examples/pictures, and just written, so that no disk is waited for. A pass
takes all of them and ends with the class tokens in host memory, float32 (pictures, hidden), in the order of the files.
Ours is what `dinov2-fast extract` runs, so it computes the means of the patch tokens as well, writes shards and is read
back from there. The peers have their own preprocessing in a DataLoader with as many workers, in pinned
memory where there is a GPU, and leave the features on the device until the end. Workers start within the pass, each in
the way that is their default; the model is loaded before.

Preprocessing differs, and so do the features. Before anything is timed, and again in each timed pass, the features of
a sample are held to the rule of the tests: the error, against our model in a wider dtype on that implementation's
pixels, is at most twice that of our model on plain PyTorch; and each picture must be more like itself there than like
any other. Most must be so against our features on our pixels, too. What returns rows in another order, loses one or
prepares other pictures is refused. Then whole passes run in turn, A B C B C A, and the medians count.

`floor_share` is the share of a pass in which the device works: the floor is the device's own time in the forward
passes, as if nothing else cost anything. On a GPU that is between events before and after each, on a CPU by the clock,
while the workers use it too.

At the end a model that costs next to nothing shows what else an extraction costs: bench.decoding.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dinov2_fast
from bench import decoding, harness, records
from bench.harness import keep_freed_memory, quantiles, worst_error
from bench.model import Models, Setting, resampling, show, summary
from bench.modes import DTYPES
from bench.peers import OURS, Peer, peers
from bench.records import Recorder
from dinov2_fast import optimize_for_inference
from dinov2_fast.extraction.decoding import decode
from dinov2_fast.extraction.extract import extract
from dinov2_fast.extraction.inputs import Picture
from dinov2_fast.image_processor import IMAGENET_MEAN, IMAGENET_STD, Dinov2ImageProcessor
from dinov2_fast.ops.dispatch import use_backend

TASK = "extraction"
RESOLUTION = 224  # pixels that the model gets
SIZE = (500, 375)  # of the files: width and height
QUALITY = 90
SOURCES = Path(__file__).parents[1] / "examples" / "pictures"
LETTERS = {"cpu": "S", "cuda": "SL"}  # on a GPU one that mostly waits for pictures, and one that keeps it busy
PICTURES = {"cpu": 32, "cuda": 8192}
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
PASSES = 3

Features = NDArray[np.float32]  # (pictures, hidden)
Transform = Callable[[Image.Image], Tensor]


def make_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Writes JPEG files: random parts of photographs, some mirrored, with colours of random strength, by the seed."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(SOURCES.glob("*.jpg"))]

    def write(index: int) -> str:
        draw = random.Random(f"{seed} {index}")
        photograph = photographs[index % len(photographs)]
        width = draw.uniform(0.4, 1) * min(photograph.width, photograph.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
        part = photograph.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if draw.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part = Image.merge("RGB", [band.point(_scale(draw.uniform(0.2, 1))) for band in part.split()])
        path = folder / f"{index:06}.jpg"
        part.save(path, quality=QUALITY)
        return str(path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works without Python's lock
        return list(pool.map(write, range(count)))


def _scale(factor: float) -> list[int]:
    """A table for the values of a colour. Without, parts of one photograph are so alike that features mix them up."""
    return [round(factor * value) for value in range(256)]


class Ours:
    """Our extraction, as the command runs it."""

    forward = "forward_features"  # the method that the device's time is spent in

    def __init__(self, setting: Setting, model: nn.Module, workers: int) -> None:
        self.model, self._setting, self._workers = model, setting, workers
        self._processor = Dinov2ImageProcessor()

    def pixels(self, paths: Sequence[str]) -> Tensor:
        """What the model gets (pictures, 3, height, width), float32."""
        return torch.from_numpy(np.stack([decode(Picture(path), self._processor).pixels for path in paths]))

    def features(self, paths: Sequence[str]) -> Features:
        """A whole pass.

        Raises:
            ValueError: a picture without features.
        """
        batch, workers = self._setting.batch, self._workers
        with tempfile.TemporaryDirectory() as folder, decoding.as_the_command():
            done = extract(paths, self.model, folder, processor=self._processor, batch_size=batch, workers=workers)
            if done.failures:
                raise ValueError(f"{done.failures} pictures have no features")
            return dinov2_fast.load_features(done.path)["cls"]


class Theirs:
    """A peer, fed by a DataLoader."""

    forward = "forward"

    def __init__(self, peer: Peer, setting: Setting, model: nn.Module, workers: int) -> None:
        self.model, self._peer, self._setting, self._workers = model, peer, setting, workers
        self._transform = TRANSFORMS[peer.name](setting)

    def pixels(self, paths: Sequence[str]) -> Tensor:
        """What the model gets (pictures, 3, height, width), float32."""
        files = Files(paths, self._transform)
        return torch.stack([files[index] for index in range(len(files))])

    def features(self, paths: Sequence[str]) -> Features:
        """A whole pass."""
        device, dtype = next(self.model.parameters()).device, DTYPES[self._setting.precision]
        loader = DataLoader(
            Files(paths, self._transform),
            batch_size=self._setting.batch,
            num_workers=self._workers,
            pin_memory=device.type == "cuda",
        )
        features = []
        for pixels in loader:
            x = pixels.to(device, dtype, non_blocking=True)
            features.append(self._peer.result(self.model, x, self._setting.output).float())
        return torch.cat(features).cpu().numpy()


Pipeline = Ours | Theirs


class Files(Dataset[Tensor]):
    """Pictures in files as tensors (3, height, width)."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._paths[index]) as image:
            return self._transform(image.convert("RGB"))


def _transformers(setting: Setting) -> Transform:
    """The class that transformers chooses for the checkpoints' preprocessor_config.json."""
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        Dinov2ImageProcessor().save_pretrained(folder)
        return functools.partial(_processed, AutoImageProcessor.from_pretrained(folder))


def _processed(processor: Any, image: Image.Image) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _timm(setting: Setting) -> Transform:
    """The transform of timm's configuration of the model, made for this resolution: no margin is cut off."""
    import timm

    configuration = timm.get_pretrained_cfg(setting.config.timm_name).to_dict()
    size = {"img_size": setting.resolution}
    return timm.data.create_transform(**timm.data.resolve_data_config(size, pretrained_cfg=configuration))


def _facebook(setting: Setting) -> Transform:
    """The steps of the reference's evaluation, in torchvision."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(setting.resolution),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


TRANSFORMS = {"transformers": _transformers, "timm": _timm, "facebook": _facebook}


class Judge:
    """Knows what the features of a sample must be: as many pictures as a batch and a part of one, spread over all.

    Args:
        models: the model whose features are right, in a wider dtype and in the setting's.
        paths: all pictures.
    """

    def __init__(self, setting: Setting, models: Models, paths: Sequence[str]) -> None:
        self._setting, self._models, self._count = setting, models, len(paths)
        self.places = _spread(len(paths), setting.batch + setting.batch // 32 + 1)
        self.sample = [paths[place] for place in self.places]
        self._same = models.get(OURS, DTYPES[setting.precision])
        exact = setting.precision == "fp32"
        self._wide = copy.deepcopy(models.ours).double() if exact else models.ours
        self._known: dict[Pipeline, tuple[Tensor, Tensor]] = {}
        self._ours = self._run(self._same, Ours(setting, self._same, 0).pixels(self.sample), OURS)

    def warm_up(self, pipeline: Pipeline, peer: Peer) -> float:
        """Runs the sample for the first time; the largest error of an element.

        Raises:
            ValueError: the features are not right.
        """
        pixels = pipeline.pixels(self.sample)
        self._known[pipeline] = self._run(self._wide, pixels, peer), self._run(self._same, pixels, peer)
        return self._error(pipeline, _complete(pipeline.features(self.sample), len(self.sample), self._setting))

    def check(self, pipeline: Pipeline, features: Features) -> None:
        """Looks at the sample among the features of a whole pass.

        Raises:
            ValueError: the features are not right.
        """
        self._error(pipeline, _complete(features, self._count, self._setting)[self.places])

    def _error(self, pipeline: Pipeline, features: Tensor) -> float:
        wide, usual = self._known[pipeline]
        itself = torch.arange(len(features))
        if strangers := int((nearest(features, wide) != itself).sum()):
            raise ValueError(f"the order is wrong: {strangers} of {len(itself)} pictures have the features of others")
        strangers = int((nearest(features, self._ours) != itself).sum())
        if 2 * strangers > len(itself):
            raise ValueError(f"other pixels: {strangers} of {len(itself)} pictures are more like others of ours")
        return worst_error([features.to(usual.dtype)], [wide], [usual])

    def _run(self, model: nn.Module, pixels: Tensor, peer: Peer) -> Tensor:
        """Class tokens of our model on plain PyTorch, in its dtype, with that peer's positions; on the CPU."""
        x = pixels.to(self._models.device, next(model.parameters()).dtype)
        exact, dialect = torch.backends.cudnn.flags(enabled=True, allow_tf32=False), peer.dialect(self._setting.config)
        with use_backend("torch"), exact, resampling(model, dialect):
            return torch.cat([OURS.result(model, part, "cls") for part in x.split(self._setting.batch)]).cpu()


def _complete(features: Features, count: int, setting: Setting) -> Tensor:
    expected = count, setting.config.embed_dim
    if features.shape != expected or features.dtype != np.float32:
        raise ValueError(f"the features are {features.shape} of {features.dtype}, not {expected} of float32")
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite")
    return torch.tensor(features)


def nearest(features: Tensor, others: Tensor) -> Tensor:
    """For each row the most similar one of `others`: by the cosine, once what all have in common is taken away."""
    features, others = (
        nn.functional.normalize(rows.double() - rows.double().mean(dim=0), dim=1) for rows in (features, others)
    )
    return (features @ others.T).argmax(dim=1)


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers below `count`, evenly, the first and the last among them."""
    wanted = min(count, wanted)
    return [place * (count - 1) // max(wanted - 1, 1) for place in range(wanted)]


class Busy:
    """A function that adds up for how long the device works in its calls."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self._device.type != "cuda":
            begin = time.perf_counter()
            result = self._function(*arguments, **keywords)
            self._seconds += time.perf_counter() - begin
            return result
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = self._function(*arguments, **keywords)
        last.record()
        self._spans.append((first, last))
        return result

    def seconds(self) -> float:
        """Of all calls, which the device must be done with."""
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._spans) / 1e3


@dataclass(frozen=True)
class Pass:
    """What a pass took, in seconds, and the share of it in which the device worked."""

    seconds: float
    share: float


def run_pass(pipeline: Pipeline, paths: Sequence[str], device: torch.device) -> tuple[Pass, Features]:
    """One pass over all pictures."""
    busy = Busy(getattr(pipeline.model, pipeline.forward), device)
    with mock.patch.object(pipeline.model, pipeline.forward, busy):
        begin = time.perf_counter()
        features = pipeline.features(paths)
        seconds = time.perf_counter() - begin
    return Pass(seconds, busy.seconds() / seconds), features


@torch.inference_mode()
def measure(
    setting: Setting, entrants: Sequence[Peer], models: Models, paths: Sequence[str], workers: int, passes: int
) -> list[dict[str, Any]]:
    """A row for each implementation, from whole passes in turn."""
    keep_freed_memory()
    judge = Judge(setting, models, paths)
    about = {"workers": workers, "pictures": len(paths), "pillow": records.version("pillow")}
    rows: dict[Peer, dict[str, Any]] = {}
    pipelines: dict[Peer, Pipeline] = {}
    for peer in entrants:
        rows[peer] = setting.row(peer, mode_of(peer))
        if peer.missing:
            rows[peer] |= records.missing(peer.missing)
            continue
        try:
            pipeline = _pipeline(peer, setting, models, workers)
            rows[peer] |= {"outputs_max_error": judge.warm_up(pipeline, peer), "versions": about}
            pipelines[peer] = pipeline
        except Exception as exception:  # what stops one must not stop the others
            records.stop([rows[peer]], exception, models.device)
    taken: dict[Peer, list[Pass]] = {peer: [] for peer in pipelines}
    for turn in range(passes):
        order = list(pipelines)
        for peer in order[turn % len(order) :] + order[: turn % len(order)] if order else []:
            try:
                took, features = run_pass(pipelines[peer], paths, models.device)
                judge.check(pipelines[peer], features)
                taken[peer].append(took)
            except Exception as exception:
                rows[peer]["outputs_max_error"] = None
                del pipelines[peer]
                records.stop([rows[peer]], exception, models.device)
    for peer in pipelines:
        rows[peer] |= values(len(paths), taken[peer])
    return list(rows.values())


def mode_of(peer: Peer) -> str:
    """Ours runs the engine, as the command does."""
    return "engine" if peer is OURS else "eager"


def _pipeline(peer: Peer, setting: Setting, models: Models, workers: int) -> Pipeline:
    if peer is OURS:
        engine = optimize_for_inference(
            models.ours, setting.precision, outputs="all", allow_slow=True, follow_weights=False
        )
        return Ours(setting, engine, workers)
    return Theirs(peer, setting, models.get(peer, DTYPES[setting.precision]), workers)


def values(pictures: int, taken: Sequence[Pass]) -> Mapping[str, Any]:
    """The measured keys of a row."""
    fast, median, slow = quantiles([took.seconds for took in taken])
    speeds = {"value": pictures / median, "p20": pictures / slow, "p80": pictures / fast, "unit": "images/s"}
    return speeds | {"floor_share": statistics.median(took.share for took in taken)}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    print(recorder)
    entrants = [peer for peer in peers(options.reference_path) if not peer.variant]
    precision = PRECISION[options.device]
    wanted = [Setting(TASK, config, RESOLUTION, options.batch, "cls", precision) for config in options.models]
    wanted = [
        s for s in wanted if not all(peer.missing or recorder.has(**s.row(peer, mode_of(peer))) for peer in entrants)
    ]
    like = Setting(TASK, decoding.TINY, RESOLUTION, options.batch, "cls", precision)
    pipeline = not all(recorder.has(**row) for row in decoding.settings(like))
    with tempfile.TemporaryDirectory() as folder, recorder.until_lost():
        paths = make_pictures(Path(folder), options.pictures) if wanted or pipeline else []
        for setting in wanted:
            ours = dinov2_fast.load(setting.config.name, weights="random:0", device=recorder.device)
            models = Models(setting.config, ours)
            going = [peer for peer in entrants if not recorder.lost_in(**setting.row(peer, mode_of(peer)))]
            rows = measure(setting, going, models, paths, options.workers, options.passes)
            recorder.keep(rows)
            show(f"{setting}, {options.pictures} JPEG files, {options.workers} workers", rows)
        if pipeline:
            rows = decoding.measure(like, paths, options.workers, options.passes, recorder.device)
            recorder.keep(rows)
            show(f"A tiny model, {options.workers} workers", rows)
    summary([row for row in recorder.rows if row["model"] != decoding.TINY.name])
    return recorder.finish()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser(TASK, __doc__)
    harness.add_models(parser)
    parser.add_argument("--pictures", type=_at_least(1), help="files (default: 32, on a GPU 8192)")
    parser.add_argument(
        "--workers", type=_at_least(0), help="processes that decode (default: as the command, on a GPU 16)"
    )
    parser.add_argument("--batch", type=_at_least(1), help="pictures (default: 8, on a GPU 256)")
    parser.add_argument("--passes", type=_at_least(PASSES), default=PASSES, help="of each (default: %(default)s)")
    harness.add_peers(parser)
    options = parser.parse_args(arguments)
    on = options.device
    options.models = options.models or [harness.MODELS[letter] for letter in LETTERS[on]]
    options.pictures = options.pictures or PICTURES[on]
    options.batch = options.batch or harness.batches("throughput", on, RESOLUTION)[0]
    if options.workers is None:
        options.workers = _workers(on)
    return options


def _workers(device: str) -> int:
    """On a GPU one for each core, up to 16; on a CPU, where the model runs too, as many as `dinov2-fast extract`."""
    cores = os.cpu_count() or 1
    return min(16, cores) if device == "cuda" else min(8, max(1, cores // 2))


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: a number from {lowest} on is wanted")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
