"""The engine attached to a backbone of another library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.inference import Engine, optimize_for_inference
from dinov2_fast.inference.agreement import TOLERANCES, mismatch, small_image
from dinov2_fast.inference.checks import replaced_methods
from dinov2_fast.inference.weight_watch import WeightWatch, run_up_to_date
from dinov2_fast.integrations.blocks import AcceleratedBlock, face_of, reason_against
from dinov2_fast.integrations.joining import ATTRIBUTE, has_own_forward, join, separate
from dinov2_fast.integrations.settings import path
from dinov2_fast.integrations.steps import is_exact_gelu, is_recorded_only, is_watched

logger = logging.getLogger("dinov2_fast")

_OUTSIDE = ("head.", "fc_norm.")  # keys of timm's model that are not its backbone's


class AttachedEngine:
    """The engine of our model on the weights of a backbone, or the `reason` why there is none now.

    `unanswered` holds the methods that run their own code all the same, and why. It is no submodule, so that parameters
    and state dict stay the backbone's own. A copy or pickle makes the engine anew.

    Args:
        tower: the backbone.
        face: the subclass of `AcceleratedTower` for it.
        options: those of `optimize_for_inference`. Its `follow_weights` is about the weights and settings of `tower`.

    Raises:
        ValueError: options that `optimize_for_inference` refuses.
    """

    def __init__(self, tower: nn.Module, face: Any, options: dict[str, Any]) -> None:
        self._face = face
        self._follows = options.get("follow_weights", True)
        self._options = {**options, "follow_weights": False}  # what the engine is made of is watched in `tower`
        self._make(tower)

    def attach(self, tower: nn.Module) -> None:
        """Answers the plain calls of `tower` from now on."""
        tower.__dict__[ATTRIBUTE] = self
        if not isinstance(tower, self._face):
            join(tower, self._face)
        self._remember(tower)

    def answer(self, tower: nn.Module, method: str, ask: Callable[[Any], Any], device: torch.device) -> Any:
        """What `ask` gets from the engine for the weights that `tower` has now; None if none answers `method`.

        Args:
            device: where `tower` computes.
        """
        if self._comparing:
            self._asked = True
            return None if self._compared is None else ask(self._compared)
        if self._outdated:
            self._renew(tower)

        def run() -> Any:
            return None if self._engine is None or method in self.unanswered else ask(self._engine)

        if self._watch is None:
            return run()
        return run_up_to_date(run, self._watch.changed, lambda: self._renew(tower), device)

    def _renew(self, tower: nn.Module) -> None:
        self._make(tower)
        self._remember(tower)
        if self.reason:
            logger.warning("The accelerated blocks run in place of the engine: %s", self.reason)

    def _remember(self, tower: nn.Module) -> None:
        self._outdated = tower.training  # in which it was not compared
        self._watch = WeightWatch(tower) if self._follows and not tower.training else None

    def _make(self, tower: nn.Module) -> None:
        self._engine: Engine | None = None
        self._comparing, self._compared = False, None
        self.unanswered: dict[str, str] = {}
        self.reason = _reason_against(tower) or self._face.refuses(tower)
        if self.reason is None:
            try:
                model = _ours(tower, self._face)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self.reason = f"its weights or settings are not those of a DINOv2 ({error})"
            else:
                self._make_engine(tower, model)

    def _make_engine(self, tower: nn.Module, model: nn.Module) -> None:
        if _eps_of(tower) != _eps_of(model):
            self.reason = f"its norms have eps {_eps_of(tower)} in place of {_eps_of(model)}"
            return
        if not tower.training:
            self._compare(tower, model)
        if all(method in self.unanswered for method, _ in self._face.trials):
            self.reason = "; ".join(f"its {method} {why}" for method, why in self.unanswered.items())
            return
        try:
            self._engine = optimize_for_inference(model, **self._options)
        except TypeError as error:
            self.reason = str(error)

    def _compare(self, tower: Any, model: Any) -> None:
        """Calls the methods of `tower` on a small image, by their own code and answered by `model`."""
        image = small_image(model.patch_embed, self._face.only_size(tower)).to(model.cls_token)
        with torch.no_grad(), self._joined(tower):
            for method, arguments in self._face.trials:
                self._asked = False
                answers = [self._tried(tower, method, image, arguments, by) for by in (model, None)]
                why = mismatch(answers[0], answers[1], TOLERANCES[image.dtype]) if self._asked else "needs no engine"
                if why:
                    self.unanswered.setdefault(method, why)

    @contextmanager
    def _joined(self, tower: Any) -> Iterator[None]:
        """Answers the calls of `tower` inside, also where it is not accelerated yet or by another engine."""
        before = tower.__dict__.get(ATTRIBUTE)
        tower.__dict__[ATTRIBUTE] = self
        if before is None:
            join(tower, self._face)
        try:
            yield
        finally:
            if before is None:
                separate(tower)
            else:
                tower.__dict__[ATTRIBUTE] = before

    def _tried(self, tower: Any, method: str, image: Tensor, arguments: dict[str, Any], by: Any) -> Any:
        """What a call of `tower` returns, or raises, when `by` answers it; with None, by its own code."""
        self._comparing, self._compared = True, by
        try:
            return getattr(tower, method)(image, **arguments)
        except Exception as error:
            return error
        finally:
            self._comparing, self._compared = False, None

    def __getstate__(self) -> dict[str, Any]:
        remade = {"_watch": None, "_engine": None, "_outdated": True, "_comparing": False, "_compared": None}
        return {**vars(self), **remade}


def _reason_against(tower: Any) -> str | None:
    """Why no engine can answer for this backbone, or None."""
    if any(tensor.is_meta for tensor in tower.state_dict().values()):
        return "its weights are on the meta device: load them first"
    for name, module in tower.named_modules():
        replaced = set(replaced_methods(module))
        if module is tower and has_own_forward(module):  # it may call the methods that an engine answers
            replaced.discard("forward")
            watched = bool(module._forward_hooks or module._forward_pre_hooks)
        else:
            watched = is_watched(module) and not is_recorded_only(module)
        if watched:
            return f"{name or 'it'} has a hook or a forward of its own, which an engine would pass over"
        if replaced:
            return f"{name or 'it'} has a {min(replaced)} of its own, set on the instance"
        if not _is_home(module, tower):
            return f"{name} is a {path(type(module))}, which no engine knows: merge it into the weights, or remove it"
    for name, module in tower.named_modules():
        if isinstance(module, AcceleratedBlock) or face_of(module) is not None:
            reason = module.change() if isinstance(module, AcceleratedBlock) else reason_against(module)
            if reason or not _has_known_activation(module.mlp):
                return f"{name}: {reason or 'its activation is neither the exact GELU nor SwiGLU'}"
    return None


def _is_home(module: nn.Module, tower: nn.Module) -> bool:
    """Whether the class of `module` is torch's or of the library that `tower` is of."""
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") or home.split(".")[0] == type(tower).__module__.split(".")[0]


def _has_known_activation(mlp: Any) -> bool:
    gated = "SwiGLU" in type(mlp).__name__ or getattr(mlp, "gate_last", True) is False
    inside = [module for module in mlp.children() if not isinstance(module, nn.Linear | nn.Dropout | nn.Identity)]
    if gated:
        return all(type(module).__name__ in ("SiLU", "SiLUActivation") for module in inside)
    return all(is_exact_gelu(module) for module in inside)


def _ours(tower: Any, face: Any) -> nn.Module:
    """Our model on the weights of `tower`, which it shares where the layouts pack them alike."""
    weights = {key: tensor for key, tensor in tower.state_dict().items() if not key.startswith(_OUTSIDE)}
    with torch.device("meta"):
        model = face.make(tower, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _eps_of(model: nn.Module) -> list[float]:
    return sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
