"""Lists of images: text files with a path in each line, and tables with a column of paths."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain

from dinov2_fast.data.files import ending, is_url, open_file, reason, shown
from dinov2_fast.errors import InvalidValueError

COLUMNS = ("path", "image", "url", "file_name")  # in order of priority


def read_list(path: str) -> Iterator[str]:
    """The paths in a list, in order; "" for an empty cell of a table.

    Paths in a column ``file_name``, as Hugging Face's image folders have it, are relative to the folder of the list.
    Bytes that are not UTF-8 are kept, as `os.fsdecode` does it.

    Raises:
        InvalidValueError: a table has no column of paths, or the list is damaged; for CSV and JSON it names the line.
        OSError: it cannot be read.
    """
    try:
        yield from READERS[ending(path)](path)
    except OSError as error:
        raise OSError(f"{shown(path)!r} cannot be read: {reason(error)}.") from error
    except Exception as error:
        raise InvalidValueError(f"The list {shown(path)!r} cannot be read: {reason(error)}.") from error


def _open_text(path: str, newline: str) -> io.TextIOWrapper:
    """Opens text in UTF-8, or in UTF-16 with a byte order mark, which PowerShell writes."""
    file = open_file(path)
    is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    file.seek(0)
    return io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", "surrogateescape", newline=newline)


def _lines(path: str) -> Iterator[str]:
    """The lines that are not empty."""
    with _open_text(path, newline="\n") as text:
        for line in text:
            if entry := line.rstrip("\r\n"):
                yield entry


def _csv_paths(path: str) -> Iterator[str]:
    """The column of paths in a table.

    The columns of a .tsv are separated by tabs, those of a .csv by the most frequent in its header of comma, semicolon
    and tab.
    """
    with _open_text(path, newline="") as text:
        header = text.readline()
        separators = "\t" if ending(path) == ".tsv" else ",;\t"
        rows = csv.reader(chain([header], text), delimiter=max(separators, key=header.count), strict=True)
        try:
            names = next(rows, [])
            name = _column(names)
            column = names.index(name)
            for row in filter(None, rows):
                if len(row) <= column:
                    raise InvalidValueError(f"the row has {len(row)} columns, and {name!r} is number {column + 1}")
                yield _from_list(path, name, row[column])
        except (csv.Error, ValueError) as error:
            raise InvalidValueError(f"line {rows.line_num}: {error}") from error


def _json_paths(path: str) -> Iterator[str]:
    """The paths in JSON objects, one in each line."""
    with _open_text(path, newline="\n") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise InvalidValueError('a line must be an object such as {"path": "a.jpg"}')
                name = _column(list(entry))
                if not isinstance(entry[name] or "", str):
                    raise InvalidValueError(f"{name!r} is not a string")
                os.fsencode(entry[name] or "")  # refuses escapes that no path can hold
            except (ValueError, RecursionError) as error:
                raise InvalidValueError(f"line {number}: {error}") from error
            yield _from_list(path, name, entry[name] or "")


def _parquet_paths(path: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(path) as file:
        table = pq.ParquetFile(file)
        name = _column(table.schema_arrow.names)
        for batch in table.iter_batches(columns=[name]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                raise InvalidValueError(f"the column {name!r} holds {values.type}, not strings")
            for value in values.cast(pa.large_binary()).to_pylist():
                yield _from_list(path, name, os.fsdecode(value or b""))


def _column(names: Sequence[str]) -> str:
    """The name of the column of paths."""
    found = next((name for name in COLUMNS if name in names), None)
    if found is None:
        wanted, there = " or ".join(map(repr, COLUMNS)), ", ".join(map(repr, names))
        raise InvalidValueError(f"there must be a column {wanted}; there are {there or 'no columns'}")
    return found


def _from_list(path: str, column: str, entry: str) -> str:
    if column == "file_name" and entry and not is_url(entry):
        return os.path.join(os.path.dirname(path), entry)
    return entry


READERS = {".txt": _lines, ".csv": _csv_paths, ".tsv": _csv_paths, ".jsonl": _json_paths, ".parquet": _parquet_paths}
