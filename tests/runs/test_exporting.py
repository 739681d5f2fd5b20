"""An adapter in every form gives the logits of the run, in a process that has no loralloc."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from adapter_folders import UNEVEN, logits, made
from safetensors.torch import load_file, save_file

from loralloc.adapters.folder import read_adapter
from loralloc.runs import exporting
from loralloc.runs.exporting import FORMATS, export, repeat_rotary
from loralloc.runs.verifying import named_beside

LOADERS = Path(__file__).parents[1] / "adapters" / "stock_loaders.py"
WHOLE = ("peft", "portable", "merged")
CASES = {
    "uneven": (tiny.llama, dict(r=20, lora_alpha=40, ranks=UNEVEN), FORMATS),
    "rslora": (tiny.llama, dict(r=9, use_rslora=True, ranks=(9, 4, 1, 6, 2)), FORMATS),
    "head": (tiny.llama, dict(modules_to_save=["lm_head"], ranks=UNEVEN, r=20), WHOLE),
    "gpt2": (tiny.gpt2, dict(r=20, ranks=(0, 20, 3)), FORMATS),
    "classifier": (tiny.bert_classifier, dict(r=20, ranks=UNEVEN), WHOLE),
}


def head_of(case: str) -> str:
    return "classifier" if case == "classifier" else "lm"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    return {
        case: made(tmp_path_factory.mktemp(case), build(), **options)
        for case, (build, options, _) in CASES.items()
    }


@pytest.fixture(scope="module")
def answered(adapters, tmp_path_factory) -> dict[tuple[str, str], torch.Tensor]:
    """Logits by case and form, all from one process, since it takes seconds to import PEFT."""
    scratch = tmp_path_factory.mktemp("answers")
    jobs, names = [], []
    for case, (_, _, forms) in CASES.items():
        for form in forms:
            done = export(adapters[case], to=form, output=scratch / case / form)
            hows = (form, "vllm") if (form, head_of(case)) == ("portable", "lm") else (form,)
            for how in hows:
                names.append((case, how))
                jobs.append(
                    dict(
                        head=head_of(case),
                        base=str(adapters[case].parent / "base"),
                        folder=str(done.path),
                        how=how,
                    )
                )
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-W", "ignore", LOADERS, scratch / "jobs.json", scratch / "answers"],
        check=True,
        cwd=scratch,
        env=environment,
    )
    found = load_file(scratch / "answers")
    return {name: found[str(index)] for index, name in enumerate(names)}


EXPORTS = [(case, form) for case, (_, _, forms) in CASES.items() for form in forms]


@pytest.mark.parametrize(("case", "form"), [*EXPORTS, ("uneven", "vllm"), ("rslora", "vllm")])
def test_a_process_without_loralloc_has_the_adapters_logits(case, form, adapters, answered):
    build = CASES[case][0]
    run = logits(adapters[case], build())
    base = build()(input_ids=torch.arange(3, 15)[None]).logits
    assert (run - base).abs().max() > 0.05, "the adapter says something"
    torch.testing.assert_close(answered[case, form], run, atol=1e-5, rtol=1e-5)


def test_portable_is_one_rank_with_zeros_where_modules_were_emptied(adapters, tmp_path):
    export(adapters["uneven"], to="portable", output=tmp_path / "new", rank_multiple=8)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (24, 24)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["target_modules"] == sorted(tiny.LLAMA_TARGETS)
    new, old = read_adapter(tmp_path / "new"), read_adapter(adapters["uneven"])
    assert set(new.ranks.values()) == {24} and len(new.ranks) == 14 > len(old.ranks)
    emptied = set(new.ranks) - set(old.ranks)
    assert all(not new.modules[n].a.any() and not new.modules[n].b.any() for n in emptied)


@pytest.mark.parametrize("more", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_merged_says_its_rotary_embedding_to_those_who_know_the_old_names(more, tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 5000.0, **more}
    adapter = made(tmp_path, tiny.llama(rope_parameters=rotary))
    done = export(adapter, to="merged")
    config = json.loads((done.path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]) == (5000.0, rotary)
    assert config.get("rope_scaling") == (more or None)


def test_the_part_of_a_head_that_is_turned_is_said_under_its_old_name_too(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rotary}))
    repeat_rotary(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"rope_parameters": rotary, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}


def test_peft_form_takes_the_padding_away_again(adapters, tmp_path):
    export(adapters["uneven"], to="portable", output=tmp_path / "wide")
    export(tmp_path / "wide", to="peft", output=tmp_path / "narrow")
    assert read_adapter(tmp_path / "narrow").ranks == read_adapter(adapters["uneven"]).ranks


@pytest.mark.parametrize("form", FORMATS)
def test_sixteen_bits_are_as_near_as_they_can_be(form, adapters, tmp_path):
    done = export(adapters["uneven"], to=form, output=tmp_path / form, dtype="bfloat16")
    assert 1e-5 < done.difference < done.allowed


@pytest.mark.parametrize(("case", "form"), [("head", "gguf"), ("head", "mlx")])
def test_what_a_form_cannot_hold_is_refused(case, form, adapters, tmp_path):
    with pytest.raises(ValueError, match="ranks only; use `--to merged`"):
        export(adapters[case], to=form, output=tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_an_export_that_is_wrong_is_not_kept(adapters, tmp_path, monkeypatch):
    def wrong(adapter, *args, **options):
        form = portable(adapter, *args, **options)
        key = next(key for key in form.tensors if key.endswith("lora_B.weight"))
        form.tensors[key] *= 2
        return form

    portable = exporting.portable
    monkeypatch.setattr(exporting, "portable", wrong)
    with pytest.raises(ValueError, match="differ from the run's by"):
        export(adapters["rslora"], to="portable", output=tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_nothing_that_is_there_is_written_over(adapters, tmp_path):
    with pytest.raises(ValueError, match="is there already; name another `--output_dir`"):
        export(adapters["uneven"], to="peft", output=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="onnx"), "`--to` is 'onnx'; use one of peft"),
        (dict(to="peft", dtype="int8"), "`--dtype` is 'int8'; use one of float32"),
        (dict(to="peft", rank_multiple=8), "the one rank of portable and mlx, and peft has none"),
        (dict(to="portable", rank_multiple=0), "must be at least 1"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, message, adapters, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(adapters["uneven"], output=tmp_path / "new", **options)


def test_another_models_adapter_is_refused(adapters, tmp_path):
    other = adapters["gpt2"].parent / "base"
    with pytest.raises(ValueError, match=r"is not one of this model: .*name the adapter's own"):
        export(adapters["uneven"], to="peft", output=tmp_path / "new", base=str(other))


def test_dora_is_more_than_lora(tmp_path):
    adapter = made(tmp_path, tiny.llama(), use_dora=True)
    with pytest.raises(ValueError, match="has `use_dora`, so it is more than LoRA's"):
        export(adapter, to="portable")
    export(adapter, to="merged")
    assert (tmp_path / "adapter-merged" / "config.json").is_file()


def test_tensors_that_do_not_fit_are_told_by_name(adapters, tmp_path):
    (tmp_path / "bad").mkdir()
    tensors = load_file(adapters["rslora"] / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    config = (adapters["rslora"] / "adapter_config.json").read_text()
    (tmp_path / "bad" / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"lora_A and lora_B of .* do not fit together"):
        export(tmp_path / "bad", to="peft")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/a/", "runs/a-peft"),
        ("/x/a", "/x/a-peft"),
        (".", "../here-peft"),
        ("..", "../../x-peft"),
    ],
)
def test_a_folder_gets_its_name_as_its_user_named_the_adapters(folder, name, tmp_path, monkeypatch):
    (tmp_path / "x" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "here")
    found = named_beside(Path(folder), "peft")
    assert found.is_absolute() == folder.startswith(("/", "."))
    assert os.path.abspath(found) == os.path.abspath(name)
