"""An adapter of a quantised backbone, merged into the weights that it was trained on."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loralloc.runs.exporting import export

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8bit": dict(load_in_8bit=True),
}
IDS = torch.arange(3, 15)[None]


@pytest.fixture(params=KINDS)
def run(request, tmp_path):
    """A run's folder on a quantised backbone, and the model that it trained."""
    # Blocks of 64 numbers share a scale: narrower layers would not be quantised as real ones are.
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    options = KINDS[request.param]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    adapted = tiny.with_trained_b(tiny.adapted(model)).eval()
    adapted.save_pretrained(tmp_path / "run")
    settings = {"model_name_or_path": str(tmp_path / "base"), "dtype": "float32", **options}
    said = {name: {"value": value, "source": "flag"} for name, value in settings.items()}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(said))
    return request.param, tmp_path / "run", adapted


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_merged_is_whole_weights_with_the_runs_logits(run):
    kind, folder, adapted = run
    done = export(folder, to="merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    assert "quantization_config" not in json.loads((done.path / "config.json").read_text())
    ours, theirs = logits(merged), logits(adapted)
    far = (ours - theirs).abs().max() / theirs.abs().max()
    # A step on a quantised layer rounds what goes in, to bfloat16 or 8 bits, as no weights can.
    assert far < 0.04
    if kind == "4bit":
        whole = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
        whole.load_adapter(str(folder))
        assert (logits(whole) - theirs).abs().max() / theirs.abs().max() > 5 * far
