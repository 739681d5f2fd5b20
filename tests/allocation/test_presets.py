"""What an allocation with other rounds does not read is refused."""

import pytest
import tiny

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.presets import check_read, read_by
from loralloc.methods.alora import Alora
from loralloc.methods.alora_variants import AloraSensi
from loralloc.methods.shrink import Shrink


def test_options_of_shrinking_are_refused_elsewhere():
    for changes in ({"tolerance": 0.1}, {"target_parameters": 9}, {"prune_share": 0.5}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"`{name}` is .* read where an adapter is shrunk"):
            check_read(AllocationConfig(**changes))
        with pytest.raises(ValueError, match=f"`{name}`"):
            Alora(allocation=AllocationConfig(**changes))
        check_read(AllocationConfig(preset="shrink", **changes))


@pytest.mark.parametrize(
    "changes",
    [{"ranks_per_round": 3}, {"grace_rounds": 1}, {"max_rank": 9}, {"warmup_epochs": 2.0}],
)
def test_options_of_giving_are_refused_where_nothing_is_given(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}` is .*, which shrinking does not read"):
        Shrink(allocation=AllocationConfig(**changes))


@pytest.mark.parametrize("kind", [Alora, AloraSensi])
def test_a_method_that_moves_ranks_does_not_shrink(kind):
    with pytest.raises(ValueError, match=r"moves ranks; use `--method shrink`, or attach\(\)"):
        kind(allocation=AllocationConfig(preset="shrink"))


def test_a_round_by_itself_does_not_shrink():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match='`preset` is "shrink", which judges every size'):
        Allocator(model, AllocationConfig(preset="shrink"), [tiny.causal_batch()])


def test_each_preset_reads_options_that_there_are():
    paper, shrink = read_by(AllocationConfig()), read_by(AllocationConfig(preset="shrink"))
    assert {"ranks_per_round", "policy"} <= set(paper) and "tolerance" not in paper
    assert {"tolerance", "num_rounds"} <= set(shrink) and "ranks_per_round" not in shrink


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "shrunk"}, "`preset` is 'shrunk'; use one of 'paper', 'shrink'"),
        ({"tolerance": -0.1}, "`tolerance` is -0.1; it must be a loss of at least 0"),
        ({"prune_share": 1.0}, "`prune_share` is 1.0; it must be a share of the ranks"),
        ({"target_parameters": 0}, "`target_parameters` is 0; it must be a whole number"),
        ({"judging_examples": 1}, "`judging_examples` is 1; it must be .* at least 2"),
        ({"tolerance": 0.1, "target_parameters": 9}, "a target is reached whatever the loss"),
    ],
)
def test_values_that_no_run_could_use_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        AllocationConfig(**changes)
