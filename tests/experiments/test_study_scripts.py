"""The scripts behind docs/methods.md and docs/study.md: what they run, and what they write."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from experiments.outcomes import outcome

from loralloc.experiments.executors.executor import Resources, get_executor
from loralloc.experiments.experiment import Variant, load_experiment, load_scale
from loralloc.experiments.fairness import search_rates
from loralloc.experiments.reproduce import carry_out_all
from loralloc.experiments.rows import hash_of
from loralloc.experiments.work import FAILURE, NOT_RUN, RESULT, attempt, failed
from loralloc.methods.catalog import METHODS
from loralloc.runs.adaptation import method_of
from loralloc.runs.settings import resolve

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("study")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def grid(make):
    return make(
        tasks=("sst2",),
        methods=("lora", "alora", "late"),
        variants={"late": Variant(method="alora", options={"allocation.grace_rounds": 1})},
        ranks=(2,),
        trials=3,
        seeds=(0, 1, 2),
    )


def every(of):
    """An executor of outcomes that `of` makes of a cell."""
    return lambda cells: (outcome(cell, findings={}, **of(cell)) for cell in cells)


def losses(cell):
    """Those of a task with a ceiling, of which the variant wins half back."""
    loss = {"lora": {1: 1.2, 2: 1.0, 4: 0.9, 8: 0.8}[cell.rank], "alora": 1.0}.get(cell.method, 0.9)
    noise = [0.001 * (cell.seed + n) for n in range(6)]
    examples = {"scores": [0.0] * 6, "losses": [loss + each for each in noise]}
    made = {"dev_loss": abs(cell.learning_rate - 1e-3)}
    return made if cell.test is None else {**made, "loss": loss + 0.001 * cell.seed, "of": examples}


def told(grid):
    def made(cell):
        made = losses(cell)
        examples = made.pop("of", None)
        one = outcome(cell, findings={}, **made)
        if examples:
            one.result["test"]["examples"] = examples
        return one

    return carry_out_all(grid, "fair", lambda cells: map(made, cells))


def test_a_variant_is_its_method_with_options_of_its_own(grid):
    plain, own = (
        grid.cell(task="sst2", method=name, rank=2, seed=0, learning_rate=1e-3, terms="fair")
        for name in ("alora", "late")
    )
    assert own.options == {**plain.options, "allocation.grace_rounds": 1}
    assert (own.method, own.options["method"]) == ("late", "alora")
    assert own.folder != plain.folder


def test_a_search_begins_with_as_many_rates_as_the_experiment_says(grid):
    tried = search_rates(grid, every(lambda cell: {"dev_loss": abs(cell.learning_rate - 5e-4)}))
    assert {len(search.losses) for search in tried.values()} == {3}


def test_a_search_begins_with_the_half_powers_that_the_experiment_says(make):
    grid = make(tasks=("sst2",), methods=("lora", "gora"), ladder=False, half_powers=(0, 1, 3))
    tried = search_rates(grid, every(lambda cell: {"dev_loss": abs(cell.learning_rate - 2e-3)}))
    rates = {method: sorted(search.losses) for (_, method, _), search in tried.items()}
    assert rates["lora"] == [5e-4, 1.6e-3, 1.6e-2]
    assert rates["gora"][:3] == [5e-5, 1.6e-4, 1.6e-3]
    with pytest.raises(ValueError, match="both trials and half_powers"):
        make(tasks=("sst2",), trials=3, half_powers=(0, 1))


def test_an_experiment_tests_in_its_own_way(make, quick):
    scale = replace(quick, test={"num_beams": 2, "limit": 3})
    own = {"num_beams": None, "decode": "greedy", "batch_size": 8}
    grid = make(tasks=("sst2",), methods=("lora",), scale=scale, test=own)
    expected = {"decode": "greedy", "limit": 3, "batch_size": 8}
    encoder = replace(grid, is_encoder=True)
    for one, test in ((grid, expected), (encoder, {"limit": 3, "batch_size": 8})):
        assert {tuple(sorted(cell.test.items())) for cell in one.at_one_rate("fair", {})} == {
            tuple(sorted(test.items()))
        }


def test_the_same_rows_in_another_folder_are_the_same_run(make, write_rows, tmp_path):
    folders = []
    for name, words in (("one", "fine"), ("two", "fine"), ("three", "bad")):
        for split in ("train", "validation", "test"):
            rows = [{"sentence": f"a {words} film {n}", "label": n % 2} for n in range(9)]
            write_rows(tmp_path / name / "sst2" / f"{split}.jsonl", rows)
        data, root = tmp_path / name, tmp_path / "root"
        grid = make(tasks=("sst2",), methods=("lora",), seeds=(0,), data=data, root=root)
        (cell,) = grid.at_one_rate("paper", {})
        folders.append(cell.folder.name)
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_other_rows_are_told_apart_whatever_kind_of_file_they_are_in(suffix, tmp_path):
    told = []
    for name in ("fine", "bad", "fine"):
        folder = tmp_path / f"{len(told)}"
        folder.mkdir()
        (folder / f"train.{suffix}").write_text(f"sentence,label\na {name} film,1\n")
        (folder / "notes.txt").write_text(f"{len(told)}")  # is not read
        told.append((hash_of(str(folder)), hash_of(str(folder / f"train.{suffix}"))))
    assert told[0] == told[2]
    assert told[0][0] != told[1][0]
    assert told[0][1] != told[1][1]
    assert hash_of("nobody/has-this") == hash_of(None) == ""


def test_what_has_no_test_split_is_tested_on_the_last_rows_of_training(make, write_rows, tmp_path):
    for split, count in (("train", 9), ("validation", 2)):
        rows = [{"instruction": f"say {n}", "output": f"{split} {n}"} for n in range(count)]
        write_rows(tmp_path / "data" / "alpaca" / f"{split}.jsonl", rows)
    limits = {"train": 20, "validation": 2, "test": 2}
    changes = dict(tasks=("alpaca",), methods=("lora",), data=tmp_path / "data")
    grid = make(rows=limits, **changes)
    texts = {
        split: Path(grid.sources["alpaca"], f"{split}.jsonl").read_text().splitlines()
        for split in limits
    }
    assert [json.loads(line)["output"] for line in texts["test"]] == ["train 7", "train 8"]
    assert len(texts["train"]) == 7
    (cell, *_) = replace(grid, seeds=(0,)).at_one_rate("paper", {})
    test = attempt(cell).result["test"]
    assert (test["figures"], test["examples"]["scores"]) == ([], None)
    assert len(test["examples"]["losses"]) == 2
    assert test["cross_entropy"] > 0
    with pytest.raises(ValueError, match=r"alpaca, which has no test split; give it `rows`"):
        make(scale=replace(grid.scale, rows=None), **changes)


def test_rows_of_two_experiments_in_one_folder_are_apart(make, write_rows, tmp_path):
    rows = [{"sentence": "a" * (9 - n) + " film", "label": n % 2} for n in range(9)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", rows)
    made = [
        make(tasks=("sst2",), data=tmp_path / "data", root=tmp_path / "root", rows=limits)
        for limits in ({"train": 3, "test": 2}, {"train": 5, "test": 2})
    ]
    texts = [Path(grid.sources["sst2"], "train.jsonl").read_text() for grid in made]
    assert [text.count("\n") for text in texts] == [3, 5]
    assert texts[0].startswith('{"sentence": "aaaaaaaaa film"')  # the first, not the shortest


def test_a_row_is_whole_with_a_rate_that_failed_and_not_with_one_that_was_not_run(study, grid):
    def made(cells):
        for cell in cells:
            of_edge = cell.test is None and cell.learning_rate > 1e-3
            failure = {"lora": "the loss is nan", "late": NOT_RUN}.get(cell.name.split(" ")[0], "")
            yield outcome(
                cell,
                findings={},
                dev_loss=abs(cell.learning_rate - 5e-4),
                failure=failure if of_edge else "",
            )

    section = carry_out_all(grid, "fair", made)
    assert {entry.method: entry.is_whole for entry in section.entries} == {
        "lora": True, "alora": True, "late": False
    }  # fmt: skip
    told = replace(grid.experiment, backbones={"small": "m"}, settings={"max_steps": 16})
    page = study.method_page(told, section)
    rows = len(section.entries)
    assert f"Whole so far: {rows - 1} of {rows} rows." in page
    assert "| late |" not in page
    assert "- lora r=8 on sst2: the loss is nan" in page
    assert "it has not been run yet" not in page


def test_nobody_tells_what_is_finished_and_runs_nothing(lora_cells, tmp_path):
    done, left = (replace(cell, root=str(tmp_path)) for cell in lora_cells)
    done.folder.mkdir(parents=True)
    told = {"cell": done.anywhere(), "test": {}, "dev_loss": 1.0}
    (done.folder / RESULT).write_text(json.dumps(told))
    found = list(get_executor("none")([done, left], Resources()))
    assert [one.failure for one in found] == ["", "it has not been run yet"]
    assert found[0].result["cell"] == done.as_data()
    assert not left.folder.exists()
    (done.folder / RESULT).unlink()
    failed(done, ValueError("the loss is nan"))
    assert next(get_executor("none")([done], Resources())).failure == "the loss is nan"
    (done.folder / FAILURE).unlink()


def test_some_methods_of_an_experiment(grid):
    whole = grid.experiment
    assert whole.only(["alora"]).ladder is False
    assert whole.only(["lora"]).ladder is True
    with pytest.raises(ValueError, match="compares no 'sora'; it has 'lora', 'alora', 'late'"):
        whole.only(["sora"])


@pytest.mark.parametrize("kind", ["name: b", "method: lora", "{name: b, method: lora, more: 1}"])
def test_a_method_that_is_half_described_is_refused(kind, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "title: a\nkind: scores\nbackbones: {}\ntasks: [sst2]\nmethods:\n  - " + kind
    )
    with pytest.raises(ValueError, match="has a method with the keys"):
        load_experiment(str(tmp_path / "mine.yaml"))


def test_every_run_of_the_scripts_can_be_begun(study, make):
    for name in study.NAMES:
        experiment = study.experiment(name)
        assert experiment.backbones["small"] in ("minilm-l6", "smollm2-135m")
        scale = load_scale("small")
        grid = make(tasks=("sst2",), ranks=(2,))
        grid = replace(grid, experiment=replace(experiment, tasks=("sst2",)), scale=scale)
        for cell in grid.at_one_rate("fair", {}):
            method_of(resolve(dict(cell.options)))
    compared = study.experiment(study.METHODS)
    methods = {compared.variant(name).method for name in compared.methods}
    assert methods == set(METHODS) - {"pattern"}


def test_rows_come_one_after_another(study):
    nothing = {"only": None, "tasks": None, "ranks": None}
    whole = study.experiment("ceiling-minilm-few")
    parts = list(study.parts(study.chosen(whole, **{**nothing, "tasks": ["rte"]})))
    assert [(part.tasks, part.ranks) for part in parts] == [
        (("rte",), (r,)) for r in (1, 2, 4, 8, 16)
    ]
    asked = study.chosen(whole, **{**nothing, "ranks": [1, 4]})
    assert (asked.ranks, asked.tasks) == ((1, 4), whole.tasks)
    methods = study.experiment("methods")
    (part,) = study.parts(study.chosen(methods, only=["sora"], tasks=["sst2"], ranks=None))
    assert (part.methods, part.ladder) == (("sora",), False)


def test_the_page_says_what_share_of_the_ceiling_comes_back(study, grid, tmp_path):
    page = study.study_page([(grid.experiment, told(grid))], pictures=tmp_path)
    rows = {
        line.split("|")[1].strip(): line.split("|") for line in page.splitlines() if "|" in line
    }
    assert rows["late r=2"][-2].strip() == "50%"
    assert rows["alora r=2"][-2].strip() == "0%"
    assert rows["alora r=2"][-3].strip() == "+0.0000 ± 0.0000 ~"
    assert rows["late r=2"][-3].strip() == "-0.1000 ± 0.0000"


def test_every_budget_has_a_table_and_one_ladder_of_lora(study, make, tmp_path):
    methods = ("lora", "alora")
    grid = make(tasks=("sst2",), methods=methods, ranks=(1, 2), seeds=(0, 1, 2), source="")
    rows = list(grid.rows("fair"))
    assert len(rows) == len(set(rows))
    assert {(method, rank) for _, method, rank in rows} == {
        *(("lora", rank) for rank in (1, 2, 4, 8)),
        *(("alora", rank) for rank in (1, 2)),
    }
    page = study.study_page([(grid.experiment, told(grid))], pictures=tmp_path)
    assert "### sst2, r = 1" in page
    _, second = page.split("### sst2, r = 2")
    methods = [line.split("|")[1].strip() for line in second.splitlines() if "r=" in line]
    assert methods[1:] == ["lora r=1", "lora r=2", "alora r=2", "lora r=4", "lora r=8"]


def test_sizes_go_from_large_to_small_beside_the_whole(study, make, tmp_path):
    small = Variant(method="shrink", options={"allocation.target_parameters": 99})
    methods, variants = ("lora", "shrink", "shrink, 1/8"), {"shrink, 1/8": small}
    grid = make(tasks=("sst2",), methods=methods, variants=variants, ladder=False, seeds=(0, 1, 2))

    def made(cell):
        found = losses(replace(cell, method={"lora": "lora", "shrink": "alora"}.get(cell.method)))
        examples = found.pop("of", None)
        one = outcome(cell, findings={}, **found)
        one.result["parameters"]["stored"] = {"lora": 9000, "shrink": 8000}.get(cell.method, 99)
        if examples:
            one.result["test"]["examples"] = examples
        return one

    section = carry_out_all(grid, "fair", lambda cells: map(made, cells))
    page = study.study_page([(grid.experiment, section)], pictures=tmp_path)
    lines = [line for line in page.splitlines() if line.startswith(("| lora", "| shrink"))]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[0], row[2]) for row in cells] == [
        ("lora", "9,000"), ("shrink", "8,000"), ("shrink, 1/8", "99")
    ]  # fmt: skip
    assert [row[-1] for row in cells] == ["-", "+0.2000 ± 0.0000", "+0.1000 ± 0.0000"]


def test_without_a_ceiling_there_is_no_share(study, grid, tmp_path):
    flat = carry_out_all(grid, "fair", every(lambda cell: {"dev_loss": 1.0}))
    page = study.study_page([(grid.experiment, flat)], pictures=tmp_path)
    assert "no ceiling" in page and "%" not in page.partition("| method")[2]


def test_the_page_of_methods_has_means_spreads_and_what_gates_did(study, grid):
    findings = {"overlap_with_draw": 0.6}
    section = carry_out_all(
        grid,
        "fair",
        lambda cells: (
            outcome(
                cell,
                score=80.0 + 2 * cell.seed,
                loss=0.5,
                dev_loss=-cell.learning_rate,
                findings=findings,
            )
            for cell in cells
        ),
    )
    told = replace(grid.experiment, backbones={"small": "m"}, settings={"max_steps": 16})
    lines = study.method_page(told, section)
    (row,) = [line for line in lines.splitlines() if line.startswith("| late |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].endswith("(edge)")
    assert cells[2:6] == ["3", "82.0 ± 2.0", "0.5000 ± 0.0000", "+0.0000 ± 0.0000 ~"]
    assert cells[9:] == ["overlap with draw 0.600", "1.00"]


def test_a_ceiling_has_a_map_of_what_was_searched(study, make, tmp_path):
    sweep = make(
        kind="sweep", tasks=("sst2", "rte"), methods=("lora",), ranks=(1, 2), trials=3, seeds=(0,)
    )

    def some(cells):
        """What is there so far: one task, with a rate that is missing."""
        for cell in cells:
            is_there = cell.task == "sst2" and cell.learning_rate != 5e-4
            failure = "" if is_there else "it was not run"
            yield outcome(cell, findings={}, dev_loss=cell.learning_rate, failure=failure)

    section = carry_out_all(sweep, "fair", some)
    page = study.study_page([(sweep.experiment, section)], pictures=tmp_path)
    (picture,) = tmp_path.glob("study-*.png")
    assert f"images/{picture.name}" in page
