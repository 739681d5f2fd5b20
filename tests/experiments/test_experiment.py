import pytest

from loralloc.experiments.experiment import (
    SCALES,
    experiment_names,
    load_experiment,
    load_scale,
)
from loralloc.experiments.made_rows import MAKERS, made_rows
from loralloc.tasks.catalog import TASKS

PAPERS = {
    *("table1", "table2", "table3", "table4", "table6", "table7", "table8"),
    *("figure2", "figure3", "figure4"),
}


def test_the_papers_tables_and_figures_are_there():
    assert set(experiment_names()) == PAPERS


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_an_experiment_has_a_backbone_at_every_scale(name):
    experiment = load_experiment(name)
    assert set(experiment.backbones) == set(SCALES)
    assert experiment.source.lower().replace(" ", "") == name


def test_table_1_has_thirteen_methods_and_seven_tasks():
    experiment = load_experiment("table1")
    assert (len(experiment.methods), len(experiment.tasks)) == (13, 7)
    assert set(experiment.printed["parameters"]) == set(experiment.methods)


def test_figure_2_goes_from_rank_1_to_128():
    assert load_experiment("figure2").ranks == (1, 2, 4, 8, 16, 32, 64, 128)


def test_the_papers_scale_is_its_protocol_with_five_seeds():
    scale = load_scale("paper")
    assert (len(scale.seeds), scale.learning_rate, scale.sizes) == (5, 1e-4, "paper")
    assert scale.settings == {"protocol": "paper"}
    assert scale.terms == ("paper", "fair")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: [", "is not valid YAML"),
        ("title: a\nkind: scores\nrow: 3", "has the unknown key 'row'"),
        ("title: a\nkind: scores", "has no 'backbones'"),
    ],
)
def test_a_file_that_describes_no_experiment_is_refused(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_experiment(str(tmp_path / "mine.yaml"))


def test_an_experiment_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: mine\nkind: scores\nbackbones: {}\n"
        "tasks: [sst2]\nmethods: [lora, alora]\nranks: [2]"
    )
    experiment = load_experiment(str(path))
    assert (experiment.name, experiment.ranks) == ("mine", (2,))


@pytest.mark.parametrize(
    ("name", "words"),
    [("tabel1", "did you mean 'table1'?"), ("nowhere.yaml", "There is no file nowhere.yaml")],
)
def test_an_unknown_experiment_is_told(name, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        load_experiment(name)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"demo"}))
def test_made_rows_are_what_a_task_reads(task):
    rows = made_rows(task, {"train": 6, "test": 2})
    assert {split: len(found) for split, found in rows.items()} == {"train": 6, "test": 2}
    examples = [TASKS[task].example(row) for row in rows["train"]]
    if TASKS[task].labels:
        assert {example.response for example in examples} == set(TASKS[task].labels)
    assert made_rows(task, {"train": 6, "test": 2}) == rows


def test_rows_of_every_task_but_the_demo_are_made():
    assert set(MAKERS) == set(TASKS) - {"demo"}
