"""The table of real servers in docs/serving.md is what `experiments/served.py` wrote."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_has_every_outcome():
    said = json.loads((ROOT / "experiments" / "results" / "served.json").read_text())
    expected = set()
    for server, found in said.items():
        if isinstance(found, dict) and server != "ranks":
            name = f"{server} {found['version']}" if "version" in found else server
            for form, outcome in found.items():
                if form != "version":
                    far = outcome.get("largest_logprob_difference", "not told")
                    expected.add((name, form, f"{outcome['same_text']} of 6", str(far)))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `?(.+?)`? \| (\d of 6) \| (\S.*?) \|$", page, re.MULTILINE)
    assert expected and set(rows) == expected
