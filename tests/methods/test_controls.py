"""ALoRA drawn and inverted, as methods; their decisions are tested with the allocation."""

import pytest
from session import BUILDS, Drive, prepared

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.alora import Alora
from loralloc.methods.controls import InverseRounds, RandomRounds

CONFIG = AllocationConfig(num_rounds=2, warmup_epochs=0.4, recovery_epochs=0.1, ranks_per_round=8)


@pytest.mark.parametrize(("kind", "option"), [(RandomRounds, "score"), (InverseRounds, "policy")])
def test_a_control_is_alora_with_one_option_fixed(kind, option):
    value = kind.fixed[1]
    for given in ({}, {option: value}):
        config = kind(allocation=AllocationConfig(num_rounds=3, **given)).allocation
        assert config == AllocationConfig(num_rounds=3, **{option: value})
    other = {"score": "ablation", "policy": "mine:plan"}[option]
    with pytest.raises(ValueError, match=f"`{option}` is '{other}', but .* is ALoRA with"):
        kind(allocation=AllocationConfig(**{option: other}))


@pytest.mark.parametrize("kind", [RandomRounds, InverseRounds])
@pytest.mark.parametrize("options", [{"tolerance": 0.1}, {"preset": "shrink"}])
def test_options_of_shrinking_are_refused_as_alora_refuses_them(options, kind):
    for other in (Alora, kind):
        with pytest.raises(ValueError, match="shrink"):
            other(allocation=AllocationConfig(**options))


@pytest.mark.parametrize("kind", [RandomRounds, InverseRounds])
def test_it_moves_as_many_ranks_as_alora_at_the_same_steps_and_others(kind):
    records = {}
    for other in (Alora, kind):
        method = prepared(other(rank=3, allocation=CONFIG), BUILDS["llama"]())
        Drive(method, num_steps=20).begin().train()
        records[other] = method.record
    moved = {
        name: [(entry.step, sum(map(len, entry.pruned.values()))) for entry in record.rounds]
        for name, record in records.items()
    }
    assert moved[kind] == moved[Alora]
    assert records[kind].ranks != records[Alora].ranks
