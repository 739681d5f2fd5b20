"""`loralloc env`: what a bug report needs to know about this machine."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loralloc import __version__
from loralloc.cli.console import Console
from loralloc.runs import machine

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
)
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

Fact = str | int | bool | list[str] | None
"""A value of the report; None where it cannot be told."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "env",
        help="describe this machine for a bug report",
        description="Versions, hardware and caches: paste this into a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    from rich.table import Table
    from rich.text import Text

    found = facts(wait_policy=args.wait_policy)
    if args.json:
        data = {name.lower().replace(" ", "_"): value for name, value in found.items()}
        Console().print_json(data=data)
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.items():
        table.add_row(name, Text(_words(value)))
    Console().print(table)
    return 0


def facts(*, wait_policy: str) -> dict[str, Fact]:
    """Every fact by name, in the order of the report; it holds on a broken installation too.

    Args:
        wait_policy: How idle threads wait, as `let_idle_threads_sleep` says.
    """
    found: dict[str, Fact] = {
        "loralloc": __version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
    found.update({name: _version(name) for name in PACKAGES})
    found["CPU"] = _cpu_model()
    hardware: dict[str, Callable[[], Fact]] = {
        "physical cores": machine.physical_cores,
        "torch threads": _torch_threads,
        "CPU capability": _cpu_capability,
        "bf16 arithmetic on this CPU": machine.cpu_has_bf16,
        "GPUs": _gpus,
    }
    for name, ask in hardware.items():
        found[name] = _attempt(ask)
    found["OpenMP wait policy"] = wait_policy
    found["Hub offline"] = _hub_is_offline()
    found["model cache"] = _attempt(_cache_dir)
    found["built-in models cached"] = _attempt(_cached_models)
    found["WordNet"] = _attempt(_wordnet)
    return found


def _attempt(ask: Callable[[], Fact]) -> Fact:
    # A bug report is asked for when something is broken: what fails becomes a line of it.
    try:
        return ask()
    except Exception as error:
        return f"not known ({type(error).__name__}: {error})"


def _words(value: Fact) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str | None:
    names = [entry["model name"] for entry in machine.cpu_entries() if "model name" in entry]
    return names[0] if names else platform.processor() or None


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _gpus() -> list[str]:
    import torch

    if torch.backends.mps.is_available():
        return ["Apple GPU (MPS)"]
    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in every]


def _hub_is_offline() -> bool:
    """Whether huggingface_hub will be offline, by the variables that it reads."""
    value = next((os.environ[name] for name in OFFLINE_SWITCHES if os.environ.get(name)), "")
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _cache_dir() -> str:
    """The folder with the home folder as "~": the report is for others to read."""
    from loralloc.runs.models import cache_dir

    return _without_home(cache_dir())


def _without_home(folder: Path) -> str:
    home = Path.home()
    return str(Path("~") / folder.relative_to(home) if folder.is_relative_to(home) else folder)


def _cached_models() -> list[str]:
    from loralloc.runs.models import BUILT_IN, is_cached

    return [name for name in BUILT_IN if is_cached(name)]


def _wordnet() -> str:
    """The synonyms that METEOR needs: their version and folder, or how to install them."""
    from loralloc.evaluation.wordnet import find_wordnet, read_version

    try:
        folder = find_wordnet()
    except FileNotFoundError as error:
        return f"{error} METEOR is missing without it."
    return f"{read_version(folder)} in {_without_home(folder)}"
