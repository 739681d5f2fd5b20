"""Checkpoints that say of themselves whether they are whole.

Files of a checkpoint are written one after the other, by PEFT, Transformers and others. Last of all
comes a list of them with their sizes and hashes. Where it is missing, a kill or a full disk came in
between; where it does not agree, something was changed since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.files import flush_file, flush_folder, read_json, write_text

logger = logging.getLogger(__name__)

SEAL = "files.json"
"""Sizes and hashes of all other files of a checkpoint; written last."""

BLOCK_BYTES = 2**20

CHECKPOINTS = "checkpoint-*"
"""Folders of what training goes on from, as Trainer names them."""


def seal(folder: Path) -> None:
    """Write down what a checkpoint holds, once all of it is on the disk.

    Raises:
        OSError: Something could not be written; the checkpoint does not count as whole.
    """
    (folder / SEAL).unlink(missing_ok=True)
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush_file(path)
            found[path.relative_to(folder).as_posix()] = _facts(path)
    flush_folder(folder)
    write_text(folder / SEAL, json.dumps(found, indent=1) + "\n")


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where it is as it was written."""
    path = folder / SEAL
    if not path.is_file():
        return f"it lacks {SEAL}, which is written last"
    try:
        sealed = read_json(path)
        facts = {str(name): (int(of["bytes"]), str(of["sha256"])) for name, of in sealed.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return f"its {SEAL} cannot be read"
    for name, (size, digest) in facts.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {SEAL} names {name!r:.60}, which is outside"
        if not file.is_file() or file.is_symlink():
            return f"it lacks {name}"
        if file.stat().st_size != size or _facts(file)["sha256"] != digest:
            return f"{name} is not as it was written"
    return ""


def newest_whole(folder: str | Path) -> Path | None:
    """The newest checkpoint in a folder that is whole; newer ones are named in the log.

    Returns:
        None where there is none.
    """
    for path in sorted(_checkpoints(Path(folder)), key=step_of, reverse=True):
        fault = fault_of(path)
        if not fault:
            return path
        if replicas.is_first():
            logger.warning("loralloc: %s is passed over: %s.", path, fault)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimiser steps taken before a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    One without a seal may come from a trainer that nothing drove; it has to be finished.

    Raises:
        ValueError: Saying what is wrong with it.
    """
    fault = fault_of(folder)
    if fault and not (folder / SEAL).is_file() and _is_finished(folder):
        return
    if fault:
        raise ValueError(
            f"Training cannot go on from {folder}: {fault}; name an earlier checkpoint, or give "
            "`resume_from_checkpoint=True` for the newest that is whole."
        )


def sealing(trainer: Trainer) -> Callable[..., None]:
    """The trainer's `_save_checkpoint`, which seals what it wrote before an older one goes.

    Other processes wait for the one that writes.
    """
    own = trainer._save_checkpoint

    def finish(limit: int | None, trial: Any) -> None:
        if not trainer.args.should_save:
            return
        where = Path(trainer._get_output_dir(trial=trial))
        newest = where / f"checkpoint-{trainer.state.global_step}"
        seal(newest)
        _rotate(newest, limit, best=trainer.state.best_model_checkpoint)

    def save_checkpoint(model: Any, trial: Any) -> None:
        args = trainer.args
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            own(model, trial)
        finally:
            args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        replicas.together(lambda: finish(limit, trial))

    return save_checkpoint


def _checkpoints(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.glob(CHECKPOINTS)
        if path.name.rpartition("-")[2].isdigit() and path.is_dir() and not path.is_symlink()
    ]


def _rotate(newest: Path, limit: int | None, *, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a limit, never the newest or the best.

    Trainer goes by the times of the folders, and a clock that is set back makes the newest the
    oldest. Later steps than the newest are an earlier run's.
    """
    if not limit or limit < 0:
        return
    kept = {newest.name, Path(best).name} if best else {newest.name}
    found = _checkpoints(newest.parent)
    ages = {path: (step_of(path) <= step_of(newest), step_of(path)) for path in found}
    old = sorted((path for path in found if path.name not in kept), key=ages.__getitem__)
    for path in old[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _is_finished(folder: Path) -> bool:
    """Whether Trainer's own last file is there and can be read."""
    try:
        return isinstance(json.loads((folder / "trainer_state.json").read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False
