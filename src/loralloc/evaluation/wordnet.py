"""WordNet's files, read as far as METEOR needs them: the synonyms of an English word.

WordNet comes with Debian and Ubuntu (`apt install wordnet-base`) and with no Python package;
nltk's own reader wants further files, which are downloaded. The format of the files is described
in wndb(5WN), and how a word is brought to its base form in morphy(7WN).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
"""Where Debian has it."""

VARIABLE = "WNSEARCHDIR"
"""The environment variable by which WordNet's own programs find another folder."""

_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
"""Endings of inflected forms, and what the base form has there: morphy's, and "ves" from nltk."""

_FILES = tuple(
    name for part in _ENDINGS for name in (f"index.{part}", f"data.{part}", f"{part}.exc")
)
_VERSION = re.compile(rb"^ .*WordNet (\d[\d.]*) Copyright", re.MULTILINE)
_MARKER = re.compile(r"\((?:a|p|ip)\)$")
"""Behind an adjective: where in a sentence it may stand."""


@dataclass(frozen=True)
class Lemma:
    """A word of a synset; words of a phrase are joined by "_"."""

    spelling: str

    def name(self) -> str:
        """Return the spelling; nltk's metrics ask for it by this name."""
        return self.spelling


@dataclass(frozen=True)
class Synset:
    """Words of one meaning."""

    words: tuple[Lemma, ...]

    def lemmas(self) -> tuple[Lemma, ...]:
        """Return the words; nltk's metrics ask for them by this name."""
        return self.words


class WordNet:
    """The synsets of a word, with the part of nltk's interface that its metrics call."""

    def __init__(self, folder: Path) -> None:
        """Read the files of a folder that `find_wordnet` returned, or any with these files."""
        self.folder = folder
        self.version = read_version(folder)
        self._indices = {part: _read_index(folder / f"index.{part}") for part in _ENDINGS}
        self._exceptions = {part: _read_exceptions(folder / f"{part}.exc") for part in _ENDINGS}
        self._data = {part: (folder / f"data.{part}").read_bytes() for part in _ENDINGS}

    def synsets(self, word: str) -> list[Synset]:
        """Return the synsets of a word and of its base forms, as every part of speech.

        Case does not matter; a word that WordNet does not know has none.

        Raises:
            ValueError: If the files do not belong together.
        """
        return [
            self._synset(part, offset)
            for part in _ENDINGS
            for form in self._base_forms(part, word.lower())
            for offset in self._offsets(part, form)
        ]

    def _base_forms(self, part: str, word: str) -> list[str]:
        """The word itself and its base forms, as far as WordNet has them, in nltk's order.

        A word in the list of exceptions has the forms given there and no others.
        """
        derived = self._exceptions[part].get(word)
        if derived is None:
            derived = [
                word.removesuffix(ending) + base
                for ending, base in _ENDINGS[part]
                if word.endswith(ending)
            ]
        return [form for form in dict.fromkeys([word, *derived]) if form in self._indices[part]]

    def _offsets(self, part: str, form: str) -> list[int]:
        """Where the synsets of a form begin in the data file, commonest meaning first.

        An index line is: lemma, part of speech, number of synsets, number of pointers, the
        pointers, two counts, the offsets.
        """
        fields = self._indices[part][form].split()
        return [int(offset) for offset in fields[-int(fields[1]) :]]

    def _synset(self, part: str, offset: int) -> Synset:
        """Read a line of the data file.

        It is: its own offset, number of the lexicographer's file, type, number of words in
        hexadecimal, then a word and a number as often, then what is of no use here.
        """
        data = self._data[part]
        fields = data[offset : data.find(b"\n", offset)].decode().split()
        if not fields or fields[0] != f"{offset:08d}":
            raise ValueError(
                f"{self.folder / f'data.{part}'} has no synset at byte {offset}, where "
                f"index.{part} says: the two are of different versions, install WordNet anew."
            )
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        return Synset(tuple(Lemma(_MARKER.sub("", word)) for word in words))


def find_wordnet() -> Path:
    """Return the folder of WordNet's files: $WNSEARCHDIR, otherwise where Debian has them.

    Raises:
        FileNotFoundError: If a file is missing there; one sentence that says how to install it.
    """
    folder = Path(os.environ.get(VARIABLE) or FOLDER).expanduser()
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"There is no WordNet in {folder} ({missing[0]} is missing): `apt install "
            f"wordnet-base`, or set {VARIABLE} to the folder that has it."
        )
    return folder


def load_wordnet() -> WordNet:
    """Read the WordNet of this machine, once.

    Raises:
        FileNotFoundError: As `find_wordnet`.
    """
    return _load(find_wordnet())


def read_version(folder: Path) -> str:
    """Return the version that the licence at the head of the files names, if it names one."""
    with (folder / "data.noun").open("rb") as file:
        found = _VERSION.search(file.read(4096))
    return found[1].decode() if found else "of unknown version"


_load = lru_cache(maxsize=1)(WordNet)


def _read_index(path: Path) -> dict[str, str]:
    """Map each lemma to the rest of its line; lines of the licence begin with a blank."""
    lines = path.read_text("utf-8").splitlines()
    entries = (line.partition(" ") for line in lines if not line.startswith(" "))
    return {lemma: rest for lemma, _, rest in entries}


def _read_exceptions(path: Path) -> dict[str, list[str]]:
    """Map each irregular form to its base forms."""
    lines = (line.split() for line in path.read_text("utf-8").splitlines() if line.strip())
    return {form: bases for form, *bases in lines}
