"""Help answers at once: no verb imports a framework before it has work to do."""

import resource
import subprocess
import sys

import pytest

from loralloc.cli import VERBS, main
from loralloc.cli.help_text import HelpText

FRAMEWORKS = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "matplotlib")
NAMES = [module.__name__.rpartition(".")[2] for module in VERBS]


@pytest.mark.parametrize("words", (["--help"], ["train", "--help"]))
def test_help_takes_little_time(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "loralloc", *words], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert "usage: loralloc" in done.stdout
    assert used_s < 1.0  # half a second on a machine that does nothing else


def test_help_of_every_verb_imports_no_framework():
    script = f"""
import contextlib, io, sys
from loralloc.cli import main
for words in [["--help"], *([name, "--help"] for name in {NAMES})]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words)
print(sorted(set({FRAMEWORKS}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: loralloc {name}" in capsys.readouterr().out


@pytest.mark.parametrize("columns", (80, 120))
def test_no_line_of_a_help_is_wider_than_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("", *NAMES):
        with pytest.raises(SystemExit):
            main([name, "--help"] if name else ["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > columns] == [], name


def test_a_help_is_filled_its_lists_beside_their_names_and_examples_stay():
    text = """\
Words of a paragraph that
goes on.

list:
  --name N  what it is for, in words
            that go on
  --other   more

  loralloc train --task sst2 --dataset_name data/sst2
"""
    assert HelpText("x", width=28)._fill_text(text, 28, "").splitlines() == [
        "Words of a paragraph that",
        "goes on.",
        "",
        "list:",
        "  --name N  what it is for,",
        "            in words that go",
        "            on",
        "  --other   more",
        "",
        "  loralloc train --task sst2 --dataset_name data/sst2",
    ]


def test_every_verb_stands_on_one_line_with_what_it_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert set(NAMES) <= {words[0] for words in lines if len(words) > 2}


def test_the_flags_named_in_the_help_exist():
    import re

    from loralloc.cli.train import FLAGS
    from loralloc.runs.flags import flags

    known = {flag.name.removeprefix("allocation.") for group in flags().values() for flag in group}
    named = set(re.findall(r"^  --(?:allocation\.)?(\w+)", FLAGS, flags=re.MULTILINE))
    assert named and named <= known


def test_the_defaults_named_in_the_help_are_true():
    import re

    from loralloc.cli.train import FLAGS
    from loralloc.runs.settings import resolve

    settings = resolve([])
    defaults = {**vars(settings.allocation), **settings.given}
    named = dict(
        re.findall(r"^  --(?:allocation\.)?(\w+) .*\[([^\]]+)\]$", FLAGS, flags=re.MULTILINE)
    )
    named.pop("output_dir")
    assert len(named) >= 8
    for name, shown in named.items():
        value = defaults[name]
        same = float(shown) == value if isinstance(value, (int, float)) else shown == value
        assert same, name


@pytest.mark.parametrize("words", ([], ["--debug"]))
def test_the_bare_command_shows_the_verbs(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    verbs = {line.split()[0] for line in shown.splitlines() if line.startswith("    ")}
    assert set(NAMES) <= verbs


def test_the_version_is_the_packages(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"loralloc {version('loralloc')}\n"
