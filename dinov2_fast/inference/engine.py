"""`optimize_for_inference`: a model with the same methods and outputs that computes them in fewer, larger steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import huggingface
from dinov2_fast.data.image_processor import IMAGENET_MEAN, IMAGENET_STD
from dinov2_fast.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from dinov2_fast.huggingface.modeling import Dinov2Model
from dinov2_fast.huggingface.outputs import BaseModelOutputWithPooling
from dinov2_fast.inference import fp8
from dinov2_fast.inference.agreement import check_agreement
from dinov2_fast.inference.backbone import Plan, fold_backbone, layouts_for
from dinov2_fast.inference.cuda_graphs import NOT_CAPTURED, Graphs, is_captured
from dinov2_fast.inference.fold import FoldedModule, frozen, hollow, refuse_edits, refuse_tensors
from dinov2_fast.inference.packing import as_batch
from dinov2_fast.inference.report import Report, compare
from dinov2_fast.inference.watch import ModelWatch, run_up_to_date
from dinov2_fast.model import QKV, DinoVisionTransformer
from dinov2_fast.ops import dispatch, implementation
from dinov2_fast.ops._backends import refuses_e4m3
from dinov2_fast.ops.choices import BackendChoice, format_choices
from dinov2_fast.timm_adapter import TimmVisionTransformer
from dinov2_fast.torch_private import is_traced

# The dtype of activations and outputs.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
BATCH = 32  # images at a time where a tensor of many is given
OUTPUTS = ("auto", "cls", "all")
RESIDUALS = ("same", "fp32")
BACKBONES = (
    DinoVisionTransformer,
    huggingface.Dinov2Model,
    huggingface.Dinov2WithRegistersModel,
    huggingface.Dinov2Backbone,
    huggingface.Dinov2WithRegistersBackbone,
    TimmVisionTransformer,
)
CLASSIFIERS = (huggingface.Dinov2ForImageClassification, huggingface.Dinov2WithRegistersForImageClassification)


def optimize_for_inference(
    model: nn.Module,
    precision: str = "auto",
    outputs: str = "auto",
    residual: str = "same",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    allow_slow: bool = False,
    max_tokens: int | None = None,
    skip_layers: Iterable[int] = (),
    cuda_graphs: bool | str = "auto",
    follow_weights: bool = True,
) -> Engine:
    """A faster form of a model, for inference.

    LayerScale is folded into the linears before it, the normalisation of uint8 images into the patch embedding;
    activations and residual additions go with their linears. Weights are folded in fp64 from those that the model
    holds, and rounded once: give a model in fp32, since what bf16 has lost does not come back. In fp32 on a CPU with
    AVX-512 the weights of the linears are kept a second time, in the blocks that oneDNN reads.

    Args:
        model: in eval mode, of one of the classes of this package. It stays as it is and remains in memory.
        precision: "bf16", "fp16" or "fp32"; "auto" is bf16 on a GPU and fp32 elsewhere. Outputs have this dtype. "fp8"
            is bf16 with e4m3 operands in the linears of the blocks, whose errors are several times larger:
            `Engine.calibrate` fits it to images, and `Engine.report` shows what it costs there.
        outputs: "auto" runs the last block for the CLS token alone where a call returns nothing else, which is the
            reference's ``model(x)``, and timm's where it pools the CLS token. "cls" does so in the Hugging Face face,
            too, whose outputs then have `pooler_output` and no `last_hidden_state`. "all" never does.
        residual: "fp32" keeps the residual stream in fp32, "same" in the dtype of `precision`. In fp32 the errors of a
            bf16 engine were a quarter smaller (random weights with outliers, 4 blocks), for more memory traffic;
            outputs before the last norm are fp32 then.
        mean, std: of each channel, for values in 0 to 1; with these uint8 images are normalised.
        allow_slow: take bf16, fp16 and fp8 also on a device that has no instructions for it.
        max_tokens: a list of images runs as packed sequences of at most so many tokens (an image of 224 x 224 has
            257), to bound memory; None for one sequence. A larger image runs alone.
        skip_layers: with "fp8", the indices of blocks (0 is the first) that stay in bf16.
        cuda_graphs: on a GPU, run calls as CUDA graphs: True for all calls but those for lists, hidden states,
            attentions or a loss; "auto" where batches are small enough for the launching of kernels to take longest,
            from the second call of a kind on (print the engine to see up to how many tokens); False for none. Results
            are copied out of a graph, so they stay. The first call of a kind is slow. Each of the 16 kinds used last
            keeps memory for its images and results, 0.1 GB (ViT-g) to 0.5 GB (ViT-S) for the largest calls that "auto"
            captures, more where several layers are returned; they share the memory in between, which stays reserved.
            While a kind is captured no other thread may draw random numbers on the device: torch raises an error there
            ("Offset increment outside graph capture").
        follow_weights: notice changes of the model, see :class:`Engine`. With False the engine notices none, in weights
            or settings, and spares the check of each call; `Engine.refresh` takes the changes over. Its weights then
            stay laid out for the backends that were chosen when it was made.

    Returns:
        An engine with the methods of the model. Besides what the model takes it accepts images in any floating
        dtype, and uint8 ones, (batch, channels, height, width) or (batch, height, width, channels).

    Raises:
        TypeError: a model that is none of this package's, or has parts that cannot be folded.
        ValueError: a setting that does not exist or does not go with the model, or a model in training mode.
    """
    _choose("precision", precision, ("auto", *PRECISIONS))
    _choose("outputs", outputs, OUTPUTS)
    _choose("residual", residual, RESIDUALS)
    _check_model(model, outputs)
    if len(mean) != len(std) or 0.0 in std:
        raise InvalidValueError(f"mean and std need one value for each channel, std none of 0; got {mean} and {std}.")
    device = next(model.parameters()).device
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if max_tokens is not None and max_tokens < 1:
        raise InvalidValueError(f"max_tokens must be at least 1, or None for no limit; got {max_tokens}.")
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise InvalidValueError(f"There is no cuda_graphs {cuda_graphs!r}; choose one of auto, True, False.")
    if cuda_graphs is True and device.type != "cuda":
        raise InvalidValueError(
            f"cuda_graphs=True needs a model on a GPU, this one is on {device}: move it, or use 'auto'."
        )
    dtype, e4m3, skipped = PRECISIONS[precision], precision == "fp8", _indices(skip_layers)
    if skipped and not e4m3:
        raise InvalidValueError(
            f"skip_layers are blocks that stay out of fp8: it does not go with precision={precision!r}."
        )
    reason = None if allow_slow else why_slow(precision, device)
    if reason:
        instead = ("bf16", "use a newer GPU") if device.type == "cuda" else ("fp32", "move the model to a GPU first")
        raise InvalidValueError(
            f"precision={precision!r} would be slower than {instead[0]} here: {reason}. Use precision={instead[0]!r}, "
            f"{instead[1]}, or pass allow_slow=True."
        )
    stream = torch.float32 if residual == "fp32" else dtype
    plan = Plan(
        dtype,
        stream,
        outputs,
        tuple(mean),
        tuple(std),
        max_tokens,
        e4m3,
        skipped,
        cuda_graphs=cuda_graphs,
        follow_weights=follow_weights,
    )
    return Engine(model, plan)


class Engine(nn.Module):
    """What `optimize_for_inference` returns; see there.

    It follows its model: when a parameter was replaced, moved or written to, or a setting changed (such as
    `position_interpolation`, or the eps of a norm), the next call folds anew. On a GPU the call runs first and checks
    while the device computes; if something has changed it folds anew and runs again. What it does not see are writes
    through ``.data``, a NumPy view or the storage: call `refresh` after them. In code compiled by torch.compile, and
    with ``follow_weights=False``, nothing is checked: call `refresh` there. Where the model has become one that the
    engine cannot compute (a hook was added, a method replaced), the call raises and says why. It also folds anew, once,
    where :func:`~dinov2_fast.use_backend` chooses linears that want their weights laid out in another way; to go
    back and forth between such settings, make an engine for each.

    It has no parameters, its weights are buffers. `.to(device)` moves it, and it stays there when the model moves.
    Copies and pickles hold the model and fold anew. Under autocast it computes in its own precision.
    """

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device | None = None) -> None:
        super().__init__()
        self.training = False
        self.plan = plan
        self._graphs = Graphs(plan.cuda_graphs)
        self.__dict__["_model"] = model  # not a submodule: its parameters are not the engine's
        self._fold(device)

    def _fold(self, device: torch.device | None) -> None:
        setting = dispatch.current_setting()  # read first: another thread may change it
        with torch.inference_mode(False), torch.no_grad():
            self._watch = ModelWatch(self._model) if self.plan.follow_weights else None
            device = device or next(self._model.parameters()).device
            with _without_autocast(device.type):
                folded = _fold(self._model, self.plan, device).to(device).eval()
                check_agreement(_backbone(self._model), _backbone(folded))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # streams other than this may read the weights before, and will these
        self._graphs.clear()
        self.folded = folded
        # By device, since replicas of torch.nn.DataParallel share it. None: whatever is set, the layout stays.
        self._laid_out_for: dict[torch.device, dispatch.BackendSetting] | None = None
        if self.plan.follow_weights:
            self._laid_out_for = {device: setting}

    def refresh(self) -> None:
        """Folds the model's present weights; a calibration stays, CUDA graphs are captured anew.

        Raises:
            RuntimeError: a CUDA graph is being captured, in which nothing can be folded.
        """
        if is_captured(next(self.folded.buffers())):
            raise InvalidStateError(
                "The model's weights or the setting of backends have changed, and while a CUDA graph is captured "
                "nothing can be folded: call refresh() on the engine before."
            )
        self._fold(self.device)

    def _follow_setting(self) -> None:
        """Folds anew if the backends that are chosen now want their weights laid out in another way.

        Not with ``follow_weights=False``, nor if the weights came by `load_state_dict`: the model may have others.
        """
        known, device, setting = self._laid_out_for, self.device, dispatch.current_setting()
        if known is not None and known.get(device) is not setting and not is_traced():
            backbone = _backbone(self.folded)
            if layouts_for(self.plan, device, backbone.gated) != backbone.layouts:
                self.refresh()
            known[device] = setting

    # What a precision costs

    @torch.no_grad()
    def calibrate(self, images: Tensor | Iterable[Tensor]) -> None:
        """Fits the e4m3 scales of precision "fp8" to images: some hundred of those that it is for.

        The largest magnitudes of attention outputs and hidden activations, which a bf16 engine has on them, then have
        at least twice the room they need. Norms need no calibration.

        Args:
            images: (images, channels, height, width), or batches of that form, as the engine takes them; they are
                moved to its device.

        Raises:
            ValueError: another precision, no images, or activations that are not finite.
        """
        if not self.plan.e4m3:
            raise InvalidValueError(f"calibrate is for precision='fp8', and this engine is in {self.precision}.")
        with _without_autocast(self.device.type):
            scales, count = fp8.measure(self._beside(self.dtype), self._batches(images))
        self.plan = replace(self.plan, calibration=fp8.Calibration(scales, count, fp8.checksum(self._model)))
        self.refresh()

    @torch.no_grad()
    def report(self, images: Tensor | Iterable[Tensor]) -> Report:
        """How near this engine's features, and those in bf16, are to those in fp32: print it for a table.

        Args:
            images: as for `calibrate`, but not the same ones; at least three are needed for nearest neighbours.

        Returns:
            After each block and at the end, for CLS and patch tokens: the mean and the smallest cosine, and the share
            of images whose nearest neighbour among those given stays the same.

        Raises:
            ValueError: no images.
        """
        if self._watch is not None and self._watch.changed():
            self.refresh()
        versions = {self.precision: _backbone(self.folded)}
        if self.precision != "bf16":
            versions["bf16"] = self._beside(torch.bfloat16)
        with _without_autocast(self.device.type):
            return compare(self._beside(torch.float32), versions, self._batches(images))

    def _beside(self, dtype: torch.dtype) -> Any:
        """The backbone of this engine in another precision."""
        plan = replace(self.plan, dtype=dtype, stream=dtype, e4m3=False)
        with torch.inference_mode(False), torch.no_grad():
            return _backbone(_fold(self._model, plan, self.device).to(self.device).eval())

    def _batches(self, images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
        for batch in as_batch(images).split(BATCH) if isinstance(images, Tensor) else images:
            if not isinstance(batch, Tensor):
                raise InvalidTypeError(
                    f"images must be a tensor or batches that are tensors, got {type(batch).__name__}."
                )
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
        """The CLS tokens of images of different sizes, which run as one sequence.

        Args:
            images: batches (batch, channels, height, width) or single images (channels, height, width). uint8 ones
                may have their channels last. `forward_features` takes such lists, too.

        Returns:
            For each entry its `x_norm_clstoken` of `forward_features`, (batch, hidden); a single image is a batch of
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
        """`TimmVisionTransformer.forward_intermediates`; models of other classes have none."""
        return self._call("forward_intermediates", args, kwargs)

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """`TimmVisionTransformer.forward_head`; models of other classes have none."""
        return self._call("forward_head", args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or self._watch is None:
            return self._run(method, args, kwargs)
        return run_up_to_date(lambda: self._run(method, args, kwargs), self._watch.changed, self.refresh, self.device)

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``folded.method(*args, **kwargs)`` with the weights as they were folded."""
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
                    "The engine is for inference and computes no derivatives of forward mode, but an input carries a "
                    "tangent. Use the model itself."
                )
            self._follow_setting()
            return self._graphs.run(self.folded, _backbone(self.folded), method, args, kwargs)

    def _channels_first(self, argument: Any) -> Any:
        """uint8 images as (batch, channels, height, width), also from channels last; anything else as it is."""
        if isinstance(argument, list):
            return [self._channels_first(as_batch(part)) for part in argument]
        if isinstance(argument, Tensor) and argument.dtype == torch.uint8 and argument.ndim == 4:
            channels = _backbone(self.folded).patch_embed.in_chans
            if argument.shape[1] != channels and argument.shape[3] == channels:
                return argument.permute(0, 3, 1, 2)
        return argument

    # What else a model has

    @property
    def device(self) -> torch.device:
        return _backbone(self._modules["folded"])._buffers["cls_token"].device  # in each call: it is to cost little

    @property
    def dtype(self) -> torch.dtype:
        """That of the outputs."""
        return self.plan.dtype

    @property
    def precision(self) -> str:
        """As `optimize_for_inference` takes it."""
        return "fp8" if self.plan.e4m3 else _name(self.plan.dtype)

    def __getattr__(self, name: str) -> Any:
        """Other attributes and methods are the folded model's, which has those of the model."""
        if name == "folded":
            return super().__getattr__(name)
        return getattr(self.folded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name) and name not in vars(self) and hasattr(self._modules.get("folded"), name):
            raise AttributeError(f"{name} belongs to the model: set it there and call refresh() on the engine.")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Engine:
        """Does nothing with False.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise InvalidStateError(
                "The engine is for inference and cannot be trained. Train the model it was made from: the engine "
                "follows its weights (with follow_weights=False at the next refresh())."
            )
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`, for what `state_dict` of an engine gave.

        Raises:
            RuntimeError: weights of a model; they belong into the model that the engine follows.
        """
        if not any(key.startswith("folded.") for key in state_dict):
            raise InvalidStateError(
                "An engine holds its model's weights in a folded form: load them into the model, which the engine "
                "follows (with follow_weights=False at the next refresh()), or make an engine of a model that has them."
            )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:  # it raises for keys that do not fit, after it has loaded those that do
            self._graphs.clear()
            self._laid_out_for = None
            backbone = _backbone(self.folded)
            backbone._sizes.clear()  # made of the tensors that were written
            for part in backbone.modules():
                if isinstance(part, FoldedModule):
                    part.bind()  # `assign` may have brought tensors of another kind

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
        """Which implementation of each op of the engine runs on its device, and why."""
        return _backbone(self.folded).backends()

    def __repr__(self) -> str:
        return describe(self)


def describe(engine: Engine) -> str:
    """What the engine does and why, in some lines."""
    plan, backbone, model = engine.plan, _backbone(engine.folded), engine._model
    held = next(parameter.dtype for parameter in model.parameters())
    interleaved = any(block.mlp.up.interleaved for block in backbone.blocks)
    deferred = any(block.deferred.end is not None for block in backbone.blocks)
    uint8 = "normalised in the patch embedding" if backbone.patch_embed.proj_uint8 else "not taken: no mean and std"
    last = (
        "computed for the CLS token alone where nothing else is returned" if backbone.cls_only else "computed in full"
    )
    lines = [
        f"weights: {_name(plan.dtype)}, folded in fp64 from {_name(held)} and rounded once",
        f"changes of the model: {'noticed at the next call' if plan.follow_weights else 'not noticed: call refresh()'}",
        *(fp8.describe(backbone, model) if plan.e4m3 else ()),
        f"folded: LayerScale into proj and {'w3' if backbone.gated else 'fc2'}"
        + (", rows of w12 interleaved" if interleaved else ""),
        f"uint8 images: {uint8}",
        f"residual stream: {_name(plan.stream)}, in place" + (", the norms add the biases" if deferred else ""),
        f"lists of images: packed, {f'up to {plan.max_tokens} tokens' if plan.max_tokens else 'all'} at a time",
        f"last block: {last} (outputs={plan.outputs!r})",
        f"CUDA graphs: {engine._graphs.describe(backbone)}",
        f"what runs on {engine.device}:",
        *(f"  {line}" for line in format_choices(engine.backends())),
    ]
    title = f"Engine of a {type(model).__name__}: {len(backbone.blocks)} blocks of {backbone.embed_dim} channels"
    return "\n  ".join([title, *lines])


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in PRECISIONS.items() if known == dtype), str(dtype))


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # which torch cannot say of meta
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _fold(model: Any, plan: Plan, device: torch.device) -> Any:
    """The folded model of any face, for that device."""
    refuse_edits(model)
    refuse_tensors(model)
    if isinstance(model, DinoVisionTransformer):
        return fold_backbone(model, plan, device)
    made = hollow(model)
    for name, child in model.named_children():
        folded = fold_backbone(child, plan, device) if child is model.base_model else frozen(child, plan.dtype)
        made.add_module(name, folded)
    return made


