"""Makes docs/quickstart.ipynb from docs/quickstart.md: python pages/notebook.py."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "quickstart.md", DOCS / "quickstart.ipynb"


def notebook(page: str) -> dict:
    """The page's text as Markdown cells and its Python as code cells, as Jupyter reads them."""
    cells = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n", page, flags=re.DOTALL)):
        if not part.strip():
            continue
        cell = {
            "id": f"cell-{len(cells)}",
            "metadata": {},
            "source": part.strip().splitlines(keepends=True),
        }
        if i % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell |= {"cell_type": "markdown"}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    made = notebook(PAGE.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
