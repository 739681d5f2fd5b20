import io
import re
from collections.abc import Iterable

import pytest
from rank_records import BERT, make_record
from rich.console import Console
from rich.segment import Segment

from loralloc.report.grid import RankChange, RankGrid
from loralloc.report.ranks import rank_table, summary


def lines_of(grid: RankGrid, width: int) -> list[str]:
    """The table as a terminal without colours shows it."""
    console = Console(file=io.StringIO(), width=width, no_color=True)
    with console.capture() as capture:
        console.print(rank_table(grid, width))
    return capture.get().splitlines()


def segments_of(grid: RankGrid, width: int = 80) -> list[Segment]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor"
    )
    return list(console.render(rank_table(grid, width)))


def grid_of(before: dict[str, int], after: dict[str, int]) -> RankGrid:
    return RankGrid.from_allocation(
        {"initial_ranks": before, "rounds": [{"round": 1, "ranks_after": after}]}
    )


def written(cell: RankChange, *, amounts: bool) -> str:
    if cell.change == 0:
        return str(cell.now)
    if amounts:
        return f"{cell.now} {cell.change:+d}"
    return f"{cell.now}{'+' if cell.change > 0 else '-'}"


def body(lines: Iterable[str]) -> dict[str, list[str]]:
    """Rows of a table by their first word; a change belongs to the rank before it."""
    rows = [re.findall(r"\S+(?: [+-]\d+)?", line) for line in lines]
    return {row[0]: row[1:] for row in rows if row}


@pytest.fixture
def smollm2() -> RankGrid:
    return RankGrid.from_allocation(make_record())


def test_layers_are_columns_where_they_fit(smollm2: RankGrid) -> None:
    rows = body(lines_of(smollm2, 140))
    assert rows["layer"] == [*map(str, range(30)), "total"]
    for kind in smollm2.kinds:
        cells = [smollm2.cells[layer, kind] for layer in smollm2.layers]
        assert rows[kind][:-1] == [written(cell, amounts=False) for cell in cells]
        assert rows[kind][-1].split()[0] == str(sum(cell.now for cell in cells))
    assert rows["total"][-1] == "1680"


def test_layers_are_columns_down_to_the_last_character(smollm2: RankGrid) -> None:
    needed = max(map(len, lines_of(smollm2, 139)))
    assert "29" in body(lines_of(smollm2, needed))["layer"]
    assert "29" in body(lines_of(smollm2, needed - 1))  # now a row


def test_layers_are_rows_in_80_columns(smollm2: RankGrid) -> None:
    rows = body(lines_of(smollm2, 80))
    assert rows["layer"] == [*smollm2.kinds, "total"]
    for layer in smollm2.layers:
        cells = [smollm2.cells[layer, kind] for kind in smollm2.kinds]
        assert rows[str(layer)][:-1] == [written(cell, amounts=True) for cell in cells]
    sums = [
        sum(smollm2.cells[layer, kind].now for layer in smollm2.layers) for kind in smollm2.kinds
    ]
    assert [words.split()[0] for words in rows["total"]] == [*map(str, sums), "1680"]


@pytest.mark.parametrize("width", [40, 60, *range(70, 80), 100, *range(130, 140), 200])
def test_every_rank_is_shown_whole_in_any_width(smollm2: RankGrid, width: int) -> None:
    lines = lines_of(smollm2, width)
    assert max(map(len, lines)) <= width
    heads = [i for i, line in enumerate(lines) if line.split()[:1] == ["layer"]]
    shown = [w for head in heads for w in body([lines[head]])["layer"]]
    across = "0" in shown
    assert shown == [*(map(str, smollm2.layers) if across else smollm2.kinds), "total"]
    rows: dict[str, list[str]] = {}
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        for name, words in body(lines[start + 1 : end]).items():
            rows.setdefault(name, []).extend(words)
    for (layer, kind), cell in smollm2.cells.items():
        row, column = (kind, str(layer)) if across else (str(layer), kind)
        words = rows[row][shown.index(column)]
        assert words in {written(cell, amounts=True), written(cell, amounts=False)}


