"""One step of facebookresearch/dinov2's own pretraining code, from a checkout: `--reference-path`.

What runs is its `SSLMetaArch` with its losses, its parameter groups, AdamW and `update_teacher`, in the order of its
`do_train`. Replaced is what one process does not need or this environment does not have, see `REPLACED`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from bench.pretraining_batch import Batch
from dinov2_fast.pretraining.config import HeadConfig, PretrainingConfig

REPLACED = (
    "fvcore and omegaconf by the few names that are used, FSDP by plain modules (in bf16 a step casts the fp32 weights "
    "to bf16, as FSDP's mixed precision does)"
)
XFORMERS_REPLACED = (
    "; xformers' operators by PyTorch's: attention by one scaled_dot_product_attention for each size of crops, the "
    "sums of stochastic depth by index_add"
)


@contextmanager
def imported(
    path: Path | None, device: torch.device, modules: dict[str, ModuleType] | None = None
) -> Iterator[ModuleType]:
    """The reference's module `dinov2.train.train`. There must be a process group.

    Afterwards `sys.modules` is as before, but for torchvision, which the reference imports.

    Args:
        path: the checkout.
        device: on a CPU `Tensor.cuda` does nothing.
        modules: take the place of others, by default `replacements(device)`.
    """
    if path is None or not (path / "dinov2" / "train" / "ssl_meta_arch.py").is_file():
        raise FileNotFoundError(f"There is no dinov2/train/ssl_meta_arch.py in {path}; give a checkout of dinov2.")
    tf32 = torch.backends.cuda.matmul.allow_tf32  # the reference sets it when it is imported
    modules = replacements(device) if modules is None else modules
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _root(name) in _roots(modules)}
    sys.modules.update(modules)
    sys.path.insert(0, str(path))
    on_cpu = mock.patch.object(Tensor, "cuda", lambda self, **_: self) if device.type == "cpu" else mock.patch.dict({})
    try:
        with on_cpu, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which of xformers' parts there are
            yield importlib.import_module("dinov2.train.train")
    finally:
        sys.path.remove(str(path))
        for name in [name for name in sys.modules if _root(name) in _roots(modules)]:
            del sys.modules[name]
        sys.modules.update(hidden)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _root(module: str) -> str:
    return module.partition(".")[0]


def _roots(modules: dict[str, ModuleType]) -> set[str]:
    return {"dinov2", *map(_root, modules)}


def replacements(device: torch.device) -> dict[str, ModuleType]:
    """Modules with the names that the reference takes from them."""
    contents: dict[str, dict[str, Any]] = {}
    if not has_xformers(device):
        contents["xformers"] = {}
        contents["xformers.ops"] = {
            "fmha": SimpleNamespace(BlockDiagonalMask=Packed),
            "memory_efficient_attention": attention,
            "unbind": torch.unbind,
            "index_select_cat": index_select_cat,
            "scaled_index_add": scaled_index_add,
        }
    return make_modules(contents)


def make_modules(contents: dict[str, dict[str, Any]]) -> dict[str, ModuleType]:
    """Modules with these contents by name, and the few names of fvcore and omegaconf that the reference uses."""
    contents = contents | {
        "fvcore": {},
        "fvcore.common": {},
        "fvcore.common.checkpoint": {"Checkpointer": object, "PeriodicCheckpointer": object},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=load_settings)},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(modules[name]).update(values)
    return modules


@cache
def has_xformers(device: torch.device) -> bool:
    """Whether the operators of xformers that the reference uses run here, forward and backward."""
    if device.type != "cuda":
        return False
    try:
        from xformers.ops import fmha, index_select_cat, memory_efficient_attention, scaled_index_add

        bias, x = fmha.BlockDiagonalMask.from_tensor_list([torch.randn(1, 50, 1, 64, device=device)] * 2)
        x = x.bfloat16().requires_grad_()
        memory_efficient_attention(x, x, x, attn_bias=bias).sum().backward()
        rows, index = x.detach()[0], torch.arange(4, device=device)
        index_select_cat([rows.flatten(1)], [index])
        scaled_index_add(rows.clone(), index, rows[:4], scaling=rows.new_ones(64), alpha=2.0)
    except Exception:  # not installed, not built for this torch, or not for this GPU
        return False
    return True


class Settings(dict[str, Any]):
    """Settings whose items are attributes too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def load_settings(file: Path) -> Settings:
    settings: Settings = json.loads(json.dumps(yaml.safe_load(file.read_text())), object_hook=Settings)
    return settings


class Packed:
    """Batches of sequences that are packed into one: xformers' BlockDiagonalMask, without a mask."""

    def __init__(self, lengths: Sequence[int], batch_sizes: Sequence[int] = ()) -> None:
        self._lengths = lengths  # of each sequence
        self._batch_sizes = batch_sizes  # sequences of each batch; the reference sets it

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> Packed:
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Packed, Tensor]:
        packed = torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)
        lengths = [tensor.shape[1] for tensor in tensors for _ in range(tensor.shape[0])]
        return cls(lengths, [tensor.shape[0] for tensor in tensors]), packed

    def split(self, packed: Tensor) -> list[Tensor]:
        ends = list(itertools.accumulate(self._batch_sizes))
        sizes = [(count, self._lengths[end - 1]) for count, end in zip(self._batch_sizes, ends, strict=True)]
        parts = packed.split([count * length for count, length in sizes], dim=1)
        return [part.view(*size, *part.shape[2:]) for part, size in zip(parts, sizes, strict=True)]


