import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    """No test of this folder reaches the network or leaves tables in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def write(tmp_path):
    """Write a file below tmp_path: text as it is, bytes as they are, rows as JSON Lines."""

    def write(name: str, content: str | bytes | list[dict]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
