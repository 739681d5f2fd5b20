"""Help answers at once: no verb imports a framework before it has work to do."""

import resource
import subprocess
import sys

import pytest

from loralloc.cli import VERBS, main

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
