"""The script of `loralloc completion`, run by the shell."""

import shutil
import subprocess

import pytest

from loralloc.cli import VERBS

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="bash is not here")


@pytest.fixture
def completed(call, tmp_path):
    path = tmp_path / "script"
    answer = call("completion", "bash")
    assert (answer.code, answer.err) == (0, "")
    path.write_text(answer.out)

    def completed(*words):
        script = (
            f'source {path}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _loralloc; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    return completed


def test_verbs_and_flags_are_completed(completed):
    names = {module.__name__.rpartition(".")[2] for module in VERBS}
    assert set(completed("loralloc", "")) == names
    assert completed("loralloc", "pred") == ["predict"]
    assert completed("loralloc", "predict", "--out") == ["--output"]
    flags = completed("loralloc", "train", "--allocation.new")
    assert set(flags) == {f"--allocation.new{name}" for name in ("borns", "_state", "_rows")}
    assert completed("loralloc", "train", "--dry-r") == ["--dry-run"]
    assert completed("loralloc", "eval", "--allocation.new") == []
    assert completed("loralloc", "eval", "ru") == []  # the shell's own: files


def test_zsh_reads_the_same_script(call):
    bash, zsh = (call("completion", shell).out for shell in ("bash", "zsh"))
    assert zsh.endswith(bash) and "bashcompinit" in zsh.removesuffix(bash)