def _backbone(folded: Any) -> Any:
    return folded if isinstance(folded, DinoVisionTransformer) else folded.base_model


def _choose(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InvalidValueError(f"There is no {name} {value!r}; choose one of {', '.join(choices)}.")


def _check_model(model: nn.Module, outputs: str) -> None:
    if type(model) not in (*BACKBONES, *CLASSIFIERS):
        raise InvalidTypeError(
            f"optimize_for_inference takes a model of this package, one of "
            f"{', '.join(kind.__name__ for kind in (*BACKBONES, *CLASSIFIERS))}; got {type(model).__qualname__}. "
            f"{_instead_of(model)}"
        )
    if model.training:
        raise InvalidValueError(
            "The model is in training mode, in which it drops paths and activations: call model.eval()."
        )
    if outputs == "cls" and type(model) not in BACKBONES[:3] and getattr(model, "global_pool", None) != "token":
        raise InvalidValueError(
            f"A {type(model).__name__} needs the tokens of all patches: outputs='cls' is not for it."
        )


def _instead_of(model: nn.Module) -> str:
    """What to do with a model that is not taken, in a sentence."""
    if type(getattr(model, "backbone", None)) in BACKBONES:
        return "Its backbone can be an engine: model.backbone = optimize_for_inference(model.backbone)."
    return "For a compiled or wrapped model, give the model inside and compile or wrap the engine."


def _indices(skip_layers: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(index(i) for i in skip_layers)
    except TypeError:
        raise InvalidTypeError(f"skip_layers takes indices of blocks, such as [0, 11], not {skip_layers!r}.") from None


def why_slow(precision: str, device: torch.device) -> str | None:
    """Why this precision, one of `PRECISIONS`, is slower on this device than one of more bits, or None."""
    return _slow_in_e4m3(device) if precision == "fp8" else _slow_on_cpu(PRECISIONS[precision], device)


def _slow_in_e4m3(device: torch.device) -> str | None:
    """Why products of e4m3 operands are slower than others on this device, or None."""
    if device.type != "cuda":
        return f"a {device.type} multiplies no e4m3 operands"
    return refuses_e4m3(torch.empty(0, device=device))


def _slow_on_cpu(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why products in this dtype are slower than in fp32 on this processor, or None."""
    if device.type != "cpu":
        return None
    has = torch.cpu.get_capabilities()
    native = {
        torch.float32: True,
        torch.bfloat16: has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"),
        torch.float16: has.get("avx512_fp16") or has.get("amx_fp16") or has.get("fp16_arith"),
    }
    return None if native[dtype] else f"this processor has no instructions for products in {_name(dtype)}"
