"""The readers of what may come from anybody, as fuzzing calls them: bytes in, a refusal or nothing.

What a reader may raise is a sentence. Anything else is a fault, and so are a hang, a file outside
of the folder, a connection, and a process that nobody asked for.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hostile.inputs import made
from safetensors.torch import save_file

from loralloc.adapters import folder as adapter_folder
from loralloc.adapters import stranger
from loralloc.adapters.folder import read_adapter
from loralloc.adapters.lint import lint
from loralloc.allocation import files
from loralloc.allocation.record import Record
from loralloc.methods.pattern import read_ranks
from loralloc.report.folders import read_run
from loralloc.report.grid import RankGrid, read_allocation
from loralloc.report.rounds import moves_of
from loralloc.runs.folder import claimed_inputs, has_ended
from loralloc.runs.permissions import check_granted_again
from loralloc.runs.settings import saved, saved_defaults, saved_values
from loralloc.tasks.alpaca import alpaca_example
from loralloc.tasks.catalog import TASKS
from loralloc.tasks.conversations import check_options, read_messages, template_options
from loralloc.tasks.source import DEMO_NAME
from loralloc.training.seal import fault_of

SENTENCES = (ValueError, FileNotFoundError)
"""What readers raise; never a class below that the language itself raises, `NOT_OURS`."""

NOT_OURS = (UnicodeError, json.JSONDecodeError)

NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]
WIDTH = 4


def _round(number: int, before: list[int], after: list[int], pruned: dict, added: dict) -> dict:
    return {
        "round": number,
        "step": 3 * number,
        "epoch": number / 2,
        "score": "gradient",
        "s_full": -2.5,
        "s_base": -2.75,
        "terms": {
            term: {n: [0.5] * r for n, r in zip(NAMES, before, strict=True)}
            for term in ("without", "only")
        },
        "verified": {NAMES[0]: [0]},
        "settled": False,
        "pruned": pruned,
        "added": added,
        "ranks_before": dict(zip(NAMES, before, strict=True)),
        "ranks_after": dict(zip(NAMES, after, strict=True)),
        "churn": None if number == 1 else 0.5,
        "lost": 0,
        "spare": 0,
        "seconds": 0.1,
        "worth": {},
    }


RECORD = {
    "version": 1,
    "config": {"num_rounds": 2, "newborns": "compete", "score": "gradient"},
    "initial_ranks": dict.fromkeys(NAMES, 2),
    "round_steps": [3, 6],
    "note": "",
    "rounds": [
        _round(1, [2, 2, 2, 2], [1, 3, 2, 2], {NAMES[0]: [1]}, {NAMES[1]: 1}),
        _round(2, [1, 3, 2, 2], [1, 2, 2, 3], {NAMES[1]: [2]}, {NAMES[3]: 1}),
    ],
    "frontier": [
        {
            **{"step": 3, "parameters": 64, "ranks": 8, "modules": 4, "loss": 2.5},
            **{"worse_by": 0.0, "standard_error": 0.0, "kept": True},
        }
    ],
}

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/model",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 1},
    "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
    "megatron_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

SETTINGS = {
    name: {"value": value, "source": source}
    for name, value, source in (
        ("model_name_or_path", "some/model", "flag"),
        ("dataset_name", "data", "flag"),
        ("task", None, "default"),
        ("method", "alora", "default"),
        ("trust_remote_code", False, "default"),
        ("push_to_hub", False, "default"),
        ("report_to", ["none"], "default"),
        ("attn_implementation", None, "default"),
        ("model_init_kwargs", None, "default"),
        ("allocation.score", "gradient", "default"),
        ("allocation.num_rounds", 8, "file sft.yaml"),
        ("learning_rate", 2e-4, "default"),
    )
}

CLAIM = {"ended": True, "process": 1, "host": "here", "inputs": {"data": "0a"}, "owns": ["a"]}

SEAL = {"adapter_config.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc2"}}

ROWS = [
    {"sentence": "fine", "label": 1, "idx": 0},
    {"sentence1": "a", "sentence2": "b", "label": 0},
    {"question": "is it", "sentence": "it is", "label": 1},
    {"question": "is it", "passage": "it is", "label": True},
    {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0},
    {
        "passage": "Ann met Bob.",
        "query": "@placeholder met Bob",
        "entities": ["Ann", "Bob"],
        "answers": ["Ann"],
    },
    {
        "question": "who",
        "context": "Ann met Bob.",
        "answers": {"text": ["Ann"], "answer_start": [0]},
        "id": "1",
    },
    {"meaning_representation": "name[Alimentum]", "human_reference": "It is."},
    {
        "instruction": "Do.",
        "input": "",
        "output": "Done.",
        "system": "Be.",
        "history": [["a", "b"]],
    },
    {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["c"]},
    {
        "messages": [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [{"type": "function"}]},
        ],
        "tools": "[]",
        "chat_template_kwargs": {"thinking": False},
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


@dataclass(frozen=True)
class Target:
    """A reader and what it reads."""

    whole: list[Any]
    """Documents that it takes."""

    read: Callable[[Path, bytes], None]
    """Reads a document that was put into a folder."""


def _record(folder: Path, content: bytes) -> None:
    path = folder / "allocation.json"
    path.write_bytes(content)
    for read in (_whole_record, _shown_record, lambda f: read_ranks(f / path.name, NAMES)):
        refused(read, folder)


def _whole_record(folder: Path) -> None:
    record = Record.load(folder)
    births = record.births()
    assert {name: len(of) for name, of in births.items()} == record.ranks
    record.young(10)
    record.churn({})
    assert isinstance(record.churn_note, str)
    json.dumps(record.as_data())


def _shown_record(folder: Path) -> None:
    data = read_allocation(folder)
    RankGrid.from_allocation(data, scored=True)
    RankGrid.from_allocation(data)
    moves_of(data)


stranger.MOST_S = 0.2  # a hundred inputs a second would wait for their ten seconds


def _adapter(folder: Path, content: bytes) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(content)
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        tensors = {}
        for name, rank in zip(NAMES, (1, 2, 2, 2), strict=True):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.ones(rank, WIDTH)
            tensors[f"{key}.lora_B.weight"] = torch.ones(WIDTH, rank)
        save_file(tensors, weights)
    refused(lambda f: lint(read_adapter(f)), folder)
    refused(lambda f: read_ranks(f / path.name, NAMES), folder)


def _settings(folder: Path, content: bytes) -> None:
    first, *others = (folder / name for name in ("settings.json", "run.json", "files.json"))
    first.write_bytes(content)
    for other in others:
        if not other.exists():
            other.hardlink_to(first)
    for read in (saved, saved_defaults, claimed_inputs, has_ended, fault_of):
        refused(read, folder)
    refused(lambda f: check_granted_again(f, saved_values(f), {}), folder)
    refused(lambda f: read_run(f, name="run"), folder)


def _rows(folder: Path, content: bytes) -> None:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(row, dict):
        return
    for name, task in TASKS.items():
        if name != DEMO_NAME:
            refused(task.example, row)
    refused(alpaca_example, row)
    refused(check_options, row)
    if _is_told(check_options, row):
        template_options(row)
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list):
            refused(lambda r, c=column: read_messages(r[c], c), row)


TARGETS = {
    "allocation.json": Target([RECORD], _record),
    "adapter_config.json": Target([CONFIG], _adapter),
    "settings": Target([SETTINGS, CLAIM, SEAL], _settings),
    "task-rows": Target(ROWS, _rows),
}


def hasten() -> None:
    """Let what costs most of an input's time be done once: for a process that does nothing else."""
    stranger._fault_of = functools.cache(stranger._fault_of)
    adapter_folder.read_tensors = functools.cache(adapter_folder.read_tensors)
    files.json = SimpleNamespace(loads=functools.lru_cache(maxsize=1)(json.loads))


