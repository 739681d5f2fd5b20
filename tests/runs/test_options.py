"""One table says which run reads which option, and what a run does not read is refused."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import transformers
import trl

import loralloc
from loralloc.runs.arguments import GROUPS
from loralloc.runs.options import (
    CHECKPOINTING,
    READ_BY,
    UNCHANGED,
    check_conditions,
    check_head_options,
    check_options,
)
from loralloc.runs.run import HEADS
from loralloc.runs.settings import resolve

FIELDS = {f.name for group in GROUPS for f in dataclasses.fields(group) if f.init}
READ = {name: reading for name, reading in READ_BY.items() if not (reading.never or reading.inert)}
OF_TRAINER = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
OTHER_NAMES = {"gradient_checkpointing_kwargs": f"{CHECKPOINTING}_kwargs"}
"""Old names of options, which Transformers reads under the new one."""


def source(package, *patterns):
    """The code of some files of a package."""
    folder = Path(package.__file__).parent
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    assert paths
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


TRAINER = source(transformers, "trainer*.py", "training_args.py", "integrations/*.py")
SFT = source(trl, "trainer/sft_trainer.py")
CALLED = source(trl, "trainer/utils.py", "scripts/utils.py")
OURS = source(loralloc, "runs/*.py", "runs/heads/*.py", "training/*.py")


@pytest.fixture(scope="module")
def defaults():
    return resolve({})


@pytest.fixture
def giving(defaults):
    """Settings in which an option is given, whatever its value; others may be set."""

    def giving(name, **others):
        groups = {
            field.name: dataclasses.replace(getattr(defaults, field.name))
            for field in dataclasses.fields(defaults)
            if field.name in ("script", "model", "mixture", "run")
        }
        groups["training"] = copy.copy(defaults.training)
        for other, value in others.items():
            holder = next(group for group in groups.values() if hasattr(group, other))
            setattr(holder, other, value)
        return dataclasses.replace(
            defaults, **groups, given={name: object()}, sources={name: "flag"}
        )

    return giving


def test_every_option_is_in_the_table_and_nothing_else():
    assert READ_BY.keys() == FIELDS


@pytest.mark.parametrize("name", [n for n, reading in READ.items() if not reading.follows])
def test_every_option_is_read_where_the_table_says(name):
    """By name, in the code of ours and of the trainers, which is beyond the lists of options."""
    places = OURS + CALLED
    if name in OF_TRAINER:
        places += TRAINER
    if READ[name].heads == ("lm",):
        places += SFT
    assert re.search(rf"""(\.|, "){OTHER_NAMES.get(name, name)}\b""", places)


@pytest.mark.parametrize("name", [n for n, reading in READ_BY.items() if reading.never])
def test_what_no_run_reads_is_refused_with_the_reason(name, giving):
    with pytest.raises(ValueError, match=rf"`{name}` has no effect here: .*; leave it out\."):
        check_options(giving(name))


def test_an_option_that_a_newer_library_has_is_refused_and_not_listed(giving, monkeypatch):
    from loralloc.runs.flags import flags

    monkeypatch.delitem(READ_BY, "packing")
    with pytest.raises(ValueError, match="`packing` has no effect here: this version of loralloc"):
        check_options(giving("packing"))
    assert "packing" not in {flag.name for group in flags().values() for flag in group}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", READ)
def test_an_option_is_refused_by_the_heads_that_do_not_read_it(name, head, giving):
    settings = giving(name)
    if READ[name].follows or head not in READ[name].heads:
        with pytest.raises(ValueError, match=f"`{name}` is ") as refused:
            check_head_options(settings, HEADS[head])
        assert f"the {head} head" in str(refused.value)
    else:
        check_head_options(settings, HEADS[head])


CONDITIONS = [(name, condition) for name in READ for condition in READ[name].where]


@pytest.mark.parametrize(("name", "condition"), CONDITIONS)
def test_an_option_is_read_with_others_only(name, condition, giving):
    off = {
        option: False if not values else "none of them" for option, values in READ_BY[name].where
    }
    with pytest.raises(ValueError, match=f"`{name}` is read only with .*; give that too, or leave"):
        check_conditions(giving(name, **off))
    option, values = condition
    check_conditions(giving(name, **off | {option: values[0] if values else True}))


@pytest.mark.parametrize("name", [n for n in READ if READ[n].unless])
def test_an_option_that_another_replaces_is_refused(name, giving):
    other = READ[name].unless
    with pytest.raises(ValueError, match=f"`{name}` is not read where `{other}` is given"):
        check_options(giving(name, **{other: "something"}))
    check_options(giving(name, **{other: None}))


@pytest.mark.parametrize("name", [n for n, reading in READ_BY.items() if reading.inert])
def test_what_is_taken_without_being_read_does_no_harm(name, giving):
    settings = giving(name)
    check_options(settings)
    check_conditions(settings)
    for head in HEADS.values():
        check_head_options(settings, head)


@pytest.mark.parametrize("head", HEADS)
def test_what_changes_nothing_is_no_mistake(head):
    """A YAML may well spell out the defaults, of whatever trainer."""
    kept = ("lora_task_type", "output_dir", "use_peft", "debug")
    options = {
        name: value
        for name, value in UNCHANGED.items()
        if name not in kept and isinstance(value, bool | int | float | str)
    }
    settings = resolve(options)
    check_options(settings)
    check_head_options(settings, HEADS[head])
    check_conditions(settings)


@pytest.mark.parametrize("head", HEADS)
def test_pefts_type_of_task_follows_from_the_head(head):
    right = HEADS[head].task_type.value
    check_head_options(resolve({"lora_task_type": right}), HEADS[head])
    for wrong in {"CAUSAL_LM", "SEQ_CLS", "NONSENSE"} - {right}:
        words = f"`lora_task_type` is '{wrong}', and follows from the {head} head: it is '{right}'"
        with pytest.raises(ValueError, match=words):
            check_head_options(resolve({"lora_task_type": wrong}), HEADS[head])


def test_a_protocols_own_values_do_not_make_an_option_unread():
    settings = resolve({"protocol": "paper", "eval_steps": 5})
    check_options(settings)
    later = settings.with_defaults({"eval_strategy": "steps"}, source="protocol paper")
    check_conditions(later)
    with pytest.raises(ValueError, match=r"only with `eval_strategy` 'steps' \(it is 'epoch'\)"):
        check_conditions(settings)
