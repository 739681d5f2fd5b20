"""A run opens again with the backbone that it was trained on."""

import json

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from loralloc.runs import models
from loralloc.runs.folder import save_labels
from loralloc.runs.run import HEADS
from loralloc.runs.trained import head_of, load_trained


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]


@pytest.fixture
def write_run(tmp_path, llama_folder, bert_folder):
    """A run folder of a head as training leaves it, with some settings."""

    def write(head, **settings):
        backbone, load, new = {
            "lm": (llama_folder, AutoModelForCausalLM, None),
            "classification": (bert_folder, AutoModelForSequenceClassification, "classifier"),
            "span": (bert_folder, AutoModelForQuestionAnswering, "qa_outputs"),
        }[head.name]
        base = load.from_pretrained(backbone, dtype=torch.float32)
        model = tiny.adapted(base, modules_to_save=new and [new], task_type=head.task_type)
        tiny.with_trained_b(model).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
        if head.has_labels:
            save_labels(tmp_path, ("bad", "good"))
        given = {"model_name_or_path": str(backbone), **settings}
        data = {name: {"value": value, "source": "flag"} for name, value in given.items()}
        (tmp_path / "settings.json").write_text(json.dumps(data))
        return tmp_path

    return write


def backbone_dtype(model):
    return next(p for name, p in model.named_parameters() if "lora" not in name).dtype


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_in_the_dtype_it_was_trained_in(dtype, head, write_run):
    folder = write_run(head, dtype=dtype)
    assert head_of(folder) is head
    model, _ = load_trained(folder, head=head)
    assert backbone_dtype(model) == getattr(torch, dtype)


def test_in_float32_below_a_head_that_was_trained_where_no_dtype_was_asked_for(
    head, write_run, monkeypatch
):
    monkeypatch.setattr(models, "fastest_dtype", lambda: torch.bfloat16)
    model, _ = load_trained(write_run(head, dtype=None), head=head)
    assert backbone_dtype(model) == (torch.float32 if head.is_new else torch.bfloat16)


def test_with_the_attention_it_was_trained_with(head, write_run):
    model, _ = load_trained(write_run(head, attn_implementation="eager"), head=head)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", dtype="bfloat16"),
            dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bfloat16"),
        ),
        (dict(load_in_8bit=True), dict(load_in_8bit=True)),
    ],
)
def test_quantised_as_it_was_trained_and_then_not_moved(
    settings, expected, head, write_run, monkeypatch
):
    load, asked = models._from_pretrained, []

    def quantised(loader, name, options):
        asked.append(options.pop("quantization_config", None))
        model, loading = load(loader, name, options)
        model.is_quantized = True
        model.to = None
        return model, loading

    folder = write_run(head, **settings)
    monkeypatch.setattr(models, "_from_pretrained", quantised)
    monkeypatch.setattr("loralloc.runs.trained.load_tokenizer", AutoTokenizer.from_pretrained)
    monkeypatch.setattr("loralloc.runs.trained.open_adapter", lambda model, folder: model)
    load_trained(folder, head=head)
    assert [config.to_dict() for config in asked] == [BitsAndBytesConfig(**expected).to_dict()]
