"""A small dictionary in the format of WordNet's files, with words of its own."""

from pathlib import Path

VERSION = "9.1"
LICENCE = (
    "This is no WordNet: a few words that tests look up, é included.",
    "",
    f"WordNet {VERSION} Copyright 2026 by nobody.  ",
)
PLACE = [
    "place",
    "spot",
    "site",
    "venue",
    "locale",
    "position",
    "point",
    "location_1",
    "station",
    "seat",
    "stead",
]
SYNSETS: dict[str, list[tuple[str, list[str]]]] = {
    "noun": [
        ("n", ["car", "auto", "motor_car"]),
        ("n", ["eatery", "restaurant", "eating_house"]),
        ("n", PLACE),  # eleven words: their number is hexadecimal
        ("n", ["Riverside"]),
        ("n", ["wolf"]),
        ("n", ["ax", "hatchet"]),
        ("n", ["axis"]),
        ("n", ["glass", "tumbler"]),
        ("n", ["spectacles"]),
        ("n", ["seat", "chair"]),
        ("n", ["leaf"]),
        ("n", ["policeman"]),
    ],
    "verb": [("v", ["eat", "dine"]), ("v", ["place", "put"]), ("v", ["be", "exist"])],
    "adj": [
        ("a", ["cheap", "inexpensive"]),
        ("s", ["cut-rate(a)", "affordable"]),
        ("a", ["asleep(p)"]),
    ],
    "adv": [("r", ["well", "good"])],
}
KINDS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
EXCEPTIONS = {
    "noun": ["axes ax axis", "glasses spectacles", "wolves wolf"],
    "verb": ["ate eat", "is be"],
    "adj": ["better good well"],
    "adv": ["better well"],
}


def write_wordnet(folder: Path) -> Path:
    """Write the twelve files; a folder that is not there is made."""
    folder.mkdir(parents=True, exist_ok=True)
    licence = "".join(f"  {number} {line}\n" for number, line in enumerate(LICENCE, start=1))
    for part, synsets in SYNSETS.items():
        data, senses = licence.encode(), {}
        previous = 0
        for kind, words in synsets:
            offset = len(data)
            listed = " ".join(f"{word} {i:x}" for i, word in enumerate(words))
            pointers = f"001 & {previous:08d} a 0000" if kind == "s" else "000"
            line = f"{offset:08d} 03 {kind} {len(words):02x} {listed} {pointers} | “gloss”  \n"
            data += line.encode()
            for word in words:
                lemma = word.partition("(")[0].lower()
                senses.setdefault(lemma, []).append(f"{offset:08d}")
            previous = offset
        index = "".join(
            f"{lemma} {KINDS[part]} {len(found)} 2 @ ~ {len(found)} 0 {' '.join(found)}  \n"
            for lemma, found in sorted(senses.items())
        )
        (folder / f"data.{part}").write_bytes(data)
        (folder / f"index.{part}").write_text(licence + index, "utf-8")
        exceptions = "".join(f"{line}\n" for line in EXCEPTIONS[part])
        (folder / f"{part}.exc").write_text(exceptions, "utf-8")
    return folder
