"""The engine that answers the calls of a backbone of another library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.inference import Engine, optimize_for_inference
from dinov2_fast.inference.checks import TOLERANCES, mismatch, replaced_methods, small_image
from dinov2_fast.inference.optimize import EngineOptions
from dinov2_fast.inference.weight_watch import WeightWatch, run_up_to_date
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.block_check import reason_against
from dinov2_fast.integrations.changes import class_path, has_hooks
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, has_own_forward, swap_back, swap_class
from dinov2_fast.integrations.libraries import block_class_for
from dinov2_fast.integrations.module_ops import is_exact_gelu

logger = logging.getLogger("dinov2_fast")


class AttachedEngine:
    """An engine on the weights of a backbone. It is made anew when the backbone changes.

    It is not a submodule, so parameters and state dict stay the backbone's own. A copy or pickle makes its own engine.
    `options` are those of `optimize_for_inference`; `follow_weights` is about the weights and attributes of `backbone`.

    Attributes:
        reason: why there is no engine now, or None.
        unanswered: by their name, the methods that run their own code although there is an engine, and why.
    """

    def __init__(self, backbone: nn.Module, backbone_class: type[AcceleratedBackbone], options: EngineOptions) -> None:
        self._backbone_class = backbone_class
        self._follows_weights = options.get("follow_weights", True)
        # The engine need not watch the model that it is made of: its weights are those of `backbone`.
        self._options: EngineOptions = {**options, "follow_weights": False}
        self._make(backbone)

    def attach(self, backbone: nn.Module) -> None:
        """Answers the plain calls of `backbone` from now on."""
        backbone.__dict__[STATE_ATTRIBUTE] = self
        if not isinstance(backbone, self._backbone_class):
            swap_class(backbone, self._backbone_class)
        self._watch_changes(backbone)

    def answer(self, backbone: nn.Module, method: str, ask: Callable[[Any], Any], device: torch.device) -> Any:
        """See `AcceleratedBackbone.answer`; the outputs are for the present weights of `backbone`, on `device`."""
        if self._outdated:
            self._renew(backbone)

        def run() -> Any:
            return None if self._engine is None or method in self.unanswered else ask(self._engine)

        if self._watch is None:
            return run()
        return run_up_to_date(run, self._watch.changed, lambda: self._renew(backbone), device)

    def _renew(self, backbone: nn.Module) -> None:
        self._make(backbone)
        self._watch_changes(backbone)
        if self.reason:
            logger.warning("The accelerated blocks run instead of the engine: %s", self.reason)

    def _watch_changes(self, backbone: nn.Module) -> None:
        self._outdated = backbone.training  # the calls are not compared in training mode
        self._watch = WeightWatch(backbone) if self._follows_weights and not backbone.training else None

    def _make(self, backbone: nn.Module) -> None:
        self._engine: Engine | None = None
        self.unanswered: dict[str, str] = {}
        self.reason = (
            _reason_against_engine(backbone) or self._backbone_class.refuses(backbone) or self._make_engine(backbone)
        )

    def _make_engine(self, backbone: nn.Module) -> str | None:
        """Makes the engine, or returns why there is none."""
        try:
            model = self._make_model(backbone)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its weights or settings are not those of a DINOv2 ({error})"
        if _eps_of(backbone) != _eps_of(model):
            return f"its norms have eps {_eps_of(backbone)} instead of {_eps_of(model)}"
        if not backbone.training:
            self._compare(backbone, model)
        if all(method in self.unanswered for method, _ in self._backbone_class.compared_calls):
            return "; ".join(f"its {method} {why}" for method, why in self.unanswered.items())
        try:
            self._engine = optimize_for_inference(model, **self._options)
        except TypeError as error:
            return str(error)
        return None

    def _make_model(self, backbone: Any) -> nn.Module:
        """Our model on the weights of `backbone`, which it shares where both pack them alike."""
        head = self._backbone_class.head_keys
        weights = {key: tensor for key, tensor in backbone.state_dict().items() if not key.startswith(head)}
        with torch.device("meta"):
            model = self._backbone_class.make_model(backbone, weights)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def _compare(self, backbone: Any, model: Any) -> None:
        """Calls the methods of `backbone` on a small image twice: answered by `model`, and with their own code."""
        image = small_image(model.patch_embed, self._backbone_class.fixed_image_size(backbone)).to(model.cls_token)
        before = backbone.__dict__.get(STATE_ATTRIBUTE)  # an engine, if `backbone` was accelerated before
        if before is None:
            swap_class(backbone, self._backbone_class)
        try:
            for method, arguments in self._backbone_class.compared_calls:
                by_model = _StandIn(model)
                ours, theirs = (each.result_of(backbone, method, image, arguments) for each in (by_model, _StandIn()))
                why = mismatch(ours, theirs, TOLERANCES[image.dtype])
                if not by_model.was_asked:
                    why = "calls nothing that an engine answers"
                if why:
                    self.unanswered.setdefault(method, why)
        finally:
            backbone.__dict__[STATE_ATTRIBUTE] = before
            if before is None:
                swap_back(backbone)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None, "_engine": None, "_outdated": True}


class _StandIn:
    """Takes the place of the engine while methods are compared: answers by `model`, or never if it is None."""

    def __init__(self, model: Any = None) -> None:
        self._model = model
        self.was_asked = False

    def answer(self, backbone: Any, method: str, ask: Callable[[Any], Any], device: torch.device) -> Any:
        self.was_asked = True
        return None if self._model is None else ask(self._model)

    @torch.no_grad()
    def result_of(self, backbone: Any, method: str, image: Tensor, arguments: dict[str, Any]) -> Any:
        """What a call of `backbone` returns or raises."""
        backbone.__dict__[STATE_ATTRIBUTE] = self
        try:
            return getattr(backbone, method)(image, **arguments)
        except Exception as error:
            return error


def _reason_against_engine(backbone: Any) -> str | None:
    """Why no engine can answer for this backbone, or None."""
    if any(tensor.is_meta for tensor in backbone.state_dict().values()):
        return "its weights are on the meta device: load them first"
    for name, module in backbone.named_modules():
        replaced = set(replaced_methods(module))
        if module is backbone and has_own_forward(module):  # it may call the methods that an engine answers
            replaced.discard("forward")
            hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        else:
            hooked = has_hooks(module, except_recording=True)
        if hooked:
            return f"{name or 'it'} has a hook, or a forward set on the instance, which an engine would skip"
        if replaced:
            return f"its {f'{name}.{min(replaced)}'.lstrip('.')} was set on the instance"
        if not _is_of_same_library(module, backbone):
            return f"{name} is a {class_path(type(module))}: merge it into the weights, or remove it"
    for name, module in backbone.named_modules():
        if isinstance(module, AcceleratedBlock) or block_class_for(module) is not None:
            reason = module.change() if isinstance(module, AcceleratedBlock) else reason_against(module)
            if reason or not _has_known_activation(module.mlp):
                return f"{name}: {reason or 'its activation is neither the exact GELU nor SwiGLU'}"
    return None


def _is_of_same_library(module: nn.Module, backbone: nn.Module) -> bool:
    """Whether the class of `module` belongs to torch or to the library of `backbone`."""
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") or home.split(".")[0] == type(backbone).__module__.split(".")[0]


def _has_known_activation(mlp: Any) -> bool:
    gated = "SwiGLU" in type(mlp).__name__ or getattr(mlp, "gate_last", True) is False
    inside = [module for module in mlp.children() if not isinstance(module, nn.Linear | nn.Dropout | nn.Identity)]
    if gated:
        return all(type(module).__name__ in ("SiLU", "SiLUActivation") for module in inside)
    return all(is_exact_gelu(module) for module in inside)


def _eps_of(model: nn.Module) -> list[float]:
    return sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
