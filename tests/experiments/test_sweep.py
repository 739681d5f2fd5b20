"""A search finds the optimum, says where it lies, and gives the numbers of runs one by one."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loralloc.cli import main
from loralloc.experiments import sweep
from loralloc.experiments.executors import fleet
from loralloc.experiments.executors.executor import Resources, get_executor
from loralloc.experiments.files import write_json
from loralloc.experiments.work import RESULT, TRAINED, Outcome

QUICK = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "dtype": "float32",
    "use_cpu": True,
    "eval_strategy": "no",
    "save_strategy": "no",
}


@pytest.fixture
def options(tmp_path, write_rows, llama_folder):
    rows = [{"prompt": f"the film {n} is", "completion": " good" * (n % 3 + 1)} for n in range(12)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:5])
    data = str(tmp_path / "data")
    return {**QUICK, "dataset_name": data, "model_name_or_path": str(llama_folder)}


def cells(options, root, **changes):
    searched = {"methods": ["lora"], "ranks": [2], "learning_rates": [1e-3, 4e-2], "seeds": [0]}
    return sweep.cells(options, root=root, **{**searched, **changes})


def test_the_scale_is_one_at_all_ranks(options, tmp_path):
    made = cells(options, tmp_path, ranks=[1, 4], seeds=[0, 1])
    assert len({cell.folder for cell in made}) == 8
    assert {(c.options["lora_r"], c.options["lora_alpha"]) for c in made} == {(1, 2), (4, 8)}
    fixed = cells({**options, "lora_alpha": 16}, tmp_path, ranks=[1, 4])
    assert {cell.options["lora_alpha"] for cell in fixed} == {16}


def test_rsloras_alpha_is_one_at_all_ranks_so_that_its_scaling_falls(options, tmp_path):
    own = cells(options, tmp_path, methods=["rslora"], ranks=[1, 4])
    asked = cells({**options, "use_rslora": True}, tmp_path, ranks=[1, 4])
    assert {c.options["lora_alpha"] for c in [*own, *asked]} == {16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rates": [1e-3]}, "There is nothing to search over"),
        ({"ranks": [2, 2]}, "`r` is 2, 2; give each value once"),
        ({"seeds": []}, "`seed` is empty"),
    ],
)
def test_a_search_without_a_choice_is_refused(changes, words, options, tmp_path):
    with pytest.raises(ValueError, match=words):
        cells(options, tmp_path, **changes)


def test_what_goes_together_is_grouped_and_the_rest_says_why(options, tmp_path):
    made = cells(options, tmp_path, methods=["lora", "alora", "dora"], seeds=[0, 1, 2])
    alone, *together = sorted(fleet.groups(made, at_once=8), key=lambda g: not g.why_alone)
    assert {cell.method for cell in alone.cells} == {"dora"}
    assert "`method` is 'dora'" in alone.why_alone
    assert [len(group.cells) for group in together] == [6, 6]
    other = cells({**options, "max_steps": 3}, tmp_path)
    assert [len(g.cells) for g in fleet.groups([*made[:2], *other], at_once=8)] == [2, 2]


@pytest.mark.slow
def test_the_fleet_gives_the_numbers_of_runs_one_by_one(options, tmp_path):
    results = {
        name: list(get_executor(name)(cells(options, tmp_path / name), Resources()))
        for name in ("fleet", "process")
    }
    losses = {name: [o.result["dev_loss"] for o in found] for name, found in results.items()}
    assert losses["fleet"] == pytest.approx(losses["process"], abs=1e-5)
    assert losses["fleet"][0] != pytest.approx(losses["fleet"][1], abs=1e-3)
    assert all(outcome.ran for outcome in results["fleet"])


def test_where_memory_is_short_fewer_go_at_once(options, tmp_path, monkeypatch):
    tried = []

    def train_at_once(cells):
        tried.append(len(cells))
        if len(cells) > 1:
            raise fleet.torch.OutOfMemoryError
        return {cells[0].folder: Outcome(cell=cells[0], result=None, failure="not trained")}

    monkeypatch.setattr(fleet, "_train_at_once", train_at_once)
    made = cells(options, tmp_path, ranks=[1, 2], learning_rates=[1e-3])
    assert [o.cell for o in fleet.run(made, Resources())] == made
    assert tried == [2, 1, 1]


def test_what_another_process_has_trained_meanwhile_is_not_trained_again(
    options, tmp_path, monkeypatch
):
    one, other, left = cells(options, tmp_path, learning_rates=[3e-3, 2e-3, 1e-3])
    for cell, name, data in ((one, TRAINED, {}), (other, RESULT, {"test": None})):
        write_json(cell.folder / name, {"cell": cell.anywhere(), **data})
    begun, held = [], []

    def begin(cell, prepare):
        begun.append(cell)
        raise ValueError("it is not prepared here")

    monkeypatch.setattr(fleet, "begin_cell", begin)
    monkeypatch.setattr(fleet, "locked", lambda folder: held.append(folder) or nullcontext())
    assert fleet._train_at_once([one, other, left]) == {}
    assert begun == [left]
    assert held == sorted(held)  # or two fleets could wait for each other
    assert len(held) == 3


def test_several_workers_test_what_a_fleet_has_trained(options, tmp_path, monkeypatch):
    def told(where):
        return lambda cells, _: (Outcome(cell=cell, result=None, failure=where) for cell in cells)

    monkeypatch.setattr(fleet, "_train_at_once", lambda cells: {})
    monkeypatch.setattr(fleet, "run_pool", told("a pool"))
    monkeypatch.setattr(fleet, "run_one_by_one", told("here"))
    searched, tested, trained = cells(options, tmp_path, learning_rates=[1e-3, 2e-3, 3e-3])
    made = [searched, replace(tested, test={}), replace(trained, test={})]
    trained.folder.mkdir(parents=True)
    (trained.folder / TRAINED).touch()
    for workers, where in ((1, "here"), (2, "a pool")):
        found = {o.cell.folder: o.failure for o in fleet.run(made, Resources(workers=workers))}
        assert list(found.values()) == ["here", where, where]
    assert [cell.folder for cell in made] == sorted(found)


def outcome(options, root, rank, rate, seed, loss):
    (cell, _) = cells(options, root, ranks=[rank], learning_rates=[rate, 9.0], seeds=[seed])
    result = None if loss is None else {"dev_loss": loss}
    return Outcome(cell=cell, result=result, failure="" if result else "no memory")


def found(options, root, losses):
    return sweep.find(
        outcome(options, root, rank, rate, seed, loss)
        for (rank, rate), of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    )


def test_the_lowest_mean_is_the_best_and_an_edge_is_told(options, tmp_path):
    losses = {
        (1, 1e-3): (3.0, 3.1),
        (1, 2e-3): (2.5, 2.7),
        (2, 1e-3): (2.2, 2.4),
        (2, 2e-3): (2.1, 1.9),
        (4, 2e-3): (2.6, 2.4),
    }
    best = found(options, tmp_path, losses)
    assert (best.best.rank, best.best.learning_rate) == (2, 2e-3)
    assert best.best.mean == pytest.approx(2.0)
    assert best.best.error == pytest.approx(0.1)
    assert best.cell.seed == 1
    assert best.edges == (
        "The best --learning_rate is 0.002, the largest that was tried, so the optimum may lie "
        "beyond it; search on with --learning_rate 0.004.",
    )
    assert [(near.rank, near.learning_rate) for near in best.near] == [(2, 1e-3)]


def test_an_optimum_inside_has_no_edge_and_a_failed_seed_is_no_optimum(options, tmp_path):
    losses = {(2, 1e-3): (3.0,), (2, 2e-3): (2.0,), (2, 4e-3): (2.5,), (2, 8e-3): (None,)}
    best = found(options, tmp_path, losses)
    assert best.edges == ()
    assert best.points[-1].failures == {0: "no memory"}
    with pytest.raises(RuntimeError, match="with every seed; the first failed: no memory"):
        found(options, tmp_path, {(2, 1e-3): (None,)})


def test_the_command_prints_the_table_and_keeps_the_best(
    options, tmp_path, llama_folder, capsys, monkeypatch
):
    flags = [f"--{name}={value}" for name, value in options.items()]
    words = ["sweep", "--learning_rate", "1e-3,4e-2", "--r", "1,2", *flags]
    words += ["--output_dir", str(tmp_path / "sweep")]
    assert main([*words, "--plan"]) == 0
    assert "4 runs, 0 of them finished before\n4 at once" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "lora: development loss by rank and learning rate, of one seed" in said
    assert "the largest that was tried" in said
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    PeftModel.from_pretrained(base, tmp_path / "sweep" / "best")
    monkeypatch.setattr(fleet, "_train_at_once", None)  # nothing is trained again
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again.count("(finished before)") == 4
    assert again.splitlines()[-3:] == said.splitlines()[-3:]