def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Packed | None = None) -> Tensor:
    """Attention of (batch, tokens, heads, channels), or of sequences that are packed into a batch of one."""
    if attn_bias is not None:
        batches = zip(*map(attn_bias.split, (q, k, v)), strict=True)
        return torch.cat([attention(*each).reshape(1, -1, *q.shape[2:]) for each in batches], dim=1)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The chosen rows of matrices, flattened and joined."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    """x with alpha * scaling * source added to the chosen entries of dimension 0."""
    return torch.index_add(x, 0, index, (source * scaling).to(x.dtype), alpha=alpha)


class ReferenceStep:
    """Steps on a batch. A call does one and returns its losses and the norms of its gradients.

    In bf16 `arch` computes with bf16 copies of the weights that `masters` has in fp32.
    """

    def __init__(
        self, reference: ModuleType, config: PretrainingConfig, weights: dict[str, Tensor], batch: Batch
    ) -> None:
        self.reference, self.config, self.rates = reference, config, batch.rates
        settings = reference_settings(config)
        in_bf16 = config.run.precision == "bf16"
        self.masters = self._build(settings, weights, batch.device)
        self.arch = self._build(settings, weights, batch.device).to(torch.bfloat16) if in_bf16 else self.masters
        of_network = {}
        for name in self.masters.student:
            for kind in ("student", "teacher"):
                network = getattr(self.masters, kind)[name]
                of_network[network] = [SimpleNamespace(params=list(network.parameters()))]
        vars(importlib.import_module("dinov2.train.ssl_meta_arch"))["get_fsdp_modules"] = of_network.__getitem__
        self.optimizer = reference.build_optimizer(settings, self.masters.get_params_groups())
        self.student: nn.Module = self.arch.student
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        masks = batch.masks.flatten(0, 1)
        self.inputs = {
            "collated_global_crops": batch.global_crops.flatten(0, 1).to(dtype),
            "collated_local_crops": batch.local_crops.flatten(0, 1).to(dtype),
            "collated_masks": masks,
            "mask_indices_list": batch.masked,
            "masks_weight": batch.mask_weights,
            "upperbound": len(batch.masked),
            "n_masked_patches": torch.tensor([len(batch.masked)], device=batch.device),
        }

    def _build(self, settings: Settings, weights: dict[str, Tensor], device: torch.device) -> Any:
        arch = self.reference.SSLMetaArch(settings)
        for network in (arch.student, arch.teacher):
            network.load_state_dict(weights)
        arch.need_to_synchronize_fsdp_streams = False
        arch.to(device).train()
        return arch

    def __call__(self) -> dict[str, Any]:
        arch, masters, rates = self.arch, self.masters, self.rates
        self.reference.apply_optim_scheduler(
            self.optimizer, rates.learning_rate, rates.weight_decay, rates.last_layer_learning_rate
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts = arch.forward_backward(self.inputs, teacher_temp=rates.temperature)
        if arch is not masters:
            for master, copy in zip(masters.student.parameters(), arch.student.parameters(), strict=True):
                master.grad, copy.grad = None if copy.grad is None else copy.grad.float(), None
        limit = self.config.optimizer.clip_norm
        norms = {name: nn.utils.clip_grad_norm_(net.parameters(), limit) for name, net in masters.student.items()}
        self.optimizer.step()
        masters.update_teacher(rates.momentum)
        if arch is not masters:
            with torch.no_grad():
                torch._foreach_copy_(list(arch.parameters()), list(masters.parameters()))
        # They are displayed with other factors than they have in the sum.
        losses = {
            "dino_global": parts["dino_global_crops_loss"].item(),
            "dino_local": parts["dino_local_crops_loss"].item(),
            "ibot": 2 * parts["ibot_loss"].item(),
            "koleo": 2 * parts["koleo_loss"].item() / self.config.losses.koleo,
        }
        return losses | {f"gradient_norm/{name}": norm.item() for name, norm in norms.items()}


def reference_settings(config: PretrainingConfig) -> Settings:
    """The reference's default settings, changed to what a configuration says."""
    model, crops, optimizer = config.model, config.crops, config.optimizer
    vits: Any = importlib.import_module("dinov2.models.vision_transformer")
    vits.vit_bench = partial(
        vits.DinoVisionTransformer,
        embed_dim=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        block_fn=partial(vits.Block, attn_class=vits.MemEffAttention),
    )
    settings: Settings = json.loads(
        json.dumps(importlib.import_module("dinov2.configs").dinov2_default_config), object_hook=Settings
    )
    changes: dict[str, dict[str, Any]] = {
        "compute_precision": {"grad_scaler": False},
        "dino": _head(config.dino_head) | {"koleo_loss_weight": config.losses.koleo},
        "ibot": _head(config.ibot_head or config.dino_head) | {"separate_head": config.ibot_head is not None},
        "train": {"centering": config.losses.centering},
        "student": {
            "arch": "vit_bench",
            "patch_size": model.patch_size,
            "layerscale": model.layer_scale,
            "drop_path_rate": model.drop_path,
        },
        "optim": {
            "layerwise_decay": optimizer.layer_decay,
            "patch_embed_lr_mult": optimizer.patch_embed_multiplier,
            "clip_grad": optimizer.clip_norm,
        },
        "crops": {
            "global_crops_size": crops.global_size,
            "local_crops_size": crops.local_size,
            "local_crops_number": crops.n_local,
        },
    }
    for group, values in changes.items():
        settings[group].update(values)
    return settings


def _head(head: HeadConfig) -> dict[str, int]:
    return {
        "head_n_prototypes": head.prototypes,
        "head_bottleneck_dim": head.bottleneck_size,
        "head_nlayers": head.layers,
        "head_hidden_dim": head.hidden_size,
    }
