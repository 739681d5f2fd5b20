import traceback
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from scripted import Say, error

from loralloc.evaluation.judge.endpoint import EndpointError

MESSAGES = [{"role": "user", "content": "Which is better?"}]
KEY = "sk-a-very-secret-key"


def test_a_reply_and_what_was_sent_for_it(server, endpoint, waits):
    server.script = [Say(text="This one.", finish_reason="length")]
    reply = endpoint(temperature=0.5, max_tokens=77).ask(MESSAGES)
    assert (reply.text, reply.finish_reason, waits) == ("This one.", "length", [])
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "the-judge",
        "messages": MESSAGES,
        "temperature": 0.5,
        "max_completion_tokens": 77,
    }


@pytest.mark.parametrize(
    ("header", "waited"), [("7", 7), ("0.5", 0.5), ("-3", 0), ("soon", 1), ("nan", 1), (None, 1)]
)
def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(
    header, waited, server, endpoint, waits
):
    server.script = [error(429, **({} if header is None else {"Retry_After": header}))]
    assert endpoint().ask(MESSAGES).text
    assert waits == [waited]
    assert len(server.requests) == 2


def test_the_server_may_name_a_date(server, endpoint, waits):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    server.script = [error(503, Retry_After=date)]
    assert endpoint().ask(MESSAGES).text
    assert 50 < waits[0] <= 60


@pytest.mark.parametrize("status", (408, 409, 429, 500, 503))
def test_what_passes_is_tried_again_after_longer_and_longer_waits(status, server, endpoint, waits):
    server.script = [error(status)] * 3
    assert endpoint().ask(MESSAGES).text
    assert waits == [1, 2, 4]


def test_who_waits_is_told_why(server, endpoint):
    told = []
    server.script = [error(429, "slow down", Retry_After=3)]
    endpoint(on_wait=told.append).ask(MESSAGES)
    assert told == [f"The judge at {server.url} answered 429 (slow down); next try in 3 s"]


def test_tries_have_an_end(server, endpoint, waits):
    server.otherwise = lambda request: error(500, "out of order")
    with pytest.raises(EndpointError, match=r"answered 500 \(out of order\), 6 times") as refused:
        endpoint().ask(MESSAGES)
    assert "run the same command again" in str(refused.value)
    assert waits == [1, 2, 4, 8, 16]
    assert len(server.requests) == 6


def test_a_wait_of_hours_is_told_and_not_made(server, endpoint, waits):
    server.script = [error(429, Retry_After=7200)]
    with pytest.raises(EndpointError, match="asks to wait 7200 s; run the same command again then"):
        endpoint().ask(MESSAGES)
    assert waits == []


def test_no_reply_in_time(server, endpoint, waits):
    server.script = [Say(hangs=True)]
    assert endpoint(timeout_s=0.3).ask(MESSAGES).text
    assert waits == [1]


def test_no_reply_in_time_ever(server, endpoint, waits):
    server.otherwise = lambda request: Say(hangs=True)
    with pytest.raises(EndpointError, match=r"gave no reply within 0\.05 s \(`--timeout`\), 6 tim"):
        endpoint(timeout_s=0.05).ask(MESSAGES)
    assert len(waits) == 5


def test_nobody_listens(server, endpoint, waits):
    url = server.url
    server.__exit__()
    with pytest.raises(EndpointError, match="cannot be reached, 6 times"):
        endpoint(base_url=url).ask(MESSAGES)
    assert len(waits) == 5


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (error(401, "bad key"), r"answered 401 \(bad key\); set the environment variable OPENAI_"),
        (error(403), "answered 403 .* OPENAI_API_KEY"),
        (
            error(404, "no such model"),
            r"\(no such model\); is 'the-judge' a model there, .*/v1",
        ),
        (error(400, "too long"), r"answered 400 \(too long\); the request will not be repeated"),
        (error(422, "a " * 500), r"answered 422 \((a ){99}a.\);"),
        (Say(status=400, body=b'{"detail": "pinned"}'), r"answered 400 \(pinned\)"),
        (Say(status=410, body=b""), r"answered 410 \(.*\)"),
        (error(429, "pay first", code="insufficient_quota"), r"answered 429 \(pay first\)"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Say) else "",
)
def test_what_does_not_pass_is_told_at_once(say, words, server, endpoint, waits):
    server.script = [say]
    with pytest.raises(EndpointError, match=words):
        endpoint().ask(MESSAGES)
    assert waits == []
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "say",
    [
        Say(body=b"<html>Welcome</html>", headers={"Content-Type": "text/html"}),
        Say(body=b"{not json"),
        Say(body=b'{"choices": []}'),
        Say(body=b'{"choices": null}'),
        Say(body=b"[]"),
    ],
    ids=lambda say: say.body.decode(),
)
def test_something_else_listens_there(say, server, endpoint, waits):
    server.script = [say]
    with pytest.raises(EndpointError, match="not with a chat completion; does an OpenAI-compat"):
        endpoint().ask(MESSAGES)
    assert waits == []


def test_a_reply_without_words(server, endpoint):
    server.script = [Say(body=b'{"choices": [{"finish_reason": "stop", "message": {}}]}')]
    assert endpoint().ask(MESSAGES).text == ""


def test_the_key_goes_to_the_server_and_nowhere_else(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = endpoint()
    server.script = [Say(text=f"Your key is {KEY}."), error(401, f"{'x' * 190} {KEY} is wrong")]
    assert asked.ask(MESSAGES).text == "Your key is [OPENAI_API_KEY]."
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    with pytest.raises(EndpointError) as refused:
        asked.ask(MESSAGES)
    shown = "".join(traceback.format_exception(refused.value))
    assert "x" * 190 in shown
    assert KEY[:8] not in shown
    assert KEY not in repr(asked.request(MESSAGES))


@pytest.mark.parametrize("key", (None, ""))
def test_a_server_of_ones_own_needs_no_key(key, server, endpoint, monkeypatch):
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    server.script = [Say(text="none of them")]
    assert endpoint().ask(MESSAGES).text == "none of them"
    assert server.requests[0].headers["authorization"] == "Bearer none"


def test_a_key_read_from_a_file_may_end_in_a_line_break(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    endpoint().ask(MESSAGES)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ("sk-\u2026-secret", "sk\n-secret"))
def test_a_key_that_cannot_be_sent_is_refused_without_repeating_it(key, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds signs that no key has") as refused:
        endpoint()
    assert "secret" not in str(refused.value)


def test_a_placeholder_that_some_servers_want_is_no_secret(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.script = [Say(text="EMPTY words")]
    assert endpoint().ask(MESSAGES).text == "EMPTY words"


@pytest.mark.parametrize("base_url", ("localhost:8000/v1", "", "ftp://host/v1", "http:///v1"))
def test_no_address(base_url, endpoint):
    with pytest.raises(ValueError, match=r"`base_url` is .*; it must be an address such as"):
        endpoint(base_url=base_url)


@pytest.mark.parametrize("base_url", ("http://me:secret@host/v1", "http://host/v1?key=secret"))
def test_an_address_with_a_secret_is_refused_without_repeating_it(base_url, endpoint):
    with pytest.raises(ValueError, match="must hold no password") as refused:
        endpoint(base_url=base_url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("options", ({"max_tokens": 0}, {"timeout_s": 0.0}, {"temperature": -1.0}))
def test_numbers_out_of_range(options, endpoint):
    with pytest.raises(ValueError, match=r"`max_tokens` is .* at least 1, the second above 0"):
        endpoint(**options)
