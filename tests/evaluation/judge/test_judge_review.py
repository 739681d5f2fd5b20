from pathlib import Path

import pytest
from scripted import Say, error, scores

from loralloc.evaluation.judge.contestants import Contestant
from loralloc.evaluation.judge.endpoint import EndpointError
from loralloc.evaluation.judge.questions import Question
from loralloc.evaluation.judge.replies import Reply, ReplyCache
from loralloc.evaluation.judge.review import Judge

QUESTIONS = [Question(number=i, turns=(f"Question {i}?", "And then?")) for i in (1, 2)]
LOST = Say(text="I like both.")


def contestant(name: str) -> Contestant:
    answers = {q.number: (f"{name} on {q.number}", f"{name} again") for q in QUESTIONS}
    return Contestant(name=name, source=Path(name), answers=answers)


LEFT, RIGHT = contestant("left"), contestant("right")


@pytest.fixture
def judge(endpoint, tmp_path):
    """Make a judge that knows what earlier ones were told."""
    return lambda **options: Judge(endpoint(**options), ReplyCache(tmp_path / "replies"))


def test_both_orders_are_asked_and_averaged(server, judge):
    server.script = [scores(7, 4), scores(2, 9), scores(5, 5), scores(6, 5)]
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert [r.prompt.index("left on") < r.prompt.index("right on") for r in server.requests] == [
        True,
        False,
        True,
        False,
    ]
    first, second = result.comparisons
    # Question 2, in the second order: A is right, so left has 5.
    assert (first.scores, second.scores) == ((8, 3), (5, 5.5))
    assert (first.first_shown_first.scores, first.second_shown_first.scores) == ((7, 4), (9, 2))
    assert (first.verdict, second.verdict) == ("first", "second")
    assert result.mean_scores == (6.5, 4.25)
    assert (result.count("first"), result.count("tie"), result.count("second")) == (1, 0, 1)


def test_a_judge_that_likes_the_first_place(server, judge):
    server.otherwise = lambda request: scores(8, 5)
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert result.mean_scores == (6.5, 6.5)
    assert result.count("tie") == 2
    assert result.num_changed_by_order == 2
    assert result.mean_gain_of_place == 3


def test_a_judge_that_does_not_look_at_the_place(server, judge):
    def say(request):
        return (
            scores(9, 3)
            if request.prompt.index("left") < request.prompt.index("right")
            else (scores(3, 9))
        )

    server.otherwise = say
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert result.mean_scores == (9, 3)
    assert (result.num_changed_by_order, result.mean_gain_of_place) == (0, 0)


@pytest.mark.parametrize(
    "useless",
    [LOST, Say(finish_reason="length"), Say(finish_reason="content_filter"), Say(text="")],
)
def test_a_reply_that_cannot_be_used_is_asked_for_once_more(useless, server, judge):
    server.script = [useless, scores(7, 4), scores(4, 7)]
    result = judge().compare(LEFT, RIGHT, QUESTIONS[:1])
    assert result.mean_scores == (7, 4)
    assert result.num_missing == 0
    first, again, _ = server.requests
    assert again.prompt.startswith(first.prompt) and again.prompt != first.prompt


@pytest.mark.parametrize(
    ("useless", "reason"),
    [
        (LOST, "no two scores in the reply"),
        (Say(finish_reason="length"), "cut off (length)"),
    ],
)
def test_then_it_is_missing_and_never_a_score(useless, reason, server, judge):
    server.script = [useless, useless, scores(4, 7), scores(5, 5), scores(5, 5)]
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert len(server.requests) == 5
    lost = result.comparisons[0]
    assert lost.first_shown_first.scores is None
    assert lost.first_shown_first.missing == reason
    assert lost.first_shown_first.text == useless.text
    assert lost.second_shown_first.scores == (7, 4)
    # One order alone is no score either.
    assert (lost.scores, lost.verdict, lost.order_changed_verdict) == (None, None, None)
    assert (len(result.judged), result.num_missing) == (1, 1)
    assert result.mean_scores == (5, 5)
    assert [result.count(v) for v in ("first", "tie", "second")] == [0, 1, 0]


