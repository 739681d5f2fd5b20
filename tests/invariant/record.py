"""Record all runs anew, or those that are named: from the root of the repository

    PYTHONPATH=tests python -m invariant.record [NAME ...]

Only where a change is meant to change them; its message says why.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from invariant.runs import RUNS

FOLDER = Path(__file__).parent


def record(name: str) -> None:
    with TemporaryDirectory() as folder:
        trajectory = RUNS[name](Path(folder))
    text = json.dumps(trajectory, indent=1) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        record(name)
