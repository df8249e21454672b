"""``dinov2-fast search``: the images of a folder of features that are nearest to query images."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2_fast.cli import options
from dinov2_fast.cli.extract import SOME_FAILED
from dinov2_fast.curation.neighbours import Found, search, vector_size
from dinov2_fast.errors import InvalidValueError

DESCRIPTION = """\
Finds the images in FEATURES, a folder that `dinov2-fast extract` wrote, whose
features have the largest cosine with those of each QUERY.

The features of a query are made as those in the folder were: by the model that
its manifest names, after the same preprocessing. Every image is compared, in
one pass that holds one shard in memory. Of images that are equally near, the
first in the folder comes first; an image that is there itself finds itself.

QUERY is an image, or what else `dinov2-fast extract` takes for images.
"""
COLUMNS = ("path", "cosine", "row")  # row: the image's number in the folder
EPILOG = """\
examples:
  dinov2-fast search features/ cat.jpg
  dinov2-fast search features/ cat.jpg dog.jpg --k 3 --feature patch_mean
  dinov2-fast search features/ 'queries/*.jpg' --format csv

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some queries could not
be read and are left out, 130 interrupted.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "search",
        help="find the images of stored features that are nearest to others",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("features", metavar="FEATURES", help="folder that `dinov2-fast extract` wrote")
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="images, or where they are")
    parser.add_argument("--k", type=options.at_least(1), default=10, metavar="N", help="images to find (default: 10)")
    parser.add_argument(
        "--feature", default="cls", metavar="NAME", help="which feature, of one vector an image (default: cls)"
    )
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="(default: table)")
    model = parser.add_argument_group("the model, where the folder's is not found by its name")
    model.add_argument("--model", help="as for `dinov2-fast extract`; its weights must be those of the folder")
    model.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Searches; 0, or 3 if some queries could not be read."""
    import dinov2_fast
    from dinov2_fast.data.sources import find_images
    from dinov2_fast.extraction.as_stored import extract_as_stored
    from dinov2_fast.features.schema import as_text

    if args.weights and not args.model:
        raise InvalidValueError("--weights needs --model.")
    features = dinov2_fast.load_features(args.features)
    vector_size(features, args.feature)
    images = list(find_images(args.queries))
    if not images:
        raise InvalidValueError(f"There are no images in {', '.join(map(repr, args.queries))}.")
    vectors, errors = extract_as_stored(
        features, images, args.feature, model=args.model, weights=args.weights, device=args.device
    )
    for image, error in zip(images, errors, strict=True):
        if error is not None:
            print(f"{image.path!r} is left out: {error}", file=sys.stderr)
    good = [error is None for error in errors]
    if not any(good):
        raise InvalidValueError("None of the queries could be read.")
    found = search(features, vectors[np.array(good)], args.k, feature=args.feature)
    read = [as_text(image.path) for image, is_good in zip(images, good, strict=True) if is_good]
    {"table": print_table, "json": print_json, "csv": print_csv}[args.format](read, found)
    print(f"{found.compared} images compared, {found.skipped} without features skipped", file=sys.stderr)
    return 0 if all(good) else SOME_FAILED


def print_table(queries: Sequence[str], found: Found) -> None:
    """Each query, and under it cosines and paths."""
    for query, paths, cosines in zip(queries, found.paths, found.cosines.tolist(), strict=True):
        print(query)
        for path, cosine in zip(paths, cosines, strict=True):
            print(f"  {cosine:7.4f}  {path}")


def print_json(queries: Sequence[str], found: Found) -> None:
    """A list with an object for each query."""
    columns = zip(queries, found.paths, found.cosines.tolist(), found.rows.tolist(), strict=True)
    listed = [
        {"query": query, "found": [dict(zip(COLUMNS, row, strict=True)) for row in zip(*values, strict=True)]}
        for query, *values in columns
    ]
    print(json.dumps(listed, indent=1))


def print_csv(queries: Sequence[str], found: Found) -> None:
    """A line for each image that was found."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("query", *COLUMNS))
    for query, *values in zip(queries, found.paths, found.cosines.tolist(), found.rows.tolist(), strict=True):
        writer.writerows((query, *row) for row in zip(*values, strict=True))
