"""Two processes with half a batch each come to what one comes to with the whole, to rounding."""

import pytest
import trained_together
from together import assert_alike, start

QUICK = "gradient"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return start(f"trained_together:{QUICK}", tmp_path_factory.mktemp("quick"), (1, 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return start("trained_together", tmp_path_factory.mktemp("all"), (1, 2, 4))


def check(found, number, name):
    alone = found[1][0][name]
    assert len(alone["rounds"]) == 3
    assert any(entry["added"] for entry in alone["rounds"])
    for each in found[number]:
        assert each[name] == found[number][0][name]  # to the last bit
        assert_alike(each[name], alone)


def test_two_processes_come_to_what_one_does(quick):
    check(quick, 2, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("number", (2, 4))
@pytest.mark.parametrize("name", trained_together.checks(None))
def test_processes_come_to_what_one_does(name, number, found):
    check(found, number, name)
