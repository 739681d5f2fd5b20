"""A user's arguments of `from_pretrained` reach it, in training and when a run is opened again."""

import pytest

from loralloc.runs.checks import OWN_OPTIONS, checked_model_arguments
from loralloc.runs.run import prepare, train
from loralloc.runs.trained import load_trained


@pytest.mark.parametrize("given", [{"attention_dropout": 0.25}, '{"attention_dropout": 0.25}'])
def test_arguments_reach_the_model_of_a_run_and_of_one_opened_again(
    given, tmp_path, llama_folder, write_rows
):
    rows = [{"prompt": f"film {i}", "completion": " good"} for i in range(8)]
    options = {
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
        "model_name_or_path": llama_folder,
        "output_dir": tmp_path / "run",
        "method": "lora",
        "max_steps": 1,
        "validation_examples": 2,
        "model_init_kwargs": given,
    }
    run = prepare(options)
    assert run.model.config.attention_dropout == 0.25
    train(run)
    assert load_trained(tmp_path / "run")[0].config.attention_dropout == 0.25


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_an_argument_with_an_option_of_its_own_is_refused(name):
    use = OWN_OPTIONS[name]
    words = f"has an option of its own; use `--{use}`" if use else "a run sets itself"
    with pytest.raises(ValueError, match=f"`model_init_kwargs` has '{name}', which {words}"):
        checked_model_arguments({name: 1})


@pytest.mark.parametrize("given", ("use_kernels", ["a"], "[1]"))
def test_what_is_no_mapping_is_refused(given):
    with pytest.raises(ValueError, match="it must be a mapping of arguments, such as"):
        checked_model_arguments(given)


def test_nothing_is_nothing():
    assert checked_model_arguments(None) == {}
