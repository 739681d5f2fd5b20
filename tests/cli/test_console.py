"""What strangers' files say is shown, and no terminal obeys it."""

import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from loralloc import cli
from loralloc.cli.console import Console, counted, tables_that_fit, visible

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


COLUMNS = ("method", "parameters, at first / at the end", "verdict", "p, examples")
ROWS = (
    ("parallel-adapter", "17,632 / 8,680", "inside the noise", "0.008"),
    ("lora", "8,704 / 8,704", "-", "-"),
)


@pytest.mark.parametrize(("width", "number"), [(36, 3), (55, 2), (80, 1)])
def test_tables_that_fit_break_no_cell_and_repeat_what_begins_a_row(width, number):
    tables = tables_that_fit("Title", COLUMNS, ROWS, width=width)
    assert len(tables) == number
    out = io.StringIO()
    for table in tables:
        Console(file=out, width=width).print(table)
    lines = out.getvalue().splitlines()
    for cell in (cell for row in ROWS for cell in row):
        assert any(cell in line for line in lines), cell
    assert sum(line.startswith("parallel-adapter ") for line in lines) == number
    assert sum("Title" in line for line in lines) == 1
    for word in " ".join(COLUMNS).split():
        assert word in out.getvalue().split(), word


def test_one_has_no_plural():
    assert [counted(number, "round") for number in (0, 1, 1680)] == [
        *("0 rounds", "1 round", "1,680 rounds"),
    ]


def test_numbers_end_where_their_column_does_and_texts_begin_there():
    (table,) = tables_that_fit(
        "", ("a", "b", "c"), [("x", "long", "1"), ("y", "s", "100")], width=80, texts=2
    )
    lines = [line.rstrip() for line in printed(table).splitlines() if line.strip()]
    assert lines[-2:] == ["x  long    1", "y  s     100"]
