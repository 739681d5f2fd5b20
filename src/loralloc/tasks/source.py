"""Where rows come from: the embedded demo, a file, a folder or the Hub.

A file is JSON, JSON Lines, CSV or Parquet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.tasks.demo_grammar import demo_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


import csv
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

DEMO_NAME = "demo"
SPELLINGS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""How the three splits are called in the wild."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


_SHARD = re.compile(r"(?P<name>.+)-\d+-of-(?P<count>\d+)")
"""The stem of a file that holds a part of a split, as the Hub names it."""

_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one split, and where they came from."""

    name: str
    """One of train, validation and test."""

    dataset: Dataset
    """The rows; at least one."""

    source: str
    """The file, or the Hub data set and its split: what an error message names."""


def load_splits(
    data: str | Path,
    *,
    config: str | None = None,
    split_names: Mapping[str, str] | None = None,
) -> dict[str, Split]:
    """Load the splits of a data set, in the order train, validation, test.

    Args:
        data: "demo", the embedded set; a file (.json, .jsonl, .csv or .parquet), which becomes
            the train split; a folder with one such file a split, or several
            named NAME-00000-of-00002 and so on; or the name of a data set on
            the Hub. A local path comes before a Hub name. A folder called demo is "./demo".
        config: The configuration of a Hub data set that has several.
        split_names: The splits to load, as this package's name -> the source's own name, for
            instance `{"train": "train_sft"}`. If None, whichever of the three are there, under
            any of their usual spellings (`SPELLINGS`).

    Raises:
        ValueError: If nothing can be loaded from there, a split asked for is missing, or a split
            has no rows; one sentence.
    """
    unknown = set(split_names or ()) - set(SPELLINGS)
    if unknown:
        raise ValueError(
            f"split_names has the unknown key '{min(unknown)}'; it maps train, validation or "
            "test to a name in the source."
        )
    path = Path(data).expanduser()
    is_local = data == DEMO_NAME or path.exists()
    if is_local and config is not None:
        raise ValueError(
            f"'{data}' is not on the Hub, so the configuration '{config}' has no meaning for it."
        )
    if data == DEMO_NAME:
        place, offers = "The demo set", _demo_offers()
    elif path.is_dir():
        place, offers = f"The folder {path}", _folder_offers(path)
    elif path.exists():
        place, offers = f"The file {path}", [_file_offer("train", path)]
    else:
        title = f"{data} ({config})" if config else str(data)
        place, offers = f"The Hub data set {title}", _hub_offers(str(data), config, title)

    splits = {}
    for name, offer in _chosen(place, offers, split_names).items():
        splits[name] = Split(name=name, dataset=offer.load(), source=offer.source)
        if len(splits[name].dataset) == 0:
            raise ValueError(f"The {name} split is empty: {offer.source} has no rows.")
    return splits


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A split that a place has, not yet read."""

    own_name: str
    source: str
    load: Callable[[], Dataset]


def _chosen(
    place: str, offers: list[_Offer], split_names: Mapping[str, str] | None
) -> dict[str, _Offer]:
    """Pick the splits asked for by name, or those with a usual name."""
    chosen = {}
    for ours, spellings in SPELLINGS.items():
        if split_names is not None:
            spellings = (split_names[ours],) if ours in split_names else ()
        matches = [offer for offer in offers if offer.own_name in spellings]
        if len(matches) > 1:
            listed = ", ".join(offer.source for offer in matches)
            raise ValueError(f"{place} has several {ours} splits ({listed}): keep or name one.")
        if matches:
            chosen[ours] = matches[0]
        elif split_names is not None and ours in split_names:
            raise ValueError(f"{place} has no split '{split_names[ours]}'; {_found(offers)}.")
    if not chosen:
        raise ValueError(f"{place} has no split named train, validation or test; {_found(offers)}.")
    return chosen


def _found(offers: list[_Offer]) -> str:
    return "found: " + (", ".join(offer.own_name for offer in offers) or "nothing to read")


def _demo_offers() -> list[_Offer]:
    from datasets import Dataset

    return [
        _Offer(own_name=name, source=f"demo, split {name}", load=partial(Dataset.from_list, rows))
        for name, rows in demo_rows().items()
    ]


def _folder_offers(folder: Path) -> list[_Offer]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    offers = []
    shards: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file.stem):
            shards.setdefault((shard["name"], shard["count"]), []).append(file)
        else:
            offers.append(_file_offer(file.stem, file))
    for (name, count), parts in shards.items():
        source = f"{folder} ({parts[0].name} and {len(parts) - 1} more)"
        load = partial(_join, parts, int(count))
        offers.append(_Offer(own_name=name, source=source, load=load))
    return sorted(offers, key=lambda offer: offer.own_name)


def _join(parts: Sequence[Path], count: int) -> Dataset:
    """All rows of a split in several files, in the order of their names.

    Raises:
        ValueError: Some of the files are missing, or their columns differ.
    """
    from datasets import concatenate_datasets

    if len(parts) != count:
        raise ValueError(
            f"{parts[0].parent} has {len(parts)} of the {count} files of which {parts[0].name} is "
            "one; add the others."
        )
    tables = [read_table(part) for part in parts]
    for part, table in zip(parts, tables, strict=True):
        if table.column_names != tables[0].column_names:
            raise ValueError(
                f"{part} has the columns {', '.join(table.column_names)}, and {parts[0].name} "
                f"{', '.join(tables[0].column_names)}; parts of one split need the same."
            )
    return concatenate_datasets(tables)


def _file_offer(own_name: str, path: Path) -> _Offer:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} cannot be read: its name ends in none of {', '.join(SUFFIXES)}.")
    return _Offer(own_name=own_name, source=str(path), load=partial(read_table, path))


def _hub_offers(name: str, config: str | None, title: str) -> list[_Offer]:
    loaded = _load_from_hub(name, config)
    return [
        _Offer(own_name=own, source=f"{title}, split {own}", load=partial(loaded.__getitem__, own))
        for own in loaded
    ]


def _load_from_hub(name: str, config: str | None) -> DatasetDict:
    """Ask the Hub, or what it has already sent to this machine, for all splits."""
    looked = f"There is no file or folder '{name}'"
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith(SUFFIXES):
        raise ValueError(f"{looked}.")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"{looked}, and the Hub has no data set of that name that you may read; "
            f"'{DEMO_NAME}' is always there."
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"{looked}, and the Hub cannot be reached to look for a data set of that name; "
            f"without a network, give a local path or '{DEMO_NAME}'."
        ) from error
    except Exception as error:  # the Hub client's and the builders' classes have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"The Hub data set {name} cannot be loaded: {reason}.") from error


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
                f"{path}, line {error.lineno}, is not valid JSON: {error.msg}; mend it there."
            ) from error
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
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
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                _refuse_one_object(path)
                raise ValueError(
                    f"{path}, line {number}, is not valid JSON: {error.msg} (column "
                    f"{error.colno}); mend or delete the line."
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, cannot be read ({error}).") from error
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
    except (ValueError, RecursionError):
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
