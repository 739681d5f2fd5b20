"""What a model is given to answer is what it was trained to go on from, token by token."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loralloc.evaluation.generation import generate
from loralloc.evaluation.labels import encode_labels
from loralloc.evaluation.tokens import answered_tokens, end_tokens, start_tokens
from loralloc.tasks.conversations import Chat, Common

WORDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)
THOUGHT = MARKED.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
"""Writes in front of the last answer what a model writes itself when it is asked, as Qwen3's."""

TEMPLATES = {"words": WORDS, "marked": MARKED, "thinking": THINKING, "thought": THOUGHT}
FRAMES = {"bare": "$A", "begun": "<s> $A", "ended": "$A </s>", "both": "<s> $A </s>"}
"""What a tokenizer puts around a text."""


@pytest.fixture
def tokenizer_with(llama_folder):
    def build(frame="bare", template="words"):
        tokenizer = AutoTokenizer.from_pretrained(llama_folder)
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=FRAMES[frame], special_tokens=ids
        )
        tokenizer.chat_template = TEMPLATES.get(template, template)
        return tokenizer

    return build


@pytest.fixture
def trained_on(llama_folder, tmp_path):
    """The tokens that TRL makes of a row to train on."""

    def tokens(tokenizer, row):
        args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        trainer = SFTTrainer(
            model, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
        )
        return trainer.train_dataset[0]["input_ids"]

    return tokens


def message(role, content):
    return {"role": role, "content": content}


QUESTION, ANSWER = "is the film good?", "yes, it is"
SYSTEM = message("system", "Be brief.")
ASKED, SAID = [message("user", QUESTION)], [message("assistant", ANSWER)]
ROWS = {
    "prompt": ({"prompt": QUESTION, "completion": f" {ANSWER}"}, QUESTION),
    "prompt with a blank": ({"prompt": QUESTION + " ", "completion": ANSWER}, QUESTION + " "),
    "prompt with a line": ({"prompt": QUESTION + "\n", "completion": ANSWER}, QUESTION + "\n"),
    "text": ({"text": f"{QUESTION} {ANSWER}"}, QUESTION),
    "messages": ({"messages": ASKED + SAID}, Common().ask(QUESTION)),
    "prompt of messages": ({"prompt": ASKED, "completion": SAID}, Common().ask(QUESTION)),
    "system": ({"messages": [SYSTEM, *ASKED, *SAID]}, Common(system="Be brief.").ask(QUESTION)),
    "turns": (
        {"messages": ASKED + SAID + ASKED + SAID},
        Common().ask_turns((QUESTION, QUESTION), (ANSWER,)),
    ),
    "options": (
        {"messages": ASKED + SAID, "chat_template_kwargs": {"bos_token": ""}},
        Common(template_options={"bos_token": ""}).ask(QUESTION),
    ),
}


CASES = [
    (shape, template)
    for shape, (_, prompt) in ROWS.items()
    for template in (TEMPLATES if isinstance(prompt, Chat) else ["words"])
]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("shape", "template"), CASES)
def test_an_answer_goes_on_from_the_tokens_it_went_on_from_in_training(
    shape, frame, template, tokenizer_with, trained_on
):
    row, prompt = ROWS[shape]
    tokenizer = tokenizer_with(frame, template)
    trained = trained_on(tokenizer, row)
    [start] = start_tokens(tokenizer, [prompt])
    assert trained[: len(start)] == start
    rest = trained[len(start) :]
    assert tokenizer.decode(rest).lstrip().startswith(ANSWER)
    # And it ends with the token that followed it there, where one did.
    ends = end_tokens(tokenizer, [prompt])
    length = next((i for i, token in enumerate(rest) if token in ends), None)
    has_end = not isinstance(prompt, Chat) or template != "words"
    assert (length is not None) == has_end
    if has_end:
        assert rest[length] == ends[0]
        assert tokenizer.decode(rest[:length]).strip() == ANSWER


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("shape", ("prompt", "messages", "system"))
@pytest.mark.parametrize("template", ("marked", "thinking", "thought"))
def test_labels_are_scored_as_the_answers_of_training(
    shape, frame, template, tokenizer_with, trained_on
):
    row, prompt = ROWS[shape]
    tokenizer = tokenizer_with(frame, template)
    trained = trained_on(tokenizer, row)
    [start] = start_tokens(tokenizer, [prompt])
    [[ending]] = encode_labels(tokenizer, [prompt], [ANSWER])
    assert [*start, *ending] == trained[: len(start) + len(ending)]
    assert answered_tokens(tokenizer, [prompt], ANSWER) == [[*start, *ending[:-1]]]


def test_a_conversation_ends_where_its_turn_ends(llama_folder, tokenizer_with, monkeypatch):
    """Whatever the tokenizer's own end token is: training on conversations never shows that."""
    tokenizer = tokenizer_with(template="marked")
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = tokenizer("good", add_special_tokens=False)["input_ids"]

    def scripted(*, input_ids, attention_mask, generation_config):
        assert generation_config.eos_token_id == [end, tokenizer.eos_token_id]
        return torch.cat([input_ids, torch.tensor([[*said, end, *said]])], dim=1)

    monkeypatch.setattr(model, "generate", scripted)
    assert generate(model, tokenizer, [Common().ask("the film")], max_new_tokens=9) == ["good"]


def test_a_conversation_that_the_template_refuses_is_told_in_a_sentence(tokenizer_with):
    with pytest.raises(ValueError, match="template does not take this conversation: no system"):
        start_tokens(tokenizer_with(template=STRICT), [Common(system="x").ask("hi")])
