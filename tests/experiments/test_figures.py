"""Figures of experiments, drawn on outcomes that nobody ran."""

import math
from xml.etree import ElementTree

import pytest
from outcomes import outcome

from loralloc.experiments.collected import collect
from loralloc.experiments.reproduce import Report
from loralloc.experiments.views import tables
from loralloc.report.experiment_figures import SUFFIXES, draw, figures_of

KINDS = ("self_attn.q_proj", "mlp.up_proj")
MODULES = [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in KINDS]


def report_of(grid, made, terms=("paper",)):
    sections = [
        collect(grid, term, [outcome(c, **made(c)) for c in grid.at_one_rate(term, {})], {})
        for term in terms
    ]
    found = tables(grid.experiment, sections)
    return Report(grid=grid, sections=sections, tables=found, remarks=[])


def drawn(drawing):
    """Its axes, those of a colour bar last."""
    return drawing.draw().axes


@pytest.fixture(scope="module")
def sweep(make):
    grid = make("figure2", seeds=(0, 1))

    def made(cell):
        if (cell.task, cell.method, cell.rank, cell.seed) == ("boolq", "sora", 2, 1):
            return {"failure": "it broke"}
        return {"score": 10.0 * cell.rank + cell.seed, "loss": 1.0 / cell.rank}

    return report_of(grid, made)


def test_a_sweep_has_a_panel_for_every_task_and_a_line_for_every_method(sweep):
    score, loss = figures_of(sweep)
    assert [score.name, loss.name] == ["figure2-paper", "figure2-paper-cross-entropy"]
    boolq, e2e = drawn(score)
    assert [axes.get_title(loc="left") for axes in (boolq, e2e)] == ["boolq, score", "e2e, BLEU"]
    assert drawn(loss)[0].get_title(loc="left") == "boolq, cross-entropy"
    dots, line = boolq.lines[:2]
    assert list(line.get_ydata()) == [10.5, 20.5, 40.5]
    assert list(dots.get_ydata()) == [10.0, 11.0, 20.0, 21.0, 40.0, 41.0]
    assert list(boolq.lines[5].get_xdata()) == pytest.approx([2**0.09 * rank for rank in (1, 2, 4)])
    assert [label.get_text() for label in boolq.get_xticklabels()] == ["1", "2", "4"]


def test_a_failed_seed_is_a_gap_in_the_line_beside_the_dots_that_are_there(sweep):
    boolq, _ = drawn(figures_of(sweep)[0])
    dots, line = boolq.lines[2:4]
    first, gap, last = line.get_ydata()
    assert (first, last) == (10.5, 40.5) and math.isnan(gap)
    assert list(dots.get_ydata()) == [10.0, 11.0, 20.0, 40.0, 41.0]


def test_a_sweep_of_which_nothing_came_has_no_figure(make):
    report = report_of(make("figure2"), lambda _: {"failure": "it broke"})
    assert figures_of(report) == [] and draw(report) == []


def ranks(cell):
    """A module that ended without a rank is in the first ranks only."""
    final = dict(zip(MODULES, (12 + cell.seed, 4, 9, 0), strict=True))
    kept = {name: rank for name, rank in final.items() if rank}
    return {"ranks": {"initial": dict.fromkeys(MODULES, 8), "final": kept}}


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_final_ranks_stand_side_by_side_in_one_scale_of_colours(make):
    grid = make("figure3", methods=("alora", "sora"), seeds=(0, 1))

    def made(cell):
        return ranks(cell) if cell.method == "alora" else ranks(grid.at_one_rate("paper", {})[0])

    (drawing,) = figures_of(report_of(grid, made))
    alora, sora, bar = drawn(drawing)
    assert alora.get_title(loc="left") == "alora r=8 on e2e"
    assert words(alora) == ["12.5", "4.0", "9.0", "0.0", "10.8", "2.0"]
    assert words(sora) == ["12", "4", "9", "0", "10.5", "2.0"]
    assert [label.get_text() for label in alora.get_xticklabels()] == ["q_proj", "up_proj"]
    assert [label.get_text() for label in alora.get_yticklabels()] == ["0", "1", "mean"]
    assert {mesh.get_clim() for axes in (alora, sora) for mesh in axes.collections} == {(-8, 4.5)}
    assert bar.get_xlabel() == "rank (white: 8, LoRA's)"


def test_without_ranks_there_is_no_heat_map(make):
    assert figures_of(report_of(make("figure4"), lambda _: {})) == []
    assert figures_of(report_of(make("table6", methods=("alora",)), ranks)) == []


def test_figures_lie_beside_the_tables_which_name_them(make):
    report = report_of(make("figure4"), ranks, terms=("paper", "fair"))
    report.write()
    assert "figure4-paper.png" not in (report.folder / "report.md").read_text()
    paths = draw(report)
    names = [f"figure4-{terms}{suffix}" for terms in ("paper", "fair") for suffix in SUFFIXES]
    assert [path.name for path in paths] == names
    for path in paths:
        assert path.parent == report.folder
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    for form in ("md", "tex"):
        text = (report.folder / f"report.{form}").read_text()
        assert "figure4-paper.png" in text and "figure4-fair.png" in text
