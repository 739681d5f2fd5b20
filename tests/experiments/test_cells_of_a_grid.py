import json
from dataclasses import replace

import pytest

from loralloc.experiments.cell import Cell
from loralloc.experiments.experiment import load_scale
from loralloc.methods.catalog import get_method
from loralloc.methods.peft_method import default_budget
from loralloc.runs.adaptation import method_of
from loralloc.runs.models import empty_model
from loralloc.runs.settings import resolve


@pytest.fixture(scope="module")
def table1(make):
    return make()


def test_a_grid_is_every_method_on_every_task_with_every_seed(table1):
    cells = replace(table1, seeds=(0, 1)).at_one_rate("paper", {})
    assert len(cells) == 13 * 7 * 2
    assert len({cell.folder for cell in cells}) == len(cells)


def test_one_budget_for_all_and_one_scale_and_dropout_for_low_rank_updates(table1):
    budget = default_budget(empty_model(table1.backbone))
    for cell in table1.at_one_rate("fair", {}):
        if cell.task != "sst2" or cell.rank != 8:
            continue
        assert cell.options["budget"] == budget
        method = method_of(resolve(dict(cell.options)))
        names = method.option_names()
        own = {"adalora": 8.0}.get(cell.method, 1.0)  # its authors' own
        assert "scale" not in names or method.scale == own
        assert "dropout" not in names or method.dropout == 0.0
        if method.allocates:
            assert method.allocation.budget == "parameters"


def test_the_papers_terms_at_its_scale_are_its_own_sizes(table1, quick):
    grid = replace(table1, scale=replace(load_scale("paper"), rows=quick.rows))
    cells = {cell.method: cell for cell in grid.at_one_rate("paper", {}) if cell.task == "rte"}
    for name, cell in cells.items():
        assert cell.options["paper"] is True
        method = method_of(resolve(dict(cell.options)))
        sized = {name: getattr(method, name) for name in get_method(name).paper}
        assert sized == dict(get_method(name).paper)
        assert cell.learning_rate == 1e-4


def test_fair_terms_add_lora_at_other_ranks(table1):
    lora = [rank for task, method, rank in table1.rows("fair") if (task, method) == ("rte", "lora")]
    assert sorted(lora) == [4, 8, 16, 32]
    assert [rank for _, method, rank in table1.rows("paper") if method == "lora"] == [8] * 7


def test_a_cell_is_data_and_its_folder_tells_options_apart(table1):
    cell = table1.at_one_rate("paper", {})[0]
    assert Cell.from_data(json.loads(json.dumps(cell.as_data()))).folder == cell.folder
    assert replace(cell, options={**cell.options, "max_steps": 5}).folder != cell.folder
    assert cell.untested().folder == cell.folder


def test_an_encoder_is_asked_for_no_text(make):
    (cell,) = make("table7", methods=("lora",), tasks=("boolq",)).at_one_rate("paper", {})
    assert not {"num_beams", "max_new_tokens"} & set(cell.test)


def test_rows_of_the_users_are_taken_where_they_are(make, write_rows, tmp_path):
    rows = [{"sentence": "a" * (9 - n) + " film", "label": n % 2} for n in range(9)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", rows)
    grid = make(tasks=("sst2", "rte"), data=tmp_path)
    with open(f"{grid.sources['sst2']}/train.jsonl") as file:
        kept = [json.loads(line) for line in file]
    assert kept == rows[1:]  # the eight shortest, in their order
    assert "rte-made" in grid.sources["rte"]


def test_a_folder_of_data_that_is_not_there_is_told(make, tmp_path):
    with pytest.raises(ValueError, match="which is no folder"):
        make(data=tmp_path / "nowhere")
