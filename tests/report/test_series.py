from pathlib import Path

import pytest
from run_folders import make_run

from loralloc.report.folders import TrainedRun, read_runs
from loralloc.report.series import series_of, size_of, spread


@pytest.fixture
def runs(tmp_path: Path) -> list[TrainedRun]:
    for method in ("alora", "lora"):
        for rank in (2, 8):
            for seed in (0, 1):
                more = {"allocation.num_rounds": 4, "ranks_per_round": rank}
                make_run(
                    tmp_path / f"{method}-{rank}-{seed}",
                    method=method,
                    rank=rank,
                    seed=seed,
                    settings=more if method == "alora" else {},
                )
    return read_runs([tmp_path])


def test_runs_that_differ_in_their_seed_are_one_series_told_by_as_little_as_can_be(runs) -> None:
    series = series_of(runs)
    assert [(one.label, len(one.runs)) for one in series] == [
        ("alora, r=2", 2),
        ("alora, r=8", 2),
        ("lora, r=2", 2),
        ("lora, r=8", 2),
    ]
    assert [one.index for one in series] == [0, 1, 2, 3]


def test_a_copy_of_a_run_is_no_further_seed(runs, tmp_path: Path) -> None:
    make_run(tmp_path / "resized", method="lora", rank=2, seed=1, loss=9.0)
    series = series_of([*runs, *read_runs([tmp_path / "resized"])])
    assert [(one.label, len(one.runs)) for one in series][2:] == [
        ("lora-2-0", 2),
        ("lora, r=8", 2),
        ("resized", 1),
    ]


def test_runs_without_a_second_seed_go_by_their_names(runs) -> None:
    alone = [run for run in runs if run.settings["seed"] == 0]
    assert [one.label for one in series_of(alone)] == [run.name for run in alone]


@pytest.mark.parametrize(
    ("method", "settings", "size"),
    [
        ("lora", {}, "4"),
        ("sora", {"method.rank": 2}, "2"),
        ("houlsby", {"method.bottleneck": 16}, "16"),
        ("houlsby", {}, ""),
        ("os.path:join", {}, ""),
    ],
)
def test_a_size_is_that_of_the_method(tmp_path: Path, method, settings, size) -> None:
    make_run(tmp_path / "run", method=method, settings=settings)
    (run,) = read_runs([tmp_path])
    assert size_of(run) == size


def test_a_spread_names_mean_and_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], ".2f") == "2.00 ± 1.00"
    assert spread([1.0], ".2f") == "1.00"
