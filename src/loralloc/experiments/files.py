"""Files that are whole or not there at all, and folders that one process at a time works in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: two that write the same file do not write into one another's.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a file of JSON in one step."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=float) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None where there is none."""
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def locked(folder: Path) -> FileLock:
    """A lock on a folder, to be held while its run is carried out.

    A process that was killed holds none; one that lives on after the one that started it is waited
    for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(folder.name + ".lock"))
