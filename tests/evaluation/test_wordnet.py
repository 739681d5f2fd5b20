import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from wordnet_files import EXCEPTIONS, PLACE, SYNSETS, VERSION, write_wordnet

from loralloc.evaluation.wordnet import FOLDER, WordNet, find_wordnet, load_wordnet

CAR = ["car", "auto", "motor_car"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.fixture(scope="module")
def wordnet(folder):
    return WordNet(folder)


class NltkWordNet(WordNetCorpusReader):
    """nltk's reader of the same files, without the older versions that it maps to."""

    def map_wn(self, version="wordnet"):
        return None


@pytest.fixture(scope="module")
def nltk_wordnet(tmp_path_factory):
    folder = write_wordnet(tmp_path_factory.mktemp("nltk"))
    names = [f"{number:02d}\tnone\t1\n" for number in range(4)]
    (folder / "lexnames").write_text("".join(names), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nltk.data.path", [str(folder)])  # it reads nowhere else
        yield NltkWordNet(str(folder), omw_reader=object())


def names(wordnet, word):
    return [[lemma.name() for lemma in synset.lemmas()] for synset in wordnet.synsets(word)]


@pytest.mark.parametrize(
    ("word", "synsets"),
    [
        ("car", [CAR]),
        ("Cars", [CAR]),
        ("motor_car", [CAR]),
        ("riverside", [["Riverside"]]),
        ("place", [PLACE, ["place", "put"]]),
        ("seat", [PLACE, ["seat", "chair"]]),
        ("dining", [["eat", "dine"]]),
        ("eats", [["eat", "dine"]]),
        ("leaves", [["leaf"]]),
        ("policemen", [["policeman"]]),
        ("cheapest", [["cheap", "inexpensive"]]),
        ("cut-rate", [["cut-rate", "affordable"]]),
        ("asleep", [["asleep"]]),
        ("axes", [["ax", "hatchet"], ["axis"]]),
        ("glasses", [["spectacles"]]),  # an exception has no other base form
        ("is", [["be", "exist"]]),
        ("better", [["well", "good"]]),
        ("s", []),
        ("auto-car", []),
        ("", []),
        ("éé", []),
    ],
)
def test_a_word_has_the_synsets_of_its_base_forms(word, synsets, wordnet):
    assert names(wordnet, word) == synsets


STEMS = sorted(
    {word for synsets in SYNSETS.values() for _, words in synsets for word in words}
    | {form for lines in EXCEPTIONS.values() for line in lines for form in line.split()}
)
ENDINGS = ("", "s", "es", "ed", "d", "ing", "er", "est", "ves", "ies", "men", "ses")


@given(st.sampled_from(STEMS), st.integers(0, 3), st.sampled_from(ENDINGS))
def test_it_reads_what_nltks_reader_reads(wordnet, nltk_wordnet, stem, cut, ending):
    word = stem[: len(stem) - cut] + ending
    assert names(wordnet, word) == names(nltk_wordnet, word)


def test_the_version_is_that_of_the_licence(wordnet, folder, tmp_path):
    assert wordnet.version == VERSION
    other = write_wordnet(tmp_path)
    for file in other.iterdir():
        file.write_bytes(file.read_bytes().replace(b"Copyright", b"copyleft!"))
    assert WordNet(other).version == "of unknown version"


def test_it_is_where_its_own_variable_says(folder, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    assert find_wordnet() == folder
    assert load_wordnet() is load_wordnet()
    assert load_wordnet().folder == folder


def test_otherwise_it_is_where_debian_has_it(folder, monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr("loralloc.evaluation.wordnet.FOLDER", folder)
    assert find_wordnet() == folder
    assert FOLDER.as_posix() == "/usr/share/wordnet"


@pytest.mark.parametrize("missing", ["index.verb", "data.adj", "noun.exc"])
def test_a_missing_file_is_named_with_what_installs_it(missing, tmp_path, monkeypatch):
    write_wordnet(tmp_path)
    (tmp_path / missing).unlink()
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    words = rf"{missing} is missing\): `apt install wordnet-base`, or set WNSEARCHDIR"
    with pytest.raises(FileNotFoundError, match=words):
        load_wordnet()


def test_files_of_two_versions_are_refused(tmp_path):
    write_wordnet(tmp_path)
    data = tmp_path / "data.noun"
    data.write_bytes(b"  0 one more line\n" + data.read_bytes())
    mixed = WordNet(tmp_path)
    assert names(mixed, "eat") == [["eat", "dine"]]
    with pytest.raises(
        ValueError, match=r"data\.noun has no synset at byte \d+, where index\.noun"
    ):
        mixed.synsets("car")


def test_the_real_one():
    try:
        wordnet = load_wordnet()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert "automobile" in names(wordnet, "cars")[0]
    assert ["abacus"] in names(wordnet, "abaci")
    assert {"dining", "dine"} <= {name for group in names(wordnet, "dining") for name in group}
    assert names(wordnet, "hardrocked") == []
