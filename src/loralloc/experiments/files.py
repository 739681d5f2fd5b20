"""Files that are whole or not there at all, and folders that one process at a time works in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from loralloc.allocation import files


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a file of JSON in one step."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=float) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None where there is none."""
    return files.read_json(path) if path.is_file() else None


def locked(folder: Path) -> FileLock:
    """A lock on a folder, to be held while its run is carried out.

    A process that was killed holds none; one that lives on after the one that started it is waited
    for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(folder.name + ".lock"))
