from pathlib import Path

from run_folders import EVIL, SIZES, make_run

from loralloc.report import tables
from loralloc.report.folders import read_runs
from loralloc.report.series import series_of
from loralloc.report.tables import Table


def test_a_run_is_a_row_and_what_no_run_has_is_no_column(tmp_path: Path) -> None:
    make_run(tmp_path / "a", figures={"accuracy": 71.5})
    make_run(tmp_path / "b", method="lora", seed=1)
    table = tables.results(read_runs([tmp_path]))
    first, second = (dict(zip(table.headings, row, strict=True)) for row in table.rows)
    assert first["method"] == "alora" and first["rounds"] == "4" and first["rounds, s"] == "6 (50%)"
    assert first["sst2-test-beam5 accuracy"] == "71.50"
    assert first["lowest development loss"] == "0.5250"
    assert second["rounds"] == second["sst2-test-beam5 accuracy"] == ""
    assert table.headings[: table.num_texts] == ["run", "method", "model", "data"]
    without = tables.results(read_runs([tmp_path / "b"]))
    assert "rounds" not in without.headings


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    for seed, loss in enumerate((0.4, 0.6)):
        make_run(tmp_path / f"s{seed}", seed=seed, loss=loss)
    table = tables.by_series(series_of(read_runs([tmp_path])))
    assert table is not None
    ((_, seeds, _, loss),) = table.rows
    assert seeds == "2" and loss == "0.5250 ± 0.1414"
    assert tables.by_series(series_of(read_runs([tmp_path / "s0"]))) is None


def test_rounds_and_sizes_are_rows(tmp_path: Path) -> None:
    make_run(tmp_path / "a", frontier=SIZES)
    runs = read_runs([tmp_path])
    rounds, sizes = tables.rounds(runs), tables.frontier(runs)
    assert rounds is not None and sizes is not None
    assert [row[1:] for row in rounds.rows[:2]] == [
        ["1", "5", "6", "6", "", "1.0000", "1.5"],
        ["2", "10", "6", "6", "25%", "0.5000", "1.5"],
    ]
    assert [row[-1] for row in sizes.rows] == ["yes", "yes", "no"]


def test_no_cell_leaves_its_cell_in_markdown_or_latex() -> None:
    table = Table(name="t", title="T", headings=["a_b", "x|y"], rows=[[EVIL, "50% & ±"]])
    *_, row, _ = table.markdown().split("\n")
    assert row.replace("\\|", "").count("|") == 3
    assert "\\<img" in row
    latex = table.latex()
    assert r"a\_b & x|y \\" in latex
    assert r"\$\textbackslash{}frac\{\$\textless{}/script" in latex
    assert r" & 50\% \& $\pm$ \\" in latex
    assert latex.startswith(r"\begin{tabular}{lr}")