def test_nothing_judged_gives_no_figure(server, judge):
    server.otherwise = lambda request: LOST
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert (result.mean_scores, result.mean_gain_of_place) == (None, None)
    assert (result.num_missing, result.num_changed_by_order) == (2, 0)


def test_an_interrupted_run_costs_nothing_twice(server, judge):
    server.script = [LOST, scores(7, 4), scores(4, 7), error(401)]
    with pytest.raises(EndpointError, match="401"):
        judge().compare(LEFT, RIGHT, QUESTIONS)
    assert len(server.requests) == 4
    server.script = [scores(1, 2), scores(2, 1)]
    resumed = judge()
    result = resumed.compare(LEFT, RIGHT, QUESTIONS)
    assert len(server.requests) == 6
    assert (resumed.num_asked, resumed.num_cached) == (2, 3)
    assert result.mean_scores == (4, 3)
    again = judge()
    assert again.compare(LEFT, RIGHT, QUESTIONS) == result
    assert again.num_asked == 0


def test_what_is_missing_stays_missing_without_being_paid_for_again(server, judge):
    server.otherwise = lambda request: LOST
    first = judge().compare(LEFT, RIGHT, QUESTIONS)
    num_requests = len(server.requests)
    server.otherwise = lambda request: scores(5, 5)
    assert judge().compare(LEFT, RIGHT, QUESTIONS) == first
    assert len(server.requests) == num_requests


@pytest.mark.parametrize("change", ({"model": "b"}, {"temperature": 1.0}, {"max_tokens": 9}))
def test_another_judge_is_asked_anew(change, server, judge):
    judge().compare(LEFT, RIGHT, QUESTIONS[:1])
    other = judge(**change)
    other.compare(LEFT, RIGHT, QUESTIONS[:1])
    assert (other.num_asked, other.num_cached) == (2, 0)


def test_replies_come_back_by_the_content_of_the_request(tmp_path):
    cache = ReplyCache(tmp_path / "replies")
    reply = Reply(text="Ünïcödé \U0001f600", finish_reason="stop")
    assert cache.get({"model": "m", "messages": []}) is None
    cache.put({"model": "m", "messages": []}, reply)
    assert cache.get({"messages": [], "model": "m"}) == reply
    assert cache.get({"model": "n", "messages": []}) is None
    assert [path.suffix for path in (tmp_path / "replies").iterdir()] == [".json"]


@pytest.mark.parametrize("content", ("", "{}", '{"reply": {"text": "a"}}', "[]"))
def test_a_spoilt_file_is_named(content, tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put({}, Reply(text="a", finish_reason="stop"))
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name} holds no reply of the judge; remove it"):
        cache.get({})


def test_what_has_no_reply_is_missing_and_the_next_is_asked(server, judge, tmp_path):
    server.script = [error(400, "too long"), scores(4, 7), scores(7, 4), Say(body=b"[]")]
    result = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert len(server.requests) == 4
    assert (result.num_missing, len(result.without_reply)) == (2, 2)
    assert "answered 400 (too long)" in result.comparisons[0].first_shown_first.missing
    assert "not with a chat completion" in result.comparisons[1].second_shown_first.missing
    assert len(list((tmp_path / "replies").iterdir())) == 2  # no failure is kept
    server.script = [scores(7, 4), scores(4, 7)]
    again = judge().compare(LEFT, RIGHT, QUESTIONS)
    assert (again.num_missing, again.without_reply) == (0, [])


def test_a_judge_that_never_replies_is_not_asked_hundreds_of_times(server, judge):
    many = [Question(number=i, turns=("a", "b")) for i in range(100)]
    one, other = (
        Contestant(name=n, source=Path(n), answers={q.number: (n, n) for q in many}) for n in "ab"
    )
    server.otherwise = lambda request: error(400, "no such option")
    with pytest.raises(EndpointError, match=r"no such option.*with 3 requests one after the oth"):
        judge().compare(one, other, many)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "reply", ('{"text": 5, "finish_reason": "stop"}', '{"text": "a", "finish_reason": null}')
)
def test_a_kept_reply_has_words(reply, tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put({}, Reply(text="a", finish_reason="stop"))
    (path,) = tmp_path.iterdir()
    path.write_text(f'{{"reply": {reply}}}')
    with pytest.raises(ValueError, match="holds no reply of the judge"):
        cache.get({})
