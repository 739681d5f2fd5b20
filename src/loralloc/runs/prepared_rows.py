"""Rows that are tokenised once for all runs of a fleet, which read the same ones alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from datasets import Dataset

_kept: ContextVar[dict[str, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def shared_rows(kept: dict[str, Any]) -> Iterator[None]:
    """Let the runs that are prepared within share what `once` gives.

    Args:
        kept: What has been prepared, by the rows that it was made of; it is added to.
    """
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def once(rows: Any, prepare: Callable[[], Any]) -> Any:
    """What `prepare` makes of rows; within `shared_rows` the same for the same rows.

    Args:
        rows: A data set; one that is no `Dataset` is always prepared.
        prepare: Tokenises them.
    """
    kept = _kept.get()
    if kept is None or not isinstance(rows, Dataset):
        return prepare()
    text = json.dumps(rows.to_dict(), sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in kept:
        kept[key] = prepare()
    return kept[key]
