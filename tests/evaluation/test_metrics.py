import pytest
import sacrebleu

from loralloc.evaluation.metrics import bleu

PREDICTIONS = [
    "The Mill is a cheap pub in the riverside area.",
    "You can eat Italian food at Aromi near the park.",
    "Blue Spice is a family friendly coffee shop.",
]
REFERENCES = [
    ["The Mill is a cheap pub by the river.", "By the river there is a cheap pub, The Mill."],
    ["Aromi near the park has Italian food.", "You can eat Italian at Aromi, near the park."],
    ["Blue Spice is a coffee shop for families.", "A family friendly coffee shop is Blue Spice."],
]


def test_it_is_sacrebleus_corpus_bleu():
    figure = bleu(PREDICTIONS, REFERENCES)
    transposed = list(zip(*REFERENCES, strict=True))
    assert figure.value == sacrebleu.corpus_bleu(PREDICTIONS, transposed).score
    assert figure.name == "BLEU"


def test_the_implementation_is_named_with_version_and_settings():
    implementation = bleu(PREDICTIONS, REFERENCES).implementation
    assert f"version:{sacrebleu.__version__}" in implementation
    assert "tok:13a" in implementation


def test_the_number_of_references_may_differ():
    ragged = [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2] * 2]
    filled = [[*texts, *[texts[0]] * (4 - len(texts))] for texts in ragged]
    transposed = list(zip(*filled, strict=True))
    expected = sacrebleu.corpus_bleu(PREDICTIONS, transposed).score  # repeats change nothing
    assert bleu(PREDICTIONS, ragged).value == pytest.approx(expected)


def test_its_ends():
    assert bleu([texts[0] for texts in REFERENCES], REFERENCES).value == pytest.approx(100)
    assert bleu(["zzz"] * 3, REFERENCES).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        (["a", "b"], [["a"]], "2 predictions and references for 1; give references for every"),
        (["a", "b"], [["a"], []], "Example 2 has no reference; BLEU needs at least one each"),
        ([], [], "prediction"),
    ],
)
def test_what_cannot_be_measured_is_refused(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        bleu(predictions, references)
