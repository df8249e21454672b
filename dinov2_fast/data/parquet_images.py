"""Images in a column of a Parquet file, as Hugging Face's datasets store them: structs of ``bytes`` and ``path``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from dinov2_fast.data.files import MAX_BYTES, ImageError, ReadError, open_file, read_bytes, reason, shown
from dinov2_fast.errors import InvalidValueError

COLUMN = "image"


def holds_images(path: str) -> bool:
    """Whether the column ``image`` holds images, not paths: structs with ``bytes``, or binary values."""
    import pyarrow as pa

    schema = _metadata(path).schema.to_arrow_schema()
    if COLUMN not in schema.names:
        return False
    type = schema.field(COLUMN).type
    if pa.types.is_struct(type):
        return type.get_field_index("bytes") >= 0
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def rows(path: str) -> range:
    """The numbers of the rows. What this process remembers of Parquet files is dropped: they may have changed.

    Raises:
        InvalidValueError: a row group, most of which is in memory at a time, has more than `MAX_BYTES` of images; or
            the file is damaged, or no Parquet file.
    """
    metadata = _metadata(path)
    largest = max((_size(metadata.row_group(group)) for group in range(metadata.num_row_groups)), default=0)
    if largest > MAX_BYTES:
        raise InvalidValueError(
            f"{shown(path)!r} has a row group with {largest} bytes of images, the limit is {MAX_BYTES}. Write it anew "
            "with smaller row groups."
        )
    _starts.cache_clear()
    _row_group.cache_clear()
    return range(metadata.num_rows)


def _size(group: Any) -> int:
    """The number of bytes of the images in a row group."""
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == COLUMN)


def read_row(path: str, row: int) -> bytes:
    """The bytes of the image in a row, or of the file that the row names instead; fast if rows are read in order.

    Raises:
        ReadError: one of the files is missing or unreadable.
        ImageError: the row is empty, or the Parquet file is damaged.
    """
    try:
        starts = _starts(path)
        group = bisect_right(starts, row) - 1
        value = _value(path, group, row - starts[group])
    except (OSError, MemoryError) as error:
        raise ReadError(reason(error)) from error
    except Exception as error:
        raise ImageError(f"damaged in the Parquet file: {reason(error)}") from error
    content, linked = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is None and linked:
        return read_bytes(linked)
    if content is None:
        raise ImageError("no image in this row")
    return bytes(content)


def _value(path: str, group: int, index: int) -> Any:
    for _ in range(2):  # continue after the last row that was read, or start again
        for number, value in _row_group(path, group):
            if number == index:
                return value.as_py()
            if number > index:
                break
        _row_group.cache_clear()
    raise IndexError(f"row group {group} has no row {index}")


@lru_cache(maxsize=1)
def _row_group(path: str, group: int) -> Iterator[tuple[int, Any]]:
    """The images of a row group, one at a time: a small dictionary may expand to many large values."""

    def read() -> Iterator[tuple[int, Any]]:
        import pyarrow.parquet as pq

        with open_file(path) as file:
            batches = pq.ParquetFile(file).iter_batches(
                batch_size=1, row_groups=[group], columns=[COLUMN], use_threads=False
            )
            yield from enumerate(batch.column(0)[0] for batch in batches)

    return read()


@lru_cache(maxsize=16)
def _starts(path: str) -> list[int]:
    """The first row of each row group."""
    metadata = _metadata(path)
    return list(accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups - 1)), initial=0))


def _metadata(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            return pq.read_metadata(file)
    except pa.ArrowException as error:
        raise InvalidValueError(f"{shown(path)!r} is damaged, or no Parquet file ({reason(error)}).") from error
