import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from loralloc import __version__
from loralloc.evaluation.answers import accuracy, answer_em, answer_f1, f1_em, label_score

LABELS = ("entailment", "not entailment")


def values(figures):
    return {figure.name: figure.value for figure in figures}


def by_torchmetrics(predictions, answers):
    found = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [
            {"answers": {"answer_start": [0] * len(texts), "text": list(texts)}, "id": str(i)}
            for i, texts in enumerate(answers)
        ],
    )
    return found["f1"].item(), found["exact_match"].item()


def test_accuracy_is_the_share_of_right_labels():
    predictions = ["entailment", "not entailment", "entailment", "not entailment"]
    responses = ["entailment", "not entailment", "not entailment", "not entailment"]
    assert values(accuracy(predictions, responses, labels=LABELS)) == {
        "accuracy": 75,
        "not a label": 0,
    }


def test_what_is_no_label_is_wrong_and_counted():
    predictions = ["", "entailment.", "entailment not", "Not  Entailment\n", "entailment"]
    figures = accuracy(predictions, ["not entailment"] * 5, labels=LABELS)
    assert values(figures) == {"accuracy": 20, "not a label": 60}


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("yes", 100), (" YES ", 100), ("no", 0), ("yes yes", 0), ("yes, it is", 0), ("", 0)],
)
def test_one_label(prediction, score):
    assert label_score(prediction, "yes") == score


@pytest.mark.parametrize(
    ("predictions", "responses", "labels", "words"),
    [
        (["yes"], ["yes"], (), "tasks with labels, and there are none"),
        (["yes"] * 2, ["yes", "maybe"], ("yes", "no"), "Example 2 has the response 'maybe', which"),
        (["yes"], ["yes"] * 2, ("yes", "no"), "1 predictions and references for 2"),
        ([], [], ("yes", "no"), "no predictions, so accuracy is not defined"),
    ],
)
def test_accuracy_of_nothing_is_refused(predictions, responses, labels, words):
    with pytest.raises(ValueError, match=words):
        accuracy(predictions, responses, labels=labels)


# Prediction, right answers, F1, EM; counted by hand.
ANSWERS = [
    ("Denver Broncos", ["Denver Broncos"], 100, 100),
    ("the DENVER   broncos!", ["Denver Broncos"], 100, 100),
    ("Broncos", ["Denver Broncos", "The Broncos"], 100, 100),
    ("Broncos Denver", ["Denver Broncos"], 100, 0),
    ("Denver", ["Denver Broncos"], 200 / 3, 0),
    ("Denver Denver", ["Denver Broncos"], 50, 0),
    ("Carolina", ["Denver Broncos"], 0, 0),
    ("co-op", ["coop"], 100, 100),
    ("co op", ["co-op"], 0, 0),
    ("another theme", ["other me"], 0, 0),  # articles are whole words
    ("a.n.", ["the"], 100, 100),  # punctuation goes first, and leaves an article
    ("“quoted”", ["quoted"], 0, 0),  # only ASCII has punctuation
    ("£20–25", ["£20–25"], 100, 100),
    ("", ["Denver"], 0, 0),
    ("", ["the"], 100, 100),
    ("!", ["the", "Denver"], 100, 100),
    ("مرحبا بالعالم", ["مرحبا"], 200 / 3, 0),
    ("🙂 ok", ["OK 🙂"], 100, 0),
]


@pytest.mark.parametrize(("prediction", "answers", "f1", "exact"), ANSWERS)
def test_one_answer(prediction, answers, f1, exact):
    assert answer_f1(prediction, answers) == pytest.approx(f1)
    assert answer_em(prediction, answers) == exact
    assert by_torchmetrics([prediction], [answers]) == pytest.approx((f1, exact), abs=1e-3)


def test_the_three_figures_are_means_over_the_examples():
    predictions, answers, f1, exact = zip(*ANSWERS, strict=True)
    found = values(f1_em(predictions, answers))
    assert list(found) == ["f1-em", "F1", "EM"]
    assert found["F1"] == pytest.approx(sum(f1) / len(f1))
    assert found["EM"] == pytest.approx(sum(exact) / len(exact))
    assert found["f1-em"] == pytest.approx((found["F1"] + found["EM"]) / 2)
    assert by_torchmetrics(predictions, answers) == pytest.approx(
        (found["F1"], found["EM"]), abs=1e-3
    )


# Words that meet often, and any text at all.
words = st.sampled_from(
    ["a", "an", "the", "The", "cat", "Cat", "cat's", "cats", "no.", ".", "-", "£5", "\t", " ", "ﬁ"]
)
texts = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_f1_and_em_are_those_of_torchmetrics(pairs):
    predictions, answers = zip(*pairs, strict=True)
    found = values(f1_em(predictions, answers))
    assert (found["F1"], found["EM"]) == pytest.approx(
        by_torchmetrics(predictions, answers), abs=1e-3
    )


def test_answers_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="Example 2 has no reference; f1-em needs at least one"):
        f1_em(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="no predictions, so f1-em is not defined"):
        f1_em([], [])


def test_the_figures_say_whose_they_are():
    for figure in [*accuracy(["no"], ["no"], labels=("no", "yes")), *f1_em(["no"], [["no"]])]:
        assert figure.implementation.startswith(f"loralloc {__version__}: ")
        assert figure.missing is None
