"""``dinov2-fast convert``: a checkpoint in another implementation's layout."""

from __future__ import annotations

import argparse

from dinov2_fast.cli import options
from dinov2_fast.cli.process import OK

LAYOUTS = ("facebook", "huggingface", "huggingface_memory", "timm")
HELP = "write a checkpoint in another implementation's layout"
DESCRIPTION = """\
Writes a DINOv2 checkpoint in the layout of another implementation. The layout
of IN is recognised; nothing in the file is executed.

IN is a checkpoint file, a folder that holds one, the folder of a pretraining
run (its newest teacher), a Hugging Face hub id, or one of the eight names such
as dinov2_vits14. OUT is a file that ends in .safetensors, or in .pth, .pt, .bin
or .ckpt for PyTorch's format. With --to huggingface OUT may be a folder instead,
for transformers' from_pretrained (config.json and model.safetensors).

The file is written whole or not at all. It is read back and compared with IN,
tensor by tensor. What the new layout cannot hold is listed as lost.
"""
EPILOG = """\
layouts:
  facebook            Meta's code: torch.hub, the official .pth files
  huggingface         transformers, on disk
  huggingface_memory  a state dict of transformers' newer models in memory
  timm                timm, which has no mask token

examples:
  dinov2-fast convert dinov2_vits14 small.safetensors --to timm
  dinov2-fast convert teacher_checkpoint.pth my-model/ --to huggingface
  dinov2-fast convert facebook/dinov2-base base.pth --to facebook

Exit codes: 0 done, 1 not done (the message says why), 2 wrong usage, 130
interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("source", metavar="IN", help="the checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="the file, or with --to huggingface the folder, to write")
    parser.add_argument("--to", dest="layout", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Converts and prints what was read, written and lost; 0."""
    from dinov2_fast.convert import convert_checkpoint

    done = convert_checkpoint(**options.keywords(args))
    print(f"Read:     {done.source}\n          {done.summary}")
    print(f"Written:  {done.written}, {done.written.stat().st_size / 1e6:.1f} MB, layout {args.layout}")
    for text in done.lost:
        print(f"Lost:     {text}")
    print(f"Checked:  {done.compared} tensors read back from the file have the same values")
    if done.resampling:
        old, new = done.resampling
        print(
            f"Note:     readers of the old layout resample positions as {old!r}, those of the new as {new!r}:\n"
            f"          at image sizes other than {done.img_size} px the same weights give other features."
        )
    return OK
