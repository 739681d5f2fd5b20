"""What strangers' files say is shown, and no terminal obeys it."""

import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from loralloc import cli
from loralloc.cli.console import Console, visible

HOSTILE = "a\x1b]0;gone\x9b2J\u202eb\ud800"
SHOWN = "a\\x1b]0;gone\\x9b2J\\u202eb\\ud800"


def printed(value, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=200, **options).print(value)
    return out.getvalue()


@pytest.mark.parametrize("value", (HOSTILE, Text(HOSTILE)), ids=("text", "Text"))
def test_what_a_terminal_would_obey_is_written_out(value):
    assert printed(value).strip() == visible(HOSTILE) == SHOWN


def test_in_a_table_too():
    table = Table()
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    shown = printed(table)
    assert shown.count("a\\x1b]0;gone") == 2
    assert visible(shown) == shown


def test_our_own_colours_still_reach_it():
    assert "\x1b[1mbold\x1b[0m" in printed(Text("bold", "bold"), force_terminal=True)


@pytest.mark.parametrize("text", ("runs/[red]x[/]", "[/nothing]", ":smile:", "two\nlines\tand"))
def test_brackets_are_no_markup(text):
    assert printed(text, tab_size=1).rstrip("\n").split() == text.split()


def test_every_verb_prints_so():
    """Nothing under cli/ takes Rich's console itself."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        taken = re.findall(r"from rich\.console import (.*)", path.read_text())
        assert path.name == "console.py" or all("Console" not in t.split(", ") for t in taken), path
