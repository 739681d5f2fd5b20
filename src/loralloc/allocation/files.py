"""Files of a run: written so that a kill leaves the old or the new, read as a stranger's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""

MOST_JSON_BYTES = 2**28
"""A file of JSON that is longer is none of a run's."""


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: written beside it, flushed to the disk, renamed.

    Args:
        path: The file; its folder is there.
        text: All that it is to hold.

    Raises:
        OSError: It cannot be written, as on a full disk; the file is as it was.
    """
    # Named by the process: two that write the same file do not write into one another's.
    scratch = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def refuse_links(paths: Iterable[Path]) -> None:
    """Refuse links where a run writes, as a folder from somebody else may have.

    Raises:
        ValueError: Naming the first one.
    """
    for path in paths:
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, so that what is written there would go "
                "elsewhere; put the file itself in its place, or remove it."
            )


def flush_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where a system can say so."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: The file is not there, too long, or holds something else; it is named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there, or no file; take it from the run again.")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, and no run writes over "
            f"{MOST_JSON_BYTES:,}; take the file from the run again."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}); take the file from the run again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds a {type(data).__name__} and no object; take the file from the run again."
        )
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors.

    Raises:
        ValueError: The file is not there, cut short or changed; it is named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there, or no file; take it from the run again.")
    from safetensors.torch import load_file  # a page of ranks is drawn without PyTorch

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it was cut short or changed; take the file from the "
            "run again."
        ) from error


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that is one, of a size that a float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found
