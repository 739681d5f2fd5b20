"""The tables that `loralloc reproduce` left beside its runs, for the page on these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loralloc.experiments.reproduce import REPORT
from loralloc.report.folders import shown
from loralloc.report.tables import Table

LONGEST = 400
"""Characters of a cell or a note that are shown."""


def experiment_tables(folders: Iterable[Path]) -> list[Table]:
    """The tables of every experiment whose output folder is among some folders.

    What an experiment could not do stands below the last of its tables.

    Args:
        folders: Each may hold folders of experiments: `NAME/report.json` beside `cells`.

    Raises:
        ValueError: A report is not what `loralloc reproduce` writes; one sentence with its name.
    """
    paths = {
        path.resolve(): path
        for folder in folders
        for path in sorted(folder.glob(f"*/{REPORT}.json"))
    }
    found: list[Table] = []
    for path in paths.values():
        found += _tables(path, first=len(found) + 1)
    return found


def _tables(path: Path, *, first: int) -> list[Table]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        remarks = [shown(remark, longest=LONGEST) for remark in data["remarks"]]
        head = f"{data['experiment']} ({data['backbone']}, scale {data['scale']})"
        found = [
            _table(table, name=f"experiment-{number}", head=shown(head))
            for number, table in enumerate(data["tables"], start=first)
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is not a report of `loralloc reproduce` ({reason}); run the experiment again."
        ) from error
    if found and remarks:
        found[-1] = found[-1].with_notes(remarks)
    return found


def _table(data: Mapping[str, Any], *, name: str, head: str) -> Table:
    headings = [shown(cell, longest=LONGEST) for cell in data["columns"]]
    rows = [[shown(cell, longest=LONGEST) for cell in row] for row in data["rows"]]
    if any(len(row) != len(headings) for row in rows):
        raise ValueError("a row has not as many cells as there are headings")
    return Table(
        name=name,
        title=f"{head}: {shown(data['title'], longest=LONGEST)}",
        headings=headings,
        rows=rows,
        notes=[shown(note, longest=LONGEST) for note in data["notes"]],
    )
