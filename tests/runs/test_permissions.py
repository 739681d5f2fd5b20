"""A folder may come from anybody: what it says runs no code, uploads nothing, keeps no secret."""

import json

import pytest

from loralloc.cli import main
from loralloc.runs.permissions import PERMISSIONS, granted, without_permissions
from loralloc.runs.settings import resolve, resolve_again, saved

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).write_text("ran")
class Own(LlamaForCausalLM):
    pass
class OwnConfig(LlamaConfig):
    pass
"""


@pytest.fixture
def stranger(tmp_path, llama_folder, write_rows):
    """A finished run, whose backbone's folder then comes with code and whose settings trust it."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    rows = [{"prompt": f"the film {i} is", "completion": " good"} for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = {
        "dataset_name": str(data), "model_name_or_path": str(model), "method": "lora",
        "validation_examples": 8, "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
        "output_dir": str(tmp_path / "run"), "dtype": "float32", "lora_r": 1,
    }  # fmt: skip
    from loralloc import prepare, train

    train(prepare(options))
    marker = tmp_path / "marker"
    (model / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config["model_type"] = "llama-of-a-stranger"
    (model / "config.json").write_text(json.dumps(config))
    return tmp_path / "run", marker


def says(folder, name, value):
    path = folder / "settings.json"
    data = json.loads(path.read_text())
    data[name] = {"value": value, "source": "flag"}
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{run}", "--prompt", "the film"],
        ["eval", "{run}", "--task", "demo", "--limit", "2"],
        ["train", "--resume", "--output_dir", "{run}"],
    ],
    ids=lambda words: words[0],
)
def test_opening_a_strangers_run_runs_none_of_its_code(command, stranger, capsys):
    run, marker = stranger
    says(run, "trust_remote_code", True)
    assert main([word.format(run=run) for word in command]) == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trust_remote_code", True),
        ("push_to_hub", True),
        ("hub_model_id", "somebody/elses"),
        ("report_to", ["wandb"]),
        ("deepspeed", "zero.json"),
        ("method", "os:path"),
        ("allocation.score", "antigravity:fly"),
        ("attn_implementation", "somebody/kernel"),
        ("model_init_kwargs", {"trust_remote_code": True}),
        ("model_init_kwargs", '{"trust_remote_code": true}'),
        ("model_init_kwargs", "[no JSON"),
    ],
)
def test_a_resume_wants_what_a_folder_may_not_grant_given_again(name, value, tmp_path):
    resolve({"output_dir": str(tmp_path)}).save()
    says(tmp_path, name, value)
    with pytest.raises(ValueError, match=f"begun with `{name}` of .*, which a folder may not"):
        resolve_again({"output_dir": str(tmp_path)})
    assert saved(tmp_path).get(name) != value


def test_given_again_it_is_taken(tmp_path):
    resolve({"output_dir": str(tmp_path)}).save()
    says(tmp_path, "trust_remote_code", True)
    settings = resolve_again({"output_dir": str(tmp_path), "trust_remote_code": True})
    assert settings.training.trust_remote_code is True
    assert (
        resolve_again(
            {"output_dir": str(tmp_path), "trust_remote_code": False}
        ).training.trust_remote_code
        is False
    )


def test_an_ordinary_run_grants_nothing_and_resumes_as_before(tmp_path):
    resolve({"output_dir": str(tmp_path), "learning_rate": 3e-4}).save()
    assert granted(saved(tmp_path)) == {}
    assert resolve_again({"output_dir": str(tmp_path)}).training.learning_rate == 3e-4


def test_a_token_is_written_nowhere_and_shown_nowhere(tmp_path):
    settings = resolve({"output_dir": str(tmp_path), "hub_token": "hf_secret"})
    settings.save()
    assert "hf_secret" not in (tmp_path / "settings.json").read_text()
    says(tmp_path, "hub_token", "hf_secret")
    with pytest.raises(ValueError) as error:
        resolve_again({"output_dir": str(tmp_path)})
    assert "hf_secret" not in str(error.value)


def test_every_permission_is_an_option():
    from dataclasses import fields

    from loralloc.runs.arguments import GROUPS

    known = {f.name for group in GROUPS for f in fields(group)}
    assert set(PERMISSIONS) <= known | {"hub_revision"}
    assert without_permissions(dict.fromkeys(PERMISSIONS, "x")) == {}
