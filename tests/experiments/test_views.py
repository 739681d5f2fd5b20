import json

import pytest
from outcomes import outcome

from loralloc.experiments.collected import as_data, collect
from loralloc.experiments.views import tables


def section_of(grid, terms="paper", **by_method):
    """A section in which a method's outcomes are what a function of the cell says."""
    cells = grid.at_one_rate(terms, {})
    made = [outcome(cell, **by_method.get(cell.method, lambda cell: {})(cell)) for cell in cells]
    return collect(grid, terms, made, {})


@pytest.fixture(scope="module")
def grid(make):
    return make("table6", methods=("lora", "alora"), tasks=("boolq", "squad"), seeds=(0, 1, 2))


def column(table, name):
    return {row[0]: row[list(table.columns).index(name)] for row in table.rows}


def test_scores_stand_beside_the_papers(grid):
    section = section_of(grid, alora=lambda cell: {"score": 60.0 + cell.seed})
    overview = tables(grid.experiment, [section])[0]
    assert column(overview, "boolq score") == {"lora": "50.00", "alora": "61.00"}
    assert column(overview, "boolq, Table 6") == {"lora": "", "alora": "88"} or column(
        overview, "boolq, Table 6"
    ) == {"lora": "", "alora": "88.0"}


def test_loras_ladder_has_nothing_of_the_papers_beside_it(make):
    grid = make("table7", methods=("lora", "alora"), seeds=(0, 1))
    overview = tables(grid.experiment, [section_of(grid, terms="fair")])[0]
    theirs = column(overview, "Table 7, millions")
    assert theirs == {
        "lora": "3.54 / 3.54", "alora": "3.54 / 3.42", "lora r=4": "", "lora r=16": "",
        "lora r=32": "",
    }  # fmt: skip


def test_only_the_measure_that_examples_were_scored_by_is_told_by_examples(make):
    grid = make("table2", methods=("lora", "alora"), tasks=("e2e",), seeds=(0, 1))
    section = section_of(grid, alora=lambda cell: {"score": 60.0 + cell.seed})
    entry = section.find("e2e", "alora", 8)
    told = {name for name in (*entry.measures, "cross-entropy") if entry.examples(name)}
    assert told == {"BLEU", "cross-entropy"}
    assert section.against_lora(entry, "METEOR").p_examples is None


def test_a_difference_inside_the_noise_is_printed_as_such(grid):
    section = section_of(grid, alora=lambda cell: {"score": 49.0 + cell.seed})
    overview, detail = tables(grid.experiment, [section])[:2]
    assert column(overview, "boolq score") == {"lora": "50.00", "alora": "50.00 ~"}
    assert column(detail, "verdict") == {"lora": "-", "alora": "inside the noise"}
    assert column(detail, "every seed")["alora"] == "49.00 50.00 51.00"


def test_a_difference_that_is_told_is_better_or_worse_by_what_is_measured(grid):
    section = section_of(grid, alora=lambda cell: {"score": 60.0, "loss": 2.0})
    found = {table.title.split(", on")[0]: table for table in tables(grid.experiment, [section])}
    assert column(found["boolq, score"], "verdict")["alora"] == "better"
    assert column(found["boolq, cross-entropy"], "verdict")["alora"] == "worse"


def test_a_failed_cell_is_a_named_hole(grid):
    def broken(cell):
        return {"failure": "it broke"} if (cell.task, cell.seed) == ("squad", 1) else {}

    section = section_of(grid, alora=broken)
    overview = tables(grid.experiment, [section])[0]
    assert column(overview, "squad score")["alora"] == "failed"
    assert column(overview, "boolq score")["alora"] != "failed"
    assert section.holes() == ["alora r=8 on squad, seed 1: it broke"]
    entry = section.find("squad", "alora", 8)
    assert entry.spread("score") is None
    assert set(entry.values("score")) == {0, 2}


def test_loras_ladder_gives_the_rank_that_would_do_the_same(grid):
    def by_rank(cell):
        return {"loss": {4: 1.2, 8: 1.0, 16: 0.8, 32: 0.7}[cell.rank]}

    section = section_of(grid, "fair", lora=by_rank, alora=lambda cell: {"loss": 0.8})
    entry = section.find("boolq", "alora", 8)
    assert section.lora_equivalent(entry) == "16"
    data = json.loads(json.dumps(as_data(section)))
    found = next(e for e in data["entries"] if (e["method"], e["task"]) == ("alora", "boolq"))
    assert found["lora_equivalent_rank"] == "16"
    assert found["measures"]["cross-entropy"]["by_seed"] == {"0": 0.8, "1": 0.8, "2": 0.8}
    assert found["measures"]["cross-entropy"]["against_lora"]["inside_the_noise"] is False


def test_parameters_away_from_the_budget_are_told(grid):
    def larger(cell):
        budget = cell.options["budget"]
        return {"parameters": {"budget": budget, "trained": budget, "stored": budget * 1.05}}

    detail = tables(grid.experiment, [section_of(grid, alora=larger)])[1]
    assert column(detail, "of the budget")["alora"] == "+5.0%"
    assert "Further from the budget than 1%: alora +5.0%." in detail.notes


def test_costs_are_ratios_to_lora(make):
    grid = make("table4")
    section = section_of(grid, sora=lambda cell: {"seconds": 20.0, "peak_bytes": 2 * 10**9})
    (table,) = tables(grid.experiment, [section])
    assert [row[0] for row in table.rows] == ["lora", "sora", "alora"]
    sora = dict(enumerate(table.rows[1]))
    assert (sora[1], sora[2], sora[3], sora[4]) == ("2.00", "2.00", "18.8", "1.07")
    assert all(cell.alone for cell in grid.at_one_rate("paper", {}))


def test_a_sweep_has_a_column_for_every_budget(make):
    grid = make("figure2", tasks=("e2e",))
    section = section_of(grid, lora=lambda cell: {"score": float(cell.rank)})
    table = tables(grid.experiment, [section])[0]
    assert list(table.columns) == ["method", "r=1", "r=2", "r=4"]
    assert table.rows[0] == ["lora", "1.00", "2.00", "4.00"]


def test_ranks_are_shown_by_layer_and_kind(make):
    grid = make("figure3", seeds=(0, 1))

    def ranks(cell):
        initial = {f"model.layers.{n}.{kind}": 8 for n in (0, 1) for kind in ("q", "v")}
        final = {"model.layers.0.q": 9 + 2 * cell.seed, "model.layers.1.v": 4}
        return {"ranks": {"initial": initial, "final": final}}

    (table,) = tables(grid.experiment, [section_of(grid, alora=ranks)])
    assert (list(table.columns), table.rows) == (
        ["layer", "q", "v"],
        [["0", "10", "0"], ["1", "0", "4"]],
    )
