"""`loralloc train` on a backbone in 4 and in 8 bits, and what is done with the run afterwards."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from loralloc.runs.trained import load_trained

pytest.importorskip("bitsandbytes")

LATER = pytest.mark.slow
KINDS = {
    "nested": ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true"),
    "8bit": ("--load_in_8bit", "true"),
}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def last(folder, name):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry][-1]


@pytest.mark.parametrize("kind", ["nested", pytest.param("8bit", marks=LATER)])
def test_trained_evaluated_exported_and_resumed(kind, train, call, output, tmp_path):
    saving = dict(save_strategy="steps", save_steps=5, save_total_limit=9)
    answer = train(*KINDS[kind], dtype="bfloat16", **saving)
    assert (answer.code, answer.err) == (0, "")  # and nothing of what bitsandbytes has to say
    assert "round 2 " in answer.out
    assert {value.dtype for value in weights(output).values()} == {torch.float32}
    model, _ = load_trained(output)
    layers = {type(module).__name__ for module in model.modules()}
    assert {"Linear4bit", "Linear8bitLt"} & layers

    assert call("generate", output, "--prompt", "the film 1 is").code == 0
    assert call("eval", output).code == 0
    found = json.loads((output / "eval" / "held-out-validation" / "eval.json").read_text())
    assert found["loss"] == pytest.approx(last(output, "eval_loss"), rel=1e-3)

    answer = call("export", output, "--to", "merged", "--output_dir", tmp_path / "merged")
    assert (answer.code, answer.err) == (0, "")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in merged  # the weights that the adapter was trained on

    whole = weights(output)
    for later in (10, 12):  # as if it had been killed after its first checkpoint
        shutil.rmtree(output / f"checkpoint-{later}")
    answer = call("train", "--resume", "--output_dir", output)
    assert (answer.code, answer.err) == (0, "")
    assert weights(output).keys() == whole.keys()
    for name, value in weights(output).items():
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize(
    "dtype", ["auto", pytest.param(None, marks=LATER), pytest.param("float32", marks=LATER)]
)
def test_products_have_the_type_of_the_other_weights(dtype, train, output, monkeypatch):
    from loralloc.runs import models

    monkeypatch.setattr(models, "fastest_dtype", lambda: torch.bfloat16)
    assert train("--load_in_4bit", "true", dtype=dtype, max_steps=6).code == 0
    model, _ = load_trained(output)
    layer = next(m for m in model.modules() if hasattr(m, "compute_dtype"))
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    assert layer.compute_dtype == expected
    assert model.get_input_embeddings().weight.dtype == expected


def test_ablation_is_refused_where_products_are_rounded_and_exact_in_float32(train, output):
    options = dict(score="ablation", dtype="bfloat16")
    sentence = train("--load_in_4bit", "true", **options).sentence
    assert "the model computes in bfloat16" in sentence and "or float32 weights" in sentence
    assert not output.exists()
    assert train("--load_in_4bit", "true", **options | {"dtype": "float32"}).code == 0
