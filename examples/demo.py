"""Extracts features from the images that ship with the project, and draws what the model sees in them.

It uses the released ViT-S/14 weights if they are in a cache or on the network. Otherwise it uses random weights, and
marks every output. Run ``make demo`` or ``python examples/demo.py [output folder]``. It prints the commands that it
runs, as a user would type them.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import dinov2_fast
from dinov2_fast.cli import main as dinov2_fast_command
from dinov2_fast.weights.sources import find_backbone

MODEL = "dinov2_vits14"
IMAGES = Path(__file__).parent / "images"

OFFLINE = """
************************************************************************
*  THE RELEASED WEIGHTS ARE NOT HERE: THIS RUN USES RANDOM WEIGHTS.    *
*  It shows that everything works, but not what DINOv2 sees. Every     *
*  output is marked "random-weights".                                  *
************************************************************************
"""


def main(out: Path) -> None:
    """Writes features, and images of PCA, attention and neighbours, to the folder `out`."""
    options, mark = choose_weights()
    images, features = os.path.relpath(IMAGES), str(out / f"features{mark}")
    model = ["--model", MODEL, *options]
    run("extract", images, *model, "--out", features, "--workers", "0", "--batch-size", "4", "--overwrite")
    run("show", images, *model, "--pca", "--attention", "--out", str(out))
    run("show", features, "--neighbours", "--count", "3", "--out", str(out))
    if mark:
        print("\nAll outputs come from RANDOM weights.")


def choose_weights() -> tuple[list[str], str]:
    """The commands' options for the weights that are available, and a suffix for the names of the outputs."""
    try:
        find_backbone(dinov2_fast.BACKBONES[MODEL])
    except dinov2_fast.WeightsError as error:
        print(error, file=sys.stderr)
        print(OFFLINE, file=sys.stderr, flush=True)
        return ["--weights", "random:0"], "-random-weights"
    return [], ""


def run(*arguments: str) -> None:
    """Prints and runs ``dinov2-fast`` with these arguments."""
    print(f"\n$ dinov2-fast {shlex.join(arguments)}", flush=True)
    code = dinov2_fast_command(arguments)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
