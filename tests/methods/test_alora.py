"""ALoRA and its two ablation variants, as methods; their scores are tested with the allocation."""

import pytest

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.alora import Alora
from loralloc.methods.alora_variants import AloraDnas, AloraSensi


@pytest.mark.parametrize(
    ("kind", "score"), [(AloraDnas, "architecture"), (AloraSensi, "sensitivity")]
)
def test_a_variant_is_alora_with_its_score_and_all_other_options_as_given(kind, score):
    for given in ({}, {"score": score}):
        config = kind(allocation=AllocationConfig(num_rounds=3, min_rank=1, **given)).allocation
        assert config == AllocationConfig(num_rounds=3, min_rank=1, score=score)


@pytest.mark.parametrize("kind", [AloraDnas, AloraSensi])
def test_a_variant_with_another_score_is_refused(kind):
    with pytest.raises(ValueError, match=r"`score` is 'ablation', but alora-\w+ is ALoRA with"):
        kind(allocation=AllocationConfig(score="ablation"))


def test_alora_takes_the_options_as_they_are():
    config = AllocationConfig(score="shapley")
    assert Alora(allocation=config).allocation is config
