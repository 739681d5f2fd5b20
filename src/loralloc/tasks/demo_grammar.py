"""The grammar of the demo set: facts about invented restaurants, and sentences that tell them.

A fact set is a name, a kind of place, a kitchen and one to three more facts. Six patterns turn
any fact set into English; every fact set is written in four of them, drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

SIZES = {"train": 1000, "validation": 100, "test": 100}
"""Rows of each split."""

PHRASINGS_PER_FACT_SET = 4

ADJECTIVES = (
    "Amber", "Brass", "Copper", "Crooked", "Drifting", "Frosted", "Gilded", "Humble",
    "Juniper", "Lucky", "Marble", "Painted", "Quiet", "Rusty", "Scarlet", "Velvet",
)  # fmt: skip
NOUNS = (
    "Acorn", "Anchor", "Barrel", "Candle", "Fern", "Finch", "Kettle", "Ladle",
    "Lantern", "Pepper", "Saddle", "Shutter", "Sparrow", "Teapot", "Thistle", "Walnut",
)  # fmt: skip
KINDS = ("bistro", "cafeteria", "canteen", "diner", "grill", "noodle bar", "tavern", "tea room")
FOODS = (
    "Brazilian", "Ethiopian", "Greek", "Korean", "Lebanese", "Mexican", "Moroccan",
    "Peruvian", "Polish", "Portuguese", "Thai", "Turkish",
)  # fmt: skip
PRICES = ("low", "moderate", "high")
STARS = ("one", "two", "three", "four", "five")
PLACES = {
    "harbour": "at the harbour",
    "hillside": "on the hillside",
    "market square": "on the market square",
    "old town": "in the old town",
    "station quarter": "in the station quarter",
    "university": "by the university",
}
"""A part of the town -> how a sentence says that something is there."""
LANDMARKS = (
    "the aquarium", "the clock tower", "the glass bridge", "the lighthouse", "the opera house",
    "the planetarium", "the post office", "the rose garden", "the town hall", "the windmill",
)  # fmt: skip

Facts = dict[str, str]
"""Name of a fact -> its value, in the order in which the prompt lists them."""


def demo_rows(seed: int = 0) -> dict[str, list[dict[str, object]]]:
    """Draw the rows of every split; the same seed gives the same rows on every Python.

    A row has `prompt`, `completion` (one phrasing, behind the blank that joins it) and
    `references` (all phrasings of that fact set). No fact set is in two splits. A split holds
    every fact set once before it holds any twice, so that a quarter of it has all prompts.
    """
    rng = Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, object]]] = {}
    for split, size in SIZES.items():
        groups: list[tuple[str, list[str]]] = []
        while len(groups) < size // PHRASINGS_PER_FACT_SET:
            facts = draw_facts(rng)
            prompt = prompt_of(facts)
            if prompt not in seen:
                seen.add(prompt)
                groups.append((prompt, _draw(rng, phrasings(facts), PHRASINGS_PER_FACT_SET)))
        splits[split] = [
            {"prompt": prompt, "completion": " " + texts[turn], "references": list(texts)}
            for turn in range(PHRASINGS_PER_FACT_SET)
            for prompt, texts in groups
        ]
    return splits


def draw_facts(rng: Random) -> Facts:
    """Draw four to six facts; one of price, stars and children is always among them."""
    must = _draw(rng, ("price", "stars", "children"), 1)
    rest = [fact for fact in ("price", "stars", "children", "where", "near") if fact not in must]
    chosen = must + _draw(rng, rest, int(rng.random() * 3))
    facts = {
        "name": f"The {_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)}",
        "kind": _pick(rng, KINDS),
        "food": _pick(rng, FOODS),
        "price": _pick(rng, PRICES),
        "stars": _pick(rng, STARS),
        "children": _pick(rng, ("yes", "no")),
        "where": _pick(rng, tuple(PLACES)),
        "near": _pick(rng, LANDMARKS),
    }
    always = ("name", "kind", "food")
    return {fact: value for fact, value in facts.items() if fact in always or fact in chosen}


def prompt_of(facts: Facts) -> str:
    """List the facts, and ask for a sentence."""
    return "; ".join(f"{fact}: {value}" for fact, value in facts.items()) + "\nDescription:"


def phrasings(facts: Facts) -> list[str]:
    """Tell the facts in each of the six patterns, 15 to 30 words each."""
    name, kind, food = facts["name"], f"a {facts['kind']}", f"{facts['food']} food"
    spot = _spot(facts)
    price, children = facts.get("price"), facts.get("children")
    stars = f"{facts['stars']} out of five stars" if "stars" in facts else None

    def allowed(yes: str, no: str) -> str | None:
        return {"yes": yes, "no": no, None: None}[children]

    plain = _list(
        price and f"keeps its prices {price}",
        stars and f"has a rating of {stars}",
        allowed("welcomes guests with children", "does not admit children"),
    )
    offered = _list(f"{food} on the menu", price and f"{price} prices", stars)
    bring = allowed(" Guests may bring their children.", " Guests may not bring children.")
    clauses = _list(
        stars and f"which has {stars}",
        allowed("where children are welcome", "where only adults eat"),
    )
    facts_listed = _list(
        price and f"its prices are {price}",
        stars and f"its rating is {stars}",
        allowed("children are welcome", "children are not allowed"),
    )
    guests = allowed("guests of all ages", "adult guests") or "guests"
    qualities = _list(stars and f"rated {stars}", allowed("open to children", "for adults only"))
    return [
        f"{name} is {kind}{spot} that serves {food}. It {plain}.",
        f"There is {kind} called {name}{spot}, with {offered}.{bring or ''}",
        f"If you would like some {food}, try {name}, {kind}{spot}"
        f"{f' with {price} prices' if price else ''}{clauses and ', ' + clauses}.",
        f"{food} is on the menu at {name}, {kind}{spot}. "
        f"{facts_listed[0].upper()}{facts_listed[1:]}.",
        f"At {name}, {kind}{spot}, {guests} can sit down to some {food}"
        f"{f' at {price} prices' if price else ''}.{f' It has {stars}.' if stars else ''}",
        f"For {food}{f' at {price} prices' if price else ''}, pay a visit to {name}{spot}. "
        f"It is {kind}{qualities and ' ' + qualities}.",
    ]


def _spot(facts: Facts) -> str:
    """Say where the place is, behind a blank; nothing if the facts do not tell."""
    where = " " + PLACES[facts["where"]] if "where" in facts else ""
    return where + (f" near {facts['near']}" if "near" in facts else "")


def _list(*parts: str | None) -> str:
    """Join the parts that are there: "a", "a and b", "a, b and c"."""
    there = [part for part in parts if part]
    return " and ".join(filter(None, [", ".join(there[:-1]), *there[-1:]]))


def _pick(rng: Random, options: Sequence[str]) -> str:
    # Of Random's methods only random() is promised to stay the same between Python versions.
    return options[int(rng.random() * len(options))]


def _draw(rng: Random, options: Sequence[str], count: int) -> list[str]:
    """Draw without replacement, in the order drawn."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