def refused(read: Callable[[Any], object], given: Any) -> None:
    """Call a reader, which may refuse in a sentence.

    Raises:
        AssertionError: It refused in another way than by a sentence of ours.
    """
    try:
        read(given)
    except NOT_OURS as error:
        raise AssertionError(f"{type(error).__name__} is not ours: {error}") from error
    except SENTENCES as error:
        words = str(error)
        assert len(words.split()) >= 4, f"no sentence: {words!r}"
        assert len(words) < 2000, f"{len(words)} characters: {words[:80]!r}"


def _is_told(read: Callable[[Any], object], given: Any) -> bool:
    try:
        read(given)
    except SENTENCES:
        return False
    return True


def fuzzed(name: str, data: bytes, folder: Path) -> None:
    """Let the readers of a target read what bytes make.

    Raises:
        BaseException: They do not do what readers may.
    """
    target = TARGETS[name]
    with nothing_outside(folder):
        target.read(folder, made(data, target.whole))


_GUARD: list[Path] = []
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod"}
_FORBIDDEN = {"socket.connect", "os.system", "os.exec", "shutil.rmtree"}


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _GUARD:
        return
    if event == "open" and (_writes(args[1]) or args[2] & (os.O_WRONLY | os.O_RDWR)):
        # A number is a pipe of the process that tries expressions.
        inside = isinstance(args[0], int) or _GUARD[0] in Path(os.fsdecode(args[0])).parents
        assert inside or args[0] == os.devnull, f"{args[0]} was opened for writing"
    elif event in _CHANGES:
        assert _GUARD[0] in Path(os.fsdecode(args[0])).parents, f"{event} {args[0]}"
    elif event == "os.posix_spawn":  # from Python 3.13 on, of the process that tries expressions
        assert args[0] == sys.executable, args[0]
    elif event in _FORBIDDEN:
        raise AssertionError(f"{event} {args}")


def _writes(mode: Any) -> bool:
    return isinstance(mode, str) and any(sign in mode for sign in "wax+")


@contextmanager
def nothing_outside(folder: Path):
    """Fail where something is written outside of a folder, or connected with."""
    global _watches
    if not _watches:
        sys.addaudithook(_watch)
        _watches = True
    _GUARD.append(folder)
    try:
        yield
    finally:
        _GUARD.pop()


_watches = False
