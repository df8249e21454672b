"""Training steps side by side: forward, backward and AdamW, with stochastic depth, in pictures per second.

All start from the same weights and get the same random pictures, the same gradient for all tokens after the final norm
(there is no loss function), and the same rate of stochastic depth in every layer. AdamW is torch's, on a GPU its fused
form. Each has a copy of the weights, which its steps change.

Before anything is timed, the model that is timed, in the same mode and on the same batch, runs forward and backward
with stochastic depth off. Its tokens and some gradients, from the first layer to the last, are held to the rule of the
tests: the error, against our model in a wider dtype, is at most twice that of our model on plain PyTorch in the same
precision. What breaks the rule is refused; so is what has a parameter that is not finite when all steps are done.

Stochastic depth is what each implementation makes of it. Ours and the reference compute a layer's branches for the
pictures that they keep, always as many; the others compute them for all and multiply by zero.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_fast
from bench import harness, records, roofline
from bench.harness import Run, contest, worst_error
from bench.model import PRECISIONS, SAMPLE, Setting, exact_fp32, left, rows_of, show, summary, values
from bench.modes import BACKENDS, COMPILED, DTYPES, compiling, contexts, modes_of
from bench.peers import NAMES, OURS, Peer, chosen, peers
from bench.records import Recorder
from bench.workloads import Shape
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.layouts import plan_conversion
from dinov2_fast.ops.dispatch import use_backend

TASK = "training"
MODES = {"cpu": ["eager"], "cuda": ["eager", *BACKENDS, "compile"]}
BACKBONES = {"cpu": "S", "cuda": "SBL"}
DROP_PATH = 0.3  # rate of stochastic depth
LEARNING_RATE = 1e-5  # small: the weights of all stay near those they began with
CHUNK = 8  # pictures that the wider dtype runs at once
ADAMW_TENSORS = 7  # reads parameter, gradient and both moments; writes parameter and both moments


class Step:
    """Training steps of one implementation.

    Args:
        model: of that peer, its weights in the dtype of the precision; the steps change it.
        mode: "eager", one of COMPILED (the forward pass is compiled, and with it the backward), or a backend of ours.
    """

    def __init__(self, peer: Peer, model: nn.Module, precision: str, mode: str, device: torch.device) -> None:
        def forward(x: Tensor) -> Tensor:
            return peer.result(model, x, "all")

        self.model = model
        self._forward = torch.compile(forward, dynamic=False, mode=COMPILED[mode]) if mode in COMPILED else forward
        self._context = contexts(precision, mode, device)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")

    def __call__(self, x: Tensor, gradient: Tensor) -> None:
        """One step on pictures, with the gradient of all tokens (batch, tokens, hidden)."""
        self.backward(x, gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Adds to the parameters' gradients; gives the tokens."""
        with self._context():
            tokens = self._forward(x)
        tokens.backward(gradient.to(tokens.dtype))
        return tokens.detach()


def build(peer: Peer, config: BackboneConfig, ours: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A model to train, with the weights of ours."""
    made = peer.build(config, ours, DROP_PATH)
    return made.to(device, DTYPES[precision]).train()


def incoming(setting: Setting, device: torch.device) -> Tensor:
    """The gradient of all tokens: numbers of bf16, so that they are the same in every precision."""
    shape = Shape(setting.config, setting.resolution, setting.batch, device, torch.float32)
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.tokens, shape.hidden)
    return torch.randn(size, device=device, generator=generator).to(torch.bfloat16).to(DTYPES[setting.precision])


def watched(config: BackboneConfig) -> list[str]:
    """The parameters whose gradients stand for all, by our names."""
    last = config.depth - 1
    fc2 = "fc2" if config.ffn_layer == "mlp" else "w3"
    return [
        "patch_embed.proj.weight",
        f"blocks.{config.depth // 2}.attn.qkv.weight",
        f"blocks.{last}.mlp.{fc2}.weight",
        "norm.weight",
    ]


class Judge:
    """Knows what a step's tokens and gradients must be without stochastic depth.

    Args:
        ours: our model in fp32, on the device.
    """

    def __init__(self, setting: Setting, ours: nn.Module, x: Tensor, gradient: Tensor) -> None:
        self._setting, self._ours, self._x, self._gradient = setting, ours, x, gradient
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def error(self, peer: Peer, step: Step) -> float:
        """The largest error of an element.

        Raises:
            ValueError: the tokens or a gradient are not the model's.
        """
        dialect = peer.dialect(self._setting.config)
        if dialect not in self._known:
            self._known[dialect] = self._expected(dialect)
        wide, usual = self._known[dialect]
        found = self._results(step, self._x, self._gradient)
        worst = 0.0
        for name, result in found.items():
            try:
                worst = max(worst, worst_error([result.to(usual[name].dtype)], [wide[name]], [usual[name]]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return worst

    def _expected(self, dialect: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those of our model in a wider dtype, and in this precision, both on plain PyTorch."""
        precision = self._setting.precision
        wide = torch.float64 if precision == "fp32" else torch.float32
        with use_backend("torch"), exact_fp32():
            step = self._plain(dialect, wide, "fp32")
            reference = self._results(step, self._x.to(wide), self._gradient.to(wide), CHUNK)
        with use_backend("torch"):
            step = self._plain(dialect, DTYPES[precision], precision)
            return reference, self._results(step, self._x, self._gradient)

    def _plain(self, dialect: str, dtype: torch.dtype, precision: str) -> Step:
        model = copy.deepcopy(self._ours).to(dtype)
        model.position_dialect = dialect
        return Step(OURS, model, precision, "eager", self._x.device)

    def _results(self, step: Step, x: Tensor, gradient: Tensor, chunk: int | None = None) -> dict[str, Tensor]:
        """All tokens and the gradients watched, of a batch taken in chunks or at once; nothing is left behind."""
        step.model.eval()
        chunk = chunk or len(x)
        parts = zip(x.split(chunk), gradient.split(chunk), strict=True)
        tokens = torch.cat([step.backward(*part) for part in parts])
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in step.model.named_parameters()
        }
        plan = plan_conversion(gradients)  # a layout renames and joins these weights, and so their gradients
        found = {f"the gradient of {name}": plan.read(name) for name in watched(self._setting.config)}
        step.model.zero_grad()
        step.model.train()
        return {"the tokens": tokens} | found


