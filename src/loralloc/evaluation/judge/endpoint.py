"""Asking a model behind an OpenAI-compatible endpoint, patiently but not for ever.

What is at the address is not trusted: a reply may be endless, slow, elsewhere, or about the key.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from loralloc.evaluation.judge.replies import Reply

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"
"""Sent where no key is set: servers of one's own want none, but the protocol has the header."""

SHORTEST_SECRET = 8
"""Characters; a shorter key ("EMPTY") is a placeholder that may as well be a word of a reply."""

MAX_TRIES = 6
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 300.0
"""A server that asks for more than this is not waited for."""

RETRIED = (408, 409, 429)
"""Refusals that pass; so do all of 500 and above."""

MOST_BYTES = 2**22
"""A reply with its envelope that is longer is none; 1,024 tokens are some 5 KB."""

LONGEST_REASON = 40
"""Characters of a finish_reason; the protocol's own have at most 14."""

NOT_REACHED = ("ConnectError", "ProxyError", "UnsupportedProtocol")
"""The errors of httpx, by name since the library has two of it, before anything was sent."""

_HALF_SIGN = re.compile("[\ud800-\udfff]")
"""Half of a sign of UTF-16, which JSON can name and no file can hold."""


class EndpointError(RuntimeError):
    """The endpoint gives no replies, in a sentence; replies so far are kept."""


class NoReply(EndpointError):
    """There is no reply to this request, in a sentence; there may be to another."""


