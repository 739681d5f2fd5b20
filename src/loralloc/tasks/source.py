"""Where rows come from: the embedded demo, a file, a folder or the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.tasks.demo_grammar import demo_rows
from loralloc.tasks.files import SUFFIXES, read_table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DEMO_NAME = "demo"
SPELLINGS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""How the three splits are called in the wild."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
            the train split; a folder with one such file a split; or the name of a data set on
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
    return [_file_offer(file.stem, file) for file in files]


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