@compiling()
def measure(
    setting: Setting, entrants: Iterable[tuple[Peer, str]], ours: nn.Module, seconds: float, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each implementation and mode, measured in turn for about `seconds` in all.

    Args:
        ours: our model in fp32, on the device.
        known: rows of bench.roofline, for the floor.
    """
    device = next(ours.parameters()).device
    x, gradient = setting.pictures(device), incoming(setting, device)
    judge = Judge(setting, ours, x, gradient)
    rows = rows_of(setting, entrants)
    models: dict[tuple[Peer, str], nn.Module] = {}

    def ready(entrant: tuple[Peer, str]) -> Run:
        peer, mode = entrant
        model = build(peer, setting.config, ours, setting.precision, device)
        step = Step(peer, model, setting.precision, mode, device)
        rows[entrant]["outputs_max_error"] = judge.error(peer, step)
        models[entrant] = model
        return partial(step, x, gradient)

    least = _floor(setting, known)
    for entrant, times in contest(rows, ready, device, seconds, SAMPLE[device.type]).items():
        if all(parameter.isfinite().all() for parameter in models[entrant].parameters()):
            rows[entrant] |= values(setting, times, least)
        else:
            rows[entrant] |= records.not_measured("refused: after the steps a parameter is not finite")
    return list(rows.values())


def floor(config: BackboneConfig, resolution: int, batch: int, precision: str, ceilings: roofline.Ceilings) -> float:
    """Seconds that a training step takes at least, its parts one after the other:

        products(k) * 3 + attention * k * 3.5 + elementwise * k * 3 + AdamW

    Products, attention and elementwise are those of a forward pass with output "all" (:func:`bench.roofline.floor`). A
    product becomes three, of the same size; the two of attention become seven, since its backward computes the scores
    anew; elementwise traffic is taken to be the same three times. AdamW moves 7 tensors as large as the parameters, in
    their dtype, at the speed of a copy.

    k is the share of the pictures that stochastic depth keeps in each branch, as the reference rounds it: what it
    leaves out is not counted, at the rates of whole batches. The patch embedding sees all pictures.

    Args:
        ceilings: of :func:`bench.roofline.ceilings_of`, in the precision of the products.

    Raises:
        ValueError: `ceilings` lack a rate for these sizes.
    """
    kept = max(int(batch * (1 - DROP_PATH)), 1) / batch
    whole = roofline.floor(config, resolution, batch, "all", ceilings)
    patches = next(p for p in roofline.products_of(config, resolution, batch, "all") if p.place == "patch embedding")
    embedding = patches.flops / ceilings.products[patches.sizes]
    products = embedding + (whole.products - embedding) * kept
    moved = ADAMW_TENSORS * roofline.parameters(config) * DTYPES[precision].itemsize
    return 3 * products + 3.5 * kept * whole.attention + 3 * kept * whole.elementwise + moved / ceilings.copy


def _floor(setting: Setting, known: list[dict[str, Any]]) -> float | None:
    """Seconds, or None where bench.roofline has not measured what it takes."""
    try:
        ceilings = roofline.ceilings_of(known, setting.precision.removeprefix("autocast-"))
        return floor(setting.config, setting.resolution, setting.batch, setting.precision, ceilings)
    except ValueError:
        return None


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    print(recorder)
    known = recorder.known(roofline.TASK)
    everyone = chosen(peers(options.reference_path), options.implementations)
    installed = [peer for peer in everyone if not peer.missing]
    entrants = [(peer, mode) for peer in everyone for mode in modes_of(peer, options.modes, installed)]
    with recorder.until_lost():
        for config in options.models:
            ours = None
            for setting in settings(options, config):
                if taking_part := left(recorder, setting, entrants):
                    ours = ours or dinov2_fast.load(config.name, weights="random:0", device=recorder.device)
                    rows = measure(setting, taking_part, ours, options.seconds, known)
                    recorder.keep(rows)
                    show(str(setting), rows)
    summary(recorder.rows)
    return recorder.finish()


def settings(options: argparse.Namespace, config: BackboneConfig) -> Iterator[Setting]:
    for precision, resolution in itertools.product(options.precisions, options.sizes):
        for batch in options.batches or harness.batches(TASK, options.device, resolution):
            yield Setting(TASK, config, resolution, batch, "all", precision)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("training", __doc__)
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels (default: 224)")
    parser.add_argument("--batches", type=harness.numbers, help="pictures (default: 64, on a CPU 3)")
    parser.add_argument("--precisions", type=harness.some_of(PRECISIONS["cuda"]), help=",".join(PRECISIONS["cuda"]))
    parser.add_argument("--modes", type=harness.some_of(MODES["cuda"]), help=",".join(MODES["cuda"]))
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row's peers together")
    harness.add_peers(parser, NAMES)
    options = parser.parse_args(arguments)
    on = options.device
    options.models = options.models or [harness.MODELS[letter] for letter in BACKBONES[on]]
    options.sizes = options.sizes or harness.sizes(TASK, on)
    options.precisions = options.precisions or PRECISIONS[on]
    options.modes = options.modes or MODES[on]
    return options


if __name__ == "__main__":
    sys.exit(main())
