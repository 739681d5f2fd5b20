"""Rows of every task out of a grammar, for trying an experiment where its data is not at hand.

They have the columns of the real data and nothing else in common with it: restaurants, as the demo
tells of them. What a model scores on them means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from loralloc.tasks.demo_grammar import Facts, draw_facts, phrasings

Row = dict[str, Any]


def made_rows(task: str, sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[Row]]:
    """So many rows of each split; the same seed gives the same rows.

    Args:
        task: A task's name.
        sizes: Rows by split.
        seed: Of the draw.

    Raises:
        ValueError: Rows of this task are not made.
    """
    if task not in MAKERS:
        raise ValueError(
            f"Rows of the task {task} are not made up, only those of {', '.join(MAKERS)}; name "
            "data with `--data`."
        )
    rng = Random(f"{task} {seed}")
    return {
        split: [MAKERS[task](rng, number) for number in range(size)]
        for split, size in sizes.items()
    }


def _told(rng: Random) -> tuple[Facts, str]:
    """A restaurant, and a sentence or two about it."""
    facts = draw_facts(rng)
    return facts, phrasings(facts)[int(rng.random() * 6)]


def _sst2(rng: Random, number: int) -> Row:
    label = number % 2
    facts, _ = _told(rng)
    praise = ("a dull and tasteless", "a warm and wonderful")[label]
    return {"sentence": f"{facts['name']} is {praise} {facts['kind']} ", "label": label}


def _pair(rng: Random, number: int) -> tuple[str, str, int]:
    """A text, a sentence that follows from it (label 0) or not (1), and the label."""
    facts, text = _told(rng)
    other = facts["food"] if number % 2 == 0 else _another_food(rng, facts)
    return text, f"{facts['name']} serves {other} food.", number % 2


def _another_food(rng: Random, facts: Facts) -> str:
    while True:
        other = draw_facts(rng)["food"]
        if other != facts["food"]:
            return other


def _rte(rng: Random, number: int) -> Row:
    text, claim, label = _pair(rng, number)
    return {"sentence1": text, "sentence2": claim, "label": label}


def _qnli(rng: Random, number: int) -> Row:
    facts, text = _told(rng)
    if number % 2:
        facts, _ = _told(rng)
    asked = f"What food is there at {facts['name']}?"
    return {"question": asked, "sentence": text, "label": number % 2}


def _boolq(rng: Random, number: int) -> Row:
    text, claim, label = _pair(rng, number)
    asked = "is it true that " + claim.rstrip(".")
    return {"question": asked, "passage": text, "label": 1 - label}


def _copa(rng: Random, number: int) -> Row:
    facts, _ = _told(rng)
    right, wrong = "The cook had studied abroad.", "The lamp was switched off."
    first, second = (right, wrong) if number % 2 == 0 else (wrong, right)
    return {
        "premise": f"{facts['name']} has very good {facts['food']} food.",
        "choice1": first,
        "choice2": second,
        "question": "cause",
        "label": number % 2,
    }


def _record(rng: Random, number: int) -> Row:
    facts, text = _told(rng)
    name = facts["name"]
    passage = f"{text}\n@highlight\n{name} is {facts['kind']} of the year"
    starts = [at for at in range(len(passage)) if passage.startswith(name, at)]
    return {
        "passage": passage,
        "query": f"Guests of @placeholder come for its {facts['food']} food.",
        "answers": [name],
        "entity_spans": {"text": [name] * len(starts), "start": starts},
    }


def _squad(rng: Random, number: int) -> Row:
    facts, text = _told(rng)
    food = facts["food"]
    return {
        "context": text,
        "question": f"Which food does {facts['name']} serve?",
        "answers": {"text": [food], "answer_start": [text.index(food)]},
    }


def _e2e(rng: Random, number: int) -> Row:
    facts, text = _told(rng)
    meaning = ", ".join(f"{fact}[{value}]" for fact, value in facts.items())
    return {"meaning_representation": meaning, "human_reference": text}


def _alpaca(rng: Random, number: int) -> Row:
    facts, text = _told(rng)
    listed = "; ".join(f"{fact}: {value}" for fact, value in facts.items())
    return {"instruction": "Describe this place.", "input": listed, "output": text}


def _mt_bench(rng: Random, number: int) -> Row:
    facts, _ = _told(rng)
    turns = [f"Write a line about {facts['name']}.", "Now say it in fewer words."]
    return {"question_id": number + 1, "category": "writing", "turns": turns, "reference": []}


MAKERS: Mapping[str, Callable[[Random, int], Row]] = {
    "sst2": _sst2,
    "rte": _rte,
    "qnli": _qnli,
    "boolq": _boolq,
    "copa": _copa,
    "record": _record,
    "squad": _squad,
    "e2e": _e2e,
    "alpaca": _alpaca,
    "mt_bench": _mt_bench,
}
"""By the name of the task."""