class Endpoint:
    """A chat model at an address. The key is read from the environment and held nowhere else."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        timeout_s: float = 120.0,
        on_wait: Callable[[str], object] | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Name the model; nothing is sent yet.

        Args:
            base_url: The address up to and with "/v1".
            model: The model's name there.
            temperature: 0 for the likeliest reply.
            max_tokens: Most tokens of a reply.
            timeout_s: Longest time of one request, from its first byte to the reply's last.
            on_wait: Called before each wait with what happened and how long it will take.
            sleep: What waits.

        Raises:
            ValueError: If an argument cannot be used.
        """
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"`base_url` is {base_url!r}; it must be an address such as "
                "'https://api.openai.com/v1' or 'http://localhost:8000/v1'."
            )
        if "@" in address.netloc or address.query:
            raise ValueError(
                f"`base_url` must hold no password and no '?': it is written down with the "
                f"results; give the key in the environment variable {KEY_VARIABLE}."
            )
        if max_tokens < 1 or not timeout_s > 0 or not temperature >= 0:
            raise ValueError(
                f"`max_tokens` is {max_tokens}, `timeout` {timeout_s} and `temperature` "
                f"{temperature}; the first must be at least 1, the second above 0 and the third "
                "at least 0."
            )
        self.base_url, self.model = base_url, model
        self._options = {"temperature": temperature, "max_completion_tokens": max_tokens}
        self._timeout_s, self._on_wait, self._sleep = timeout_s, on_wait, sleep
        self._key = os.environ.get(KEY_VARIABLE, "").strip() or NO_KEY
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                f"{KEY_VARIABLE} holds signs that no key has; set the environment variable anew."
            )

    def as_data(self) -> dict[str, object]:
        """Who is asked, and how."""
        return {"base_url": self.base_url, "model": self.model, **self._options}

    def request(self, messages: Sequence[dict[str, str]]) -> dict[str, object]:
        """All that a reply depends on."""
        written = [{name: _whole(text) for name, text in m.items()} for m in messages]
        return {**self.as_data(), "messages": written}

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Send the messages; try again where that can help.

        Time-outs, lost connections and refusals that pass are tried `MAX_TRIES` times, with waits
        of 1, 2, 4, ... seconds or what the server's Retry-After says.

        Raises:
            NoReply: There is none to these messages; one sentence.
            EndpointError: There is no reply to be had to any.
        """
        for num_waits in range(MAX_TRIES):
            try:
                return self._send(messages)
            except _Passing as passing:
                problem = f"The judge at {self.base_url} {passing.problem}"
                wait_s, reached = passing.wait_s, passing.reached
            if wait_s is None:
                wait_s = FIRST_WAIT_S * 2**num_waits
            if wait_s > LONGEST_WAIT_S:
                raise EndpointError(
                    f"{problem} and asks to wait {wait_s:.0f} s; run the same command again then, "
                    "what was judged so far is kept."
                )
            if num_waits < MAX_TRIES - 1:
                if self._on_wait:
                    self._on_wait(f"{problem}; next try in {wait_s:.0f} s")
                self._sleep(wait_s)
        raise (NoReply if reached else EndpointError)(
            f"{problem}, {MAX_TRIES} times; run the same command again when it answers, what was "
            "judged so far is kept."
        )

    def _send(self, messages: Sequence[dict[str, str]]) -> Reply:
        import openai

        # The client's own retries cannot be told how to wait, nor explain why they gave up. A
        # redirect would take the conversation, and the key, to wherever it says. What is packed
        # could be unpacked into any size.
        http = openai.DefaultHttpxClient(
            follow_redirects=False,
            timeout=self._timeout_s,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [_bounded]},
        )
        client = openai.OpenAI(
            api_key=self._key, base_url=self.base_url, max_retries=0, http_client=http
        )
        chat: Any = client.chat.completions
        asked = {k: v for k, v in self.request(messages).items() if k != "base_url"}
        try:
            completion = _within(self._timeout_s, lambda: chat.create(**asked))
            choice = completion.choices[0]
            text, reason = choice.message.content or "", str(choice.finish_reason or "stop")
            if not isinstance(text, str):
                raise TypeError
        # The library's errors may quote the key: none is passed on, not even as a cause.
        except (TimeoutError, openai.APITimeoutError):
            raise _Passing(f"gave no reply within {self._timeout_s:g} s (`--timeout`)") from None
        except (_NotRead, _SentOn, openai.APIConnectionError) as error:
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            if isinstance(cause, _SentOn):
                raise self._elsewhere(cause) from None
            if isinstance(cause, _NotRead):
                raise NoReply(f"The judge at {self.base_url} {cause}.") from None
            reached = type(cause).__name__ not in NOT_REACHED
            what = "ended the connection before its reply" if reached else "cannot be reached"
            raise _Passing(what, reached=reached) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except (AttributeError, TypeError, IndexError, KeyError, ValueError, RecursionError):
            raise NoReply(
                f"{self.base_url} answered, but not with a chat completion; does an "
                "OpenAI-compatible server listen there, and does the address end in /v1?"
            ) from None
        finally:
            client.close()
        reason = _shortened(self._safe(reason))[:LONGEST_REASON]
        return Reply(text=self._safe(text), finish_reason=reason)

    def _elsewhere(self, sent_on: _SentOn) -> Exception:
        place = _shortened(self._safe(sent_on.place))
        return EndpointError(
            f"The judge at {self.base_url} answered {sent_on.status} and sends on to {place}, "
            "where neither the key nor the answers were sent; give that address as `--base_url` "
            "if it is meant."
        )

    def _refusal(self, error: Any) -> Exception:
        status, said = error.status_code, _shortened(self._safe(_message(error)))
        at = f"The judge at {self.base_url} answered {status}"
        # A spent budget comes as 429, which elsewhere means "later".
        spent = error.code == "insufficient_quota"
        if (status in RETRIED or status >= 500) and not spent:
            header = error.response.headers.get("retry-after")
            return _Passing(f"answered {status} ({said})", wait_s=_seconds(header))
        if status in (401, 403):
            how = f"set the environment variable {KEY_VARIABLE} to a key that it accepts."
        elif status == 404:
            how = f"is {self.model!r} a model there, and does the address end in /v1?"
        else:
            how = "the request will not be repeated."
        every = spent or status in (401, 403, 404)
        return (EndpointError if every else NoReply)(f"{at} ({said}); {how}")

    def _safe(self, text: str) -> str:
        """What a server said, as it may be stored and shown."""
        if len(self._key) >= SHORTEST_SECRET:
            text = re.sub(re.escape(self._key), f"[{KEY_VARIABLE}]", text, flags=re.IGNORECASE)
        return _whole(text)


class _Passing(Exception):
    """A failure that another try may mend."""

    def __init__(self, problem: str, *, wait_s: float | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.problem, self.wait_s, self.reached = problem, wait_s, reached


class _NotRead(Exception):
    """A reply too long, or packed: no more of it is read."""


class _SentOn(Exception):
    """A redirect, which not every version of the library takes for a refusal."""

    def __init__(self, status: int, place: str) -> None:
        super().__init__()
        self.status, self.place = status, place


def _bounded(response: Any) -> None:
    """Let no more of a response be read than a reply can have."""
    if 300 <= response.status_code < 400:
        raise _SentOn(response.status_code, response.headers.get("location", ""))
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _NotRead("sent a packed reply, which was not asked for")
    read = response.iter_raw

    def iter_raw(chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for part in read(chunk_size):
            size += len(part)
            if size > MOST_BYTES:
                raise _NotRead(f"sent more than {MOST_BYTES:,} bytes, which no reply has")
            yield part

    response.iter_raw = iter_raw


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call gives, if it does so in time: libraries bound each read, which may be a byte.

    Raises:
        TimeoutError: It has not ended; its thread goes with its connection.
    """
    came: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            came.append((call(), None))
        except BaseException as error:
            came.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not came:
        raise TimeoutError
    value, error = came[0]
    if error is not None:
        raise error
    return value


def _whole(text: str) -> str:
    return _HALF_SIGN.sub("\ufffd", text)


def _message(error: Any) -> str:
    """What the server said, wherever it put it."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or body.get("detail") or body.get("error") or error.body or "")


def _shortened(text: str) -> str:
    """A server's words in a sentence of ours, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(line.split()).rstrip(".")[:200] or "without a word"


def _seconds(header: str | None) -> float | None:
    """A Retry-After: seconds, or a date; None where it is absent or neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return None if math.isnan(seconds) else max(seconds, 0.0)
