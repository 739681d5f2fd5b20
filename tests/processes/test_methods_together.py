"""Every method comes in two processes to what it comes to in one."""

import methods_together
import pytest
from together import assert_alike, start


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return start("methods_together", tmp_path_factory.mktemp("all"), (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", methods_together.checks(None))
def test_a_method_comes_in_two_processes_to_what_it_does_in_one(name, found):
    first, second = (each[name] for each in found[2])
    assert first == second  # to the last bit
    assert_alike(first, found[1][0][name])
