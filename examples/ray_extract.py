"""Features of images on a Ray cluster: reads images, runs one model per worker, writes Parquet, and can be run again.

    python examples/ray_extract.py photos/ features/ --model dinov2_vits14 --workers 4

The images may be on any file system that Ray reads (``s3://bucket/photos``). Each worker is an actor that loads the
model once; give it a GPU with ``--gpus 1``. What is done is written to a checkpoint beside the output: run the same
command again after a crash, and only the images that are missing are done, into more files of the same folder. An
image that cannot be read is a row with its error.

With ``--address auto`` it runs on the cluster that this machine belongs to; output and checkpoint must then be where
all its machines see them. Without, it starts a Ray of its own on this machine. Another model or size needs another
output folder: Ray's checkpoint knows the images, and not what was done with them.
"""

from __future__ import annotations

import argparse
import os

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

import dinov2_fast

# That a Ray of its own has at least, however many the machine has: with 2, Ray's checkpoint waited for ever for a place
# beside the workers when it was run again.
LOGICAL_CPUS = 12


def main(argv: list[str] | None = None) -> None:
    """Extracts the features of all images that the checkpoint does not have yet."""
    args = parse(argv)
    if args.address:
        ray.init(args.address)
    else:
        ray.init("local", num_cpus=max(os.cpu_count() or 1, LOGICAL_CPUS))
    # The paths tell the images apart: each is written once, however often this is run.
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


def whole(path: str) -> str:
    """A URL as it is, a path from the root on: the same in every folder, and all that Ray takes for a checkpoint."""
    return path if "://" in path else os.path.abspath(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Features of images on a Ray cluster, as Parquet.")
    parser.add_argument("images", type=whole, help="folder or URL of images")
    parser.add_argument("out", type=whole, help="folder or URL of the Parquet files")
    parser.add_argument(
        "--model", default="dinov2_vits14", help="a name, file, folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--weights", help="checkpoint file, or random:SEED")
    parser.add_argument("--size", type=int, help="pixels, a multiple of 14 (default: 224)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="copies of the model (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each worker (default: %(default)s)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto (default: a Ray of its own)")
    parser.add_argument(
        "--checkpoint", type=whole, help="folder of what is done (default: the output's name and .checkpoint)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
