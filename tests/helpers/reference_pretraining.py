"""Pretraining in the reference implementation: its losses, gradients and steps, on small networks on a CPU, in fp32.

    python -m tests.helpers.reference_pretraining --reference-path FOLDER     # a checkout of facebookresearch/dinov2

writes ``tests/golden/pretraining`` anew. `run_reference` computes it from the stored inputs and weights. What
runs is the reference's own code: `SSLMetaArch` with its losses and its `update_teacher`, its parameter groups,
schedules and optimizer. Replaced is only what a CPU or this environment does not have:

- `Tensor.cuda` does nothing;
- fvcore and omegaconf are the few names that the reference takes from them;
- xformers is no more than the class that packs sequences. So the layers run without xformers, and each batch of a
  list goes through a block alone;
- networks are not wrapped by FSDP, whose parameters and `clip_grad_norm_` are here those of the plain networks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import pretraining_reference
from bench.pretraining_reference import make_modules
from tests.helpers import golden_pretraining as golden

COMMIT = "b8931f7"
STEPS = 3
TEACHER_TEMPERATURE = 0.05  # of the cases; the steps have the reference's schedule
BACKBONE = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
# What differs from the reference's dinov2/configs/ssl_default_config.yaml. An epoch is one step.
SETTINGS: dict[str, Any] = {
    "compute_precision": {"grad_scaler": False},
    "dino": {"head_n_prototypes": 48, "head_bottleneck_dim": 16, "head_hidden_dim": 32},
    "ibot": {"head_n_prototypes": 40, "head_bottleneck_dim": 16, "head_hidden_dim": 32},
    "train": {"batch_size_per_gpu": 4, "OFFICIAL_EPOCH_LENGTH": 1},
    "student": {"arch": "vit_golden", "patch_size": 14, "drop_path_rate": 0.0, "layerscale": 0.1},
    "teacher": {"warmup_teacher_temp_epochs": 2},
    "crops": {"global_crops_size": 56, "local_crops_size": 28, "local_crops_number": 2},
    # The first step of the warm-up has a rate of 0. Only in the second the frozen last layer differs from the rest.
    "optim": {"epochs": 6, "warmup_epochs": 2, "freeze_last_layer_epochs": 2, "clip_grad": 0.05},
}


def run_reference(path: Path, name: str) -> dict[str, Any]:
    """What the reference at `path` computes from the stored inputs and weights.

    Args:
        name: one of `golden.CASES`, which are one step without the optimizer, or "steps" for three whole steps.

    Returns:
        Of a case, "losses": the parts as they enter the sum, and the sum, "loss"; "displayed": the parts as the
        reference logs them; "gradients": of every parameter of the student; "centers": those of the next step.
        Of the steps, "student" and "teacher": the weights afterwards; "losses": of each step; "norms": of each step,
        the norm of each network's gradients before they are clipped.
    """
    return run_steps(path) if name == "steps" else run_case(path, name)


def run_case(path: Path, case: str) -> dict[str, Any]:
    with imported(path) as reference:
        arch = load(reference, case)
        losses, displayed = forward_backward(arch, golden.load_inputs(), TEACHER_TEMPERATURE)
        centered = {"dino": arch.dino_loss, "ibot": arch.ibot_patch_loss}
        for each in centered.values():
            each.apply_center_update()
        return {
            "losses": losses,
            "displayed": displayed,
            "gradients": {name: parameter.grad for name, parameter in arch.student.named_parameters()},
            "centers": {name: each.center for name, each in centered.items()},
        }


def run_steps(path: Path) -> dict[str, Any]:
    with imported(path) as reference:
        arch = load(reference, golden.STEPS_CASE)
        train = importlib.import_module("dinov2.train.train")
        optimizer = train.build_optimizer(arch.cfg, arch.get_params_groups())
        rates, decays, momenta, temperatures, last_layer_rates = train.build_schedulers(arch.cfg)
        losses, norms = [], []
        for step in range(STEPS):
            train.apply_optim_scheduler(optimizer, rates[step], decays[step], last_layer_rates[step])
            optimizer.zero_grad(set_to_none=True)
            losses.append(forward_backward(arch, golden.load_inputs(step), temperatures[step])[0])
            limit = arch.cfg.optim.clip_grad
            of_each = {name: nn.utils.clip_grad_norm_(net.parameters(), limit) for name, net in arch.student.items()}
            norms.append({name: norm.item() for name, norm in of_each.items()})
            optimizer.step()
            arch.update_teacher(momenta[step])
        weights = {name: getattr(arch, name).state_dict() for name in ("student", "teacher")}
        return weights | {"losses": losses, "norms": norms}


def build(reference: ModuleType, case: str) -> Any:
    """The reference's `SSLMetaArch` of a case, with random weights of its own."""
    settings = importlib.import_module("dinov2.configs").dinov2_default_config
    for group, values in SETTINGS.items():
        settings[group].update(values)
    settings.train.centering, head = case.split("-")
    settings.ibot.separate_head = head == "separate"
    importlib.import_module("dinov2.utils.config").apply_scaling_rules_to_cfg(settings)
    arch = reference.SSLMetaArch(settings)
    arch.need_to_synchronize_fsdp_streams = False
    arch.train()
    return arch


def load(reference: ModuleType, case: str) -> Any:
    """The reference's `SSLMetaArch` of a case, with the stored weights and, for centring, the stored centres."""
    arch = build(reference, case)
    arch.student.load_state_dict(golden.load_weights("student", case))
    arch.teacher.load_state_dict(golden.load_weights("teacher", case))
    if case.startswith("centering"):
        centers = golden.load_centers(case)
        arch.dino_loss.center.copy_(centers["dino"])
        arch.ibot_patch_loss.center.copy_(centers["ibot"])
    return arch


