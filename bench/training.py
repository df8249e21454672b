"""Task training: forward, backward and AdamW, with stochastic depth.

All implementations have the same weights, random images, rate of stochastic depth in every layer, and gradient of all
tokens after the final norm (there is no loss function). AdamW is torch's, on a GPU its fused form. Each steps a copy of
its own.

Before the timing the same model, in the same mode and on the same batch, is checked with stochastic depth off: its
tokens, and some gradients from the first layer to the last. Stochastic depth itself is each implementation's own: ours
and the reference compute a branch for the images that they keep, the others for all, and multiply by zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import records, roofline
from bench.harness import Run
from bench.modes import surroundings
from bench.peers import OURS, Peer
from bench.tasks import Entrant, Judge, Row, Setting, Task
from bench.workloads import Shape
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.layouts import plan_conversion

DROP_PATH = 0.3  # rate of stochastic depth
LEARNING_RATE = 1e-5  # so small that all weights stay near the first ones
CHUNK = 8  # images at once for the expected results, since the wider dtype takes more memory
ADAMW_TENSORS = 7  # it reads parameter, gradient and two moments, and writes parameter and two moments


class Step:
    """Training steps of one implementation.

    Args:
        model: the peer's, its weights in the dtype of the precision; the steps change it.
        mode: eager, compile (of forward and backward), or a backend of ours.
    """

    def __init__(self, peer: Peer, model: nn.Module, mode: str) -> None:
        def forward(x: Tensor) -> Tensor:
            return peer.result(model, x, "all")

        device = next(model.parameters()).device
        self.model = model
        self._forward = torch.compile(forward, dynamic=False) if mode == "compile" else forward
        self._context = surroundings(mode)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")

    def __call__(self, x: Tensor, gradient: Tensor) -> None:
        """One step on images, with the gradient of all tokens (batch, tokens, hidden)."""
        self.backward(x, gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Accumulates gradients; gives the tokens."""
        with self._context():
            tokens = self._forward(x)
        tokens.backward(gradient.to(tokens.dtype))
        return tokens.detach()

    def results(self, x: Tensor, gradient: Tensor, chunk: int, watched: list[str]) -> dict[str, Tensor]:
        """All tokens and some gradients, without stochastic depth. The model is the same afterwards."""
        self.model.eval()
        tokens = torch.cat([self.backward(*part) for part in zip(x.split(chunk), gradient.split(chunk), strict=True)])
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        plan = plan_conversion(gradients)  # converts gradients to our layout, as it does weights
        found = {f"the gradient of {name}": plan.read(name) for name in watched}
        self.model.zero_grad()
        self.model.train()
        return {"the tokens": tokens} | found


class Training(Task):
    """Steps on a batch of random images."""

    in_inference_mode = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._x, self._gradient = self.setting.images(self.device), incoming(self.setting, self.device)
        self._watched = watched(self.setting.config)
        self._judge = Judge(self.setting, self.models, self._expected)
        self._trained: dict[Entrant, nn.Module] = {}

    def _expected(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        step = Step(OURS, model, "eager")
        try:
            return step.results(self._x.to(dtype), self._gradient.to(dtype), CHUNK, self._watched)
        finally:
            model.eval()

    def ready(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        model = build(peer, self.setting, self.models.ours, self.device)
        step = Step(peer, model, mode)
        found = step.results(self._x, self._gradient, len(self._x), self._watched)
        self._trained[peer, mode] = model
        return partial(step, self._x, self._gradient), self._judge.verdict(peer, found)

    def values(self, entrant: Entrant, times: list[float]) -> Row:
        if all(parameter.isfinite().all() for parameter in self._trained[entrant].parameters()):
            return super().values(entrant, times)
        return records.not_measured("refused: after the steps a parameter is not finite")

    def floor(self, rates: roofline.Rates) -> float:
        return floor(self.setting, rates)


def build(peer: Peer, setting: Setting, ours: nn.Module, device: torch.device) -> nn.Module:
    """A model to train, with the weights of ours."""
    return peer.build(setting.config, ours, DROP_PATH).to(device, setting.dtype).train()


def incoming(setting: Setting, device: torch.device) -> Tensor:
    """The gradient of all tokens: bf16 values, so that they are the same in every precision."""
    shape = Shape(setting.config, setting.resolution, setting.batch, device, torch.float32)
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.tokens, shape.hidden)
    return torch.randn(size, device=device, generator=generator).to(torch.bfloat16).to(setting.dtype)


def watched(config: BackboneConfig) -> list[str]:
    """The parameters whose gradients are checked, by our names."""
    last = config.depth - 1
    fc2 = "fc2" if config.ffn_layer == "mlp" else "w3"
    return [
        "patch_embed.proj.weight",
        f"blocks.{config.depth // 2}.attn.qkv.weight",
        f"blocks.{last}.mlp.{fc2}.weight",
        "norm.weight",
    ]


def floor(setting: Setting, rates: roofline.Rates) -> float:
    """The least seconds of a training step, the sum of

        3 * (embedding + k * products) + 3.5 * k * attention + 3 * k * elementwise + AdamW

    with the parts of a forward pass with output "all" (bench/roofline.py). The backward of a product is two more of the
    same size; that of attention's two products is five, since it computes the scores anew; elementwise traffic counts
    three times. AdamW moves 7 tensors as large as the parameters, in their dtype, at the speed of a copy. k is the
    share of images that stochastic depth keeps in each branch, rounded as in the reference.
    """
    kept = max(int(setting.batch * (1 - DROP_PATH)), 1) / setting.batch
    whole = roofline.work(setting.config, setting.resolution, setting.batch, "all", setting.dtype.itemsize, False)
    flops = 3 * whole.embedding + kept * (3 * whole.products + 3.5 * whole.attention)
    adamw = ADAMW_TENSORS * roofline.parameters(setting.config) * setting.dtype.itemsize
    return flops / rates.product + (3 * kept * whole.elementwise + adamw) / rates.copy
