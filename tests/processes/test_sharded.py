"""Processes that hold a part of the backbone each come to what one with all of it does."""

import pytest
import tiny
from together import assert_alike, start


def started(checks, folder, numbers):
    tiny.llama().save_pretrained(folder / "model")
    return start(f"sharded:{checks}", folder, numbers)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return started("saved", tmp_path_factory.mktemp("quick"), (1, 2))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    checks = "saved,screened,sensitivity,refused"
    return started(checks, tmp_path_factory.mktemp("more"), (1, 2, 4))


def check(found, number, name):
    alone = found[1][0][name]
    assert len(alone["rounds"]) == 3
    assert any(entry["added"] for entry in alone["rounds"])
    for each in found[number]:
        assert each[name] == found[number][0][name]  # to the last bit
        assert_alike(each[name], alone)


@pytest.mark.slow
def test_two_processes_come_to_what_one_does_and_save_a_whole_adapter(quick):
    check(quick, 2, "saved")


@pytest.mark.slow
@pytest.mark.parametrize("number", (2, 4))
@pytest.mark.parametrize("name", ("saved", "screened", "sensitivity"))
def test_processes_come_to_what_one_does(name, number, more):
    check(more, number, name)


@pytest.mark.slow
def test_a_method_that_acts_on_the_whole_backbone_is_refused_by_name(more):
    for each in more[2]:
        assert "loaded in parts, and sora acts between steps" in each["refused"]["error"]
