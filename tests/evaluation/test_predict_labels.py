"""The label that a classifier gives its highest logit."""

import encoders
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loralloc.evaluation.classifiers import predict_labels
from loralloc.tasks.task import Example

NAMES = ("yes", "no", "perhaps")
TEXTS = (
    ("the film is good", None),
    ("the film", "a warm place of the year is cold, and the story is bad"),
    ("the story of a cold place", "it is bad"),
    ("Ann Lee made the film in Rome", "Who?"),
    ("the year", "a " * 200),
    ("warm", None),
)
EXAMPLES = [
    Example(prompt="", response="", label=0, text=text, text_pair=pair) for text, pair in TEXTS
]


@pytest.fixture(params=encoders.KINDS)
def classifier(request, tmp_path):
    path = encoders.folder(request.param, tmp_path / request.param)
    with tiny.seeded(1):
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=3, id2label=dict(enumerate(NAMES))
        )
        for name, parameter in model.classifier.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=1.0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    # On the whole it likes every label as much, so that the examples decide.
    mean = sum(logits(model.eval(), tokenizer, example) for example in EXAMPLES) / len(EXAMPLES)
    last = list(model.classifier.modules())[-1]
    last.bias.data -= mean
    return model, tokenizer


def logits(model, tokenizer, example):
    texts = [text for text in (example.text, example.text_pair) if text is not None]
    inputs = tokenizer(*texts, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0]


def one_by_one(model, tokenizer, example):
    return NAMES[int(logits(model, tokenizer, example).argmax())]


@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_batches_give_what_each_example_alone_gives(batch_size, classifier):
    expected = [one_by_one(*classifier, example) for example in EXAMPLES]
    assert predict_labels(*classifier, EXAMPLES, batch_size=batch_size) == expected
    assert len(set(expected)) > 1


def test_the_second_text_is_read(classifier):
    model, tokenizer = classifier
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    predict_labels(model, tokenizer, EXAMPLES[2:3])
    (inputs,) = seen
    expected = tokenizer("the story of a cold place", "it is bad")
    assert inputs["input_ids"].tolist() == [expected["input_ids"]]
    if "token_type_ids" in expected:
        assert inputs["token_type_ids"].tolist() == [expected["token_type_ids"]]
        assert inputs["token_type_ids"].any()


def test_examples_without_a_text_are_named(classifier):
    with pytest.raises(ValueError, match="Example 2 has no text to classify"):
        predict_labels(*classifier, [EXAMPLES[0], Example(prompt="a", response="b")])


@pytest.mark.parametrize("training", (True, False))
def test_the_models_mode_comes_back(training, classifier):
    model, tokenizer = classifier
    model.train(training)
    predict_labels(model, tokenizer, EXAMPLES[:1])
    assert model.training is training


def test_progress_is_told_after_each_batch(classifier):
    done = []
    predict_labels(*classifier, EXAMPLES, batch_size=4, on_batch=done.append)
    assert done == [4, 6]


def test_no_examples_no_labels(classifier):
    assert predict_labels(*classifier, []) == []
