"""The best stretch of a text over all of its windows."""

import encoders
import pytest
import tiny
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from loralloc.evaluation.spans import predict_spans
from loralloc.runs.heads.span import text_of, windows
from loralloc.tasks.task import Example, Span

FILLER = "the cold story of a warm place is good and bad, "
CONTEXTS = (
    "Ann Lee made it.",
    "Bo Ek saw it, " + FILLER * 6,
    FILLER * 3 + "Ann Lee made it in Rome. " + FILLER * 9,
    "said שָׁלוֹם to 👨‍👩‍👧 in Cafe\u0301 Rome, " + FILLER,
    "U.S.",
)


def example(context, question="Who made the film?"):
    span = Span(question=question, context=context, answers=(context,), starts=(0,))
    return Example(prompt="", response="", span=span)


EXAMPLES = [example(context) for context in CONTEXTS]


@pytest.fixture(params=encoders.KINDS)
def span_model(request, tmp_path):
    path = encoders.folder(request.param, tmp_path / request.param)
    with tiny.seeded(0):
        model = AutoModelForQuestionAnswering.from_pretrained(path)
        # A wide head: it has preferences.
        torch.nn.init.normal_(model.qa_outputs.weight, std=1.0)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def one_by_one(model, tokenizer, span, *, max_length=64, stride=None, most=30):
    """Every window alone and every pair of tokens in turn."""
    best, answer = -float("inf"), ""
    for window in windows(tokenizer, [span], max_length=max_length, stride=stride):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window.input_ids]))
        firsts = logits.start_logits[0].log_softmax(0).tolist()
        lasts = logits.end_logits[0].log_softmax(0).tolist()
        held = [position for position, pair in enumerate(window.offsets) if pair is not None]
        for first in held:
            for last in held:
                score = firsts[first] + lasts[last]
                if first <= last < first + most and score > best:
                    best, answer = score, text_of(window, span.context, first, last)
    return answer


@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_batches_give_what_each_window_alone_gives(batch_size, span_model):
    expected = [one_by_one(*span_model, example.span) for example in EXAMPLES]
    assert predict_spans(*span_model, EXAMPLES, batch_size=batch_size) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("options", [dict(max_length=40), dict(max_length=48, stride=3)])
def test_windows_are_as_asked_for(options, span_model):
    expected = [one_by_one(*span_model, example.span, **options) for example in EXAMPLES]
    assert predict_spans(*span_model, EXAMPLES, **options) == expected


@pytest.mark.parametrize("most", (1, 2))
def test_an_answer_is_no_longer_than_allowed(most, span_model):
    expected = [one_by_one(*span_model, example.span, most=most) for example in EXAMPLES]
    assert predict_spans(*span_model, EXAMPLES, max_answer_length=most) == expected
    assert expected != predict_spans(*span_model, EXAMPLES)


def test_answers_are_characters_of_their_contexts(span_model):
    for text, context in zip(predict_spans(*span_model, EXAMPLES), CONTEXTS, strict=True):
        assert text and text in context and text == text.strip()


def test_a_model_that_likes_the_question_most_still_answers_from_the_context(span_model):
    asked = example("Ann Lee", question="the film is good and warm and the story is bad")
    (answer,) = predict_spans(*span_model, [asked])
    assert answer and answer in "Ann Lee"


def test_an_answer_deep_in_a_long_text_is_found(span_model):
    """A head that knows "Rome": the windows without it say that there is no answer."""
    model, tokenizer = span_model
    (rome,) = set(tokenizer(" Rome", add_special_tokens=False)["input_ids"][-1:])

    class Knows(torch.nn.Module):
        config, device = model.config, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            scores = 9.0 * (input_ids == rome) + 5.0 * (input_ids == tokenizer.cls_token_id)
            return type("Logits", (), dict(start_logits=scores, end_logits=scores))

    context = FILLER * 1100 + "in Rome " + FILLER * 1100
    assert len(context) > 100_000
    (answer,) = predict_spans(Knows(), tokenizer, [example(context)], max_length=64)
    assert answer and "Rome".endswith(answer)


@pytest.mark.parametrize("context", ("", " \n "))
def test_a_context_without_tokens_has_no_answer(context, span_model):
    assert predict_spans(*span_model, [example(context), EXAMPLES[0]])[0] == ""


def test_examples_without_a_span_are_named(span_model):
    bare = Example(prompt="a", response="b")
    with pytest.raises(ValueError, match="Example 2 has no span, so there is no context"):
        predict_spans(*span_model, [EXAMPLES[0], bare])


def test_it_must_allow_one_token(span_model):
    with pytest.raises(ValueError, match="`max_answer_length` is 0; it must be at least 1"):
        predict_spans(*span_model, EXAMPLES, max_answer_length=0)


@pytest.mark.parametrize("training", (True, False))
def test_the_models_mode_comes_back(training, span_model):
    model, tokenizer = span_model
    model.train(training)
    predict_spans(model, tokenizer, EXAMPLES[:1])
    assert model.training is training


def test_progress_is_told_after_each_batch(span_model):
    done = []
    predict_spans(*span_model, EXAMPLES, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]


def test_no_examples_no_answers(span_model):
    assert predict_spans(*span_model, []) == []
