"""A process that carries out cells: each a line of JSON in, its outcome a line of JSON out.

It ends when nothing more can come in, so also when the process that started it is no more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.work import Outcome, attempt


def main() -> None:
    """Serve standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    from loralloc.runs.quiet import prepare_process

    prepare_process()
    for line in sys.stdin:
        outcome = attempt(Cell.from_data(json.loads(line)))
        answers.write(json.dumps(as_data(outcome), default=float) + "\n")
        answers.flush()


def as_data(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its cell, as JSON has it."""
    return {"result": outcome.result, "failure": outcome.failure, "ran": outcome.ran}


def from_data(cell: Cell, data: Mapping[str, Any]) -> Outcome:
    """What `as_data` gave, of this cell."""
    return Outcome(cell=cell, **data)


if __name__ == "__main__":
    main()
