"""Task training: forward, backward and AdamW, with stochastic depth.

All implementations have the same weights, random images, rate of stochastic depth in every layer, and gradient of all
tokens after the final norm (there is no loss function). AdamW is torch's, on a GPU its fused form. Each implementation
trains its own copy of the weights.

Before the timing the same model, in the same mode and on the same batch, is checked with stochastic depth off: its
tokens, and some gradients from the first layer to the last. Each implementation has its own stochastic depth: ours
computes a branch only for the images that it keeps, the others compute it for all images and multiply the dropped ones
by zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import records, roofline
from bench.harness import Run
from bench.modes import backend_context
from bench.peers import OURS, Peer
from bench.records import Row
from bench.tasks import Scenario, Task, Variant
from bench.workloads import Shape
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.layouts import plan_conversion

DROP_PATH = 0.3  # rate of stochastic depth
LEARNING_RATE = 1e-5  # so small that all weights stay near their initial values
CHUNK = 8  # images at a time for the expected results, since the wider dtype takes more memory
ADAMW_TENSORS = 7  # it reads parameter, gradient and two moments, and writes parameter and two moments


class Trainer:
    """Training steps of one implementation, which change the weights of `model`.

    The mode is eager, compile (of forward and backward), or a backend of ours.
    """

    def __init__(self, peer: Peer, model: nn.Module, mode: str) -> None:
        def forward(x: Tensor) -> Tensor:
            return peer.result(model, x, "all")

        on_gpu = next(model.parameters()).device.type == "cuda"
        self.model = model
        self._forward = torch.compile(forward, dynamic=False) if mode == "compile" else forward
        self._context = backend_context(mode)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=on_gpu)

    def __call__(self, x: Tensor, gradient: Tensor) -> None:
        """One step on images, with the gradient of all tokens (batch, tokens, hidden)."""
        self.backward(x, gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Accumulates gradients. Returns the tokens."""
        with self._context():
            tokens = self._forward(x)
        tokens.backward(gradient.to(tokens.dtype))
        return tokens.detach()

    def results(self, x: Tensor, gradient: Tensor, chunk: int, checked_parameters: list[str]) -> dict[str, Tensor]:
        """All tokens and some gradients, without stochastic depth. The model does not change."""
        self.model.eval()
        tokens = torch.cat([self.backward(*part) for part in zip(x.split(chunk), gradient.split(chunk), strict=True)])
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        plan = plan_conversion(gradients)  # converts gradients to our layout, as it does weights
        selected = {f"the gradient of {name}": plan.read(name) for name in checked_parameters}
        self.model.zero_grad()
        self.model.train()
        return {"the tokens": tokens} | selected


class TrainingTask(Task):
    """Steps on a batch of random images."""

    in_inference_mode = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._x, self._gradient = self.scenario.images(self.device), token_gradient(self.scenario, self.device)
        self._checked_parameters = checked_parameters(self.scenario.config)
        self._trained: dict[Variant, nn.Module] = {}

    def our_results(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        trainer = Trainer(OURS, model, "eager")
        try:
            return trainer.results(self._x.to(dtype), self._gradient.to(dtype), CHUNK, self._checked_parameters)
        finally:
            model.eval()

    def checked_run(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        model = build_model(peer, self.scenario, self.models.ours, self.device)
        trainer = Trainer(peer, model, mode)
        results = trainer.results(self._x, self._gradient, len(self._x), self._checked_parameters)
        self._trained[peer, mode] = model
        return partial(trainer, self._x, self._gradient), self.accuracy.check(peer, results)

    def values(self, variant: Variant, times: list[float]) -> Row:
        if all(parameter.isfinite().all() for parameter in self._trained[variant].parameters()):
            return super().values(variant, times)
        return records.not_measured("refused: after the steps a parameter is not finite")

    def floor_seconds(self, rates: roofline.Rates) -> float:
        return floor_seconds(self.scenario, rates)


def build_model(peer: Peer, scenario: Scenario, ours: nn.Module, device: torch.device) -> nn.Module:
    """A model to train, with the weights of ours."""
    return peer.build(scenario.config, ours, DROP_PATH).to(device, scenario.dtype).train()


def token_gradient(scenario: Scenario, device: torch.device) -> Tensor:
    """The gradient of all tokens: bf16 values, so that they are the same in every precision."""
    shape = Shape(scenario.config, scenario.resolution, scenario.batch)
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.tokens, shape.hidden)
    return torch.randn(size, device=device, generator=generator).to(torch.bfloat16).to(scenario.dtype)


def checked_parameters(config: BackboneConfig) -> list[str]:
    """The parameters whose gradients are checked, by our names."""
    fc2 = "fc2" if config.ffn_layer == "mlp" else "w3"
    of_blocks = [f"blocks.{config.depth // 2}.attn.qkv.weight", f"blocks.{config.depth - 1}.mlp.{fc2}.weight"]
    return ["patch_embed.proj.weight", *of_blocks, "norm.weight"]


def floor_seconds(scenario: Scenario, rates: roofline.Rates) -> float:
    """The least seconds of a training step: the sum

        3 * (embedding + k * products) + 3.5 * k * attention + 3 * k * elementwise + AdamW

    over the parts of a forward pass with output "all" (bench/roofline.py). The backward of a product takes two more of
    the same size. That of attention's two products takes five, since it computes the scores again. Elementwise traffic
    counts three times. AdamW moves 7 tensors as large as the parameters, in their dtype, at the speed of a copy. k is
    the share of images that stochastic depth keeps in each branch, rounded as in the reference.
    """
    kept = max(int(scenario.batch * (1 - DROP_PATH)), 1) / scenario.batch
    where, itemsize = (scenario.config, scenario.resolution, scenario.batch, "all"), scenario.dtype.itemsize
    forward = roofline.forward_work(*where, itemsize, False)
    flops = 3 * forward.embedding + kept * (3 * forward.products + 3.5 * forward.attention)
    adamw = ADAMW_TENSORS * roofline.count_parameters(scenario.config) * itemsize
    return flops / rates.product + (3 * kept * forward.elementwise + adamw) / rates.copy
