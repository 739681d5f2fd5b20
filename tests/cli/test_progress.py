import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from loralloc.allocation.record import Round
from loralloc.cli.progress import Progress

MODULES = {f"model.layers.{n}.self_attn.{k}_proj": 2 for n in range(2) for k in "qv"}
FIRST, *_, LAST = MODULES


def entry(**changes) -> Round:
    usual = dict(
        round=2,
        step=50,
        epoch=0.5,
        score="screened",
        s_full=-1.0,
        s_base=-2.0,
        terms={},
        verified={},
        settled=True,
        pruned={FIRST: [0, 1]},
        added={LAST: 2},
        ranks_before=MODULES,
        ranks_after={**MODULES, FIRST: 0, LAST: 4},
        churn=0.25,
        lost=0,
        spare=0,
        seconds=1.24,
    )
    return Round(**{**usual, **changes})


@pytest.fixture
def progress():
    return Progress(Console(file=io.StringIO(), width=200))


def shown(progress) -> str:
    return progress.console.file.getvalue()


def test_a_round_names_its_step_what_went_and_what_came(progress):
    progress.show_round(entry())
    (line,) = shown(progress).splitlines()
    assert line.startswith("round 2") and line.endswith("1.2 s")
    for words in ("step 50", "pruned q", "given to v", "churn 25%"):
        assert words in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(added={}, lost=2), "no receiver"),
        (dict(added={}, lost=2), "2 lost"),
        (dict(settled=False), "first order"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(changes, words, progress):
    progress.show_round(entry(**changes))
    assert words in shown(progress)
    ordinary = Progress(Console(file=io.StringIO(), width=200))
    ordinary.show_round(entry())
    assert words not in shown(ordinary)


def test_the_first_round_has_no_ranks_given_before(progress):
    progress.show_round(entry(round=1, churn=None))
    assert "churn" not in shown(progress)


@pytest.mark.parametrize(("is_terminal", "num_lines"), [(True, 3), (False, 1)])
def test_a_round_is_broken_between_words_where_a_person_reads_it(is_terminal, num_lines):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules = {f"model.layers.0.{kind}": 8 for kind in kinds}
    crowded = entry(
        ranks_before=modules,
        pruned={name: [0, 1, 2, 3] for name in modules},
        added={name: 4 for name in modules},
    )
    wide = Progress(Console(file=io.StringIO(), width=400))
    wide.show_round(crowded)
    screen = Console(
        file=io.StringIO(), width=80, force_terminal=is_terminal, color_system=None, _environ={}
    )
    progress = Progress(screen)
    progress.show_round(crowded)
    lines = shown(progress).splitlines()
    assert len(lines) == num_lines
    assert max(map(len, lines)) <= 80 or not is_terminal
    assert shown(progress).split() == shown(wide).split()


def test_losses_are_lines_where_there_is_no_bar(progress):
    from transformers import TrainerState

    added = []
    trainer = SimpleNamespace(add_callback=added.append, remove_callback=lambda callback: None)
    progress.take_over(trainer)
    (callback,) = added
    state = TrainerState(global_step=3, max_steps=10)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.25})
    callback.on_log(None, state, None, logs={"eval_loss": 1.5, "eval_accuracy": 0.75})
    callback.on_train_end(None, state, None)
    lines = shown(progress).splitlines()
    assert "step 3  loss 1.250" in lines
    assert "step 3  development loss 1.5000  accuracy 0.750" in lines
    assert any(line.startswith("3 steps in ") for line in lines)
