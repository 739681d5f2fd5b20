"""`loralloc preview`: rows as a model reads them, whatever they hold."""

import pytest

PROMPT = "The sentiment of the given sentence is:"


@pytest.fixture
def rows(tmp_path, write_rows):
    """Write rows as one split of a folder; return the folder."""

    def rows(*content, split="train"):
        write_rows(tmp_path / "set" / f"{split}.jsonl", content)
        return tmp_path / "set"

    return rows


def reviews(count):
    return [{"sentence": f"film number {i}", "label": i % 2} for i in range(count)]


def test_prompt_response_and_label_are_shown(call, rows):
    folder = rows(*reviews(5))
    shown = call("preview", "sst2", "--data", folder, "--limit", 1)
    assert shown.code == 0
    assert shown.out == (
        f"sst2, train 1 of 5 ({folder / 'train.jsonl'})\n"
        "prompt     film number 0\n"
        f"           {PROMPT}\n"
        "response   negative\n"
        "label      index 0 of 'negative', 'positive'\n"
        "\n"
    )


def test_three_examples_of_the_first_split_unless_told_otherwise(call, rows):
    folder = rows(*reviews(2), split="test")
    assert call("preview", "sst2", "--data", folder).out.count("sst2, test ") == 2
    rows(*reviews(5))
    assert call("preview", "sst2", "--data", folder).out.count("sst2, train ") == 3
    shown = call("preview", "sst2", "--data", folder, "--split", "test", "--limit", "9").out
    assert shown.count("sst2, test ") == 2 and "sst2, train" not in shown


def test_only_the_supervised_part_is_coloured_and_only_in_a_terminal(call, rows, monkeypatch):
    folder = rows(*reviews(1))
    assert "\x1b" not in call("preview", "sst2", "--data", folder).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = call("preview", "sst2", "--data", folder).out
    assert "\x1b[1;32mnegative\x1b[0m" in shown
    assert shown.count("\x1b[1;32m") == 1
    assert f"\x1b[0m{PROMPT}\n" in shown


def test_references_turns_and_spans_are_shown(call, rows):
    turns = {"question_id": 1, "turns": ["Add 1 and 2.", "Double it."], "reference": ["3", "6"]}
    shown = call("preview", "mt_bench", "--data", rows(turns, split="test")).out
    for line in (
        "prompt     Add 1 and 2.",
        "next turn  Double it.",
        "reference  3",
        "reference  6",
    ):
        assert f"\n{line}\n" in shown
    assert "response" not in shown

    answers = {"text": ["Rome", "in Rome"], "answer_start": [7, 4]}
    row = {"context": "It is in Rome.", "question": "Where?", "answers": answers}
    shown = call("preview", "squad", "--data", rows(row), "--split", "train").out
    assert "\nresponse   Rome\nreference  in Rome\n" in shown
    assert "\nspan           9 Rome\nspan           6 in Rome\n" in shown


def test_text_is_shown_as_it_is(call, rows):
    strange = (
        "[bold]not markup[/] :smile: [/wrong] \u05e9\u05dc\u05d5\u05dd "
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 " + "long " * 200
    )
    shown = call("preview", "sst2", "--data", rows({"sentence": strange, "label": 1})).out
    assert f"prompt     {strange.strip()}\n" in shown


def test_what_would_command_the_terminal_is_spelt_out(call, rows):
    shown = call(
        "preview", "sst2", "--data", rows({"sentence": "a\x1b[31mb\x07c\rd", "label": 1})
    ).out
    assert r"a\x1b[31mb\x07c\rd" in shown
    assert "\x1b" not in shown


def test_the_demo_needs_no_data(call):
    shown = call("preview", "demo", "--limit", 1).out
    assert "demo, train 1 of 1,000" in shown
    assert shown.count("\nreference  ") == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sst"], "There is no task 'sst' (did you mean 'sst2'?)"),
        (["mt_bench"], "The task mt_bench has no data set on the Hub"),
        (["sst2", "--data", "no/such/place.jsonl"], "There is no file or folder"),
        (["demo", "--limit", "0"], "`--limit` is 0; it must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence, call):
    assert sentence in call("preview", *words).sentence


def test_bad_rows_and_missing_splits_get_one_sentence(call, rows):
    folder = rows({"sentence": "fine", "label": 1}, {"sentence": "fine", "label": 5})
    sentence = call("preview", "sst2", "--data", folder).sentence
    assert "Row 2 of" in sentence and "field 'label' must be one of 0 (negative)" in sentence
    sentence = call("preview", "sst2", "--data", folder, "--split", "test").sentence
    assert sentence == "The data has no test split; it has train."
    sentence = call("preview", "rte", "--data", folder).sentence
    assert "The task rte reads the columns sentence1, sentence2, label" in sentence
