"""The run folder: what lies in it under which name, what it holds, and how it is cleared."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loralloc.allocation.files import PARTIAL, read_json, refuse_links, write_text
from loralloc.allocation.record import FILE_NAME as RECORD
from loralloc.methods.in_place import CONFIG_NAME as METHOD_CONFIG
from loralloc.methods.in_place import WEIGHTS_NAME as WEIGHTS
from loralloc.tasks.conversations import Common
from loralloc.training.drive import STATE_NAME as METHOD_STATE
from loralloc.training.seal import CHECKPOINTS, newest_whole

CLAIM = "run.json"
"""Says that the names of this list are the run's own here, and whether the run has ended. It is
written first, into a folder that has none of them, so that whatever has one later is the run's."""

SETTINGS = "settings.json"
"""Every setting with its source."""

METRICS = "metrics.jsonl"
"""Every log entry, a line each."""

LABELS = "labels.json"
"""Names of a classifier's labels, in the order of its logits."""

CONVERSATION = "conversation.json"
"""What all conversations of the training data have in common; there only if these were rows."""

CHAT_TEMPLATE = "chat_template.jinja"
"""The tokenizer's chat template, which an overwritten run may have had and the new one not."""

CARD = "README.md"
"""What was trained and how to load it."""

PEFT_CONFIG = "adapter_config.json"
"""PEFT's description of an adapter."""

MOST_NAMED = 4
"""Files that a message names."""

DEMO = "demo.json"
"""What the demo measured before and after."""

ANSWERS = "answers.jsonl"
"""A run's answers to the questions of MT-Bench."""

EVALUATIONS = "eval"
"""Folder of predictions and figures on test data."""

REPLACED = "replaced"
"""Folder of the finished run that was here, until the one that replaces it has ended."""

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "additional_chat_templates"),
)
"""Files and folders of a tokenizer."""

LOCK = "run.lock"
"""Held by the process that trains."""

RUN_MARKS = (CLAIM, SETTINGS, RECORD, METHOD_CONFIG, PEFT_CONFIG)
"""Files of which a folder that holds a run has one."""

FILES = (
    *(SETTINGS, METRICS, LABELS, CONVERSATION, CHAT_TEMPLATE, CARD, DEMO, ANSWERS),
    *(PEFT_CONFIG, METHOD_CONFIG, WEIGHTS, RECORD),
    *(f"{METHOD_STATE}.json", f"{METHOD_STATE}.safetensors", *TOKENIZER),
)
"""Files that a run, or what looks at it, writes into its folder."""

FOLDERS = (CHECKPOINTS, EVALUATIONS)
"""Folders likewise."""


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in RUN_MARKS)


def check_free(folder: Path) -> None:
    """Refuse a folder that holds files of somebody else's under names that a run writes, or none.

    Raises:
        ValueError: Naming some of them, or the file in the way.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"`--output_dir` is {folder}, and {path} is a file; name a folder, or move the "
                "file away."
            )
    if (folder / CLAIM).is_file():
        return
    found = sorted(path.name for path in _entries(folder))
    if found:
        named = ", ".join(found[:MOST_NAMED]) + (" and others" if len(found) > MOST_NAMED else "")
        raise ValueError(
            f"{folder} holds {named}, which no run of this version wrote and a run would replace; "
            "name another `--output_dir`, or move them away."
        )


def claim(folder: Path, *, inputs: Mapping[str, str] | None = None, num_processes: int = 1) -> None:
    """Begin a run in a folder that is free: from now on the names of a run are its own there.

    Args:
        folder: The run folder; made if it is not there.
        inputs: Hashes of what the run is trained on.
        num_processes: How many train it.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_claim(folder, ended=False, inputs=inputs or {}, num_processes=num_processes)


def claimed_inputs(folder: Path) -> dict[str, str]:
    """Hashes of what the run in a folder began with; empty where they are not known."""
    inputs = read_json(folder / CLAIM).get("inputs", {})
    return inputs if isinstance(inputs, dict) else {}


def claimed_processes(folder: Path) -> int:
    """How many processes the run in a folder was last begun or gone on with."""
    number = read_json(folder / CLAIM).get("processes", 1)
    return number if isinstance(number, int) and number > 0 else 1


