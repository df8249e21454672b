"""`optimize_for_inference`: checks the model and the settings, and makes the engine."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import TypedDict

import torch
from torch import nn

from dinov2_fast import huggingface
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.inference.engine import Engine
from dinov2_fast.inference.plan import PRECISIONS, EnginePlan, auto_precision, precision_name
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._backends import refuses_e4m3
from dinov2_fast.timm_adapter import TimmVisionTransformer

BACKBONES = (
    DinoVisionTransformer,
    huggingface.Dinov2Model,
    huggingface.Dinov2WithRegistersModel,
    huggingface.Dinov2Backbone,
    huggingface.Dinov2WithRegistersBackbone,
    TimmVisionTransformer,
)
CLASSIFIERS = (huggingface.Dinov2ForImageClassification, huggingface.Dinov2WithRegistersForImageClassification)


class EngineOptions(TypedDict, total=False):
    """The options of `optimize_for_inference`, for type checkers, where a function passes them on."""

    precision: str
    outputs: str
    residual_dtype: str | torch.dtype | None
    processor: Dinov2ImageProcessor | None
    allow_slow: bool
    max_tokens: int | None
    skip_layers: Iterable[int]
    cuda_graphs: bool | str
    follow_weights: bool


def optimize_for_inference(
    model: nn.Module,
    precision: str = "auto",
    *,
    outputs: str = "auto",
    residual_dtype: str | torch.dtype | None = None,
    processor: Dinov2ImageProcessor | None = None,
    allow_slow: bool = False,
    max_tokens: int | None = None,
    skip_layers: Iterable[int] = (),
    cuda_graphs: bool | str = "auto",
    follow_weights: bool = True,
) -> Engine:
    """Makes a faster form of a model, for inference.

    LayerScale is folded into the linears before it, and the normalisation of uint8 images into the patch embedding.
    Activations and residual additions run together with their linears. Weights are folded in fp64 and rounded once, so
    give a model in fp32: what bf16 has rounded away does not come back. In fp32 on a CPU with AVX-512, the weights of
    the linears are also kept in oneDNN's blocked layout, which takes their memory a second time.

    Args:
        model: in eval mode, of one of the classes of this package. It is not changed, and stays in memory.
        precision: "bf16", "fp16" or "fp32"; "auto" is bf16 on a GPU and fp32 elsewhere. Outputs have this dtype. "fp8"
            is bf16 with e4m3 operands in the linears of the blocks. Its errors are several times larger:
            `Engine.calibrate` fits it to images, and `Engine.report` shows the errors on images.
        outputs: "auto" runs the last block for the CLS token alone in calls that return nothing else: the reference's
            ``model(x)``, and timm's where it pools the CLS token. "cls" does so in the Hugging Face face, too, whose
            outputs then have `pooler_output` and no `last_hidden_state`. "all" never does.
        residual_dtype: the dtype of the residual stream: "fp32" (or torch.float32), or None for that of `precision`.
            With "fp32" the errors of a bf16 engine were a quarter smaller (random weights with outliers, 4 blocks), for
            more memory traffic; outputs before the last norm are in fp32 then.
        processor: uint8 images are divided by 255 and normalised with its `image_mean` and `image_std`; by default with
            those of the checkpoints. Its other settings are not used.
        allow_slow: accept bf16, fp16 and fp8 also on a device that has no instructions for them.
        max_tokens: the most tokens of a list of images that run as one packed sequence, to bound memory (an image of
            224 x 224 has 257); None for no bound. A larger image runs alone.
        skip_layers: with "fp8", the indices of blocks (0 is the first) that stay in bf16.
        cuda_graphs: on a GPU, run calls as CUDA graphs. True does so for all calls for one batch, except for hidden
            states, attentions or a loss. "auto" does so for small batches, where launching the kernels takes longest,
            from the second call of a kind on (print the engine for the largest number of tokens). False never does.
            Results are copied out of a graph, so later calls do not overwrite them. A capture is slow. For each of
            the 16 kinds of call used last, memory is kept for images and results: 0.1 GB (ViT-g) to 0.5 GB (ViT-S) for
            the largest calls that "auto" captures, more where several layers are returned. They share the memory in
            between, which stays reserved. While a call is captured no other thread may draw random numbers on the
            device: torch raises an error there ("Offset increment outside graph capture").
        follow_weights: notice changes of the model, see :class:`Engine`. With False the engine notices no change of
            weights or settings, and saves the check in each call; `Engine.refresh` takes changes over. Its weights then
            keep the layout for the backends that were chosen when it was made.

    Returns:
        An engine with the methods of the model. It accepts what the model takes, and also images in any floating-point
        dtype, and uint8 images (batch, channels, height, width) or (batch, height, width, channels).

    Raises:
        TypeError: a model of another class, a part of it that cannot be folded, or a processor of another class.
        ValueError: a setting that does not exist or does not fit the model, or a model in training mode.
    """
    _check_choice("precision", precision, ("auto", *PRECISIONS))
    _check_choice("outputs", outputs, ("auto", "cls", "all"))
    if residual_dtype not in (None, "fp32", torch.float32):
        raise InvalidValueError(
            f"There is no residual_dtype {residual_dtype!r}; choose 'fp32', or None for the dtype of the precision."
        )
    if processor is not None and not isinstance(processor, Dinov2ImageProcessor):
        raise InvalidTypeError(f"processor must be a Dinov2ImageProcessor, got a {type(processor).__name__}.")
    _check_model(model, outputs)
    device = next(model.parameters()).device
    if precision == "auto":
        precision = auto_precision(device)
    if max_tokens is not None and max_tokens < 1:
        raise InvalidValueError(f"max_tokens must be at least 1, or None for no limit; got {max_tokens}.")
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise InvalidValueError(f"There is no cuda_graphs {cuda_graphs!r}; choose one of auto, True, False.")
    if cuda_graphs is True and device.type != "cuda":
        raise InvalidValueError(
            f"cuda_graphs=True needs a model on a GPU, this one is on {device}: move it, or use 'auto'."
        )
    e4m3, skipped = precision == "fp8", _indices(skip_layers)
    if skipped and not e4m3:
        raise InvalidValueError(
            f"skip_layers are blocks that stay out of fp8: it does not go with precision={precision!r}."
        )
    if not allow_slow:
        _refuse_slow(precision, device)
    processor = processor or Dinov2ImageProcessor()
    plan = EnginePlan(
        dtype=PRECISIONS[precision],
        residual_dtype=PRECISIONS[precision] if residual_dtype is None else torch.float32,
        outputs=outputs,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        max_tokens=max_tokens,
        e4m3=e4m3,
        skip_layers=skipped,
        cuda_graphs=cuda_graphs,
        follow_weights=follow_weights,
    )
    return Engine(model, plan)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InvalidValueError(f"There is no {name} {value!r}; choose one of {', '.join(choices)}.")


def _check_model(model: nn.Module, outputs: str) -> None:
    if type(model) not in (*BACKBONES, *CLASSIFIERS):
        raise InvalidTypeError(
            f"optimize_for_inference takes a model of this package, one of "
            f"{', '.join(kind.__name__ for kind in (*BACKBONES, *CLASSIFIERS))}; got {type(model).__qualname__}. "
            f"{_advice_for(model)}"
        )
    if model.training:
        raise InvalidValueError(
            "The model is in training mode, in which it drops paths and activations: call model.eval()."
        )
    if outputs == "cls" and type(model) not in BACKBONES[:3] and getattr(model, "global_pool", None) != "token":
        raise InvalidValueError(
            f"A {type(model).__name__} needs the tokens of all patches: outputs='cls' is not for it."
        )


def _advice_for(model: nn.Module) -> str:
    """What to do with a model that is not accepted, in one sentence."""
    if type(getattr(model, "backbone", None)) in BACKBONES:
        return "Its backbone can be an engine: model.backbone = optimize_for_inference(model.backbone)."
    return "For a compiled or wrapped model, give the model inside and compile or wrap the engine."


def _indices(skip_layers: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(index(i) for i in skip_layers)
    except TypeError:
        raise InvalidTypeError(f"skip_layers takes indices of blocks, such as [0, 11], not {skip_layers!r}.") from None


def _refuse_slow(precision: str, device: torch.device) -> None:
    if reason := why_slow(precision, device):
        instead = auto_precision(device)
        what_to_do = "use a newer GPU" if device.type == "cuda" else "move the model to a GPU first"
        raise InvalidValueError(
            f"precision={precision!r} would be slower than {instead} here: {reason}. Use precision={instead!r}, "
            f"{what_to_do}, or pass allow_slow=True."
        )


def why_slow(precision: str, device: torch.device) -> str | None:
    """Why one of `PRECISIONS` is slower on this device than one of more bits; None if it is not."""
    return _slow_in_e4m3(device) if precision == "fp8" else _slow_on_cpu(PRECISIONS[precision], device)


def _slow_in_e4m3(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"a {device.type} multiplies no e4m3 operands"
    return refuses_e4m3(torch.empty(0, device=device))


def _slow_on_cpu(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return None
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch below 2.11 cannot tell
    native = {
        torch.float32: True,
        torch.bfloat16: has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"),
        torch.float16: has.get("avx512_fp16") or has.get("amx_fp16") or has.get("fp16_arith"),
    }
    return None if native[dtype] else f"torch reports no instructions for products in {precision_name(dtype)}"
