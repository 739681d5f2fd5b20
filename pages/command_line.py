"""Writes docs/cli.md from the parsers: python pages/command_line.py."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from loralloc.cli import _parser
from loralloc.methods.catalog import METHODS
from loralloc.runs.flags import flags

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

Written by `make pages` from the parsers; not by hand. `loralloc VERB --help` prints the same, and
`loralloc train --help-all` besides every flag that `train`, `sweep` and `search` take from TRL's
`SFTConfig`, `ModelConfig` and `ScriptArguments`, with the default that a run has.

Exit codes: 0; 1 where `lint` finds something; 2 for bad input, with one sentence on the error
stream (`loralloc --debug VERB ...` shows the traceback); 130 when interrupted.
"""


def page() -> str:
    """Every verb with its flags, and the options of runs, allocation and methods."""
    (verbs,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in verbs._choices_actions}
    parts = [HEAD]
    for name, parser in verbs.choices.items():
        parts.append(f"## loralloc {name}\n\n{_described(parser.description or helps[name])}\n")
        actions = [action for action in parser._actions if action.dest != "help"]
        parts.append(_table((_shown(action), action.help or "") for action in actions))
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    groups = flags()
    for group, words in OURS.items():
        rows = ((f"`--{f.name}`{_default(f.default)}", f.help) for f in groups[group])
        parts.append(f"## {words}\n\n{_table(rows)}")
    parts.append("## Options of methods\n\nOne without a default is chosen by the budget.\n")
    parts.append("| method | options [default] |\n|---|---|")
    for name in METHODS:
        own = (f"`--{f.name}`{_default(f.default)}" for f in groups[f"method {name}"])
        parts[-1] += f"\n| `{name}` | {', '.join(own) or '-'} |"
    return "\n".join([*parts, ""])


OURS = {
    "RunArguments": "Flags of a run that are not TRL's",
    "AllocationConfig": "Flags of an allocation",
}
"""What of `train --help-all` is ours and stands here, with its heading."""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns; nothing where there are no rows."""
    lines = [f"| {flag} | {_cell(words) or '-'} |" for flag, words in rows]
    return "\n".join(["| flag | what it does |", "|---|---|", *lines, ""]) if lines else ""


def _described(words: str) -> str:
    """A description as a sentence, or as it is where it is laid out in lines."""
    words = words.replace("%%", "%").strip()
    if "\n  " in words:
        return f"```text\n{words}\n```"
    return _cell(words).rstrip(".") + "."


def _default(value: object) -> str:
    """A default as YAML would have it, in brackets."""
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f" [{value}]" if value != "null" else ""


def _shown(action: argparse.Action) -> str:
    """A flag or an argument with what it takes."""
    name = ", ".join(action.option_strings) or action.metavar or action.dest
    if action.choices:
        taken = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.nargs == 0:
        taken = ""
    else:
        taken = action.metavar or action.dest.upper()
    taken = " ".join(taken) if isinstance(taken, tuple) else taken
    return f"`{name} {taken}`".replace(" `", "`") if action.option_strings else f"`{taken}`"


def _cell(words: str) -> str:
    """Help in a cell of a table."""
    return re.sub(r"\s+", " ", words.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