def has_ended(folder: Path) -> bool:
    """Whether a run in a folder has ended and all of it is there."""
    try:
        return bool(read_json(folder / CLAIM)["ended"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def end(folder: Path) -> None:
    """Mark the run as whole, for the same readers everywhere; the one that it replaced goes."""
    mode = (folder / CLAIM).stat().st_mode
    for path in _entries(folder):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)  # safetensors' files are for their owner alone
    _forget_unfinished(folder)
    inputs, number = claimed_inputs(folder), claimed_processes(folder)
    _write_claim(folder, ended=True, inputs=inputs, num_processes=number)
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Make room for a run in the place of another.

    A run that has ended is kept in `replaced/` until the new one has; one that has not, goes.
    Nothing is touched that has no name of a run's, and no link is followed.

    Raises:
        ValueError: The folder is not a run's.
    """
    if not holds_run(folder):
        return
    if not (folder / CLAIM).is_file():
        check_free(folder)
    _forget_unfinished(folder)
    keeps = has_ended(folder)
    aside = folder / REPLACED
    if keeps:
        if (aside / CLAIM).exists():  # else a kill came between, and the rest follows now
            shutil.rmtree(aside)
        aside.mkdir(exist_ok=True)
    for path in [*_entries(folder), folder / CLAIM]:
        if keeps:
            path.rename(aside / path.name)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _entries(folder: Path) -> list[Path]:
    """What a folder holds under the names of a run, but for the claim."""
    named = [folder / name for name in FILES]
    found = [path for path in named if path.exists() or path.is_symlink()]
    if (folder / EVALUATIONS).exists():
        found.append(folder / EVALUATIONS)
    numbered = [p for p in folder.glob(CHECKPOINTS) if p.name.rpartition("-")[2].isdigit()]
    return found + numbered


def _forget_unfinished(folder: Path) -> None:
    """Remove what kills left of files that were being written."""
    for path in folder.glob(f"*{PARTIAL}"):
        name, _, process = path.name.removesuffix(PARTIAL).rpartition(".")
        if name in (*FILES, CLAIM) and process.isdigit():
            path.unlink()


def _write_claim(
    folder: Path, *, ended: bool, inputs: Mapping[str, str], num_processes: int
) -> None:
    owns = [*FILES, EVALUATIONS, CHECKPOINTS.replace("*", "<step>"), REPLACED]
    who = {"process": os.getpid(), "host": socket.gethostname()}
    data: dict[str, Any] = {"ended": ended, **who, "processes": num_processes}
    data |= {"inputs": dict(inputs), "owns": owns}
    write_text(folder / CLAIM, json.dumps(data, indent=1) + "\n")


def locked(folder: Path) -> FileLock:
    """A lock on a folder, for as long as a run trains in it; a process that was killed holds none.

    Raises:
        ValueError: Another process holds it, or a link is where the run would write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(_written(folder))
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another process trains in {folder}{_by(folder)}; wait until it ends, or name another "
            "`--output_dir`."
        ) from None
    return lock


def _written(folder: Path) -> Iterator[Path]:
    """What a run may write over in a folder."""
    for path in [*_entries(folder), *(folder / name for name in (CLAIM, LOCK, REPLACED))]:
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from path.rglob("*")


def _by(folder: Path) -> str:
    try:
        claim = read_json(folder / CLAIM)
        return f" (process {int(claim['process'])} on {str(claim['host'])!r})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def checkpoint_to_resume(folder: Path) -> Path:
    """The checkpoint that `--resume` goes on from.

    Raises:
        ValueError: The run was ended before its first checkpoint was whole.
    """
    if not (folder / CLAIM).is_file():
        raise ValueError(
            f"{folder} holds no {CLAIM}, so no run that was begun there; name the folder of a run."
        )
    found = newest_whole(folder)
    if found is None:
        raise ValueError(
            f"The run in {folder} has no whole checkpoint yet, so there is nothing to resume; "
            "start again with `--overwrite`, which keeps nothing of it."
        )
    return found


def forget_metrics(folder: Path, *, after: int) -> None:
    """Drop the entries of steps that a resumed run takes again."""
    path = folder / METRICS
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut short by a kill
        kept = [line for line in lines if json.loads(line)["step"] <= after]
        write_text(path, "".join(kept))


def save_labels(folder: Path, labels: Sequence[str]) -> None:
    """Write the names of a classifier's labels, which PEFT does not keep."""
    text = json.dumps(list(labels), ensure_ascii=False)
    write_text(folder / LABELS, text + "\n")


def saved_labels(folder: Path) -> list[str]:
    """The names that `save_labels` wrote.

    Raises:
        ValueError: There are none.
    """
    path = folder / LABELS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {LABELS}, so its labels have no names.")
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("they are no list of texts")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no names of labels ({error}); take the file from the run again."
        ) from error
    return labels


def save_conversation(folder: Path, conversation: Common) -> None:
    """Write what the training data's conversations have in common, for answering alike."""
    text = json.dumps(conversation.as_data(), indent=1, ensure_ascii=False)
    write_text(folder / CONVERSATION, text + "\n")


def saved_conversation(folder: Path) -> Common | None:
    """What `save_conversation` wrote; None of a run that was not trained on conversations."""
    path = folder / CONVERSATION
    if not path.is_file():
        return None
    try:
        return Common(**read_json(path))
    except TypeError as error:
        raise ValueError(
            f"{path} does not say what conversations have in common ({error}); take the file from "
            "the run again."
        ) from error


def config_of(folder: Path) -> Path | None:
    """The file that describes a folder's adapter: PEFT's, or a method's own."""
    paths = (folder / PEFT_CONFIG, folder / METHOD_CONFIG)
    return next((path for path in paths if path.is_file()), None)


def name_base(folder: Path, name: str) -> None:
    """Let an adapter's description name its backbone so, in the place of where it was loaded."""
    path = config_of(folder)
    assert path is not None, "the adapter has been saved"
    config = {**read_json(path), "base_model_name_or_path": name}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def adapter_config(folder: Path) -> dict[str, Any]:
    """What describes a folder's adapter.

    Raises:
        ValueError: The folder holds no trained adapter.
    """
    path = config_of(folder)
    if path is None:
        raise ValueError(
            f"{folder} holds no {PEFT_CONFIG} and no {METHOD_CONFIG}, so no trained adapter; "
            "name the folder of a finished run."
        )
    return read_json(path)
