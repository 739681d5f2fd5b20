"""Two processes with half a batch each come to what one comes to with the whole, to rounding."""

import pytest
import trained_together
from together import assert_alike, start

QUICK = ("gradient", "grown apart", "gates")
BY_THEMSELVES = ("killed", "dropout", "dropout, killed", "grown apart", "gates")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return start(f"trained_together:{','.join(QUICK)}", tmp_path_factory.mktemp("quick"), (1, 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return start("trained_together", tmp_path_factory.mktemp("all"), (1, 2, 4))


def check(found, number, name, like=None):
    alone = found[1][0][like or name]
    assert len(alone["rounds"]) == 3
    assert any(entry["added"] for entry in alone["rounds"])
    for each in found[number]:
        assert each[name] == found[number][0][name]  # to the last bit
        assert_alike(each[name], alone)


def test_two_processes_come_to_what_one_does(quick):
    check(quick, 2, "gradient")


def test_what_trains_beside_the_model_comes_to_what_it_does_in_one_process(quick):
    alone, together = quick[1][0]["gates"], [each["gates"] for each in quick[2]]
    assert together[0] == together[1]  # to the last bit
    assert_alike(together[0], alone)


def test_replicas_that_have_grown_apart_end_the_run_and_are_named(quick):
    words = (
        "RuntimeError: After a round of allocation lora_B of model.layers.0.self_attn.o_proj is "
        "not the same in processes 0 and 1, so that each would train another model"
    )
    assert all(each["grown apart"]["error"].startswith(words) for each in quick[2])
    assert quick[1][0]["grown apart"] == quick[1][0]["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize("number", (2, 4))
@pytest.mark.parametrize(
    "name", [name for name in trained_together.checks(None) if name not in BY_THEMSELVES]
)
def test_processes_come_to_what_one_does(name, number, found):
    check(found, number, name)


@pytest.mark.slow
@pytest.mark.parametrize("number", (2, 4))
def test_a_run_that_is_killed_goes_on(number, found):
    check(found, number, "killed", like="gradient")


@pytest.mark.slow
@pytest.mark.parametrize("number", (1, 2, 4))
def test_every_process_goes_on_with_its_own_random_numbers(number, found):
    for each in found[number]:
        assert each["dropout, killed"]["adapter"] == each["dropout"]["adapter"]
        assert each["dropout, killed"]["rounds"] == each["dropout"]["rounds"]
