"""The demo set: its sizes, that it never changes, and that its sentences tell its facts."""

import hashlib
import json
import subprocess
import sys
from random import Random

import pytest

from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import merge_references, to_examples
from loralloc.tasks.demo_grammar import PLACES, demo_rows, draw_facts, phrasings, prompt_of
from loralloc.tasks.source import load_splits

ROWS = demo_rows()


def prompts(split):
    return [row["prompt"] for row in ROWS[split]]


def test_sizes():
    assert {name: len(rows) for name, rows in ROWS.items()} == {
        "train": 1000,
        "validation": 100,
        "test": 100,
    }


def test_the_rows_are_the_same_on_every_machine_and_python():
    text = json.dumps(ROWS, sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "78c383a72f94e5a67a643e3a3f2e8f7a17fdabb35514b3ea8d9366b37844ac83"
    )


def test_another_seed_gives_other_rows():
    assert demo_rows(1) != ROWS
    assert demo_rows(1) == demo_rows(1)


def test_no_fact_set_is_in_two_splits():
    train, validation, test = (set(prompts(name)) for name in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("split", ROWS)
def test_references_are_all_phrasings_of_the_fact_set_in_the_split(split):
    written = {}
    for row in ROWS[split]:
        written.setdefault(row["prompt"], []).append(row["completion"].strip())
    for row in ROWS[split]:
        assert row["references"] == written[row["prompt"]]
        assert len(set(row["references"])) == 4


@pytest.mark.parametrize("split", ROWS)
def test_the_first_quarter_has_every_prompt_once(split):
    quarter = prompts(split)[: len(ROWS[split]) // 4]
    assert len(set(quarter)) == len(quarter)
    assert set(quarter) == set(prompts(split))


def test_evaluation_sees_each_prompt_once_with_its_phrasings():
    examples = merge_references(to_examples(load_splits("demo")["test"], get_task("demo")))
    assert [example.prompt for example in examples] == prompts("test")[:25]
    assert all(len(example.references) == 4 for example in examples)
    assert all(example.response in example.references for example in examples)


def words_for(fact, value):
    """What must stand in every sentence that tells this fact."""
    words = {
        "stars": f"{value} out of five stars",
        "where": PLACES.get(value),
        "near": f"near {value}",
    }
    return words.get(fact, value)


@pytest.mark.parametrize("seed", range(40))
def test_every_phrasing_tells_every_fact_in_one_or_two_sentences(seed):
    facts = draw_facts(Random(seed))
    assert 4 <= len(facts) <= 6
    sentences = phrasings(facts)
    assert len(set(sentences)) == 6
    for sentence in sentences:
        for fact, value in facts.items():
            if fact != "children":
                assert words_for(fact, value) in sentence
        told = any(word in sentence.lower() for word in ("child", "adult", "all ages"))
        assert told == ("children" in facts)
        assert 15 <= len(sentence.split()) <= 30
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not any(slip in sentence for slip in ("  ", " ,", " .", ",,", "..", "None"))


def test_children_or_not_is_told_apart():
    facts = {"name": "The Tin Cup", "kind": "grill", "food": "Thai"}
    welcome, refused = (phrasings(facts | {"children": answer}) for answer in ("yes", "no"))
    assert all(a != b for a, b in zip(welcome, refused, strict=True))


def test_a_fact_set_in_full():
    facts = {
        "name": "The Tin Cup",
        "kind": "grill",
        "food": "Thai",
        "price": "low",
        "stars": "two",
        "children": "no",
    }
    assert prompt_of(facts) == (
        "name: The Tin Cup; kind: grill; food: Thai; price: low; stars: two; children: no\n"
        "Description:"
    )
    assert phrasings(facts) == [
        "The Tin Cup is a grill that serves Thai food. It keeps its prices low, has a rating of "
        "two out of five stars and does not admit children.",
        "There is a grill called The Tin Cup, with Thai food on the menu, low prices and two out "
        "of five stars. Guests may not bring children.",
        "If you would like some Thai food, try The Tin Cup, a grill with low prices, which has two "
        "out of five stars and where only adults eat.",
        "Thai food is on the menu at The Tin Cup, a grill. Its prices are low, its rating is two "
        "out of five stars and children are not allowed.",
        "At The Tin Cup, a grill, adult guests can sit down to some Thai food at low prices. It "
        "has two out of five stars.",
        "For Thai food at low prices, pay a visit to The Tin Cup. It is a grill rated two out of "
        "five stars and for adults only.",
    ]


def test_importing_the_tasks_does_not_import_datasets():
    code = (
        "import sys, loralloc.tasks.catalog, loralloc.tasks.classification\n"
        "heavy = {'datasets', 'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "ours = [m for m in sys.modules if m.startswith('loralloc.')]\n"
        "assert not heavy, heavy\n"
        "assert all(m.startswith('loralloc.tasks') for m in ours), ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
