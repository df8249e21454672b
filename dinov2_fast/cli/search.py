"""``dinov2-fast search``: the images of a folder of features that are nearest to query images."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dinov2_fast.cli.options import add_device, at_least, keywords
from dinov2_fast.cli.process import OK, SOME_FAILED

if TYPE_CHECKING:
    from dinov2_fast.curation.neighbours import Found

HELP = "find the images in a folder of features that are nearest to query images"
DESCRIPTION = """\
Finds, for each QUERY, the images in FEATURES whose features have the largest
cosine with its own. FEATURES is a folder that `dinov2-fast extract` wrote.

The features of a query are made as those in the folder were: by the model that
its manifest names, after the same preprocessing. Every image is compared, in
one pass that holds one shard in memory. Among equally near images the first in
the folder comes first. A query that is in the folder finds itself.

QUERY is an image, or anything that `dinov2-fast extract` takes for images.
"""
COLUMNS = ("path", "cosine", "row")  # row: of the image, in the folder
EPILOG = """\
examples:
  dinov2-fast search features/ cat.jpg
  dinov2-fast search features/ cat.jpg dog.jpg --k 3 --feature patch_mean
  dinov2-fast search features/ 'queries/*.jpg' --format csv

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some queries could not
be read and are left out, 130 interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("features", metavar="FEATURES", help="folder that `dinov2-fast extract` wrote")
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="images, or where they are")
    parser.add_argument("--k", type=at_least(1), default=10, metavar="N", help="images to find (default: 10)")
    parser.add_argument(
        "--feature", default="cls", metavar="NAME", help="a stored feature of one vector per image (default: cls)"
    )
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="(default: table)")
    model = parser.add_argument_group("the model, if the one that FEATURES names cannot be found")
    model.add_argument("--model", help="as for `dinov2-fast extract`; its weights must be those of FEATURES")
    model.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Searches; OK, or SOME_FAILED if some queries could not be read."""
    from dinov2_fast.curation.neighbours import search

    found = search(**keywords(args, without=("format",)), skip_unreadable=True)
    for path, error in found.unreadable.items():
        print(f"{path!r} is left out: {error}", file=sys.stderr)
    {"table": print_table, "json": print_json, "csv": print_csv}[args.format](found)
    print(f"{found.compared} images compared, {found.skipped} without features skipped", file=sys.stderr)
    return SOME_FAILED if found.unreadable else OK


def print_table(found: Found) -> None:
    """Prints each query, and below it cosines and paths."""
    for query, images in _by_query(found):
        print(query)
        for path, cosine, _ in images:
            print(f"  {cosine:7.4f}  {path}")


def print_json(found: Found) -> None:
    """Prints a list with an object for each query."""
    listed = [
        {"query": query, "found": [dict(zip(COLUMNS, image, strict=True)) for image in images]}
        for query, images in _by_query(found)
    ]
    print(json.dumps(listed, indent=1))


def print_csv(found: Found) -> None:
    """Prints a line for each image that was found."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("query", *COLUMNS))
    for query, images in _by_query(found):
        writer.writerows((query, *image) for image in images)


def _by_query(found: Found) -> Iterator[tuple[str, list[tuple[str, float, int]]]]:
    """Each query, and the path, cosine and row of the images that were found for it."""
    for query, *columns in zip(found.queries, found.paths, found.cosines.tolist(), found.rows.tolist(), strict=True):
        yield query, list(zip(*columns, strict=True))
