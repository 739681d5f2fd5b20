import dataclasses
import json
import subprocess
import sys

import pytest

from loralloc.allocation.config import AllocationConfig


def test_the_defaults_are_the_papers():
    config = AllocationConfig()
    assert (config.num_rounds, config.ranks_per_round) == (8, "block")
    assert (config.warmup_epochs, config.recovery_epochs) == (1.0, 0.25)
    assert config.scoring_examples == 32
    assert (config.min_rank, config.max_rank, config.grace_rounds) == (0, None, 0)
    assert (config.score, config.policy, config.budget) == ("gradient", "paper", "ranks")
    assert config.rounds_at is None
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
            "'architecture', 'sensitivity', 'norm', 'random' or your own, as "
            "'package.module:name' or as the function itself. Did you mean 'ablation'?",
        ),
        (
            "score",
            "my package:score",
            "`score` is 'my package:score'; use one of 'gradient', 'screened', 'ablation', "
            "'shapley', 'architecture', 'sensitivity', 'norm', 'random' or your own, as "
            "'package.module:name' or as the function itself.",
        ),
        (
            "policy",
            3,
            "`policy` is 3; use one of 'paper', 'inverse', 'worth' or your own, as "
            "'package.module:name' or as the function itself.",
        ),
        (
            "newborns",
            "spared",
            "`newborns` is 'spared'; use one of 'compete', 'protected', 'potential'.",
        ),
        ("new_state", None, "`new_state` is None; use one of 'zero', 'survivors'."),
        ("budget", 7, "`budget` is 7; use one of 'ranks', 'parameters'."),
        ("warmup_epochs", 0, "`warmup_epochs` is 0; it must be a number of epochs above 0."),
        ("warmup_epochs", "1", "`warmup_epochs` is '1'; it must be a number of epochs above 0."),
        (
            "recovery_epochs",
            float("nan"),
            "`recovery_epochs` is nan; it must be a number of epochs above 0.",
        ),
        ("rank_lr_power", -1, "`rank_lr_power` is -1; it must be a number from 0."),
        ("new_rows", "svd", "`new_rows` is 'svd'; use one of 'kaiming', 'gradient'."),
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


PLACES = (
    "; give a list in ascending order, either of shares of the run between 0 and 1, as [0.1, 0.3], "
    "or of optimiser steps, as [20, 60]."
)


@pytest.mark.parametrize(
    "places",
    [[], 0.5, "0.1,0.3", [0.3, 0.1], [5, 5], [0, 5], [0.5, 1.0], [0.5, 20], [True], ["0.1"], [-3]],
)
def test_places_that_are_none_are_refused(places):
    with pytest.raises(ValueError) as error:
        AllocationConfig(rounds_at=places)
    assert str(error.value) == f"`rounds_at` is {places!r}" + PLACES


def test_places_tell_the_number_of_rounds():
    config = AllocationConfig(rounds_at=[0.1, 0.3, 0.5])
    assert (config.rounds_at, config.num_rounds) == ((0.1, 0.3, 0.5), 3)
    assert dataclasses.replace(config, seed=4).num_rounds == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_rounds=2), "`num_rounds` is 2, but `rounds_at` says where the 3 rounds take"),
        (dict(warmup_epochs=0.5), "`warmup_epochs` is 0.5, but `rounds_at` says where the 3"),
        (dict(recovery_epochs=1.0), "place; leave out one of the two."),
    ],
)
def test_two_schedules_at_once_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        AllocationConfig(rounds_at=[10, 20, 30], **options)
    assert words in str(error.value)


def test_as_data_it_is_json():
    data = AllocationConfig(rounds_at=(10, 20), score=max, policy="mine.own:plan").as_data()
    assert json.loads(json.dumps(data)) == data
    assert data["rounds_at"] == [10, 20]
    assert (data["score"], data["policy"]) == ("builtins:max", "mine.own:plan")
    assert set(data) == {field.name for field in dataclasses.fields(AllocationConfig)}


def test_it_is_free_of_torch():
    code = "import sys; import loralloc.allocation.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
