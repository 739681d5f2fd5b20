"""An address that means no good: slow, endless, elsewhere, or after the key."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from scripted import Say, ScriptedServer, error

from loralloc.evaluation.judge.endpoint import MOST_BYTES, EndpointError, NoReply

MESSAGES = [{"role": "user", "content": "Which is better?"}]
KEY = "sk-A-very-secret-key"
COMPLETION = {"choices": [{"finish_reason": "stop", "message": {"content": "Score of A: 10"}}]}


@contextmanager
def pouring(head: bytes, *, part: bytes, pause_s: float):
    """A server that sends `part` again and again after `head`, until it is closed; its address."""
    closing = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    sent = [0]

    def pour(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(head)
                while not closing.wait(pause_s):
                    sent[0] += connection.send(part)
            except OSError:
                pass  # hung up

    def serve() -> None:
        while not closing.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=pour, args=(connection,)))
            threads[-1].start()

    threads = [threading.Thread(target=serve)]
    threads[0].start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", sent
    finally:
        closing.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "head",
    (b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"),
    ids=("head", "body"),
)
def test_the_time_limit_is_of_the_whole_request(head, endpoint, monkeypatch):
    monkeypatch.setattr("loralloc.evaluation.judge.endpoint.MAX_TRIES", 1)
    with pouring(head, part=b"X", pause_s=0.02) as (url, _):
        begin = time.monotonic()
        with pytest.raises(NoReply, match=r"gave no reply within 0\.5 s \(`--timeout`\)"):
            endpoint(base_url=url, timeout_s=0.5).ask(MESSAGES)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("status", (200, 400, 500))
def test_no_more_is_read_than_a_reply_can_have(status, endpoint, waits):
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n\r\n".encode()
    with pouring(head, part=b" " * 65536, pause_s=0) as (url, sent):
        with pytest.raises(NoReply, match="sent more than 4,194,304 bytes, which no reply has"):
            endpoint(base_url=url).ask(MESSAGES)
        assert waits == []
    assert sent[0] < 4 * MOST_BYTES  # what lay in buffers


def test_a_packed_reply_is_not_unpacked(server, endpoint):
    server.script = [Say(headers={"Content-Encoding": "gzip"}, body=b"\x1f\x8b\x08\x00")]
    with pytest.raises(NoReply, match="sent a packed reply, which was not asked for"):
        endpoint().ask(MESSAGES)
    endpoint().ask(MESSAGES)
    assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}


@pytest.mark.parametrize("status", (301, 302, 303, 307, 308))
def test_a_redirect_is_not_followed_and_no_reply(status, server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = json.dumps(COMPLETION).encode()
    with ScriptedServer() as other:
        where = f"{other.url}/{KEY}"
        server.script = [Say(status=status, headers={"Location": where}, body=body)]
        with pytest.raises(EndpointError, match=f"answered {status} and sends on to http") as told:
            endpoint().ask(MESSAGES)
        assert not isinstance(told.value, NoReply)  # so it would be with all the others
        assert (len(server.requests), other.requests) == (1, [])
    assert "[OPENAI_API_KEY]" in str(told.value)
    assert KEY not in str(told.value)


@pytest.mark.parametrize(
    "say",
    [
        Say(text=f"Score of A: {KEY}"),
        Say(text=f"In other letters: {KEY.upper()} and {KEY.lower()}"),
        Say(finish_reason=KEY),
    ],
    ids=("text", "case", "finish_reason"),
)
def test_the_key_comes_back_from_nowhere(say, server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = [say]
    reply = endpoint().ask(MESSAGES)
    shown = f"{reply.text} {reply.finish_reason}"
    assert "[OPENAI_API_KEY]" in shown
    assert KEY.lower() not in shown.lower()


def test_half_a_sign_is_replaced(server, endpoint):
    content = '{"choices": [{"finish_reason": "\\udfff", "message": {"content": "a\\ud800b"}}]}'
    server.script = [Say(body=content.encode())]
    reply = endpoint().ask([{"role": "user", "content": "a\udc80"}])
    assert reply.text == "a\ufffdb"
    reply.finish_reason.encode()
    assert server.requests[0].prompt == "a\ufffd"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices": [{"message": {"content": ["a"]}}]}',
        b'{"choices": [{"message": {"content": {"a": 1}}}]}',
        b'{"choices": [{"message": "a"}]}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": {"content": ' + b"9" * 5000 + b"}}]}",
        b"\xff\xfe",
        b"null",
        b"NaN",
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_what_is_no_completion_is_no_reply(body, server, endpoint, waits):
    server.script = [Say(body=body)]
    with pytest.raises(NoReply, match="not with a chat completion"):
        endpoint().ask(MESSAGES)
    assert waits == []


@pytest.mark.parametrize("header", ("9" * 400, "Thu, 01 Jan 99999 00:00:00 GMT", "1e400", "\xff"))
def test_a_wait_of_any_length_is_read(header, server, endpoint, waits):
    server.script = [error(429, Retry_After=header)]
    try:
        assert endpoint().ask(MESSAGES).text
    except EndpointError as told:
        assert "asks to wait" in str(told)


def test_words_of_a_server_are_shown_without_what_a_terminal_obeys(server, endpoint):
    told = []
    server.script = [error(429, "slow \x1b]0;gone\x07 down \x9b2J", Retry_After=0)]
    endpoint(on_wait=told.append).ask(MESSAGES)
    assert told[0].isprintable() and "slow" in told[0] and "down" in told[0]


def test_a_connection_that_ends_early_is_tried_again(server, endpoint, waits):
    server.script = [Say(headers={"Content-Length": "9"})]
    assert endpoint().ask(MESSAGES).text
    assert len(waits) <= 1
