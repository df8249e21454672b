"""The golden cases of pretraining, ``tests/golden/pretraining``: inputs, weights, and what the reference makes of them.

`tests/helpers/reference_pretraining.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden" / "pretraining"
CASES = [f"{centering}-{head}" for centering in ("sinkhorn_knopp", "centering") for head in ("shared", "separate")]
STEPS_CASE = "sinkhorn_knopp-separate"


def load_description() -> dict[str, Any]:
    """How the cases were made: the backbone, and what differs from the reference's default settings."""
    return json.loads((FOLDER / "golden.json").read_text())


def load_inputs(step: int = 0) -> dict[str, Any]:
    """What a case sees (step 0), or one of the three steps.

    The names and layouts are those of the reference's collate function. Crops are stored as uint8 and scaled here, so
    that they are the same numbers everywhere.
    """
    inputs: dict[str, Any] = part(load_file(FOLDER / "inputs.safetensors"), str(step))
    for name in ("collated_global_crops", "collated_local_crops"):
        inputs[name] = (inputs[name].float() - 128) / 64
    return inputs | {"upperbound": inputs["upperbound"].item()}


def load_weights(network: str, case: str) -> dict[str, Tensor]:
    """fp32 weights of the "student" or the "teacher", with the keys of the reference's state dict."""
    weights = part(_load_weights(), network)
    return {key: value for key, value in weights.items() if "separate" in case or not key.startswith("ibot_head.")}


def load_centers(case: str) -> dict[str, Tensor]:
    """The centres before a case with centring: "dino" (1, prototypes) and "ibot" (1, 1, prototypes)."""
    centers = part(_load_weights(), "center")
    return {"dino": centers["dino"], "ibot": centers[f"ibot.{case.partition('-')[2]}"]}


def load_results(name: str) -> dict[str, Any]:
    """What `reference_pretraining.run_reference` returned for one of `CASES`, or for "steps"."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    tensors = {kind: part(stored, kind) for kind in sorted({key.partition(".")[0] for key in stored})}
    return tensors | load_description()["results"][name]


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose keys start with `name` and a point, under the rest of their keys."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _load_weights() -> dict[str, Tensor]:
    stored = load_file(FOLDER / "weights.safetensors")
    return {key: tensor.float() for key, tensor in stored.items()}
