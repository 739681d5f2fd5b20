"""What suits this machine: dtype, and how many threads that wait how."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")
WAIT_POLICY = "OMP_WAIT_POLICY"


def let_idle_threads_sleep() -> str:
    """Let threads that wait for each other sleep, unless the user has chosen; before PyTorch loads.

    OpenMP's threads spin while they wait. Where another process wants the cores too, the ones that
    spin keep away those that are waited for, and both processes all but stand still. Alone, a run
    loses nothing by sleeping. OpenMP reads its variables when PyTorch loads it, once; what this
    process starts inherits them.

    Returns:
        The policy in force, and whose choice it is.
    """
    chosen = os.environ.get(WAIT_POLICY)
    if chosen:
        return f"{chosen.lower()} (from {WAIT_POLICY})"
    os.environ[WAIT_POLICY] = "passive"
    return "passive (set by loralloc)"


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the device has arithmetic for it, else float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or ARM's BF16)."""
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes):
        return True
    return CPUINFO.is_file() and " bf16 " in CPUINFO.read_text(errors="ignore")


def accelerator() -> torch.device:
    """The machine's accelerator, or the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def physical_cores() -> int | None:
    """Cores of this machine, counting those that share one once; None where it cannot be told."""
    entries = [entry for entry in cpu_entries() if "core id" in entry]
    if entries:
        return len({(entry.get("physical id"), entry["core id"]) for entry in entries})
    import torch

    # Not in torch 2.6. Off Linux nothing else tells without a subprocess.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    count = capabilities.get("num_physical_cores")
    return None if count is None else int(count)


def use_physical_cores() -> int:
    """Let PyTorch have one thread a physical core that this process may use, or its share of them.

    Two threads on one core share its arithmetic units, and matrix products gain nothing from the
    second. `OMP_NUM_THREADS`, where it is set, decides instead.

    Returns:
        The threads in use.
    """
    import torch

    cores = physical_cores()
    if cores is not None and not os.environ.get("OMP_NUM_THREADS"):
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or "1")  # processes that a launcher started
        torch.set_num_threads(max(1, min(cores, allowed) // here))
    return torch.get_num_threads()


def cpu_entries() -> list[dict[str, str]]:
    """One mapping for each logical core that Linux lists; empty elsewhere."""
    if not CPUINFO.is_file():
        return []
    blocks = CPUINFO.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")
    lines = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{key.strip(): value.strip() for key, _, value in block} for block in lines]


def process_peak_bytes() -> int | None:
    """The most memory that this process has held; None on Windows, which does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
