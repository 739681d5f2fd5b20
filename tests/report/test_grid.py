import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_records import make_record

from loralloc.report.grid import (
    RankChange,
    RankGrid,
    read_allocation,
    total,
)


def grid_of(*names: str) -> RankGrid:
    ranks = {name: i for i, name in enumerate(names, start=1)}
    return RankGrid.from_allocation({"initial_ranks": ranks, "rounds": []})


def test_layers_ascend_and_kinds_keep_the_order_of_the_model() -> None:
    grid = grid_of("h.10.attn.v", "h.10.mlp.a", "h.2.attn.v", "h.2.attn.q", "lm_head")
    assert grid.layers == (2, 10)
    assert grid.kinds == ("v", "a", "q")
    assert grid.cells[10, "a"] == RankChange(2, 2)
    assert (10, "q") not in grid.cells
    assert grid.others == {"lm_head": RankChange(5, 5)}


def test_two_stacks_of_layers_stay_apart() -> None:
    grid = grid_of(
        "t5.encoder.block.0.attn.q", "t5.decoder.block.0.attn.q", "t5.decoder.block.0.wi"
    )
    assert grid.kinds == ("encoder q", "decoder q", "decoder wi")
    assert grid.cells[0, "encoder q"] == RankChange(1, 1)
    assert grid.cells[0, "decoder q"] == RankChange(2, 2)


def test_stacks_that_only_differ_in_order_keep_their_whole_names() -> None:
    assert grid_of("a.b.0.q", "b.a.0.q").kinds == ("a.b q", "b.a q")


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "0", "1"]), min_size=1, max_size=5).map(".".join),
        min_size=1,
        max_size=12,
        unique=True,
    )
)
def test_no_module_is_lost(names: list[str]) -> None:
    grid = grid_of(*names)
    assert sorted(grid.modules) == [RankChange(i, i) for i in range(1, len(names) + 1)]
    assert {layer for layer, _ in grid.cells} == set(grid.layers)
    assert {kind for _, kind in grid.cells} == set(grid.kinds)


def test_each_round_can_be_shown() -> None:
    data = make_record(num_layers=2, num_rounds=3)
    for shown in range(4):
        grid = RankGrid.from_allocation(data, shown_round=shown)
        after = data["rounds"][shown - 1]["ranks_after"] if shown else data["initial_ranks"]
        assert [cell.now for cell in grid.modules] == list(after.values())
        assert {cell.start for cell in grid.modules} == {8}
        assert (grid.shown_round, grid.num_rounds) == (shown, 3)
    assert RankGrid.from_allocation(data) == RankGrid.from_allocation(data, shown_round=3)


def test_an_emptied_module_stays_and_totals_add_up() -> None:
    ranks = {"h.0.q": 8, "h.0.v": 4}
    after = {"h.0.q": 0, "h.0.v": 11}
    grid = RankGrid.from_allocation(
        {"initial_ranks": ranks, "rounds": [{"round": 1, "ranks_after": after}]}
    )
    assert grid.cells[0, "q"].change == -8
    assert grid.total == RankChange(12, 11)
    assert grid.common_start is None
    assert total([RankChange(1, 2), None, RankChange(3, 5)]) == RankChange(4, 7)


@pytest.mark.parametrize("shown", [-1, 3])
def test_a_round_that_is_not_held_is_refused(shown: int) -> None:
    with pytest.raises(
        ValueError, match=rf"Round {shown} .* holds 2 rounds; .* 0 \(the start\) to 2"
    ):
        RankGrid.from_allocation(make_record(num_layers=1, num_rounds=2), shown_round=shown)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "the record holds no `initial_ranks`"),
        ({"initial_ranks": {}, "rounds": []}, "the record holds no `initial_ranks`"),
        ({"initial_ranks": {"\x1b[2Jq": 8}, "rounds": []}, r"has a module '\x1b[2Jq', which is"),
        ({"initial_ranks": {"q": -1}, "rounds": []}, "gives q the rank -1"),
        ({"initial_ranks": {"q": 1.5}, "rounds": []}, "gives q the rank 1.5"),
        ({"initial_ranks": {"q": True}, "rounds": []}, "gives q the rank True"),
        ({"initial_ranks": {"q": 8}}, "`rounds` is not a list of objects"),
        ({"initial_ranks": {"q": 8}, "rounds": [3]}, "`rounds` is not a list of objects"),
        ({"initial_ranks": {"q": 8}, "rounds": [{"round": 2}]}, "round 1 is numbered 2"),
        ({"initial_ranks": {"q": 8}, "rounds": [{"round": 1}]}, "round 1 holds no `ranks_after`"),
        (
            {"initial_ranks": {"q": 8}, "rounds": [{"round": 1, "ranks_after": {"v": 8}}]},
            "round 1 names other modules",
        ),
    ],
)
def test_what_is_no_record_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"allocation\.json is not a record of a run") as error:
        RankGrid.from_allocation(data)
    assert words in str(error.value)


def given_twice() -> dict[str, Any]:
    """Two rounds, each of which gave v a rank of q's."""
    states = [{"h.0.q": 8, "h.0.v": 8}, {"h.0.q": 7, "h.0.v": 9}, {"h.0.q": 6, "h.0.v": 10}]
    return {
        "initial_ranks": states[0],
        "rounds": [
            {"round": number, "ranks_after": state, "added": {"h.0.v": 1}}
            for number, state in enumerate(states[1:], start=1)
        ],
    }


@pytest.mark.parametrize(("shown", "v", "new"), [(None, 9, 1), (2, 9, 1), (1, 8, 1), (0, 8, 0)])
def test_ranks_that_no_round_has_scored_can_be_left_out(
    shown: int | None, v: int, new: int
) -> None:
    grid = RankGrid.from_allocation(given_twice(), shown_round=shown, scored=True)
    assert (grid.cells[0, "v"], grid.num_new) == (RankChange(8, v), new)
    assert RankGrid.from_allocation(given_twice()).num_new == 0


def test_a_record_that_does_not_say_what_was_given_is_refused() -> None:
    with pytest.raises(ValueError, match="round 8 holds no `added`"):
        RankGrid.from_allocation(make_record(), scored=True)


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    data = make_record(num_layers=2)
    (tmp_path / "allocation.json").write_text(json.dumps(data), encoding="utf-8")
    assert read_allocation(tmp_path) == data


def test_a_folder_above_a_run_names_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no allocation\.json, .*give a run's output folder"
    ):
        read_allocation(tmp_path)
    run = tmp_path / "demo"
    run.mkdir()
    (run / "allocation.json").touch()
    with pytest.raises(ValueError, match=r"did you mean .*demo"):
        read_allocation(tmp_path)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is not a folder; give the output folder"):
        read_allocation(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds a list and no object"),
        (b'{"version": 7}', "has version 7, but this loralloc reads version 1"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "allocation.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_allocation(tmp_path)
