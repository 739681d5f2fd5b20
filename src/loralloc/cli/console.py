"""The one place that writes to the terminal."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """A console on standard output, as wide as the terminal."""
    return Console()
