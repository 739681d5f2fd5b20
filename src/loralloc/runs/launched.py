"""Processes that a launcher has started to train one model: `torchrun`, `accelerate launch`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(seconds=5)
"""How long a process that failed looks for the others."""


def count() -> int:
    """How many there are, by what the launcher says."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_main() -> bool:
    """Whether this one writes files and speaks for all."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def find_each_other() -> None:
    """Let several processes train one model on a CPU too, where Accelerate wants to be asked."""
    import torch

    if count() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # a launcher may have said no


def part() -> None:
    """End what connects the processes, once all have done what they do together."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


LEFT_ALONE = (
    "Another process of this run has ended, and the others cannot go on without it; see what it "
    "said, and go on from the last checkpoint with `--resume`."
)
"""What is said where a process died without a word."""


def is_left_alone(error: Exception) -> bool:
    """Whether an error is that of a connection to another process."""
    if count() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    known: Any = getattr(dist, "DistError", ())
    return isinstance(error, known) or "gloo" in str(error)


def is_first_to_fail() -> bool:
    """Whether this process, which has failed, is the first: the others fail for want of it.

    They are counted where all of them meet to find each other. Where that is gone, the process that
    kept it has failed before.
    """
    if count() == 1:
        return True
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return is_main()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store: Any = getattr(dist, "TCPStore")(  # noqa: B009 - not in every build
            address, int(port), is_master=False, timeout=PATIENCE
        )
        return bool(store.add(f"loralloc/failed/{attempt}", 1) == 1)
    except RuntimeError:
        return is_main()
