"""The card of a run folder: short, and with a base model that others can open."""

import json
import shutil

import pytest

from loralloc.methods.catalog import get_method
from loralloc.runs import card
from loralloc.runs import run as runs
from loralloc.runs.heads.lm import LM
from loralloc.runs.models import BUILT_IN


class Trained:
    """What a card asks of a method."""

    about = get_method("houlsby").about
    sized_for = None

    def findings(self):
        return {}

    def num_stored(self):
        return 10

    def over_budget(self):
        return None


def written(folder, *losses, base="some/model"):
    log = [{"step": 10 * (n + 1), "eval_loss": loss} for n, loss in enumerate(losses)]
    card.write(
        folder,
        base_model=base,
        data="data",
        head=LM,
        num_labels=0,
        method=Trained(),
        record=None,
        log=log,
    )
    return (folder / "README.md").read_text()


def test_a_long_run_has_a_short_card(tmp_path):
    few = written(tmp_path, 3.0, 1.0, 2.0)
    assert "- Development loss at step 30, the last: 2.0000" in few
    assert "- Lowest of 3 evaluations: 1.0000, at step 20." in few
    assert len(written(tmp_path, *[3.0, 1.0, 2.0] * 50).splitlines()) == len(few.splitlines())
    assert "Lowest" not in written(tmp_path, 3.0, 1.0)
    assert "Development loss" not in written(tmp_path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_goes_by_its_name_on_the_hub(name, tmp_path):
    model = BUILT_IN[name]
    text = written(tmp_path, base=name)
    assert f'.from_pretrained("{model.hub_name}")' in text
    assert f"base_model: {model.hub_name}\n" in text
    assert f"`{model.distribution}` {model.version}" in text
    assert ("4 bits" in text) == (name == "smollm2-135m")


def test_a_folder_of_a_built_in_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-l6").mkdir()
    text = written(tmp_path, base="minilm-l6")
    assert '.from_pretrained("minilm-l6")' in text and "base_model:" not in text


@pytest.mark.parametrize(("method", "file"), [("lora", "adapter_config"), ("bitfit", "method")])
def test_a_saved_adapter_holds_no_path_of_the_cache(
    method, file, llama_folder, tmp_path, monkeypatch, write_rows
):
    shutil.copytree(llama_folder, tmp_path / "cache" / "models" / "smollm2-135m")
    monkeypatch.setenv("LORALLOC_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"the film {i} is", "completion": " good"} for i in range(12)]
    run = runs.prepare(
        {
            "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
            "validation_examples": 4,
            "method": method,
            "max_steps": 1,
            "output_dir": tmp_path / "out",
            "use_cpu": True,
            "disable_tqdm": True,
        }
    )
    runs.train(run)
    config = json.loads((tmp_path / "out" / f"{file}.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    from loralloc.runs.trained import load_trained

    load_trained(tmp_path / "out")  # the run's own settings say where its copy is
