"""What a method cannot do without, where a test takes every method by its name."""

import json
import tempfile
from pathlib import Path

FOLDER = tempfile.TemporaryDirectory()
"""Of the files that methods read; gone with the process."""


def options(name: str) -> dict[str, str]:
    """The options that a method of this name has to be given."""
    if name != "pattern":
        return {}
    path = Path(FOLDER.name) / "ranks.json"
    path.write_text(json.dumps({r".*\.1\..*": 2, ".*": 3}))
    return {"file": str(path)}
