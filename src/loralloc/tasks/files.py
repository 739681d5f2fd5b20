"""One file of rows as a table: JSON, JSON Lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_PARQUET_MAGIC = b"PAR1"


def read_table(path: Path) -> Dataset:
    """Read all rows of a file into memory; which reader is told by the end of its name.

    Values are taken as they are written: a date stays text, "NA" stays text, and all of CSV is
    text. A field that some rows lack is None in those. A column may mix types: who reads it
    names the offending row.

    Raises:
        ValueError: If the file cannot be read as what its name says; one sentence with the file
            and, where there is one, the line.
    """
    reader = _READERS[path.suffix.lower()]
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8.") from error


def _read_json(path: Path) -> Dataset:
    """Read an array of objects, or, where the file does not begin with "[", JSON Lines."""
    with path.open(encoding="utf-8-sig") as file:
        is_array = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if not is_array:
            return _read_json_lines(path)
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}, is not valid JSON: {error.msg}."
            ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, item {number}, must be a JSON object and is {row!r:.60}.")
    return _table(path, rows)


def _read_json_lines(path: Path) -> Dataset:
    """Read one object a line; blank lines are passed over."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                _refuse_one_object(path)
                raise ValueError(
                    f"{path}, line {number}, is not valid JSON: {error.msg} (column {error.colno})."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}, must be a JSON object and is {row!r:.60}."
                )
            rows.append(row)
    return _table(path, rows)


def _refuse_one_object(path: Path) -> None:
    """Say of a file that is one object over several lines what is wanted instead."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        return  # not valid JSON, as the reader says by the line
    if not isinstance(value, dict):
        return
    raise ValueError(
        f"{path} holds one JSON object over several lines, where rows are wanted as an array of "
        f"objects or as one object a line{where_rows_may_be(value)}."
    )


def where_rows_may_be(value: Mapping[str, object]) -> str:
    """A hint, such as "; they may be what it has under 'data'", or nothing."""
    keys = [
        repr(key)
        for key, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    ]
    return f"; they may be what it has under {' or '.join(keys)}" if keys else ""


def _read_csv(path: Path) -> Dataset:
    """Read comma-separated values whose first line names the columns."""
    limit = csv.field_size_limit(2**31 - 1)  # a field may be a long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                columns: list[list[str]] = [[] for _ in header]
                for record in reader:
                    if not record:
                        continue
                    if len(record) != len(header):
                        raise ValueError(
                            f"{path}, line {reader.line_num}, has {len(record)} fields where the "
                            f"header has {len(header)}."
                        )
                    for column, value in zip(columns, record, strict=True):
                        column.append(value)
            except csv.Error as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}, is not valid CSV: {error}."
                ) from error
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its header: {', '.join(header)}.")
    return _dataset(path, dict(zip(header, columns, strict=True)))


def _read_parquet(path: Path) -> Dataset:
    """Read Parquet through the cache of `datasets`; label names in its schema are kept."""
    from datasets import Dataset

    with path.open("rb") as file:
        is_parquet = file.read(4) == _PARQUET_MAGIC
    if not is_parquet:
        raise ValueError(f"{path} is not a Parquet file.")
    try:
        return Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow's and datasets' own classes have no common base
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as Parquet: {reason}.") from error


def _table(path: Path, rows: Sequence[Mapping[str, object]]) -> Dataset:
    names = dict.fromkeys(name for row in rows for name in row)
    return _dataset(path, {name: [row.get(name) for row in rows] for name in names})


def _dataset(path: Path, columns: Mapping[str, Sequence[object]]) -> Dataset:
    from datasets import Dataset

    try:
        return Dataset.from_dict(dict(columns), on_mixed_types="use_json")
    except (ValueError, TypeError, OverflowError) as error:  # what pyarrow's errors derive from
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as a table: {reason}.") from error


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
