"""Runs transformers' own tests of Dinov2 and Dinov2WithRegisters on this package.

    git clone --depth 1 --branch v5.17.0 https://github.com/huggingface/transformers transformers_sources
    python tests/peers/run_transformers_tests.py --checkout transformers_sources

The tests run twice: on transformers' models after `dinov2_fast.accelerate` ("accelerated"), and on the classes of this
package with the same names ("ours"). They import the installed transformers, which must have the version of the
checkout, and the package `parameterized`. `LEFT_OUT` says which tests do not apply to our classes, and why.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import dinov2_fast
from dinov2_fast.huggingface import Dinov2Config
from dinov2_fast.huggingface.pretrained import PreTrainedModel

WAYS = ("accelerated", "ours")
FILES = [f"tests/models/{name}/test_modeling_{name}.py" for name in ("dinov2", "dinov2_with_registers")]
CLASSES = [
    family + task
    for family in ("Dinov2", "Dinov2WithRegisters")
    for task in ("Model", "ForImageClassification", "Backbone")
]

# Private names that transformers' tests read of a class.
PRIVATE: dict[type, dict[str, Any]] = {
    PreTrainedModel: {
        "_can_set_experts_implementation": classmethod(lambda cls: False),
        "_from_config": classmethod(lambda cls, config, **_: cls(config)),
        "_keep_in_fp32_modules": (),
        "_keep_in_fp32_modules_strict": (),
        "_keys_to_ignore_on_load_missing": None,
        "_supports_flash_attn": False,
        "_supports_flex_attn": False,
        "_supports_sdpa": True,
    },
    Dinov2Config: {"sub_configs": {}, "_attn_implementation": "sdpa"},
}

# Reasons why tests do not apply to our classes, and the names of these tests as regular expressions.
LEFT_OUT = {
    "attention masks are refused: every token attends to all": (
        r"test_eager_matches_sdpa_inference_(?!.*no_attn_mask).*",
    ),
    "all attention implementations are the same here, and set_attn_implementation changes nothing": (
        r"test_can_set_attention_dynamically.*",
        r"test_sdpa_can_dispatch_non_composite_models",
    ),
    "weights that lack more than a classification head, or have other shapes, are refused": (
        r"test_can_init_all_missing_weights",
        r"test_model_weights_reload_no_missing_tied_weights",
    ),
    "attention maps are computed beside the attention, so that no gradient of an output reaches them": (
        r"test_retain_grad_hidden_states_attentions",
    ),
    "gradient checkpointing is set for the whole backbone, not by a flag of each block": (
        r"test_gradient_checkpointing_enable_disable",
        r"test_training_gradient_checkpointing.*",
    ),
    "backbone_type is the value of transformers' enumeration, which only transformers has": (
        r"test_backbone_common_attributes",
    ),
    "messages logged while weights load have other words": (r"test_can_load_ignoring_mismatched_shapes",),
    "from_pretrained works under torch.device('meta')": (r"test_cannot_load_with_meta_device_context_manager",),
}


class LeaveOut:
    """A pytest plugin that skips the tests of `LEFT_OUT`."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for reason, names in LEFT_OUT.items():
                if any(re.fullmatch(name, item.name) for name in names):
                    item.add_marker(pytest.mark.skip(reason=reason))


def accelerate_every(model_class: Any) -> None:
    """Makes the class accelerate each new instance, without the dropout that `accelerate` refuses."""
    init = model_class.__init__

    @functools.wraps(init)
    def accelerated(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config.attention_probs_dropout_prob = 0.0
        init(self, config, *args, **kwargs)
        if type(self) is model_class:
            dinov2_fast.accelerate(self)

    model_class.__init__ = accelerated


def run(way: str, checkout: Path) -> int:
    for name in CLASSES:
        theirs = getattr(transformers, name)
        if way == "accelerated":
            accelerate_every(theirs)
        else:  # also in the defining module, from which some tests import
            for module in (transformers, sys.modules[theirs.__module__]):
                setattr(module, name, getattr(dinov2_fast, name))
    if way == "ours":
        for owner, attributes in PRIVATE.items():
            for attribute, value in attributes.items():
                setattr(owner, attribute, value)
    os.chdir(checkout)
    plugins = [LeaveOut()] if way == "ours" else []
    return int(pytest.main(["-q", "-rs", "--disable-warnings", "-p", "no:cacheprovider", *FILES], plugins=plugins))


def version_of(checkout: Path) -> str:
    found = re.search(r'version="([^"]+)"', (checkout / "setup.py").read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="folder with transformers' sources and its tests/")
    parser.add_argument("--way", choices=WAYS, help="one of the two; default both, each in its own process")
    arguments = parser.parse_args()
    if arguments.checkout is None:
        print("Skipped: transformers' wheel has no tests; give a checkout with --checkout.")
        return 0
    if version_of(arguments.checkout) != transformers.__version__:
        parser.error(f"The checkout is of {version_of(arguments.checkout)}; take tag v{transformers.__version__}.")
    if arguments.way is not None:
        return run(arguments.way, arguments.checkout)
    command = [sys.executable, __file__, "--checkout", str(arguments.checkout), "--way"]
    return max(subprocess.run([*command, way], check=False).returncode for way in WAYS)


if __name__ == "__main__":
    sys.exit(main())
