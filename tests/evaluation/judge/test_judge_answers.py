import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralloc.evaluation.generation import generate
from loralloc.evaluation.judge import answers as answers_module
from loralloc.evaluation.judge.answers import Answering, answer_questions, kept_answers
from loralloc.evaluation.judge.conversation import turn_prompt
from loralloc.evaluation.judge.questions import Question, read_answers
from loralloc.evaluation.prompts import text_of
from loralloc.evaluation.tokens import start_tokens
from loralloc.tasks.conversations import Common

QUESTIONS = [
    Question(number=3, turns=("the film is", "the place is")),
    Question(number=1, turns=("a story",)),
    Question(number=2, turns=("the story is good and", "a place")),
]
MADE_WITH = {"model": "tiny", "num_beams": 2}
DECODING = Answering(num_beams=2, max_new_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture(scope="module")
def model(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)


@pytest.fixture
def answer(model, tokenizer, tmp_path):
    def answer(questions=QUESTIONS, *, made_with=MADE_WITH, **options):
        return answer_questions(
            model,
            tokenizer,
            questions,
            tmp_path / "answers.jsonl",
            model_id="tiny",
            made_with=made_with,
            form="chat",
            decoding=DECODING,
            **options,
        )

    return answer


def test_answers_that_cannot_fit_are_refused_before_any_is_given(model, tokenizer, tmp_path):
    half = model.config.max_position_embeddings // 2
    with pytest.raises(
        ValueError, match=rf"is {half}, and question 3 has 2 turns: with .* at most"
    ):
        answer_questions(
            model,
            tokenizer,
            QUESTIONS,
            tmp_path / "answers.jsonl",
            model_id="tiny",
            made_with=MADE_WITH,
            form="chat",
            decoding=Answering(max_new_tokens=half),
        )
    assert not (tmp_path / "answers.jsonl").exists()


def in_words(tokenizer, turns, answers, system=None):
    conversation = Common(system=system)
    prompt = turn_prompt(turns, answers, form="chat", conversation=conversation)
    return tokenizer.decode(start_tokens(tokenizer, [prompt])[0])


def test_a_chat_template_writes_the_whole_conversation(tokenizer):
    turns = ("Name a fruit.", "Another.", "A third.")
    assert in_words(tokenizer, turns, []) == "user: Name a fruit.\nassistant:"
    assert in_words(tokenizer, turns, ["Apple."]) == (
        "user: Name a fruit.\nassistant: Apple.\nuser: Another.\nassistant:"
    )


def test_the_system_message_of_a_runs_conversations_comes_first(tokenizer):
    words = in_words(tokenizer, ("A?", "B?"), ["a"], system="Be brief.")
    assert words == "system: Be brief.\nuser: A?\nassistant: a\nuser: B?\nassistant:"


def test_without_one_the_turns_of_alpaca_follow_each_other():
    turns = ("Name a fruit.", "Another.")
    first = "Instruction:\nName a fruit.\n\nResponse:"
    options = dict(form="alpaca", conversation=Common())
    assert turn_prompt(turns, [], **options) == first
    assert turn_prompt(turns, ["Apple."], **options) == (
        f"{first} Apple.\n\nInstruction:\nAnother.\n\nResponse:"
    )


@pytest.mark.parametrize("adds_start", (True, False))
def test_the_start_token_comes_once(adds_start, llama_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    if adds_start:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    prompt = turn_prompt(("the film",), [], form="chat", conversation=Common())
    assert start_tokens(tokenizer, [prompt])[0].count(tokenizer.bos_token_id) == 1


def test_the_second_turn_is_answered_after_the_first(model, tokenizer, answer, tmp_path):
    given = answer()

    def alone(prompt):
        return generate(model, tokenizer, [prompt], max_new_tokens=6, num_beams=2)[0]

    for question in QUESTIONS:
        prompt, expected = "", []
        for turn in question.turns:
            prompt += f"user: {turn}\nassistant: "
            expected.append(alone(prompt))
            prompt += f"{expected[-1]}\n"
        assert given[question.number] == tuple(expected)
    assert given == read_answers(tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [3, 1, 2]
    assert all(row["made_with"] == MADE_WITH and row["model_id"] == "tiny" for row in rows)


def test_an_interrupted_run_goes_on_with_the_questions_left(answer, monkeypatch):
    expected_num, asked = [], []

    def stopping(model, tokenizer, prompts, **options):
        if len(expected_num) == 2:
            raise KeyboardInterrupt
        expected_num.append(len(prompts))
        return [f"answer to {text_of(prompt)}" for prompt in prompts]

    monkeypatch.setattr(answers_module, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        answer()  # two turns of the first two questions, then the end
    assert expected_num == [2, 1]

    def going_on(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return ["later"] * len(prompts)

    monkeypatch.setattr(answers_module, "generate", going_on)
    done = []
    given = answer(on_batch=lambda *counts: done.append(counts))
    assert [text_of(prompt) for prompt in asked] == list(QUESTIONS[2].turns)
    assert given[2] == ("later", "later") and given[1] == ("answer to a story",)
    assert done == [(1, 1)]
    assert answer() == given
    assert len(asked) == 2


def test_answers_made_in_another_way_are_not_mixed_with(answer, tmp_path):
    answer(QUESTIONS[:1])
    with pytest.raises(ValueError, match=r"made with .*'num_beams': 2.* or move the file away"):
        answer(made_with={**MADE_WITH, "num_beams": 1})
    with pytest.raises(ValueError, match="move the file away"):
        kept_answers(tmp_path / "answers.jsonl", {})


@pytest.mark.parametrize("name", ("num_beams", "max_new_tokens", "batch_size"))
def test_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0; it must be at least 1"):
        Answering(**{name: 0})
