import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from nltk.translate import meteor_score as nltk_meteor
from rouge_score.rouge_scorer import RougeScorer
from wordnet_files import VERSION, write_wordnet

from loralloc.evaluation.overlap import (
    bleu,
    meteor,
    meteor_score,
    rouge_l,
    rouge_l_score,
    sentence_bleu,
)
from loralloc.evaluation.wordnet import WordNet, load_wordnet

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


@pytest.fixture
def wordnet(tmp_path):
    return WordNet(write_wordnet(tmp_path))


@pytest.fixture
def real_wordnet():
    try:
        return load_wordnet()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def sacrebleu_command(folder, *flags):
    """The figures that sacrebleu's own command prints for the texts above."""
    files = {"predictions": PREDICTIONS}
    for k in range(2):
        files[f"references{k}"] = [texts[k] for texts in REFERENCES]
    for name, texts in files.items():
        (folder / name).write_text("".join(f"{text}\n" for text in texts), "utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references0", "references1"]
    done = subprocess.run(
        [*command, "-i", "predictions", "--width", "12", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_bleu_is_what_sacrebleus_command_prints(tmp_path):
    printed = json.loads(sacrebleu_command(tmp_path))
    figure = bleu(PREDICTIONS, REFERENCES)
    assert figure.value == pytest.approx(printed["score"], abs=1e-9)
    assert figure.implementation == f"sacrebleu {printed['signature']}"


def test_sentence_bleu_is_what_sacrebleus_command_prints(tmp_path):
    printed = sacrebleu_command(tmp_path, "--sentence-level", "--score-only").split()
    scores = [sentence_bleu(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert scores == pytest.approx([float(score) for score in printed], abs=1e-9)
    assert sentence_bleu("The Mill", ["The Mill"]) == pytest.approx(100)  # no 4-grams to miss
    assert sentence_bleu("", ["The Mill."]) == 0


def test_rouge_l_is_rouge_scores_best_f_with_the_stemmer():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts)
        for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    figure = rouge_l(PREDICTIONS, REFERENCES)
    assert figure.name == "ROUGE-L"
    assert figure.value == pytest.approx(100 * sum(best) / len(best))
    assert figure.implementation.startswith(f"rouge-score {version('rouge-score')}: ")
    assert "stemmer" in figure.implementation


# Longest common subsequences counted by hand.
@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("police killed the gunman", ["police kill the gunman"], 100),  # one stem
        ("the gunman kill police", ["police kill the gunman"], 50),
        ("police kill", ["nothing here", "police kill the gunman"], 200 / 3),
        ("", ["police"], 0),
        ("警察", ["警察"], 0),  # ASCII only, as the docstring says
    ],
)
def test_rouge_l_of_one_text(prediction, references, score):
    assert rouge_l_score(prediction, references) == pytest.approx(score)


# Matches and runs of neighbouring matches counted by hand: with all m words matched in c runs,
# METEOR is 1 - (c/m)^3 / 2.
@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The auto has spots", ["the car has places"], 100 * (1 - 0.5 / 4**3)),
        ("the cars eat", ["car dines the"], 100 * (1 - 0.5 * (2 / 3) ** 3)),
        ("a motor", ["a car"], 100 * 0.5 * 0.5),  # phrases ("motor_car") match nothing
        ("cheap", ["inexpensive"], 0),  # it is the stem "inexpens" that nltk looks up
        ("green", ["red", "green"], 50),
        ("green", ["red"], 0),
        ("", ["red"], 0),
        ("red", [""], 0),
    ],
)
def test_meteor_of_one_text(prediction, references, score, wordnet):
    assert meteor_score(prediction, references, wordnet=wordnet) == pytest.approx(score)


def test_meteor_is_the_mean_of_nltks_best(wordnet):
    best = [
        max(
            nltk_meteor.single_meteor_score(text.split(), prediction.split(), wordnet=wordnet)
            for text in texts
        )
        for prediction, texts in zip(
            [text.replace(".", " .") for text in PREDICTIONS],
            [[t.replace(".", " .").replace(",", " ,") for t in texts] for texts in REFERENCES],
            strict=True,
        )
    ]
    figure = meteor(PREDICTIONS, REFERENCES, wordnet=wordnet)
    assert figure.name == "METEOR"
    assert figure.value == pytest.approx(100 * sum(best) / len(best))
    assert figure.implementation.startswith(f"nltk {version('nltk')}: WordNet {VERSION}, tok:13a")
    assert figure.missing is None


def test_without_wordnet_meteor_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    figure = meteor(PREDICTIONS, REFERENCES)
    assert figure.value is None
    assert "`apt install wordnet-base`" in figure.missing


def test_meteor_finds_the_wordnet_of_the_machine(monkeypatch, tmp_path, wordnet):
    expected = meteor(PREDICTIONS, REFERENCES, wordnet=wordnet)
    monkeypatch.setenv("WNSEARCHDIR", str(wordnet.folder))
    assert meteor(PREDICTIONS, REFERENCES) == expected


# nltk documents these values: in the docstrings of its functions, and in its meteor.doctest.
PARTY = (
    "It is a guide to action which ensures that the military always obeys the commands of the party"
)
PARTY_REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        (PARTY, PARTY_REFERENCES[:1], 69.44),
        (PARTY, PARTY_REFERENCES, 69.44),
        ("non matching hypothesis", ["this is a cat"], 0),
        ("on the mat sat the cat", ["The cat sat on the mat"], 50),
        ("The cat was sat on the mat", ["The cat sat on the mat"], 96.54),
        (
            "creates or updates a virtual machine scale set",
            ["create or update a vm set"],
            78.06,
        ),
    ],
)
def test_meteor_has_nltks_documented_values(prediction, references, score, real_wordnet):
    found = meteor_score(prediction, references, wordnet=real_wordnet)
    assert round(found, 2) == score


@pytest.mark.parametrize("metric", [bleu, rouge_l, meteor])
@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        (["a", "b"], [["a"]], "2 predictions and references for 1; give references for every"),
        (["a", "b"], [["a"], []], "Example 2 has no reference; {name} needs at least one each"),
        ([], [], "There are no predictions, so {name} is not defined"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, predictions, references, words):
    name = {bleu: "BLEU", rouge_l: "ROUGE-L", meteor: "METEOR"}[metric]
    with pytest.raises(ValueError, match=words.format(name=name)):
        metric(predictions, references)


def test_the_number_of_references_may_differ(wordnet):
    ragged = [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2] * 2]
    filled = [[*texts, *[texts[0]] * (4 - len(texts))] for texts in ragged]  # changes nothing
    for metric in (bleu, rouge_l):
        assert metric(PREDICTIONS, ragged).value == pytest.approx(metric(PREDICTIONS, filled).value)
    assert meteor(PREDICTIONS, ragged, wordnet=wordnet) == meteor(
        PREDICTIONS, filled, wordnet=wordnet
    )


def test_the_ends_of_bleu():
    assert bleu([texts[0] for texts in REFERENCES], REFERENCES).value == pytest.approx(100)
    assert bleu(["zzz"] * 3, REFERENCES).value == pytest.approx(0, abs=1e-6)
