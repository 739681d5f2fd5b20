import pytest
from wordnet_files import write_wordnet

from loralloc.evaluation.answers import accuracy, f1_em
from loralloc.evaluation.metrics import measure, score_example
from loralloc.evaluation.overlap import bleu, meteor, rouge_l, sentence_bleu
from loralloc.tasks.task import Example

LABELS = ("no", "yes")
CLASSIFIED = [
    Example(prompt="Is it?", response=LABELS[label], label=label) for label in (1, 0, 1, 1)
]
CHOSEN = ["Yes", "yes", "perhaps", "yes"]
REFERENCES = [
    ("The Mill is a cheap pub by the river.", "By the river there is a cheap pub, The Mill."),
    ("Aromi near the park has Italian food.",),
    ("The coffee shop Blue Spice is for families.", "A coffee shop for families is Blue Spice."),
]
WRITTEN = [
    Example(prompt=f"Write {i}", response=texts[0], references=texts)
    for i, texts in enumerate(REFERENCES)
]
PREDICTIONS = ["The Mill is an inexpensive pub by a river.", "Aromi has Italian food.", "Spice"]
GENERATION = ("f1-em", "bleu", "rouge-l", "meteor")


@pytest.fixture(autouse=True)
def wordnet_folder(tmp_path, monkeypatch):
    folder = write_wordnet(tmp_path / "wordnet")
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    return folder


def test_every_metric_of_a_task_is_measured_in_order():
    assert measure(GENERATION, PREDICTIONS, WRITTEN, labels=()) == [
        *f1_em(PREDICTIONS, REFERENCES),
        bleu(PREDICTIONS, REFERENCES),
        rouge_l(PREDICTIONS, REFERENCES),
        meteor(PREDICTIONS, REFERENCES),
    ]
    responses = [example.response for example in CLASSIFIED]
    assert measure(["accuracy"], CHOSEN, CLASSIFIED, labels=LABELS) == accuracy(
        CHOSEN, responses, labels=LABELS
    )


def test_labels_count_that_no_example_has():
    right, stray = measure(["accuracy"], ["no"], CLASSIFIED[:1], labels=LABELS)
    assert (right.value, stray.value) == (0, 0)


@pytest.mark.parametrize("metric", ("accuracy", "f1-em", "rouge-l", "meteor"))
def test_the_figure_is_the_mean_of_the_scores(metric):
    examples, predictions = (CLASSIFIED, CHOSEN) if metric == "accuracy" else (WRITTEN, PREDICTIONS)
    scores = [score_example(metric, *pair) for pair in zip(predictions, examples, strict=True)]
    figure = measure([metric], predictions, examples, labels=LABELS)[0]
    assert figure.value == pytest.approx(sum(scores) / len(scores))
    assert len(set(scores)) > 1


def test_bleu_of_one_example_is_sentence_bleu_against_all_references():
    prediction = "By the river there is a pub, The Mill."
    score = score_example("bleu", prediction, WRITTEN[0])
    assert score == sentence_bleu(prediction, REFERENCES[0])
    assert 0 < sentence_bleu(prediction, REFERENCES[0][:1]) < score < 100


def test_without_wordnet_meteor_alone_is_missing(wordnet_folder):
    (wordnet_folder / "noun.exc").unlink()
    figures = measure(GENERATION, PREDICTIONS, WRITTEN, labels=())
    assert [figure.name for figure in figures if figure.value is None] == ["METEOR"]
    assert "noun.exc is missing" in figures[-1].missing
    assert score_example("meteor", PREDICTIONS[0], WRITTEN[0]) is None


def test_the_judge_is_another_command():
    with pytest.raises(ValueError, match="run `loralloc judge`"):
        measure(["judge"], PREDICTIONS, WRITTEN, labels=())
    with pytest.raises(ValueError, match="run `loralloc judge`"):
        score_example("judge", PREDICTIONS[0], WRITTEN[0])


@pytest.mark.parametrize("metric", GENERATION)
def test_an_example_without_references_is_refused(metric):
    bare = Example(prompt="Write", response="A text.")
    with pytest.raises(ValueError, match="Example 1 has no reference"):
        score_example(metric, "A text.", bare)
    with pytest.raises(ValueError, match="Example 4 has no reference"):
        measure([metric], [*PREDICTIONS, "A text."], [*WRITTEN, bare], labels=())


def test_accuracy_needs_the_labels():
    with pytest.raises(ValueError, match="give the labels"):
        measure(["accuracy"], CHOSEN, CLASSIFIED, labels=())
