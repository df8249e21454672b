"""The main job on the pictures that ship with the project: features of each, and a sheet of their patch features' PCA.

With the released ViT-S/14 weights where they can be had (cache or network), otherwise with seeded random weights, and
then every output says so. Run it by ``make demo`` or ``python examples/demo.py [output folder]``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dinov2_fast
from dinov2_fast.cli.extract import Progress, describe
from dinov2_fast.extraction import list_images, read_image
from dinov2_fast.extraction.extract import extract
from dinov2_fast.image_processor import Dinov2ImageProcessor
from dinov2_fast.visualize import pca_rgb, save_pca_png

MODEL = "dinov2_vits14"
PCA_SIZE = 518  # 37 x 37 patches, the grid the released models were last trained on
PICTURES = Path(__file__).parent / "pictures"

OFFLINE = """
************************************************************************
*  THE RELEASED WEIGHTS ARE NOT HERE: THIS RUN USES RANDOM WEIGHTS.    *
*  It shows that everything works, not what DINOv2 sees. Every output  *
*  is marked "random-weights".                                         *
************************************************************************
"""


def main(out: Path) -> None:
    """Writes features and PCA of the example pictures to the folder `out`."""
    model, weights, mark = load_model()
    processor = Dinov2ImageProcessor()
    files = list_images([os.path.relpath(PICTURES)])
    progress = Progress(len(files))
    summary = extract(
        files,
        model,
        out / f"features{mark}",
        processor=processor,
        batch_size=4,
        overwrite=True,
        metadata={"model": MODEL, "weights": weights},
        progress=progress,
    )
    progress.end()
    sheet = draw_pca(model, files, out / f"pca{mark}.png", weights)
    print(f"\n{describe(summary)}\nPCA of the patch features: {sheet}")
    if mark:
        print("Both were made with RANDOM weights.")


def load_model() -> tuple[Any, str, str]:
    """The model in eval mode, where its weights are from, and what to add to the names of the outputs."""
    try:
        return dinov2_fast.load(MODEL), "released", ""
    except dinov2_fast.WeightsError as error:
        print(error, file=sys.stderr)
        print(OFFLINE, file=sys.stderr, flush=True)
    return dinov2_fast.load(MODEL, weights="random:0"), "random:0", "-random-weights"


def draw_pca(model: Any, files: list[str], path: Path, weights: str) -> Path:
    """Draws each picture as the model sees it beside the PCA of its patch features; one PCA for all of them."""
    processor = Dinov2ImageProcessor.for_size(PCA_SIZE)
    images = [read_image(file) for file in files]
    seen = processor(images, return_tensors="np", do_rescale=False, do_normalize=False).pixel_values
    with torch.inference_mode():
        batches = [model.forward_features(pixels[None]) for pixels in processor(images).pixel_values]
    tokens = torch.cat([batch["x_norm_patchtokens"] for batch in batches])
    title = f"{MODEL}, first three principal components of the patch features at {PCA_SIZE} px"
    if weights != "released":
        title = f"RANDOM WEIGHTS ({weights}): {title}"
    return save_pca_png(
        path,
        [Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))) for pixels in seen],
        pca_rgb(tokens),
        names=[Path(file).stem for file in files],
        title=title,
        columns=3,
        height=200,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
