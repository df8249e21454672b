"""Pictures of many sizes at once: ours packs a list of them, the others pad or loop. Pictures per second.

The list holds square pictures whose sides are drawn by a seed, the smallest and the largest side among them; squares
because then some have the same size, which those gain from that loop over groups. Ours takes the list as it is: the
model by `forward_features`, the engine by `cls_tokens`. Of the others each runs in three ways:

- single: one picture after another,
- grouped: one batch after another, each of the pictures of one size,
- padded: one batch, every picture padded with zeros to the largest side. None of the models knows what is padding, so
  these are not the class tokens of the pictures: no error is given, but it is what many do.

The reference has a forward for lists, too, where it has xformers: there it also runs as "list". Making batches counts
as time. All get the same weights. Before anything is timed, all class tokens but the padded ones are held to the rule
of bench.model, against those that our model gives for one picture after another.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from bench.harness import Run, contest
from bench.model import SAMPLE, Models, Setting, expected, judged, left, load_models, rows_of, show, summary, values
from bench.modes import BACKENDS, DTYPES, ENGINES, contexts, engine, goes_with
from bench.peers import NAMES, OURS, Peer, chosen, peers
from bench.records import Recorder
from dinov2_fast.configs import BackboneConfig

TASK = "mixed"
LISTS = ("eager", *BACKENDS, *(mode for mode in ENGINES if not mode.endswith("graphs")))  # of ours; a list has no graph
MODES = {"cpu": ["eager", "engine", "single", "grouped", "padded", "list"], "cuda": None}  # None: all
BACKBONES = {"cpu": "S", "cuda": "SBLg"}
PICTURES = {"cpu": 4, "cuda": 64}
SIDES = {"cpu": [112, 224], "cuda": [224, 518]}  # pixels, the smallest and the largest
PRECISIONS = {"cpu": ["fp32"], "cuda": ["bf16"]}


def single(peer: Peer, model: nn.Module, pictures: list[Tensor]) -> Tensor:
    """The class tokens (pictures, hidden), like those of the others below."""
    return torch.cat([peer.result(model, x[None], "cls") for x in pictures])


def grouped(peer: Peer, model: nn.Module, pictures: list[Tensor]) -> Tensor:
    places = groups(pictures)
    found = [peer.result(model, torch.stack([pictures[i] for i in same]), "cls") for same in places]
    return in_order(places, found)


def padded(peer: Peer, model: nn.Module, pictures: list[Tensor]) -> Tensor:
    height, width = (max(x.shape[side] for x in pictures) for side in (1, 2))
    batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in pictures])
    return peer.result(model, batch, "cls")


def listed(peer: Peer, model: nn.Module, pictures: list[Tensor]) -> Tensor:
    """The list forward of our model and of the reference, which take batches of one size."""
    places = groups(pictures)
    batches = [torch.stack([pictures[i] for i in same]) for same in places]
    features = model.forward_features(batches, [None] * len(batches))
    return in_order(places, [of_one_size["x_norm_clstoken"] for of_one_size in features])


WAYS: dict[str, Callable[[Peer, nn.Module, list[Tensor]], Tensor]] = {
    "single": single,
    "grouped": grouped,
    "padded": padded,
    "list": listed,
}


def groups(pictures: list[Tensor]) -> list[list[int]]:
    """The places in the list of the pictures of each size."""
    places: dict[Any, list[int]] = {}
    for i, x in enumerate(pictures):
        places.setdefault(x.shape, []).append(i)
    return list(places.values())


def in_order(places: list[list[int]], found: list[Tensor]) -> Tensor:
    """The rows of all groups, each at its place in the list."""
    rows = {i: row for same, tokens in zip(places, found, strict=True) for i, row in zip(same, tokens, strict=True)}
    return torch.stack([rows[i] for i in range(len(rows))])


def sides(count: int, smallest: int, largest: int) -> list[int]:
    """Multiples of 14 by a seed, both ends among them."""
    draw = random.Random(0)
    drawn = [smallest, largest, *draw.choices(range(smallest, largest + 1, 14), k=count - 2)]
    draw.shuffle(drawn)
    return drawn


def pictures_of(wanted: list[int], precision: str, device: torch.device) -> list[Tensor]:
    """Random pictures (3, side, side), in the dtype of the precision."""
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn((3, side, side), device=device, generator=generator) for side in wanted)
    return [x.to(DTYPES[precision]) for x in made]


def prepare(peer: Peer, model: nn.Module, pictures: list[Tensor], precision: str, mode: str) -> Run:
    """What is timed: a pass over the list; `model` is in fp32 for the engine."""
    context = contexts(precision, mode, pictures[0].device)
    if mode in ENGINES:
        made = engine(model, pictures, "cls", precision, ENGINES[mode].graphs)
        run: Callable[[], Tensor] = lambda: torch.cat(made.cls_tokens(pictures))  # noqa: E731
    else:
        way = WAYS["list" if mode in LISTS else mode]
        run = lambda: way(peer, model, pictures)  # noqa: E731

    def within() -> Tensor:
        with context():
            return run()

    return within


class Judge:
    """Knows what the class tokens must be."""

    def __init__(self, setting: Setting, models: Models, pictures: list[Tensor]) -> None:
        self._setting, self._models, self._pictures = setting, models, pictures
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def verdict(self, peer: Peer, mode: str, result: Tensor) -> dict[str, Any]:
        """What a row says about them.

        Raises:
            ValueError: they are not the model's; of padded pictures: not as many as pictures, or not finite.
        """
        if mode == "padded":
            if result.shape != (len(self._pictures), self._setting.config.embed_dim) or not result.isfinite().all():
                raise ValueError(f"the class tokens are {tuple(result.shape)}, or not finite")
            return {"versions": {"outputs": "of padded pictures: not compared, since they are not the same"}}
        dialect = peer.dialect(self._setting.config)
        if dialect not in self._known:
            self._known[dialect] = expected(self._setting.precision, self._models, dialect, self._one_by_one)
        return judged(self._setting.precision, result, *self._known[dialect])

    def _one_by_one(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        return single(OURS, model, [x.to(dtype) for x in self._pictures])


@torch.inference_mode()
def measure(
    setting: Setting, entrants: Iterable[tuple[Peer, str]], models: Models, pictures: list[Tensor], seconds: float
) -> list[dict[str, Any]]:
    """A row for each implementation and mode, measured in turn for about `seconds` in all."""
    rows = rows_of(setting, entrants)
    judge = Judge(setting, models, pictures)

    def ready(entrant: tuple[Peer, str]) -> Run:
        peer, mode = entrant
        model = models.ours if mode in ENGINES else models.get(peer, DTYPES[setting.precision])
        run = prepare(peer, model, pictures, setting.precision, mode)
        rows[entrant] |= judge.verdict(peer, mode, run())
        return run

    for entrant, times in contest(rows, ready, models.device, seconds, SAMPLE[models.device.type]).items():
        rows[entrant] |= values(setting, times, None)
    return list(rows.values())


def entrants_of(everyone: Iterable[Peer], modes: list[str]) -> list[tuple[Peer, str]]:
    """Ours with the list, the others in all other ways that they have."""

    def can(peer: Peer, mode: str) -> bool:
        if peer is OURS:
            return mode in LISTS
        return mode in WAYS and (mode != "list" or peer.variant == "xformers")

    return [(peer, mode) for peer in everyone for mode in modes if can(peer, mode)]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    print(recorder)
    everyone = chosen(peers(options.reference_path), options.implementations)
    entrants, wanted = entrants_of(everyone, options.modes), sides(options.pictures, *options.sides)
    with recorder.until_lost():
        for config in options.models:
            models = None
            for precision in options.precisions:
                setting = setting_of(config, options.sides, options.pictures, precision)
                going = [e for e in entrants if goes_with(e[1], precision, setting.output, recorder.device)]
                if taking_part := left(recorder, setting, going):
                    models = models or load_models(config, recorder.device)
                    pictures = pictures_of(wanted, precision, recorder.device)
                    rows = measure(setting, taking_part, models, pictures, options.seconds)
                    recorder.keep(rows)
                    show(str(setting), rows)
    summary(recorder.rows)
    return recorder.finish()


def setting_of(config: BackboneConfig, ends: list[int], count: int, precision: str) -> Setting:
    return Setting(TASK, config, f"{ends[0]}-{ends[1]}", count, "cls", precision)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    known = (*LISTS, *WAYS)
    parser = harness.parser(TASK, __doc__)
    harness.add_models(parser)
    parser.add_argument("--pictures", type=int, help="in the list, at least 2 (default: 64, on a CPU 4)")
    parser.add_argument("--sides", type=harness.pixels, help="smallest,largest (default: 224,518, on a CPU 112,224)")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help=",".join(DTYPES))
    parser.add_argument("--modes", type=harness.some_of(known), help=f"{','.join(known)} (on a CPU fewer)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row's peers together")
    harness.add_peers(parser, NAMES)
    options = parser.parse_args(arguments)
    on = options.device
    options.models = options.models or [harness.MODELS[letter] for letter in BACKBONES[on]]
    options.pictures = PICTURES[on] if options.pictures is None else options.pictures
    options.sides = options.sides or SIDES[on]
    options.precisions = options.precisions or PRECISIONS[on]
    options.modes = options.modes or MODES[on] or list(known)
    if options.pictures < 2:
        parser.error(f"--pictures: {options.pictures}: at least 2 are wanted, one of each of the two --sides")
    if len(options.sides) != 2 or options.sides[0] >= options.sides[1]:
        parser.error("--sides: two numbers are wanted, the smaller one first, such as 224,518")
    return options


if __name__ == "__main__":
    sys.exit(main())
