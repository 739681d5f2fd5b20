import json
import os
import shutil

import pytest
from scripted import ScriptedServer, error, scores

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["the film is", "the place is"]},
    {"question_id": 2, "category": "writing", "turns": ["the story is", "a film"]},
]
KEY = "sk-a-very-secret-key"
SHORT = ("--max_new_tokens", 4, "--num_beams", 1)


@pytest.fixture
def server(monkeypatch):
    """A judge that likes long answers, a little more when they come first."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def say(request):
        a, b = (part.count("long") for part in request.prompt.split("[Assistant B, answer 1]"))
        return scores(6 + (a > b), 5 + (b > a))

    with ScriptedServer() as server:
        server.otherwise = say
        yield server


@pytest.fixture
def questions(tmp_path, write_rows):
    write_rows(tmp_path / "mt_bench" / "test.jsonl", QUESTIONS)
    return tmp_path / "mt_bench"


@pytest.fixture
def answers(tmp_path, write_rows):
    def answers(name, text):
        rows = [{"question_id": q["question_id"], "turns": [text, text]} for q in QUESTIONS]
        return write_rows(tmp_path / f"{name}.jsonl", rows)

    return answers


@pytest.fixture
def judge(call, questions, server, tmp_path):
    def judge(*words, data=questions):
        where = ("--output_dir", tmp_path / "judged", "--base_url", server.url, "--model", "j")
        return call("judge", *words, "--data", data, *where)

    return judge


def results(tmp_path):
    return json.loads((tmp_path / "judged" / "judge.json").read_text())


def test_two_files_are_compared(judge, answers, server, tmp_path):
    done = judge(answers("brief", "so"), answers("wordy", "a long long answer"))
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines == [
        "Scores out of 10, mean of both orders, by j",
        "contestant score won tied lost",
        "brief 5.50 0 0 2",
        "wordy 6.50 2 0 0",
        "2 judged, 0 missing",
        "order alone changes 2 of 2 verdicts; being shown first is worth +1.00 points",
        "",
        "replies: 4 asked for, 0 kept from before",
        f"results: {tmp_path / 'judged' / 'judge.json'}",
    ]
    data = results(tmp_path)
    assert data["judge"]["model"] == "j" and data["judge"]["base_url"] == server.url
    (pair,) = data["pairs"]
    assert (pair["first"], pair["second"], pair["mean_scores"]) == ("brief", "wordy", [5.5, 6.5])
    comparison = pair["comparisons"][0]
    assert comparison["first_shown_first"]["scores"] == [6, 6]
    assert comparison["second_shown_first"]["scores"] == [5, 7]
    assert "Review of A: so." in comparison["second_shown_first"]["review"]


def test_the_same_command_again_asks_nothing(judge, answers, server):
    files = answers("brief", "so"), answers("wordy", "a long answer")
    first, num_requests = judge(*files), len(server.requests)
    again = judge(*files)
    assert len(server.requests) == num_requests
    assert "replies: 0 asked for, 4 kept from before" in again.out
    assert again.out.partition("replies")[0] == first.out.partition("replies")[0]


def test_every_pair_of_three(judge, answers, tmp_path):
    judge(*(answers(name, name) for name in ("a", "b", "c")))
    pairs = [(pair["first"], pair["second"]) for pair in results(tmp_path)["pairs"]]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def test_what_is_missing_is_told(judge, answers, server, tmp_path):
    server.script = [scores(11, 12)] * 2
    done = judge(answers("a", "so"), answers("b", "so"))
    assert "1 judged, 1 missing (no reply, no scores in it, or cut off)" in done.out
    lost = results(tmp_path)["pairs"][0]["comparisons"][0]
    assert (lost["scores"], lost["verdict"]) == (None, None)
    assert lost["first_shown_first"]["missing"] == "no two scores in the reply"


def test_nothing_judged_shows_no_figure(judge, answers, server):
    server.otherwise = lambda request: scores(11, 12)
    out = judge(answers("a", "so"), answers("b", "so")).out
    assert "0 judged, 2 missing" in out and "order alone" not in out
    assert ["a", "-", "0", "0", "0"] in [line.split() for line in out.splitlines()]


def test_the_key_is_written_nowhere(judge, answers, server, tmp_path):
    files = answers("a", f"{KEY[:4]}"), answers("b", "so")
    server.script = [error(429, f"{KEY} is slow", Retry_After=0), scores(1, 2), error(401, KEY)]
    refused = judge(*files)
    assert "answered 401 ([OPENAI_API_KEY]); set the environment variable" in refused.sentence
    done = judge(*files)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    written = [path.read_text() for path in (tmp_path / "judged").rglob("*") if path.is_file()]
    assert len(written) == 5
    for text in (*written, done.out, done.err, refused.out, refused.err):
        assert KEY not in text


def test_rouge_l_against_gpt4_where_the_folder_has_it(judge, answers, questions, write_rows, call):
    rows = [{"question_id": q["question_id"], "turns": ["so it is", "so"]} for q in QUESTIONS]
    gpt4 = write_rows(questions / "gpt4_answers.jsonl", rows)
    where = ("--data", questions, "--output_dir", questions.parent / "judged")
    done = call("judge", answers("a", "so"), gpt4, *where)
    assert (done.code, done.err) == (0, "")
    assert "Scores" not in done.out
    rouge_l = {c["name"]: c["rouge_l"] for c in results(questions.parent)["contestants"]}
    assert rouge_l["gpt4_answers"] is None
    assert rouge_l["a"]["value"] == pytest.approx((50 + 100) / 2)
    assert "rouge-score" in rouge_l["a"]["implementation"]
    assert ["a", "75.0"] in [line.split() for line in done.out.splitlines()]


def test_a_run_and_its_base_model_answer_for_themselves(
    train, output, llama_folder, judge, server, tmp_path, monkeypatch
):
    assert train(learning_rate=0.1).code == 0
    done = judge(output, llama_folder, *SHORT)
    assert (done.code, done.err) == (0, "")
    ours, base = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            output / "answers.jsonl",
            *(tmp_path / "judged").glob(f"{llama_folder.name}-*-answers.jsonl"),
        )
    )
    assert [row["question_id"] for row in ours] == [1, 2]
    assert ours[0]["turns"] != base[0]["turns"]
    assert "user: " not in server.requests[0].prompt
    assert ours[0]["turns"][0] in server.requests[0].prompt
    made_with = ours[0]["made_with"]
    assert made_with["prompt"] == "chat" and made_with["model"].startswith("adapter ")

    monkeypatch.setattr("loralloc.evaluation.judge.contestants.load_trained", None)
    monkeypatch.setattr("loralloc.evaluation.judge.contestants.load_model", None)
    assert judge(output, llama_folder, *SHORT).code == 0
    sentence = judge(output, llama_folder, *SHORT, "--prompt", "alpaca").sentence
    assert "'prompt': 'alpaca'" in sentence and "move the file away" in sentence
    path = output / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")  # as if trained again
    assert "move the file away" in judge(output, llama_folder, *SHORT).sentence


def test_models_whose_folders_have_one_name_keep_their_answers_apart(
    judge, llama_folder, server, tmp_path, monkeypatch
):
    for name in "ab":
        shutil.copytree(llama_folder, tmp_path / name / "merged")
    ours = tmp_path / "a" / "merged"
    assert judge(ours, tmp_path / "b" / "merged", *SHORT).code == 0
    assert len(list((tmp_path / "judged").glob("merged-*-answers.jsonl"))) == 2
    (weights,) = ours.glob("*.safetensors")
    os.utime(weights, (1, 1))  # as if exported anew
    assert judge(ours, tmp_path / "b" / "merged", *SHORT).code == 0
    assert len(list((tmp_path / "judged").glob("merged-*-answers.jsonl"))) == 3


def test_a_bad_file_is_told_before_a_model_answers(judge, llama_folder, tmp_path, write_rows):
    bad = write_rows(tmp_path / "bad.jsonl", [{"question_id": 1, "turns": ["one"]}])
    sentence = judge(llama_folder, bad, *SHORT).sentence
    assert "has 1 answers to question 1, which has 2 turns" in sentence
    assert not (tmp_path / "judged").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.jsonl", "--model", "j"], "`--model` is given without `--base_url`"),
        (["a.jsonl", "--base_url", "http://h/v1"], "`--base_url` is given without `--model`"),
        (
            ["a.jsonl", "--base_url", "http://h/v1", "--model", "j"],
            "A judge compares two and only a.jsonl is given",
        ),
        (["a.jsonl", "a.jsonl"], "a.jsonl is given twice"),
        (["a.jsonl", "--limit", "0"], "`--limit` is 0; it must be at least 1"),
        (["a.jsonl", "--num_beams", "0"], "`num_beams` is 0; it must be at least 1"),
        (["."], "is neither a finished run (adapter_config.json) nor a model (config.json)"),
        (["nothing"], "There is no folder 'nothing' here"),
    ],
)
def test_bad_input(words, sentence, call, questions, answers, tmp_path, monkeypatch):
    answers("a", "so")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert sentence in call("judge", *words, "--data", questions).sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_as_short_as_they_can_be(tmp_path, monkeypatch):
    from loralloc.evaluation.judge.contestants import contestant_names

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt.4.jsonl").write_text("")
    assert contestant_names(["runs/a", "gpt.4.jsonl", "org/model.5"]) == ["a", "gpt.4", "model.5"]
    assert contestant_names(["x/a", "y/a"]) == ["x/a", "y/a"]
