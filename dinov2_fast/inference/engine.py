"""`Engine`: the methods and outputs of a model, computed with folded weights that follow those of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.attention_features import QKV
from dinov2_fast.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from dinov2_fast.huggingface.modeling import Dinov2Model
from dinov2_fast.huggingface.outputs import BaseModelOutputWithPooling
from dinov2_fast.inference.capture import is_captured
from dinov2_fast.inference.checks import check_agreement
from dinov2_fast.inference.cuda_graphs import NOT_CAPTURED, GraphCache
from dinov2_fast.inference.describe import describe_engine
from dinov2_fast.inference.fold import FoldedModule, layouts_for
from dinov2_fast.inference.fold_model import backbone_of, fold_model
from dinov2_fast.inference.fp8 import calibrate
from dinov2_fast.inference.packing import as_batch
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.inference.precision_report import PrecisionReport, compare_precisions
from dinov2_fast.inference.weight_watch import WeightWatch, run_up_to_date
from dinov2_fast.ops import dispatch, implementation
from dinov2_fast.ops.choices import BackendChoice
from dinov2_fast.torch_private import is_traced

IMAGES_AT_A_TIME = 32  # where one tensor of many images is given


class Engine(nn.Module):
    """The faster form of a model that `optimize_for_inference` returns.

    An engine follows its model. When a parameter was replaced, moved or written to, or a setting was changed (such as
    `position_interpolation`, or the eps of a norm), the next call folds the weights again. On a GPU the call runs first
    and checks while the device computes; after a change it folds and runs again. Writes through ``.data``, a NumPy view
    or the storage are not noticed: call `refresh` after them. In code compiled by torch.compile, and with
    ``follow_weights=False``, nothing is checked: call `refresh` after every change. If the engine cannot compute what
    the model has become (a hook was added, a method was replaced), the call raises an error that says why.

    The next call also folds again when :func:`~dinov2_fast.use_backend` chooses linears that need another layout of the
    weights. To alternate between such settings, make an engine for each.

    An engine has no parameters; its weights are buffers. `.to(device)` moves it, and it stays there when the model
    moves. Copies and pickles contain the model and fold again. Under autocast it computes in its own precision.
    """

    def __init__(self, model: nn.Module, plan: EnginePlan, device: torch.device | None = None) -> None:
        super().__init__()
        self.training = False
        self.plan = plan
        self._graphs = GraphCache(plan.cuda_graphs)
        self.__dict__["_model"] = model  # not as a submodule, since its parameters are not the engine's
        self._fold(device)

    def _fold(self, device: torch.device | None) -> None:
        setting = dispatch.current_setting()  # read before folding, since another thread may change it
        with torch.inference_mode(False), torch.no_grad():
            watch = WeightWatch(self._model) if self.plan.follow_weights else None
            device = device or next(self._model.parameters()).device
            with _without_autocast(device.type):
                folded = fold_model(self._model, self.plan, device).to(device).eval()
                check_agreement(backbone_of(self._model), backbone_of(folded))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams may still read the old weights, and will read the new ones
        self._graphs.clear()
        self.folded, self._watch = folded, watch  # if folding fails, the old watch stays: the next call folds again
        # The settings of backends that the layout of the weights was checked for last, by device, since replicas of
        # torch.nn.DataParallel share the dictionary. None: the layout stays, whatever is set.
        self._layout_settings = {device: setting} if self.plan.follow_weights else None

    def refresh(self) -> None:
        """Folds the model's present weights. A calibration stays; CUDA graphs are captured again.

        Raises:
            RuntimeError: a CUDA graph is being captured, during which nothing can be folded.
        """
        if is_captured(next(self.folded.buffers())):
            raise InvalidStateError(
                "The weights have to be folded again, and while a CUDA graph is captured nothing can be folded: call "
                "refresh() on the engine before the capture."
            )
        self._fold(self.device)

    def _follow_setting(self) -> None:
        """Folds again if the backends that are chosen now need another layout of the weights.

        It does not with ``follow_weights=False``, nor after `load_state_dict`, since the model may have other weights.
        """
        known, device, setting = self._layout_settings, self.device, dispatch.current_setting()
        if known is not None and known.get(device) is not setting and not is_traced():
            backbone = backbone_of(self.folded)
            if layouts_for(self.plan, device, backbone.gated) != backbone.layouts:
                self.refresh()
            known[device] = setting

    # The errors of a precision

    @torch.no_grad()
    def calibrate(self, images: Tensor | Iterable[Tensor]) -> None:
        """Fits the e4m3 scales of precision "fp8" to images, best to some hundred of those that it will run on.

        It measures the largest attention outputs and hidden activations in bf16, and chooses scales with at least twice
        that range. Norms need no calibration.

        Args:
            images: (images, channels, height, width), or batches of that form, in the dtypes that the engine takes.
                They are moved to its device.

        Raises:
            ValueError: another precision, no images, or activations that are not finite.
            TypeError: images that are not tensors.
        """
        if not self.plan.e4m3:
            raise InvalidValueError(f"calibrate is for precision='fp8', and this engine is in {self.precision}.")
        with _without_autocast(self.device.type):
            found = calibrate(self._backbone_in(self.dtype), self._model, self._batches(images))
        self.plan = replace(self.plan, calibration=found)
        self.refresh()

    @torch.no_grad()
    def report(self, images: Tensor | Iterable[Tensor]) -> PrecisionReport:
        """Compares the features of this engine, and those in bf16, with those in fp32.

        Args:
            images: as for `calibrate`, but other ones; at least three, so that there are nearest neighbours.

        Returns:
            A report that prints as a table. After each block and at the end it has, for CLS and patch tokens, the mean
            and the smallest cosine, and the share of images whose nearest neighbour among `images` stays the same.

        Raises:
            ValueError, TypeError: no images, or something else than tensors.
        """
        if self._watch is not None and self._watch.changed():
            self.refresh()
        with _without_autocast(self.device.type):
            self._follow_setting()
            versions = {self.precision: backbone_of(self.folded)}
            if self.precision != "bf16":
                versions["bf16"] = self._backbone_in(torch.bfloat16)
            return compare_precisions(self._backbone_in(torch.float32), versions, self._batches(images))

    def _backbone_in(self, dtype: torch.dtype) -> Any:
        """A new backbone with the settings of this engine, but all in `dtype`."""
        plan = replace(self.plan, dtype=dtype, residual_dtype=dtype, e4m3=False)
        with torch.inference_mode(False), torch.no_grad():
            return backbone_of(fold_model(self._model, plan, self.device).to(self.device).eval())

    def _batches(self, images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
        for batch in as_batch(images).split(IMAGES_AT_A_TIME) if isinstance(images, Tensor) else images:
            if not isinstance(batch, Tensor):
                raise InvalidTypeError(f"images must be one or more tensors, got {type(batch).__name__}.")
            yield self._channels_first(as_batch(batch).to(self.device))

    # The methods of the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `forward`, with its arguments and outputs."""
        output = self._call("__call__", args, kwargs)
        if self.plan.outputs != "cls" or not isinstance(self._model, Dinov2Model):
            return output
        if isinstance(output, tuple):
            return output[1:]
        return BaseModelOutputWithPooling({key: output[key] for key in output if key != "last_hidden_state"})

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """`forward_features` of the model's class."""
        return self._call("forward_features", args, kwargs)

    def forward_features_list(self, *args: Any, **kwargs: Any) -> Any:
        """`DinoVisionTransformer.forward_features_list`."""
        return self._call("forward_features_list", args, kwargs)

    def cls_tokens(self, images: list[Tensor]) -> list[Tensor]:
        """The CLS tokens of images of different sizes, which run as one packed sequence.

        Args:
            images: batches (batch, channels, height, width) or single images (channels, height, width). In uint8 their
                channels may be last. `forward_features` takes such lists, too.

        Returns:
            For each entry the `x_norm_clstoken` of `forward_features`, (batch, hidden); a single image is a batch of
            one.
        """
        return self._call("cls_tokens", (images,), {})

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """`get_intermediate_layers` of the model's class."""
        return self._call("get_intermediate_layers", args, kwargs)

    def attention_maps(self, *args: Any, **kwargs: Any) -> Tensor:
        """`DinoVisionTransformer.attention_maps`, in the engine's precision."""
        return self._call("attention_maps", args, kwargs)

    def qkv_features(self, *args: Any, **kwargs: Any) -> QKV:
        """`DinoVisionTransformer.qkv_features`, in the engine's precision."""
        return self._call("qkv_features", args, kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """`TimmVisionTransformer.forward_intermediates`; other classes have no such method."""
        return self._call("forward_intermediates", args, kwargs)

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """`TimmVisionTransformer.forward_head`; other classes have no such method."""
        return self._call("forward_head", args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or self._watch is None:
            return self._run(method, args, kwargs)
        return run_up_to_date(lambda: self._run(method, args, kwargs), self._watch.changed, self.refresh, self.device)

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``folded.method(*args, **kwargs)``, without checking for changes of the model."""
        args = tuple(map(self._channels_first, args))
        kwargs = {name: self._channels_first(argument) for name, argument in kwargs.items()}
        if not torch.compiler.is_compiling():
            output = self._graphs.replay(self._modules["folded"], self.device, method, args, kwargs)
            if output is not NOT_CAPTURED:
                return output
        inputs = [*args, *kwargs.values()]
        if implementation.records_gradient(inputs):
            raise InvalidStateError(
                "The engine is for inference and computes no gradients, but an input requires one. Use the model "
                "itself, or call the engine under torch.no_grad()."
            )
        with _without_autocast(self.device.type):
            if torch.compiler.is_compiling():
                return getattr(self.folded, method)(*args, **kwargs)
            if implementation.carries_tangent(inputs):
                raise InvalidStateError(
                    "The engine is for inference and computes no forward-mode derivatives, but an input carries a "
                    "tangent. Use the model itself."
                )
            self._follow_setting()
            return self._graphs.run(self.folded, backbone_of(self.folded), method, args, kwargs)

    def _channels_first(self, argument: Any) -> Any:
        """Moves the channels of uint8 images before height and width; single images in lists become batches of one."""
        if isinstance(argument, list):
            return [self._channels_first(as_batch(part)) for part in argument]
        if isinstance(argument, Tensor) and argument.dtype == torch.uint8 and argument.ndim == 4:
            channels = backbone_of(self.folded).patch_embed.in_chans
            if argument.shape[1] != channels and argument.shape[3] == channels:
                return argument.permute(0, 3, 1, 2)
        return argument

    # The other attributes of the model

    @property
    def model(self) -> nn.Module:
        """The model that the engine follows."""
        model: nn.Module = self._model
        return model

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return backbone_of(self._modules["folded"])._buffers["cls_token"].device  # written for speed: each call asks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the outputs."""
        return self.plan.dtype

    @property
    def precision(self) -> str:
        """The precision by the name that `optimize_for_inference` takes."""
        return self.plan.precision

    def __getattr__(self, name: str) -> Any:
        """Looks other attributes and methods up in the folded model, which has those of the model."""
        if name == "folded":
            return super().__getattr__(name)
        return getattr(self.folded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name) and name not in vars(self) and hasattr(self._modules.get("folded"), name):
            raise AttributeError(f"{name} belongs to the model: set it there and call refresh() on the engine.")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Engine:
        """Does nothing with False. With True it raises a `RuntimeError`."""
        if mode:
            raise InvalidStateError(
                "The engine is for inference and cannot be trained. Train the model it was made from: the engine "
                "follows its weights (with follow_weights=False at the next refresh())."
            )
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`, for the state dict of an engine.

        Raises:
            RuntimeError: the state dict is that of a model (load it into the model that the engine follows), or its
                keys do not fit.
        """
        if not any(key.startswith("folded.") for key in state_dict):
            raise InvalidStateError(
                "An engine holds the weights of its model in a folded form, and these are not folded: load them into "
                "the model, which the engine follows (with follow_weights=False at the next refresh())."
            )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:  # if some keys do not fit, it raises after it has loaded those that do
            self._graphs.clear()
            self._layout_settings = None
            backbone = backbone_of(self.folded)
            backbone._sizes.clear()  # computed from tensors that may have changed
            for part in backbone.modules():
                if isinstance(part, FoldedModule):
                    part.bind()  # with `assign` the tensors may have another device or dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        if fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype != self.dtype:
            raise InvalidTypeError(
                "The engine's precision is set when it is made: use optimize_for_inference(precision=...)."
            )
        self._graphs.clear()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Engine, (self._model, self.plan, self.device)

    def backends(self) -> list[BackendChoice]:
        """The implementation that runs each op of the engine on its device, and the reason."""
        return backbone_of(self.folded).backends()

    def __repr__(self) -> str:
        return describe_engine(self._model, backbone_of(self.folded), self._graphs)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # torch raises an error for meta
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
