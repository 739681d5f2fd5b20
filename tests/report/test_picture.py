import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rank_records import BERT, make_record

from loralloc.report.grid import RankGrid
from loralloc.report.picture import DPI, rank_figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved, instead of saving them."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


@pytest.mark.parametrize("num_layers", [2, 12, 30, 100])
def test_a_png_of_a_sensible_size_is_written(tmp_path: Path, num_layers: int) -> None:
    grid = RankGrid.from_allocation(make_record(num_layers=num_layers, num_rounds=2))
    path = tmp_path / "ranks.png"
    rank_figure(grid, path)
    with Image.open(path) as image:
        width, height = image.size
        assert 4 * DPI <= width <= 36 * DPI
        assert 2.5 * DPI <= height <= 8 * DPI
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


@pytest.mark.parametrize(("suffix", "magic"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_vector_pictures_are_written(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"ranks{suffix}"
    rank_figure(RankGrid.from_allocation(make_record(num_layers=2)), path)
    assert path.read_bytes().startswith(magic)


def test_every_cell_shows_its_rank_on_the_colour_of_its_change(drawn: list[Figure]) -> None:
    grid = RankGrid.from_allocation(make_record(num_layers=6))
    rank_figure(grid, Path("ranks.png"))
    axes = drawn[0].axes[0]
    shown = {
        text.get_position(): text.get_text() for text in axes.texts if text.get_text().isdigit()
    }
    [mesh] = axes.collections
    for (layer, kind), cell in grid.cells.items():
        column, row = grid.layers.index(layer), grid.kinds.index(kind)
        assert shown[column + 0.5, row + 0.5] == str(cell.now)
        red, _, blue, _ = mesh.to_rgba([float(mesh.get_array()[row, column])])[0]
        if cell.change == 0:
            assert abs(red - blue) < 0.03
        else:
            assert (red > blue) == (cell.change < 0)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(grid.kinds)
    assert axes.yaxis_inverted()  # the first kind is at the top
    assert drawn[0].axes[1].get_ylabel() == "rank"
    assert "8" in [tick.get_text() for tick in drawn[0].axes[1].get_yticklabels()]


def test_the_bar_tells_the_change_where_modules_started_unlike(drawn: list[Figure]) -> None:
    data = make_record(num_layers=3)
    data["initial_ranks"]["model.layers.0.mlp.up_proj"] = 5
    rank_figure(RankGrid.from_allocation(data), Path("ranks.png"))
    bar = drawn[0].axes[1]
    assert bar.get_ylabel() == "ranks gained or lost"
    assert "0" in [tick.get_text() for tick in bar.get_yticklabels()]


@pytest.mark.parametrize(
    "grid",
    [
        RankGrid.from_allocation(make_record(num_layers=2)),
        RankGrid.from_allocation(make_record(num_layers=2, kinds=["q"], outside=["lm_head"])),
        RankGrid.from_allocation(make_record(num_layers=12, kinds=BERT, outside=["head", "wte"])),
        RankGrid.from_allocation(make_record(num_layers=100, num_rounds=1)),
        RankGrid.from_allocation(make_record(num_layers=2, num_rounds=0)),
    ],
)
def test_nothing_is_cut_off_at_the_edges(drawn: list[Figure], grid: RankGrid) -> None:
    rank_figure(grid, Path("ranks.png"))
    [figure] = drawn
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= width and box.y1 <= height


def test_dark_cells_have_white_numbers(drawn: list[Figure]) -> None:
    data = make_record(num_layers=1, kinds=["q", "v"], num_rounds=1)
    data["rounds"][0]["ranks_after"] = {"model.layers.0.q": 0, "model.layers.0.v": 9}
    rank_figure(RankGrid.from_allocation(data), Path("ranks.png"))
    inks = {text.get_text(): to_rgb(text.get_color()) for text in drawn[0].axes[0].texts}
    assert min(inks["0"]) > 0.9 > 0.4 > max(inks["9"])


def test_no_state_of_matplotlib_changes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    rank_figure(RankGrid.from_allocation(make_record(num_layers=2)), tmp_path / "ranks.png")
    assert dict(matplotlib.rcParams) == before


def test_importing_is_cheap_and_drawing_opens_no_window(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from loralloc.report.picture import rank_figure
from loralloc.report.grid import RankGrid
assert not {{"matplotlib", "rich", "torch"}} & set(sys.modules)
ranks = {{"h.0.q": 8, "h.1.q": 8}}
grid = RankGrid.from_allocation({{"initial_ranks": ranks, "rounds": []}})
rank_figure(grid, Path({str(tmp_path / "ranks.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    grid = RankGrid.from_allocation(make_record(num_layers=2))
    with pytest.raises(ValueError, match=r"'.gif', but .* .png, .pdf, .svg; name it ranks.png"):
        rank_figure(grid, tmp_path / "ranks.gif")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    grid = RankGrid.from_allocation(make_record(num_layers=2))
    with pytest.raises(ValueError, match="does not exist; create it first"):
        rank_figure(grid, tmp_path / "nothing" / "ranks.png")


def test_modules_outside_the_layers_alone_are_no_picture(tmp_path: Path) -> None:
    grid = RankGrid.from_allocation({"initial_ranks": {"lm_head": 8}, "rounds": []})
    with pytest.raises(ValueError, match="no module-by-layer picture"):
        rank_figure(grid, tmp_path / "ranks.png")
