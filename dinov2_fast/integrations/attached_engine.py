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
from dinov2_fast.inference.fold import replaced_methods
from dinov2_fast.inference.watch import ModelWatch, run_up_to_date
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.block_check import reason_against
from dinov2_fast.integrations.changes import class_path
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, has_own_forward, swap_back, swap_class
from dinov2_fast.integrations.libraries import block_class_for
from dinov2_fast.integrations.module_ops import has_hooks, has_only_recording_hooks, is_exact_gelu

logger = logging.getLogger("dinov2_fast")

_HEAD_KEYS = ("head.", "fc_norm.")  # keys of timm's model that are not its backbone's


class AttachedEngine:
    """The engine of our model on the weights of a backbone, or the `reason` why there is none now.

    `unanswered` holds the methods that run their own code all the same, and why. It is no submodule, so that parameters
    and state dict stay the backbone's own. A copy or pickle makes the engine anew.

    Args:
        backbone: the backbone.
        face: the subclass of `AcceleratedBackbone` for it.
        options: those of `optimize_for_inference`. Its `follow_weights` is about those of `backbone`.

    Raises:
        ValueError: options that `optimize_for_inference` refuses.
    """

    def __init__(self, backbone: nn.Module, face: Any, options: dict[str, Any]) -> None:
        self._face = face
        self._follows_weights = options.get("follow_weights", True)
        self._options = {**options, "follow_weights": False}  # what the engine is made of is watched in `backbone`
        self._make(backbone)

    def attach(self, backbone: nn.Module) -> None:
        """Answers the plain calls of `backbone` from now on."""
        backbone.__dict__[STATE_ATTRIBUTE] = self
        if not isinstance(backbone, self._face):
            swap_class(backbone, self._face)
        self._remember(backbone)

    def answer(self, backbone: nn.Module, method: str, ask: Callable[[Any], Any], device: torch.device) -> Any:
        """What `ask` gets from the engine for the weights that `backbone` has now; None if none answers `method`.

        Args:
            device: where `backbone` computes.
        """
        if self._comparing:
            self._asked = True
            return None if self._compared is None else ask(self._compared)
        if self._outdated:
            self._renew(backbone)

        def run() -> Any:
            return None if self._engine is None or method in self.unanswered else ask(self._engine)

        if self._watch is None:
            return run()
        return run_up_to_date(run, self._watch.changed, lambda: self._renew(backbone), device)

    def _renew(self, backbone: nn.Module) -> None:
        self._make(backbone)
        self._remember(backbone)
        if self.reason:
            logger.warning("The accelerated blocks run in place of the engine: %s", self.reason)

    def _remember(self, backbone: nn.Module) -> None:
        self._outdated = backbone.training  # in which it was not compared
        self._watch = ModelWatch(backbone) if self._follows_weights and not backbone.training else None

    def _make(self, backbone: nn.Module) -> None:
        self._engine: Engine | None = None
        self._comparing, self._compared = False, None
        self.unanswered: dict[str, str] = {}
        self.reason = _reason_against(backbone) or self._face.refuses(backbone)
        if self.reason is None:
            try:
                model = _make_our_model(backbone, self._face)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self.reason = f"its weights or settings are not those of a DINOv2 ({error})"
            else:
                self._make_engine(backbone, model)

    def _make_engine(self, backbone: nn.Module, model: nn.Module) -> None:
        if _eps_of(backbone) != _eps_of(model):
            self.reason = f"its norms have eps {_eps_of(backbone)} in place of {_eps_of(model)}"
            return
        if not backbone.training:
            self._compare(backbone, model)
        if all(method in self.unanswered for method, _ in self._face.compared_calls):
            self.reason = "; ".join(f"its {method} {why}" for method, why in self.unanswered.items())
            return
        try:
            self._engine = optimize_for_inference(model, **self._options)
        except TypeError as error:
            self.reason = str(error)

    def _compare(self, backbone: Any, model: Any) -> None:
        """Calls the methods of `backbone` on a small image, by their own code and answered by `model`."""
        image = small_image(model.patch_embed, self._face.fixed_image_size(backbone)).to(model.cls_token)
        with torch.no_grad(), self._joined(backbone):
            for method, arguments in self._face.compared_calls:
                self._asked = False
                answers = [self._result_of(backbone, method, image, arguments, by) for by in (model, None)]
                why = mismatch(answers[0], answers[1], TOLERANCES[image.dtype]) if self._asked else "needs no engine"
                if why:
                    self.unanswered.setdefault(method, why)

    @contextmanager
    def _joined(self, backbone: Any) -> Iterator[None]:
        """Answers the calls of `backbone` inside, also where it is not accelerated yet or by another engine."""
        before = backbone.__dict__.get(STATE_ATTRIBUTE)
        backbone.__dict__[STATE_ATTRIBUTE] = self
        if before is None:
            swap_class(backbone, self._face)
        try:
            yield
        finally:
            if before is None:
                swap_back(backbone)
            else:
                backbone.__dict__[STATE_ATTRIBUTE] = before

    def _result_of(self, backbone: Any, method: str, image: Tensor, arguments: dict[str, Any], by: Any) -> Any:
        """What a call of `backbone` returns, or raises, when `by` answers it; with None, by its own code."""
        self._comparing, self._compared = True, by
        try:
            return getattr(backbone, method)(image, **arguments)
        except Exception as error:
            return error
        finally:
            self._comparing, self._compared = False, None

    def __getstate__(self) -> dict[str, Any]:
        remade = {"_watch": None, "_engine": None, "_outdated": True, "_comparing": False, "_compared": None}
        return {**vars(self), **remade}


