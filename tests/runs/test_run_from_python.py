"""A run from Python: a mapping of options in the place of flags."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loralloc
from loralloc.methods.alora import Alora
from loralloc.methods.catalog import get_method
from loralloc.runs.settings import resolve, saved_values

FLAGS = [
    *("--task", "demo", "--learning_rate", "2e-4", "--lora_target_modules", "q_proj", "v_proj"),
    *("--packing", "--method", "houlsby", "--method.bottleneck", "7", "--num_rounds", "3"),
    *("--allocation.ranks_per_round", "block", "--lr_scheduler_kwargs", '{"num_cycles": 0.5}'),
]
OPTIONS = {
    "task": "demo",
    "learning_rate": 2e-4,
    "lora_target_modules": ["q_proj", "v_proj"],
    "packing": True,
    "method": "houlsby",
    "method.bottleneck": 7,
    "num_rounds": 3,
    "allocation.ranks_per_round": "block",
    "lr_scheduler_kwargs": {"num_cycles": 0.5},
}


@pytest.mark.parametrize("options", [None, "run.yaml", ["--task", "demo"]])
def test_options_that_are_no_mapping(options):
    with pytest.raises(TypeError, match="give a mapping, in which `config` may name a file"):
        loralloc.prepare(options)


def test_options_are_those_of_the_flags():
    flags, options = resolve(FLAGS), resolve(OPTIONS)
    for name in ("script", "model", "run", "allocation", "method_options"):
        assert getattr(options, name) == getattr(flags, name)
    assert options.training.learning_rate == flags.training.learning_rate
    assert options.training.lr_scheduler_kwargs == flags.training.lr_scheduler_kwargs
    assert {options.sources[name] for name in flags.sources if flags.sources[name] == "flag"} == {
        "Python"
    }


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": {"num_rounds": 3}},
        {"allocation.num_rounds": "3"},
        {"num_rounds": 3},
        {"num-rounds": 3},
    ],
    ids=str,
)
def test_spellings_of_an_option_of_the_allocation(options):
    settings = resolve(options)
    assert settings.allocation.num_rounds == 3
    assert settings.sources["allocation.num_rounds"] == "Python"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "houlsby", "method.bottleneck": 7},
        {"method": {"name": "houlsby", "bottleneck": "7"}},
    ],
    ids=str,
)
def test_spellings_of_a_methods_option(options):
    settings = resolve(options)
    assert settings.run.method == "houlsby"
    assert settings.method_options == {"bottleneck": 7}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("max_length", None, None),
        ("packing", "yes", True),
        ("gradient_checkpointing", "false", False),
        ("lora_modules_to_save", "lm_head", ["lm_head"]),
        ("output_dir", Path("here"), "here"),
        ("seed", "7", 7),
    ],
)
def test_values_are_of_pythons_types_or_text(name, value, expected):
    found = resolve({name: value}).given[name]
    assert (found, type(found)) == (expected, type(expected))


def by_norm(objective, weights_b, limits):
    return loralloc.Scores(terms={"norm": {n: b.norm(dim=0) for n, b in weights_b.items()}})


def test_a_score_and_a_method_of_ones_own_are_kept_by_their_places(tmp_path):
    options = {"allocation": {"score": by_norm}, "method": Alora, "output_dir": tmp_path}
    settings = resolve(options)
    assert settings.allocation.score is by_norm
    assert get_method(settings.run.method) is Alora
    settings.save()
    again = resolve({}, base=saved_values(tmp_path))
    assert again.allocation.score == f"{__name__}:by_norm"
    assert get_method(again.run.method) is Alora


def test_a_file_is_below_the_options(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora_r: 4\nlora_alpha: 8\nallocation:\n  num_rounds: 3\n")
    settings = resolve({"config": path, "lora_r": 2})
    assert (settings.model.lora_r, settings.model.lora_alpha) == (2, 8)
    assert settings.sources["lora_alpha"] == f"file {path}"
    assert settings.allocation.num_rounds == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_rank": 4}, "Unknown option 'lora_rank' in the options; did you mean"),
        ({"num_round": 4}, "did you mean allocation.num_rounds"),
        ({"allocation": {"num_round": 4}}, "'num_round' in the block `allocation:` in the options"),
        ({"allocation": 4}, "The block `allocation:` in the options must hold"),
        ({"zzz": 4}, "'zzz' in the options; `loralloc train --help-all` lists all"),
        ({"lora_r": "four"}, "`lora_r` in the options cannot be 'four': invalid literal for int"),
        ({"lora_r": 2.5}, "`lora_r` in the options cannot be 2.5"),
        ({"lora_r": True}, "`lora_r` in the options cannot be True"),
        ({"packing": "perhaps"}, "`packing` in the options cannot be 'perhaps'"),
        (
            {"head": "encoder"},
            "cannot be 'encoder'; choose from 'auto', 'lm', 'cl",
        ),
        (
            {"eval_strategy": "always"},
            "`eval_strategy` in the options cannot be 'always'; choose",
        ),
        ({"num_rounds": "four"}, "`num_rounds` is 'four'; it must be a whole number"),
        ({8: "lora_r"}, "Unknown option '8' in the options"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_as_of_a_flag(options, sentence):
    with pytest.raises(ValueError) as refused:
        resolve(options)
    assert sentence in str(refused.value)


@pytest.fixture
def options(tmp_path, write_rows, llama_folder):
    rows = [{"prompt": f"the film {n} is", "completion": " good"} for n in range(32)]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:24])
    write_rows(tmp_path / "data" / "validation.jsonl", rows[24:])
    return {
        "dataset_name": tmp_path / "data",
        "model_name_or_path": llama_folder,
        "output_dir": tmp_path / "out",
        "lora_r": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "dtype": "float32",
        "save_strategy": "steps",
        "save_steps": 4,
        "allocation": {
            "num_rounds": 1,
            "warmup_epochs": 0.5,
            "scoring_examples": 4,
        },
        "use_cpu": True,
        "disable_tqdm": True,
    }


def test_a_whole_run_whose_folder_is_then_left_alone_resumed_or_replaced(options, tmp_path):
    rounds = []
    run = loralloc.prepare(options, on_round=rounds.append)
    assert isinstance(run, loralloc.Run)
    assert run.allocation.steps == [3]
    loralloc.train(run)
    assert [entry.step for entry in rounds] == [3]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")

    with pytest.raises(ValueError, match="already holds a run; go on with `--resume`, replace it"):
        loralloc.prepare(options)
    with pytest.raises(ValueError, match=r"`resume` goes on .* and `overwrite` replaces it"):
        loralloc.prepare(options, resume=True, overwrite=True)

    resumed = loralloc.prepare({"output_dir": tmp_path / "out"}, resume=True)
    assert resumed.settings.sources["lora_r"] == "earlier run"
    assert resumed.checkpoint.name == "checkpoint-6"
    loralloc.train(resumed)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(again, weights, rtol=0, atol=0)

    loralloc.train(loralloc.prepare({**options, "max_steps": 4}, overwrite=True))
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("steps", [4, 6])  # in the midst of an epoch, and at the end of one
def test_a_run_that_has_ended_is_the_same_after_it_was_resumed(steps, options, tmp_path):
    more = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": steps}
    loralloc.train(loralloc.prepare({**options, **more, "save_steps": 2}))
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    resumed = loralloc.prepare({"output_dir": tmp_path / "out"}, resume=True)
    loralloc.train(resumed)
    assert resumed.trainer.state.global_step == steps
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_a_run_that_is_not_there_cannot_be_resumed(options):
    with pytest.raises(FileNotFoundError, match="so there is no run to resume"):
        loralloc.prepare(options, resume=True)
