"""Options where a test takes every method by its name: what one needs, or is quicker by."""

import json
import tempfile
from pathlib import Path

FOLDER = tempfile.TemporaryDirectory()
"""Of the files that methods read; gone with the process."""


def options(name: str) -> dict[str, str | float]:
    """The options that a method of this name is given."""
    if name == "eva":
        return {"tau": 0.8}  # its components settle in a few passes
    if name != "pattern":
        return {}
    path = Path(FOLDER.name) / "ranks.json"
    path.write_text(json.dumps({r".*\.1\..*": 2, ".*": 3}))
    return {"file": str(path)}
