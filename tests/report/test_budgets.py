from dataclasses import replace

import pytest
from run_folders import make_run

from loralloc.report.budgets import DEVELOPMENT, _sweep, lowest_loss
from loralloc.report.folders import read_runs
from loralloc.report.series import series_of


@pytest.mark.parametrize(("method", "step"), [("alora", 20), ("lora", 10), ("sora", 20)])
def test_a_loss_of_before_the_last_round_is_of_another_size(method, step, tmp_path):
    make_run(tmp_path / "run", method=method)  # whose rounds, if any, end at step 20
    (run,) = read_runs([tmp_path])
    log = [{"step": 10, "eval_loss": 0.1}, {"step": 20, "eval_loss": 0.5}]
    assert lowest_loss(replace(run, log=log)) == {10: 0.1, 20: 0.5}[step]


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