def forward_backward(
    arch: Any, inputs: dict[str, Any], temperature: float
) -> tuple[dict[str, float], dict[str, float]]:
    """The reference's losses, as they enter the sum and as it displays them. The student has the gradients."""
    total = []

    def backward(loss: Tensor) -> None:
        total.append(loss.item())
        loss.backward()

    with mock.patch.object(arch, "backprop_loss", backward):
        parts = arch.forward_backward(inputs, teacher_temp=temperature)
    displayed = {name: value.item() for name, value in parts.items()}
    entering = {
        "dino_local": displayed["dino_local_crops_loss"],
        "dino_global": displayed["dino_global_crops_loss"],
        "koleo": 2 * displayed["koleo_loss"],
        "ibot": 2 * displayed["ibot_loss"],
        "loss": total[0],
    }
    return entering, displayed


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """The reference's module `dinov2.train.ssl_meta_arch`, in a process group of one."""
    modules = make_modules({"xformers": {}, "xformers.ops": {"fmha": SimpleNamespace(BlockDiagonalMask=Packed)}})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with pretraining_reference.imported(path, torch.device("cpu"), modules):
            reference = importlib.import_module("dinov2.train.ssl_meta_arch")
            block: Any = importlib.import_module("dinov2.layers.block")
            vits: Any = importlib.import_module("dinov2.models.vision_transformer")
            block.XFORMERS_AVAILABLE = True
            block.NestedTensorBlock.forward_nested = lambda self, batches: [self(batch) for batch in batches]
            block_with_attention = partial(vits.Block, attn_class=vits.MemEffAttention)
            vits.vit_golden = partial(vits.DinoVisionTransformer, block_fn=block_with_attention, **BACKBONE)
            vars(reference)["get_fsdp_modules"] = lambda network: [SimpleNamespace(params=list(network.parameters()))]
            yield reference
    finally:
        dist.destroy_process_group()


class Packed:
    """Splits what was packed into one sequence."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple[Packed, Tensor]:
        return cls([tensor.shape[1] for tensor in tensors]), torch.cat(tensors, dim=1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.lengths, dim=1))


def draw_inputs(path: Path) -> dict[str, Tensor]:
    """Random crops of each step, with masks by the reference's collate function."""
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    with imported(path):
        data = importlib.import_module("dinov2.data")
        generate_mask = data.MaskingGenerator(input_size=(4, 4), max_num_patches=8)
        for step in range(STEPS):
            crops = [draw_crops(size, generator) for size in (56, 28)]
            images = [{"global_crops": crops[0][:, i], "local_crops": crops[1][:, i]} for i in range(4)]
            inputs = data.collate_data_and_cast(
                [(image, ()) for image in images], (0.1, 0.5), 0.5, torch.uint8, 16, generate_mask
            )
            inputs["upperbound"] = torch.tensor(inputs["upperbound"])
            tensors |= {f"{step}.{name}": value for name, value in inputs.items()}
    return tensors


def draw_crops(size: int, generator: torch.Generator) -> Tensor:
    """uint8 (2 crops, 4 images, 3, size, size): noise around a colour, so that CLS tokens of two images differ."""
    colour, noise = (torch.randn(2, 4, 3, side, side, generator=generator) for side in (1, size))
    return (128 + 48 * (colour + noise)).round().clamp(0, 255).to(torch.uint8)


def draw_weights(path: Path) -> dict[str, Tensor]:
    """bf16 weights of student and teacher, none at its initial value, and centres."""
    generator = torch.Generator().manual_seed(1)
    with imported(path) as reference:
        arch = build(reference, golden.STEPS_CASE)
        shapes = {
            f"{network}.{name}": parameter.shape
            for network in ("student", "teacher")
            for name, parameter in getattr(arch, network).named_parameters()
        }
    shapes |= {"center.dino": (1, 48), "center.ibot.shared": (1, 1, 48), "center.ibot.separate": (1, 1, 40)}
    drawn = {name: draw_weight(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return {name: weight.bfloat16() for name, weight in drawn.items()}


def draw_weight(name: str, noise: Tensor) -> Tensor:
    if name.startswith("center"):
        return 0.1 * noise
    if name.endswith("gamma"):
        return 0.1 + 0.03 * noise
    if name.endswith("weight_g") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.2 * noise
    if name.endswith(("bias", "token", "pos_embed")):
        return 0.2 * noise
    return noise * noise[0].numel() ** -0.5  # of the inputs of each output


def write(path: Path) -> None:
    """Writes inputs and weights, and what the reference makes of them."""
    golden.FOLDER.mkdir(exist_ok=True)
    save_file(draw_weights(path), golden.FOLDER / "weights.safetensors")
    save_file(draw_inputs(path), golden.FOLDER / "inputs.safetensors")
    numbers = {}
    for name in (*golden.CASES, "steps"):
        result = run_reference(path, name)
        numbers[name] = {kind: result.pop(kind) for kind in ("losses", "displayed", "norms") if kind in result}
        tensors = {f"{kind}.{key}": tensor for kind, group in result.items() for key, tensor in group.items()}
        save_file(tensors, golden.FOLDER / f"{name}.safetensors")
    description = {
        "reference": COMMIT,
        "torch": torch.__version__,
        "teacher_temperature": TEACHER_TEMPERATURE,
        "backbone": BACKBONE,
        "settings": SETTINGS,
        "results": numbers,
    }
    (golden.FOLDER / "golden.json").write_text(json.dumps(description, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-path", type=Path, required=True, help=f"a checkout of dinov2 at {COMMIT}")
    write(parser.parse_args().reference_path)
