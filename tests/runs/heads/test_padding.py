"""A classifier pads with a token that it and its tokenizer agree on, as in TRL."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralloc.evaluation.classifiers import predict_labels
from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.run import prepare, train
from loralloc.runs.trained import load_trained
from loralloc.tasks.task import Example

# TRL wants it set on the tokenizer, which is what a run does with it.
pytestmark = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")


@pytest.fixture
def options(tmp_path, llama_folder, write_rows):
    """A classifier on a decoder whose tokenizer has no padding token, as GPT-2 has none."""
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.config.pad_token_id = None
    model.save_pretrained(base)
    rows = [{"text": "film " * (1 + i % 5), "label": i % 2} for i in range(16)]
    return {
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
        "model_name_or_path": base,
        "output_dir": tmp_path / "run",
        "head": "classification",
        "method": "lora",
        "max_steps": 2,
        "validation_examples": 4,
    }


@pytest.mark.parametrize(("given", "expected"), [(None, "</s>"), ("<pad>", "<pad>")])
def test_batches_are_padded_in_training_and_when_the_run_is_opened_again(
    given, expected, options, tmp_path
):
    run = prepare(options | ({"pad_token": given} if given else {}))
    assert run.tokenizer.pad_token == expected
    assert run.model.config.pad_token_id == run.tokenizer.convert_tokens_to_ids(expected)
    train(run)
    model, tokenizer = load_trained(tmp_path / "run", head=CLASSIFICATION)
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == tokenizer.convert_tokens_to_ids(expected)
    examples = [
        Example(prompt="", response="", text=text) for text in ("film", "film film film", "a")
    ]
    together, alone = (
        predict_labels(model, tokenizer, examples, batch_size=size) for size in (3, 1)
    )
    assert together == alone


def test_a_token_that_there_is_not_is_refused(options):
    with pytest.raises(ValueError, match="`pad_token` is 'nope', and batches need one of its voc"):
        prepare(options | {"pad_token": "nope"})


def test_a_tokenizer_without_any_is_refused(options):
    base = options["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="The tokenizer has no padding token, and batches need"):
        prepare(options)


def test_an_encoder_keeps_its_own(bert_folder, write_rows, tmp_path):
    rows = [{"text": "film", "label": i % 2} for i in range(12)]
    run = prepare(
        {
            "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
            "model_name_or_path": bert_folder,
            "output_dir": tmp_path / "run",
            "method": "lora",
            "validation_examples": 4,
        }
    )
    assert run.tokenizer.pad_token == "[PAD]"
    assert run.model.config.pad_token_id == run.tokenizer.pad_token_id
