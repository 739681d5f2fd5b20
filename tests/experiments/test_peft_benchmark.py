"""A pattern of ranks as an experiment folder of PEFT's own benchmark."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model

from loralloc.allocation.layers import lora_layers
from loralloc.cli import main

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {
    *("model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps"),
    *("eval_steps", "compile", "seed", "grad_norm_clip", "optimizer_kwargs", "lr_scheduler"),
    *("use_amp", "attn_implementation", "generation_kwargs", "query_template"),
}
"""What the benchmark's `default_training_params.json` has, over which an experiment's are laid."""


@pytest.fixture
def script(monkeypatch):
    """The script as a command."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import peft_benchmark

    def script(*words):
        monkeypatch.setattr(sys, "argv", ["peft_benchmark.py", *map(str, words)])
        peft_benchmark.main()

    return script


def test_from_rows_to_a_folder_that_peft_reads_as_the_benchmark_does(
    script, write_rows, llama_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [{"query": f"the place {i}", "response": "is good and warm"} for i in range(24)]
    write_rows(tmp_path / "metamath.jsonl", given)
    words = ("--model", llama_folder, "--held-out", 8)
    script("rows", "--data", "metamath.jsonl", "--output", "rows", *words)
    first = json.loads((tmp_path / "rows" / "dev.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "Question: the place 0 Think step by step.\nAnswer:"
    assert first["completion"] == " is good and warm"
    assert len((tmp_path / "rows" / "train.jsonl").read_text().splitlines()) == 16
    quick = ("--steps", "12", "--no-doubling", "--lora_r", "2", "--lora_alpha", "4")
    quick += ("--scoring_examples", "4", "--judging_examples", "4", "--tolerance", "9")
    quick += ("--num_rounds", "2", "--max_length", "128", "--dtype", "float32")
    searched = main(["search", "--config", "rows/search.yaml", "--output_dir", "found", *quick])
    assert searched == 0
    script("folder", "found", "--output", "lora/tiny", "--learning_rate", "3e-4")
    assert {path.name for path in (tmp_path / "lora" / "tiny").iterdir()} == {
        *("adapter_config.json", "training_params.json"),
    }
    settings = json.loads((tmp_path / "lora" / "tiny" / "training_params.json").read_text())
    assert settings == {"optimizer_kwargs": {"lr": 3e-4, "weight_decay": 0.1}}
    assert set(settings) <= KNOWN
    # As the benchmark opens it.
    config = PeftConfig.from_pretrained(tmp_path / "lora" / "tiny")
    assert isinstance(config, LoraConfig) and config.base_model_name_or_path is None
    wanted = json.loads((tmp_path / "found" / "search.json").read_text())["ranks"]
    layers = lora_layers(get_peft_model(tiny.llama(), config))
    assert {name: layer.r["default"] for name, layer in layers.items()} == wanted
    assert len(set(wanted.values())) > 1
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    with pytest.raises(SystemExit, match="is there already"):
        script("folder", "found", "--output", "lora/tiny")


def test_with_the_benchmarks_own_settings_there_is_one_file(script, tmp_path, capsys):
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.up_proj": 8}
    (tmp_path / "found").mkdir()
    answer = {"ranks": ranks, "scaling": 2.0, "sentence": "r = 8 does."}
    (tmp_path / "found" / "search.json").write_text(json.dumps(answer))
    script("folder", tmp_path / "found", "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter_config.json"]
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 11 ranks, r = 8 does.\n"
    with pytest.raises(SystemExit, match=r"holds no search\.json"):
        script("folder", tmp_path, "--output", tmp_path / "other")


def test_the_settings_of_a_search_are_those_of_a_run(script, tmp_path):
    from loralloc.runs.settings import resolve

    script("rows", "--data", str(_one_row(tmp_path)), "--output", tmp_path / "rows")
    settings = resolve([], config=tmp_path / "rows" / "search.yaml")
    assert settings.model.model_name_or_path == "meta-llama/Llama-3.2-3B"
    assert settings.training.max_length == 768
    assert yaml.safe_load((tmp_path / "rows" / "search.yaml").read_text())["lora_r"] == 32


def _one_row(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"query": "1 + 1?", "response": "2"}) + "\n")
    return path
