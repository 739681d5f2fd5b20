import pytest

from loralloc.allocation.config import AllocationConfig


def test_the_defaults_are_the_papers():
    config = AllocationConfig()
    assert (config.num_rounds, config.ranks_per_round) == (8, "block")
    assert (config.warmup_epochs, config.recovery_epochs) == (1.0, 0.25)
    assert config.scoring_examples == 32
    assert (config.min_rank, config.max_rank, config.grace_rounds) == (0, None, 0)
    assert (config.score, config.budget) == ("gradient", "ranks")
    assert (config.gate_lr, config.gate_weight_decay) == (3e-4, 1e-3)
    assert AllocationConfig(gate_weight_decay=0).gate_weight_decay == 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_rounds", 0, "`num_rounds` is 0; it must be a whole number of at least 1."),
        ("num_rounds", 2.0, "`num_rounds` is 2.0; it must be a whole number of at least 1."),
        ("num_rounds", True, "`num_rounds` is True; it must be a whole number of at least 1."),
        (
            "scoring_examples",
            0,
            "`scoring_examples` is 0; it must be a whole number of at least 1.",
        ),
        ("verify_ranks", -1, "`verify_ranks` is -1; it must be a whole number of at least 0."),
        ("min_rank", -1, "`min_rank` is -1; it must be a whole number of at least 0."),
        ("grace_rounds", "1", "`grace_rounds` is '1'; it must be a whole number of at least 0."),
        ("max_rank", 0, "`max_rank` is 0; it must be a whole number of at least 1."),
        ("seed", -1, "`seed` is -1; it must be a whole number of at least 0."),
        ("ranks_per_round", 0, "`ranks_per_round` is 0; it must be a whole number of at least 1."),
        (
            "ranks_per_round",
            "blocks",
            "`ranks_per_round` is 'blocks'; use one of 'block', 'model' or a number. "
            "Did you mean 'block'?",
        ),
        (
            "score",
            "ablate",
            "`score` is 'ablate'; use one of 'gradient', 'screened', 'ablation', 'shapley', "
            "'architecture', 'sensitivity'. Did you mean 'ablation'?",
        ),
        ("budget", 7, "`budget` is 7; use one of 'ranks', 'parameters'."),
        ("warmup_epochs", 0, "`warmup_epochs` is 0; it must be a number of epochs above 0."),
        ("warmup_epochs", "1", "`warmup_epochs` is '1'; it must be a number of epochs above 0."),
        (
            "recovery_epochs",
            float("nan"),
            "`recovery_epochs` is nan; it must be a number of epochs above 0.",
        ),
        ("gate_lr", 0, "`gate_lr` is 0; it must be a number above 0."),
        ("gate_lr", "1", "`gate_lr` is '1'; it must be a number above 0."),
        (
            "gate_weight_decay",
            -1e-3,
            "`gate_weight_decay` is -0.001; it must be a number from 0.",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(field, value, words):
    with pytest.raises(ValueError) as error:
        AllocationConfig(**{field: value})
    assert str(error.value) == words


def test_max_rank_below_min_rank_is_refused():
    with pytest.raises(
        ValueError, match="`max_rank` is 2; it must be a whole number of at least 3"
    ):
        AllocationConfig(min_rank=3, max_rank=2)


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        AllocationConfig().num_rounds = 3  # type: ignore[misc]


def test_it_takes_names_only():
    with pytest.raises(TypeError):
        AllocationConfig(8)  # type: ignore[misc]
