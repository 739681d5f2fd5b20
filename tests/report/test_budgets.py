import pytest
from run_folders import make_run

from loralloc.report.budgets import DEVELOPMENT, _sweep
from loralloc.report.folders import read_runs
from loralloc.report.series import series_of


def test_of_a_search_the_best_setting_is_drawn_with_its_seeds_alone(tmp_path):
    for rate, loss in ((1e-4, 0.9), (1e-3, 0.4), (1e-2, 0.7)):
        for seed in (0, 1):
            make_run(
                tmp_path / f"lora-{rate}-{seed}",
                method="lora",
                seed=seed,
                loss=loss + 0.1 * seed,
                figures={"accuracy": 100 * (1 - loss)},
                settings={"learning_rate": rate},
            )
    make_run(tmp_path / "lora-large", method="lora", rank=8)
    series = series_of(read_runs([tmp_path]))
    sizes = _sweep(series, "sst2-test-beam5 accuracy")["lora"]
    (dots,) = sizes.values()  # the large one was not tested
    assert [value for _, value in dots] == pytest.approx([60.0, 60.0])
    small, large = sorted(_sweep(series, DEVELOPMENT)["lora"].items())
    assert [value for _, value in small[1]] == pytest.approx([0.425, 0.525])
    assert large[0] == 2 * small[0]
    assert len(large[1]) == 1
