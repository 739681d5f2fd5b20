"""Starting processes, and comparing what they came to with what a single one did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORLD = Path(__file__).with_name("world.py")


def start(checks: str, folder: Path, numbers) -> dict[int, list[dict]]:
    """By number of processes, what each of them found; see `world.py`."""
    done = subprocess.run(
        [sys.executable, WORLD, checks, folder, *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {
        number: [
            json.loads((folder / f"{number}-{index}.json").read_text()) for index in range(number)
        ]
        for number in numbers
    }


def assert_alike(found, wanted, *, rel: float = 1e-3, abs: float = 3e-4, where: str = "") -> None:
    """Numbers equal to rounding, all else equal."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), f"{where}: {found.get('error', '')}"
        for key in wanted:
            assert_alike(found[key], wanted[key], rel=rel, abs=abs, where=f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_alike(one, other, rel=rel, abs=abs, where=f"{where}/{i}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rel, abs=abs), where
    else:
        assert found == wanted, where
