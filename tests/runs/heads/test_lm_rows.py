"""Rows that a chat template refuses, and options that rows of a form do not read."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from loralloc.runs.data import ROW
from loralloc.runs.heads import lm
from loralloc.tasks.source import Split

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ m.role + ': ' + m.content }}{% endfor %}"
)
BROKEN = "{% for m in messages %}{{ m.role + m.nothing.at_all }}{% endfor %}"


def message(role, content="a"):
    return {"role": role, "content": content}


CHAT = [message("user"), message("assistant")]
WITH_SYSTEM = [message("system"), *CHAT]
TEXT = {"text": "the film is good"}
PROMPT = {"prompt": "the film", "completion": " is good"}


@pytest.fixture
def trainer_on(tmp_path, llama_folder):
    """Our trainer on given rows, which were brought out of order."""

    def build(rows, template=STRICT, **options):
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        tokenizer = AutoTokenizer.from_pretrained(llama_folder)
        tokenizer.chat_template = template
        numbered = [{**row, ROW: number} for number, row in enumerate(rows, start=1)]
        data = Dataset.from_list(numbered[::-1], on_mixed_types="use_json")
        splits = {
            name: Split(name=name, dataset=data, source=f"{name}.jsonl")
            for name in ("train", "validation")
        }
        usual = dict(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
        return lm.sft_trainer(model, tokenizer, SFTConfig(**usual, **options), splits)

    return build


@pytest.fixture
def refused(trainer_on):
    def refused(rows, **options):
        with pytest.raises(ValueError) as caught:
            trainer_on(rows, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.mark.parametrize("num_proc", (None, 2))
def test_the_first_row_that_a_template_refuses_is_named_with_its_words(num_proc, refused):
    rows = [{"messages": messages} for messages in (CHAT, WITH_SYSTEM, CHAT, WITH_SYSTEM)]
    assert refused(rows, dataset_num_proc=num_proc) == (
        "Row 2 of train.jsonl: the model's chat template does not take the conversation: no system "
        "role."
    )


def test_a_prompt_of_messages_that_a_template_refuses_is_named(refused):
    rows = [{"prompt": WITH_SYSTEM[:2], "completion": CHAT[1:]}]
    assert "Row 1 of train.jsonl: the model's chat template does not take" in refused(rows)


def test_a_template_that_fails_of_itself_is_told_in_a_sentence(refused):
    sentence = refused([{"messages": CHAT}], template=BROKEN)
    assert "Row 1 of train.jsonl: the model's chat template does not take" in sentence
    assert "nothing" in sentence


def test_an_error_that_is_not_the_templates_is_left_as_it_is(trainer_on, monkeypatch):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(lm.SupervisedSFTTrainer, "_prepare_dataset", broken)
    with pytest.raises(KeyError, match="ours"):
        trainer_on([{"messages": CHAT}])


def test_conversations_without_a_template_are_refused(refused):
    sentence = refused([{"messages": CHAT}], template=None)
    assert "the model's tokenizer has no chat template; give one with `--chat_template_path" in (
        sentence
    )


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (TEXT, {"completion_only_loss": True}, "train.jsonl has no completions; leave it out"),
        (
            {"messages": CHAT},
            {"completion_only_loss": True},
            "has no completions; for messages there is `assistant_only_loss`; leave it out",
        ),
        (TEXT, {"chat_template_path": "template.jinja"}, "must be a file with a template"),
        ({"messages": CHAT}, {"chat_template_path": "model"}, "must be a file with a template"),
    ],
)
def test_options_that_such_rows_do_not_read_are_refused(row, options, words, refused):
    assert words in refused([row], **options)


@pytest.mark.parametrize("row", (TEXT, PROMPT))
def test_a_template_for_texts_is_refused(row, tmp_path, refused):
    (tmp_path / "template.jinja").write_text(STRICT)
    sentence = refused([row], chat_template_path=str(tmp_path / "template.jinja"))
    assert "`chat_template_path` is for conversations, and train.jsonl holds texts" in sentence


def test_a_template_in_a_file_is_taken(tmp_path, trainer_on):
    (tmp_path / "template.jinja").write_text(STRICT)
    path = str(tmp_path / "template.jinja")
    trainer = trainer_on([{"messages": CHAT}], template=None, chat_template_path=path)
    assert trainer.processing_class.chat_template == STRICT
