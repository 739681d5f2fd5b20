import json
import os

import pytest

from loralloc.runs.arguments import DEFAULTS
from loralloc.runs.settings import resolve, saved

TRL_YAML = """\
# What `trl sft --config` takes
model_name_or_path: some/model
dataset_name: some/data
dataset_train_split: train_sft
learning_rate: 1e-4
lr_scheduler_type: cosine
packing: true
max_length: 512
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
lr_scheduler_kwargs:
  num_cycles: 0.5
"""


@pytest.fixture
def write_yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults():
    settings = resolve([])
    assert settings.given["lora_r"] == settings.model.lora_r == 8
    assert settings.sources["lora_r"] == "loralloc default"
    assert settings.allocation.num_rounds == 8
    assert "allocation.num_rounds" not in settings.given
    assert settings.training.report_to == []
    assert settings.given.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", ("lora_r", "allocation.min_rank"))
def test_a_flag_wins_over_the_file_over_an_earlier_run(name, write_yaml):
    bare = name.rpartition(".")[2]
    text = f"{bare}: 3" if bare == name else f"allocation:\n  {bare}: 3"
    layers = [dict(), dict(base={name: 2}), dict(config=write_yaml(text))]
    seen = []
    for count in range(1, 4):
        merged = {key: value for layer in layers[:count] for key, value in layer.items()}
        settings = resolve([], **merged)
        seen.append((settings.given.get(name), settings.sources.get(name)))
    settings = resolve([f"--{name}", "4"], **merged)
    seen.append((settings.given[name], settings.sources[name]))
    file = f"file {merged['config']}"
    assert seen[1:] == [(2, "earlier run"), (3, file), (4, "flag")]
    assert seen[0] in [(8, "loralloc default"), (None, None)]


def test_a_trl_yaml_is_taken_unchanged(write_yaml):
    settings = resolve([], config=write_yaml(TRL_YAML))
    assert settings.model.model_name_or_path == "some/model"
    assert settings.model.lora_target_modules == ["q_proj", "v_proj"]
    assert settings.script.dataset_train_split == "train_sft"
    assert settings.training.packing is True
    assert settings.training.max_length == 512
    assert settings.training.lr_scheduler_type == "cosine"
    assert settings.training.lr_scheduler_kwargs == {"num_cycles": 0.5}


def test_trl_reads_the_same_from_its_yaml(write_yaml):
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    path = write_yaml(TRL_YAML + "report_to: none\nbf16: false\noutput_dir: here\n")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config(["--config", str(path)])
    settings = resolve([], config=path)
    for ours, theirs, names in (
        (settings.script, script, ("dataset_name", "dataset_train_split")),
        (settings.model, model, ("model_name_or_path", "lora_r", "lora_target_modules")),
        (settings.training, training, ("learning_rate", "packing", "max_length", "output_dir")),
    ):
        assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]


def test_the_allocation_block(write_yaml):
    block = "allocation:\n  num_rounds: 3\n  recovery_epochs: 5e-1\n  ranks_per_round: model\n"
    path = write_yaml(TRL_YAML + block)
    settings = resolve([], config=path)
    assert settings.allocation.num_rounds == 3
    assert settings.allocation.recovery_epochs == 0.5
    assert settings.allocation.ranks_per_round == "model"
    assert settings.sources["allocation.num_rounds"] == f"file {path}"


def test_an_empty_allocation_block_is_the_default(write_yaml):
    settings = resolve([], config=write_yaml("lora_r: 4\nallocation:\n"))
    assert settings.allocation == resolve([]).allocation


@pytest.mark.parametrize("text", ("1e-4", "1E-4", "0.0001", "'1e-4'"))
def test_numbers_that_yaml_takes_for_text(text, write_yaml):
    settings = resolve([], config=write_yaml(f"learning_rate: {text}"))
    assert settings.training.learning_rate == 1e-4


def test_the_env_block_sets_environment_variables(write_yaml, monkeypatch):
    monkeypatch.setenv("LORALLOC_TEST", "before")
    resolve([], config=write_yaml("env:\n  LORALLOC_TEST: 1\nlora_r: 4\n"))
    assert os.environ["LORALLOC_TEST"] == "1"


@pytest.mark.parametrize(
    "flags",
    [
        ["--allocation.num_rounds", "3"],
        ["--allocation.num_rounds=3"],
        ["--num_rounds", "3"],
        ["--num_rounds=3"],
        ["--num-rounds", "3"],
        ["--lora_r", "4", "--num_rounds", "3", "--packing"],
    ],
)
def test_spellings_of_an_allocation_flag(flags):
    settings = resolve(flags)
    assert settings.allocation.num_rounds == 3
    assert settings.sources["allocation.num_rounds"] == "flag"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--ranks_per_round=block", "block"),
        ("--ranks_per_round=5", 5),
        ("--max_rank=16", 16),
        ("--max_rank=null", None),
        ("--warmup_epochs=5e-1", 0.5),
        ("--score=gradient", "gradient"),
        ("--score=my_package.scores:mine", "my_package.scores:mine"),
        ("--policy=my_package:plan", "my_package:plan"),
        ("--rounds_at=[0.1, 0.3]", (0.1, 0.3)),
        ("--rounds_at=[20, 60]", (20, 60)),
        ("--allocation.budget=parameters", "parameters"),
        ("--allocation.seed=7", 7),
        ("--newborns=potential", "potential"),
        ("--new_state=survivors", "survivors"),
        ("--new_rows=gradient", "gradient"),
        ("--policy=worth", "worth"),
        ("--rank_lr_power=0.5", 0.5),
    ],
)
def test_values_of_allocation_flags(flag, expected):
    name = flag.removeprefix("--").removeprefix("allocation.").partition("=")[0]
    assert getattr(resolve([flag]).allocation, name) == expected


