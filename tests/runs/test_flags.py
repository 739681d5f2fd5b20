"""One source says what a run has where nothing is given: help, dry run and run read it."""

from dataclasses import dataclass

import pytest

from loralloc.runs.arguments import DEFAULTS
from loralloc.runs.flags import field_docstrings, flags, left_to_us, unread
from loralloc.runs.settings import resolve

# What a run names itself, and what Transformers turns into a list.
DERIVED = {"output_dir", "report_to"}


def listed():
    return {flag.name: flag for group in flags().values() for flag in group}


def test_the_flags_stand_with_their_class():
    groups = flags()
    assert "allocation.num_rounds" in {flag.name for flag in groups["AllocationConfig"]}
    assert "learning_rate" in {flag.name for flag in groups["SFTConfig"]}
    assert "method.bottleneck" in {flag.name for flag in groups["method houlsby"]}


def test_the_defaults_are_those_of_a_run():
    settings, found = resolve([]), listed()
    for name in DEFAULTS.keys() - DERIVED:
        groups = (settings.script, settings.training, settings.model, settings.run)
        value = next(getattr(group, name) for group in groups if hasattr(group, name))
        assert found[name].default in (value, getattr(value, "value", value)), name
    assert found["learning_rate"].default == 2e-4
    assert found["lora_r"].default == 8
    assert found["allocation.num_rounds"].default == settings.allocation.num_rounds


def test_every_flag_says_what_it_is_for():
    assert [flag.name for flag in listed().values() if not flag.help] == []


def test_words_on_a_default_are_not_those_of_another():
    for name, flag in listed().items():
        if name in DEFAULTS:
            assert "efaults to" not in flag.help and "(default)" not in flag.help, name


def test_what_no_run_reads_is_no_flag():
    assert "dataset_streaming" in unread()
    assert not unread().keys() & listed().keys()


def test_docstrings_of_fields_are_inherited_and_in_one_line():
    @dataclass
    class Above:
        first: int = 1
        """Of the
        first."""

    @dataclass
    class Below(Above):
        second: int = 2
        """Of the second."""
        third: int = 3

    assert field_docstrings(Below) == {"first": "Of the first.", "second": "Of the second."}


@pytest.mark.parametrize("rate", (None, 1e-3))
def test_what_a_file_leaves_to_us_is_told_beside_trls_own(tmp_path, rate):
    path = tmp_path / "sft.yaml"
    path.write_text("lora_r: 4\n" + (f"learning_rate: {rate}\n" if rate else ""))
    words = left_to_us(resolve([], config=path))
    assert words.startswith(f"{path} leaves out")
    assert ("learning_rate 0.0002 (2e-05)" in words) == (rate is None)
    assert "lora_alpha 16 (32)" in words and "lora_r" not in words
    assert left_to_us(resolve([])) == ""
