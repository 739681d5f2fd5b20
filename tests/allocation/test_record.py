import json
from dataclasses import replace

import pytest

from loralloc.allocation.record import Record, Round


def a_round(number, *, pruned, added, before, after):
    return Round(
        round=number,
        step=10 * number,
        epoch=0.5 * number,
        score="screened",
        s_full=-1.25,
        s_base=-2.5,
        terms={
            "without": {name: [0.1] * rank for name, rank in before.items()},
            "only": {name: [-0.25] * rank for name, rank in before.items()},
        },
        verified={"a": [0]},
        settled=True,
        pruned=pruned,
        added=added,
        ranks_before=before,
        ranks_after=after,
        churn=None if number == 1 else 0.5,
        lost=0,
        spare=number,
        seconds=0.123,
    )


def a_record():
    first = a_round(
        1,
        pruned={"a": [0, 2]},
        added={"b": 2},
        before={"a": 3, "b": 2, "c": 1},
        after={"a": 1, "b": 4, "c": 1},
    )
    second = a_round(
        2,
        pruned={"b": [1, 2], "c": [0]},
        added={"a": 3},
        before={"a": 1, "b": 4, "c": 1},
        after={"a": 4, "b": 2, "c": 0},
    )
    initial = {"a": 3, "b": 2, "c": 1}
    return Record(config={"num_rounds": 2}, initial_ranks=initial, rounds=[first, second])


def test_it_comes_back_from_its_file_as_it_was(tmp_path):
    record = a_record()
    record.save(tmp_path)
    assert Record.load(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["allocation.json"]


def test_a_long_run_holds_the_ranks_between_two_rounds_once(tmp_path):
    a_record().save(tmp_path)
    loaded = Record.load(tmp_path)
    first, second = loaded.rounds
    assert first.ranks_before is loaded.initial_ranks
    assert second.ranks_before is first.ranks_after
    assert not hasattr(first, "__dict__")


def test_its_data_stay_as_they_were_when_rounds_follow():
    record = a_record()
    data = record.as_data()
    record.rounds.pop()
    assert [entry["round"] for entry in data["rounds"]] == [1, 2]


def test_its_file_is_json_that_others_read(tmp_path):
    a_record().save(tmp_path)
    data = json.loads((tmp_path / "allocation.json").read_text())
    assert data["version"] == 1
    assert data["initial_ranks"] == {"a": 3, "b": 2, "c": 1}
    assert [entry["pruned"] for entry in data["rounds"]] == [{"a": [0, 2]}, {"b": [1, 2], "c": [0]}]


def test_saving_again_replaces(tmp_path):
    record = a_record()
    record.save(tmp_path)
    record.rounds.pop()
    record.save(tmp_path)
    assert len(Record.load(tmp_path).rounds) == 1


def test_ranks_and_spare_are_those_of_the_last_round():
    record = a_record()
    assert record.ranks == {"a": 4, "b": 2, "c": 0}
    assert record.spare == 2
    record.rounds.clear()
    assert record.ranks == {"a": 3, "b": 2, "c": 1}
    assert record.spare == 0


def test_births_follow_each_rank_through_the_rounds():
    record = a_record()
    # b had two from the start and two of round 1; ranks 1 and 2 went in round 2.
    assert record.births() == {"a": [0, 2, 2, 2], "b": [0, 1], "c": []}
    assert {name: len(born) for name, born in record.births().items()} == record.ranks


def test_churn_is_told_of_what_a_next_round_would_prune():
    record = a_record()
    # Of a's ranks three are of round 2, as are no others.
    assert record.churn({"a": [0, 1], "b": [1]}) == 1 / 3
    assert record.churn({"b": [0]}) == 0
    record.rounds.clear()
    assert record.churn({"a": [0]}) is None


def test_a_rank_is_young_until_it_has_trained_as_long_as_the_first_before_round_1():
    record = a_record()  # rounds at steps 10 and 20
    assert record.young(29) == {"a": {1, 2, 3}, "b": set(), "c": set()}
    assert record.young(30) == {"a": set(), "b": set(), "c": set()}
    record.rounds.clear()
    assert record.young(1) == {"a": set(), "b": set(), "c": set()}


def test_a_record_of_before_there_were_schedules_in_it(tmp_path):
    data = a_record().as_data()
    del data["round_steps"], data["note"]
    (tmp_path / "allocation.json").write_text(json.dumps(data))
    loaded = Record.load(tmp_path)
    assert (loaded.round_steps, loaded.note) == (None, "")


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no allocation\.json; name the folder"):
        Record.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"version": 99, "config": {}, "initial_ranks": {}, "rounds": []}',
        '{"version": 1, "config": {}, "rounds": []}',
        '{"version": 1, "config": {}, "initial_ranks": {}, "rounds": [{"round": 1}]}',
        '{"version": 1, "config": {}, "initial_ranks": {}, "rounds": [], "more": 1}',
    ],
)
def test_what_is_no_record_is_refused(content, tmp_path):
    (tmp_path / "allocation.json").write_text(content)
    with pytest.raises(ValueError, match="is not a record of rounds in version 1"):
        Record.load(tmp_path)


def test_a_round_cannot_be_changed():
    with pytest.raises(AttributeError):
        a_record().rounds[0].step = 3
    assert replace(a_record().rounds[0], step=3).step == 3
