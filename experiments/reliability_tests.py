"""Runs the tests of what is promised of runs, then every other slow test, and counts them.

Of what is promised all tests run, those of `make test` too. Writes
experiments/results/reliability_tests.json and docs/reliability.md.

Run: python experiments/reliability_tests.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from reliability_page import PAGE, PROMISED, ROOT, TESTS, page

SLOW = "reliability or slow"


def main() -> int:
    """Run, count, write."""
    promised = [f"tests/{name}" for names in TESTS.values() for name in names]
    # Those of several processes, which wait for each other, one after the other.
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "promised": _by_file(_cases(promised)),
        "others": _counted(_cases(["-m", SLOW, *(f"--ignore={name}" for name in promised)])),
    }
    PROMISED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    failed = [*found["others"]["failed"]]
    failed += [name for of in found["promised"].values() for name in of["failed"]]
    for name in failed:
        sys.stdout.write(f"failed: {name}\n")
    return int(bool(failed))


def _cases(words: Sequence[str]) -> list[ElementTree.Element]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto"]
        reported = [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*pytest, *reported, *words], cwd=ROOT, env=environment, check=False)
        return list(ElementTree.parse(report).getroot().iter("testcase"))


def _by_file(cases: Sequence[ElementTree.Element]) -> dict[str, Any]:
    by_file: dict[str, list[ElementTree.Element]] = {}
    for case in cases:
        by_file.setdefault(case.get("file", "").removeprefix("tests/"), []).append(case)
    return {name: _counted(some) for name, some in sorted(by_file.items())}


def _counted(cases: Sequence[ElementTree.Element]) -> dict[str, Any]:
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ENDS}
    failed = [*kinds["failure"], *kinds["error"]]
    return {
        "tried": len(cases) - len(kinds["skipped"]),
        "skipped": len(kinds["skipped"]),
        "failed": [f"{case.get('file')}::{case.get('name')}" for case in failed],
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
    }


ENDS = ("failure", "error", "skipped")
"""How a case may end, beside well."""


if __name__ == "__main__":
    sys.exit(main())
