import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from loralloc.allocation.record import Round
from loralloc.cli.progress import Progress, in_time
from loralloc.cli.token_count import TokenCount

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


@pytest.mark.parametrize("width", (80, 120))
def test_a_round_is_two_aligned_lines_where_a_person_reads_it(width):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules = {f"model.layers.0.{kind}": 8 for kind in kinds}
    crowded = entry(
        ranks_before=modules,
        pruned={name: [0, 1, 2, 3] for name in modules},
        added={name: 4 for name in modules},
    )
    file = io.StringIO()
    plain = dict(force_terminal=True, color_system=None, _environ={})
    progress = Progress(Console(file=file, width=width, **plain))
    progress.show_round(crowded)
    explained, *lines = file.getvalue().splitlines()
    assert explained.startswith("churn: the share of the ranks given last")
    assert not any(re.match(r"\s*\d", line) for line in lines)  # a count stays with its module
    (given,) = (line for line in lines if "given to" in line)
    assert lines[0].index("pruned") == given.index("given to")
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for told in ("round 2, step 50", "churn 25%, 1.2 s"):
        assert told in " ".join(lines)
    assert words.count("4") + words.count("4,") == 2 * len(kinds)
    assert all(words.count(kind) == 2 for kind in kinds)
    progress.show_round(crowded)
    assert file.getvalue().count("churn: the share") == 1
    # A log file keeps a round in one line.
    file = io.StringIO()
    Progress(Console(file=file, width=width)).show_round(crowded)
    assert len(file.getvalue().splitlines()) == 1


def test_a_first_round_without_receivers_is_told_in_two_lines():
    file = io.StringIO()
    plain = dict(force_terminal=True, color_system=None, _environ={})
    entered = entry(added={}, lost=2, churn=None, settled=False)
    Progress(Console(file=file, width=80, **plain)).show_round(entered)
    first, second = file.getvalue().splitlines()
    assert "given to  no receiver: 2 lost" in second and "first order" in second
    assert "churn" not in first + second


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0:00"), (40, "0:40"), (3723.2, "1:02:03"), (59.6, "1:00")]
)
def test_times(seconds, words):
    assert in_time(seconds) == words


def drawing(added):
    """A trainer that draws two batches for a step, of 5 and of 8 tokens."""
    padded = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batches = [
        {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": padded},
        {"input_ids": torch.ones(1, 8, dtype=torch.long)},
    ]
    return SimpleNamespace(
        add_callback=added.append,
        remove_callback=lambda callback: None,
        get_batch_samples=lambda *_: (batches, None),
    )


def test_tokens_are_counted_without_padding():
    trainer = drawing([])
    tokens = TokenCount(trainer)
    assert tokens.total() == 0
    for _ in range(2):
        trainer.get_batch_samples(None, 2, "cpu")
        tokens.total()
    assert tokens.total() == 2 * (5 + 8)
    other = SimpleNamespace(get_batch_samples=lambda *_: ([{"pixels": torch.ones(2)}], None))
    counted = TokenCount(other)
    other.get_batch_samples()
    assert counted.total() == 0


def test_the_bar_fits_80_columns_and_labels_what_it_shows():
    from transformers import TrainerState

    added, file = [], io.StringIO()
    plain = dict(force_terminal=True, color_system=None, _environ={})
    progress = Progress(Console(file=file, width=80, **plain))
    trainer = drawing(added)
    progress.take_over(trainer)
    (callback,) = added
    state = TrainerState(global_step=0, max_steps=12_000)
    callback.on_train_begin(None, state, None)
    trainer.get_batch_samples(None, 2, "cpu")
    state.global_step = 900
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 10.25})
    progress.bar.refresh()
    callback.on_train_end(None, state, None)
    bar = r"900/12000 steps \S+ steps/s [\d,]+ tokens/s \S+ left loss 10.250"
    assert re.search(bar, file.getvalue())


def test_losses_are_lines_where_there_is_no_bar(progress):
    from transformers import TrainerState

    added = []
    trainer = drawing(added)
    progress.take_over(trainer)
    (callback,) = added
    state = TrainerState(global_step=3, max_steps=10)
    callback.on_train_begin(None, state, None)
    trainer.get_batch_samples(None, 2, "cpu")
    state.global_step = 5
    callback.on_log(None, state, None, logs={"loss": 1.25})
    callback.on_log(None, state, None, logs={"eval_loss": 1.5, "eval_accuracy": 0.75})
    callback.on_train_end(None, state, None)
    callback.on_log(None, state, None, logs={"eval_loss": 1.5, "eval_mean_token_accuracy": 0.5})
    lines = shown(progress).splitlines()
    told = r"step 5  loss 1.250  \S+ steps/s [\d,]+ tokens/s  \d+:\d\d left$"
    assert any(re.match(told, line) for line in lines)
    assert "step 5  development loss 1.5000  accuracy 0.750" in lines
    assert "step 5  development loss 1.5000  token accuracy 0.500" in lines
    assert any(line.startswith("5 steps in ") for line in lines)