def _reason_against(backbone: Any) -> str | None:
    """Why no engine can answer for this backbone, or None."""
    if any(tensor.is_meta for tensor in backbone.state_dict().values()):
        return "its weights are on the meta device: load them first"
    for name, module in backbone.named_modules():
        replaced = set(replaced_methods(module))
        if module is backbone and has_own_forward(module):  # it may call the methods that an engine answers
            replaced.discard("forward")
            watched = bool(module._forward_hooks or module._forward_pre_hooks)
        else:
            watched = has_hooks(module) and not has_only_recording_hooks(module)
        if watched:
            return f"{name or 'it'} has a hook or a forward of its own, which an engine would pass over"
        if replaced:
            return f"{name or 'it'} has a {min(replaced)} of its own, set on the instance"
        if not _is_of_same_library(module, backbone):
            return (
                f"{name} is a {class_path(type(module))}, unknown to the engine: merge it into the weights or remove it"
            )
    for name, module in backbone.named_modules():
        if isinstance(module, AcceleratedBlock) or block_class_for(module) is not None:
            reason = module.change() if isinstance(module, AcceleratedBlock) else reason_against(module)
            if reason or not _has_known_activation(module.mlp):
                return f"{name}: {reason or 'its activation is neither the exact GELU nor SwiGLU'}"
    return None


def _is_of_same_library(module: nn.Module, backbone: nn.Module) -> bool:
    """Whether the class of `module` is torch's or of the library that `backbone` is of."""
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") or home.split(".")[0] == type(backbone).__module__.split(".")[0]


def _has_known_activation(mlp: Any) -> bool:
    gated = "SwiGLU" in type(mlp).__name__ or getattr(mlp, "gate_last", True) is False
    inside = [module for module in mlp.children() if not isinstance(module, nn.Linear | nn.Dropout | nn.Identity)]
    if gated:
        return all(type(module).__name__ in ("SiLU", "SiLUActivation") for module in inside)
    return all(is_exact_gelu(module) for module in inside)


def _make_our_model(backbone: Any, face: Any) -> nn.Module:
    """Our model on the weights of `backbone`, which it shares where the layouts pack them alike."""
    weights = {key: tensor for key, tensor in backbone.state_dict().items() if not key.startswith(_HEAD_KEYS)}
    with torch.device("meta"):
        model = face.make(backbone, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _eps_of(model: nn.Module) -> list[float]:
    return sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