def test_a_bare_seed_is_the_runs():
    settings = resolve(["--seed", "7"])
    assert settings.training.seed == 7
    assert settings.allocation.seed is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--packing"], True),
        (["--packing", "true"], True),
        (["--packing=false"], False),
        (["--gradient_checkpointing", "True", "--packing", "yes"], True),
    ],
)
def test_boolean_flags(flags, expected):
    assert resolve(flags).training.packing is expected


def test_lists_are_given_with_blanks():
    settings = resolve(["--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4"])
    assert settings.model.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "runs/data-smollm2-135m"),
        (["--task", "sst2"], "runs/sst2-smollm2-135m"),
        (["--dataset_name", "data/mine.jsonl"], "runs/mine-smollm2-135m"),
        (["--task", "demo", "--model_name_or_path", "some/tiny-llama"], "runs/demo-tiny-llama"),
        (["--output_dir", "here"], "here"),
    ],
)
def test_the_run_folder_is_named_after_data_and_model(flags, folder):
    assert str(resolve(flags).output_dir) == folder


def test_saved_settings_come_back(tmp_path, write_yaml):
    folder = tmp_path / "run"
    path = write_yaml(TRL_YAML + "allocation:\n  num_rounds: 3\n")
    first = resolve(["--output_dir", str(folder), "--min_rank", "1"], config=path)
    first.save()
    second = resolve([], base=saved(folder))
    assert second.given == first.given
    assert second.allocation == first.allocation
    data = json.loads((folder / "settings.json").read_text())
    assert data["allocation.min_rank"] == {"value": 1, "source": "flag"}
    assert data["lora_r"] == {"value": 16, "source": f"file {path}"}


def test_a_folder_without_settings_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to resume; leave out `--resume`"):
        saved(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rank: 4", r"Unknown option 'lora_rank' in .*run\.yaml; did you mean .*lora_r"),
        ("zzz: 4", "Unknown option 'zzz' in .*; `loralloc train --help-all` lists all"),
        ("allocation:\n  num_round: 4", "'num_round' in the block `allocation:` .* mean num_round"),
        ("allocation: 4", r"The block `allocation:` in .*run\.yaml must hold"),
        ("- lora_r", "must hold `option: value` lines, not a list"),
        ("", "must hold `option: value` lines"),
        ("lora_r: [4", r"run\.yaml is not valid YAML: while parsing"),
        ("lora_r: four", "`?lora_r"),
        ("packing: perhaps", "`?packing"),
        ("allocation:\n  num_rounds: 0", "`num_rounds` is 0; it must be a whole number of at"),
        ("allocation:\n  score: gradiant", "Did you mean 'gradient'"),
        ("load_in_4bit: true\nload_in_8bit: true", "8 bit and 4 bit|pip install bitsandb"),
    ],
)
def test_errors_in_a_file(text, words, write_yaml):
    with pytest.raises(ValueError, match=words):
        resolve([], config=write_yaml(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*none\.yaml; `--config` takes"):
        resolve([], config=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rank", "4"], "Unknown option 'lora_rank' among the flags; did you mean .*lora_r"),
        (["--num_round", "4"], "did you mean .*num_rounds"),
        (["--allocation.num_round", "4"], r"did you mean allocation\.num_rounds"),
        (["--zzz=4"], "'zzz' among the flags; `loralloc train --help-all` lists all"),
        (["demo"], "'demo' stands among the flags and no flag takes it"),
        (["--rounds_at", "1", "2"], r"'2' stands .* one value, as in --rounds_at='\[20, 60\]'"),
        (["--num_rounds"], "The flag --num_rounds needs a value"),
        (["--lora_r"], "expected one argument"),
        (["--num_rounds", "--lora_r", "4"], "num_rounds"),
        (["--lora_r", "four"], "A flag could not be read: .*lora_r.*invalid int value: 'four'"),
        (["--num_rounds", "four"], "`num_rounds` is 'four'; it must be a whole number"),
        (["--num_rounds", "2.5"], "`num_rounds` is 2.5; it must be a whole number"),
        (["--ranks_per_round", "blok"], "Did you mean 'block'"),
        (["--ranks_per_round", "["], "ranks_per_round"),
        (["--warmup_epochs", "0"], "must be a number of epochs above 0"),
        (["--head", "encoder"], "invalid choice: 'encoder'"),
    ],
)
def test_errors_among_flags(flags, words):
    with pytest.raises(ValueError, match=words):
        resolve(flags)


def test_padding_free_examples_are_not_cut():
    settings = resolve(["--task", "demo", "--padding_free", "true"])
    assert settings.training.max_length is None
    assert settings.sources["max_length"] == "as padding_free"
    given = resolve(["--task", "demo", "--padding_free", "true", "--max_length", "64"])
    assert given.training.max_length == 64
