"""A run of two processes ends in both, in one sentence."""

import shutil

import pytest
from together import start

QUICK = ("one fails", "a locked folder")


@pytest.fixture(scope="module")
def found(tmp_path_factory, llama_folder, write_examples):
    """What both processes gave, by check, which is carried out when it is first asked for."""
    root = tmp_path_factory.mktemp("ends")
    shutil.copytree(llama_folder, root / "model")
    write_examples(root / "data")

    def ends(*names):
        both = start(f"ends_together:{','.join(names)}", root, (2,))[2]
        return [[each[name] for each in both] for name in names]

    return ends


def sentences(ends) -> list[str]:
    """What was said on the error streams of both."""
    return [line for end in ends for line in end["err"].splitlines() if line]


def codes(ends) -> list[int]:
    return [end["code"] for end in ends]


@pytest.fixture(scope="module")
def quick(found):
    return dict(zip(QUICK, found(*QUICK), strict=True))


def test_an_error_of_one_ends_both_in_its_own_sentence(quick):
    ends = quick["one fails"]
    assert sentences(ends) == ["loralloc: error: The second process has had enough."]
    assert codes(ends) == [2, 2]


@pytest.mark.slow
def test_one_that_is_asked_to_stop_stops_both_and_they_go_on(found):
    ends, again = found("one is asked to stop", "goes on")
    first, second = ends
    assert codes(ends) == [0, 0]
    assert "Stopped at step 3, as asked. Go on from checkpoint-3 with:" in " ".join(
        first["out"].split()
    )
    assert second["out"] == second["err"] == ""
    assert codes(again) == [0, 0]
    assert "adapter:" in again[0]["out"]


@pytest.mark.slow
def test_what_the_main_process_alone_finds_is_told_once(quick):
    ends = quick["a locked folder"]
    (sentence,) = sentences(ends)
    assert "Another process trains in" in sentence
    assert codes(ends) == [2, 2]


@pytest.mark.slow
def test_a_bug_is_shown_where_it_is(found):
    ((first, second),) = found("one breaks")
    assert (first["code"], first["err"]) == (2, "")
    assert second["err"] == "KeyError('a bug of ours')"


@pytest.mark.slow
def test_an_interruption_ends_both(found):
    (ends,) = found("all are interrupted")
    assert codes(ends) == [130, 130]
    said = sentences(ends)
    assert said.count("loralloc: interrupted") == 1
    assert len([line for line in said if line.startswith("Go on from checkpoint-2")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a refusal", "lora_r"),
        ("an unknown flag", "lora_rr"),
        ("another verb", "`loralloc tasks` runs in one process, and 2 were started"),
        ("sharding", "start the processes with `torchrun`"),
    ],
)
def test_a_refusal_is_one_sentence(name, words, found):
    (ends,) = found(name)
    (sentence,) = sentences(ends)
    assert words in sentence
    assert codes(ends) == [2, 2]


@pytest.mark.slow
def test_a_dry_run_is_shown_once(found):
    ((first, second),) = found("a dry run")
    assert first["code"] == second["code"] == 0
    assert "settings" in first["out"] or "rounds" in first["out"]
    assert second["out"] == ""