def test_100_layers_are_rows() -> None:
    rows = body(lines_of(RankGrid.from_allocation(make_record(num_layers=100)), 140))
    assert "99" in rows


def test_long_kinds_are_broken_at_their_dots() -> None:
    grid = RankGrid.from_allocation(make_record(num_layers=24, kinds=BERT))
    lines = lines_of(grid, 80)
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.split()[:1] == ["layer"]]) == 1
    assert "attention.output.dense" not in "\n".join(lines)


def test_a_module_that_a_layer_lacks_is_a_dot_and_one_outside_has_its_line() -> None:
    ranks = {"h.0.q": 8, "h.1.q": 8, "h.1.v": 8, "lm_head": 8}
    lines = lines_of(grid_of(ranks, {**ranks, "lm_head": 5}), 80)
    assert body(lines)["v"] == [".", "8", "8"]
    assert body(lines)["lm_head"] == ["5 -3"]


def test_modules_outside_the_layers_alone_are_shown() -> None:
    rows = body(lines_of(grid_of({"a": 8, "b": 8}, {"a": 9, "b": 7}), 80))
    assert (rows["a"], rows["b"]) == (["9 +1"], ["7 -1"])


def test_the_title_tells_the_round_and_the_start() -> None:
    data = make_record(num_layers=2, num_rounds=3)
    first = lines_of(RankGrid.from_allocation(data, shown_round=2), 80)[0]
    assert first == "Ranks after round 2 of 3 (every module started with 8)"
    assert lines_of(RankGrid.from_allocation(data, shown_round=0), 80)[0].startswith(
        "Ranks at the start"
    )
    data["initial_ranks"]["model.layers.0.self_attn.q_proj"] = 4
    assert "every module" not in lines_of(RankGrid.from_allocation(data), 80)[0]


def test_the_summary_counts_modules() -> None:
    before = dict.fromkeys(("h.0.q", "h.0.v", "h.1.q", "h.1.v", "lm_head"), 400)
    before["h.2.q"] = 0  # had none, so it was not emptied
    after = {"h.2.q": 0, "h.0.q": 0, "h.0.v": 399, "h.1.q": 801, "h.1.v": 400, "lm_head": 401}
    grid = grid_of(before, after)
    assert summary(grid) == (
        "2,000 ranks at the start, 2,001 now; modules: 2 gained, 2 lost (1 emptied)"
    )
    assert lines_of(grid, 80)[-1] == summary(grid)


def test_colours_tell_lost_from_gained_and_more_from_less() -> None:
    before = dict.fromkeys((f"h.{i}.q" for i in range(5)), 8)
    after = dict(zip(before, (8, 7, 1, 9, 15), strict=True))
    colours = {}
    for segment in segments_of(grid_of(before, after)):
        words = segment.text.split()
        if words and segment.style and segment.style.bgcolor:
            assert segment.style.color is not None  # readable on any background of the terminal
            colours[words[0]] = segment.style.bgcolor.get_truecolor()
    assert set(colours) == {"7", "1", "9", "15"}  # unchanged ranks and totals stay plain
    for weak, strong in (("7", "1"), ("9", "15")):
        assert saturation(colours[weak]) < saturation(colours[strong])
    assert colours["7"][0] > colours["7"][2] and colours["1"][0] > colours["1"][2]
    assert colours["9"][0] < colours["9"][2] and colours["15"][0] < colours["15"][2]


def saturation(colour: tuple[int, int, int]) -> float:
    return (max(colour) - min(colour)) / max(colour)


def test_every_tile_is_readable() -> None:
    grid = RankGrid.from_allocation(make_record(moved=60))
    for segment in segments_of(grid):
        if segment.style and segment.style.bgcolor and segment.style.color:
            ink, tile = (
                luminance(colour.get_truecolor())
                for colour in (segment.style.color, segment.style.bgcolor)
            )
            assert (max(ink, tile) + 0.05) / (min(ink, tile) + 0.05) >= 4.5  # WCAG AA


def luminance(colour: tuple[int, int, int]) -> float:
    linear = [
        c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for value in colour
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
