"""Extracts features of images on a Ray cluster into Parquet files, with one model per worker; it can be interrupted.

    python examples/ray_extract.py photos/ features/ --model dinov2_vits14 --workers 4

The images may be on any file system that Ray reads (``s3://bucket/photos``). Each worker is an actor that loads the
model once; give it a GPU with ``--gpus 1``. A checkpoint beside the output records the images that are done. After a
crash, run the same command again: it extracts the missing images into more files of the same folder. An image that
cannot be read becomes a row with its error.

With ``--address auto`` the script runs on the cluster that this machine belongs to, all of whose machines must see the
output and the checkpoint. Without it, the script starts Ray on this machine. Another model or size needs another output
folder, because Ray's checkpoint records only which images are done.
"""

from __future__ import annotations

import argparse
import os

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

import dinov2_fast

# The fewest CPUs that a Ray started here is told to have: with 2, a second run never ended, because Ray's checkpoint
# waited for a CPU beside those of the workers.
LOGICAL_CPUS = 12


def main(argv: list[str] | None = None) -> None:
    """Extracts the features of all images that the checkpoint does not have yet."""
    args = parse(argv)
    if args.address:
        ray.init(args.address)
    else:
        ray.init("local", num_cpus=max(os.cpu_count() or 1, LOGICAL_CPUS))
    # The path identifies an image: each is written once, in however many runs.
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="path",
        checkpoint_path=args.checkpoint or f"{args.out.rstrip('/')}.checkpoint",
        delete_checkpoint_on_success=False,
    )
    extractor = {"weights": args.weights, "size": args.size, "column": "bytes"}
    (
        ray.data.read_binary_files(args.images, include_paths=True)
        .map_batches(
            dinov2_fast.Extractor,
            fn_constructor_args=(args.model,),
            fn_constructor_kwargs=extractor,
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_gpus=args.gpus,
        )
        .write_parquet(args.out)
    )


def absolute(path: str) -> str:
    """A URL unchanged, a path made absolute, as Ray's checkpoint needs it."""
    return path if "://" in path else os.path.abspath(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Features of images on a Ray cluster, as Parquet.")
    parser.add_argument("images", type=absolute, help="folder or URL of images")
    parser.add_argument("out", type=absolute, help="folder or URL of the Parquet files")
    parser.add_argument(
        "--model", default="dinov2_vits14", help="a name, file, folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--weights", help="checkpoint file, or random:SEED")
    parser.add_argument("--size", type=int, help="pixels, a multiple of 14 (default: 224, or as a model's folder says)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="copies of the model (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each worker (default: %(default)s)")
    parser.add_argument("--address", help="address of a Ray cluster, such as auto (default: Ray started here)")
    parser.add_argument(
        "--checkpoint", type=absolute, help="folder that records the images that are done (default: OUT.checkpoint)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
