"""`Dinov2Module`: what every DINOv2 module of this package does besides its computation.

It loads weights in any layout, says where its parameters are, and lists which implementation of each op it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from dinov2_fast import layouts
from dinov2_fast.errors import InvalidStateError, InvalidTypeError
from dinov2_fast.ops.choices import BackendChoice, backend_choices

NOT_SCRIPTABLE = (
    "torch.jit.script cannot compile this model, whose ops choose their implementation in Python. Use torch.jit.trace, "
    "torch.export or torch.compile."
)


class Dinov2Module(nn.Module):
    """A DINOv2 backbone, or a backbone with a head, that loads weights in any layout of `dinov2_fast.layouts`.

    It does so alone and as a part of any other module. In a larger module torch's own rules hold: what fits is loaded,
    and the error of the outermost `load_state_dict` names the rest by the names of the parameters.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`, with its arguments and result, for weights in any layout of `layouts`.

        Raises:
            RuntimeError: the weights do not fit; the message names the keys and the layout. The model is unchanged.
            ValueError, TypeError: this is no state dict of one backbone (`layouts.plan_conversion`).
        """
        own = self.state_dict()
        layout, converted = _in_own_layout(state_dict, own)
        missing = [key for key in own if key not in converted]
        unexpected = [key for key in converted if key not in own]
        misshapen = [
            f"{key} {tuple(shape)} where the model has {tuple(own[key].shape)}"
            for key, value in converted.items()
            if key in own and (shape := getattr(value, "shape", ())) != own[key].shape
        ]
        if misshapen or (strict and (missing or unexpected)):
            raise InvalidStateError(layouts.misfit(layout, missing, unexpected, misshapen))
        return super().load_state_dict(converted, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Renames the weights of this module, if it is a part of the one whose `load_state_dict` was called."""
        if prefix:  # without a prefix, `load_state_dict` has already done it
            given = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
            own = dict(chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False)))
            try:
                _, given = _in_own_layout(given, own)
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            state_dict |= {prefix + key: tensor for key, tensor in given.items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._any_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the floating-point weights."""
        return self._any_weight().dtype

    def _any_weight(self) -> torch.Tensor:
        """A floating-point weight: the CLS token, which folded backbones and replicas of `nn.DataParallel` have too."""
        cls_token = getattr(self, "cls_token", None)
        if isinstance(cls_token, torch.Tensor):
            return cls_token
        return next(parameter for parameter in self.parameters() if parameter.is_floating_point())

    def backends(self) -> list[BackendChoice]:
        """For each op: which implementation runs for this model's device, dtype and mode, and why not the others."""
        return backend_choices(self.device, self.dtype, self.training, in_model=True)

    def __prepare_scriptable__(self) -> Any:
        """Refuses torch.jit.script, which calls this method first."""
        raise InvalidTypeError(NOT_SCRIPTABLE)


def _in_own_layout(state_dict: Mapping[str, Any], own: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The recognised layout, and the weights under a model's own names. Weights without such a name keep theirs."""
    if state_dict.keys() == set(own):
        return "facebook", dict(state_dict)
    plan = layouts.plan_conversion(state_dict)
    own_keys = {layouts.plain_key(key): key for key in own}
    optional = plan.not_in_source | {"mask_token"}  # timm's models have no mask token
    used = [key for key in plan.recipes if key in own_keys or key not in optional]
    return plan.layout, {own_keys.get(key, key): plan.read(key) for key in used}
