"""What PEFT would make of a stranger's configuration, refused before PEFT reads it."""

import json
import resource
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc import open_adapter
from loralloc.adapters import stranger
from loralloc.adapters.folder import read_adapter


def backbone():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def folder(tmp_path):
    """An adapter as PEFT saves it."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM"
    )
    get_peft_model(backbone(), config).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def test_an_adapter_as_peft_saves_it_is_opened(folder):
    assert "default" in open_adapter(backbone(), folder).peft_config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(r=10**7), "`r` of .* is 10000000; it must be a whole number up to 65,536"),
        (dict(r=None), "`r` of .* is None; it must be a whole number from 1 to 65,536"),
        (dict(r=0), "`r` of .* is 0; it must be a whole number from 1 to 65,536"),
        (dict(rank_pattern={"q_proj": 10**7}), "`rank_pattern` of .* gives 'q_proj' 10000000"),
        (dict(r=60_000, rank_pattern={}), "asks for .* numbers of LoRA on this model, and its wei"),
        (dict(target_modules=["q_proj", "v_proj", "up_proj"]), "asks for .* numbers of LoRA"),
        (dict(megatron_config={"a": 1}, megatron_core="evil"), "lets PEFT import what it names"),
        (dict(target_modules="(a|b"), "is no regular expression"),
        (dict(rank_pattern={"[[a]": 2}), "is no regular expression"),
        (dict(target_modules="a" * 30_000), "it has 30,000 characters"),
        (dict(target_modules=[1]), "`target_modules` of .* which is none to PEFT"),
        (dict(target_parameters=1), "`target_parameters` of .* is 1, which is none to PEFT"),
        (dict(lora_alpha="16"), "`lora_alpha` of .* must be a number"),
        (dict(rank_pattern=[1]), "`rank_pattern` of .* is a list; it must be an object"),
    ],
)
def test_what_peft_should_not_read_is_refused(options, words, folder):
    change(folder, **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words):
        open_adapter(backbone(), folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_tensors_of_another_width_are_refused_before_any_are_made(folder):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    with pytest.raises(ValueError, match=r"lora_A of .*q_proj in .* \(3, 32\), .* takes 64"):
        open_adapter(LlamaForCausalLM(config), folder)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=r"(.*)*(.*)*(.*)*x"),
        dict(rank_pattern={r"((\w|\.|s)+)+!": 2}),
        dict(exclude_modules=r"(?:.*.*.*.*.*.*.*.*.*.*)!"),
    ],
    ids=str,
)
def test_an_expression_that_takes_for_ever_is_refused(options, folder, monkeypatch):
    monkeypatch.setattr(stranger, "MOST_S", 0.5)
    change(folder, **options)
    begin = time.monotonic()
    for read in (lambda: open_adapter(backbone(), folder), lambda: read_adapter(folder)):
        with pytest.raises(ValueError, match=r"take over 0\.5 s to match, beginning with"):
            read()
    assert time.monotonic() - begin < 10


def test_expressions_that_people_write_are_matched(folder):
    change(folder, target_modules=r".*\.layers\.\d+\.self_attn\.(q_proj|v_proj)")
    assert len(read_adapter(folder).modules) == 4
    assert open_adapter(backbone(), folder) is not None


def test_pickles_are_not_opened(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors.*no pickles"):
        open_adapter(backbone(), folder)
