"""Asking a model behind an OpenAI-compatible endpoint, patiently but not for ever."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
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


class EndpointError(RuntimeError):
    """The endpoint gave no reply, in a sentence; replies so far are kept."""


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
            timeout_s: Longest wait for one reply.
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
        if max_tokens < 1 or timeout_s <= 0 or temperature < 0:
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
        return {**self.as_data(), "messages": list(messages)}

    def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Send the messages; try again where that can help.

        Time-outs, lost connections and refusals that pass are tried `MAX_TRIES` times, with waits
        of 1, 2, 4, ... seconds or what the server's Retry-After says.

        Raises:
            EndpointError: There is no reply to be had; one sentence.
        """
        for num_waits in range(MAX_TRIES):
            try:
                return self._send(messages)
            except _Passing as passing:
                problem = f"The judge at {self.base_url} {passing.problem}"
                wait_s = passing.wait_s
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
        raise EndpointError(
            f"{problem}, {MAX_TRIES} times; run the same command again when it answers, what was "
            "judged so far is kept."
        )

    def _send(self, messages: Sequence[dict[str, str]]) -> Reply:
        import openai

        try:
            # The client's own retries cannot be told how to wait, nor explain why they gave up.
            with openai.OpenAI(
                api_key=self._key,
                base_url=self.base_url,
                timeout=self._timeout_s,
                max_retries=0,
            ) as client:
                chat: Any = client.chat.completions
                completion = chat.create(model=self.model, messages=list(messages), **self._options)
            choice = completion.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason or "stop"
        # The library's errors may quote the key: none is passed on, not even as a cause.
        except openai.APITimeoutError:
            raise _Passing(f"gave no reply within {self._timeout_s:g} s (`--timeout`)") from None
        except openai.APIConnectionError:
            raise _Passing("cannot be reached") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except (AttributeError, TypeError, IndexError, ValueError):
            raise EndpointError(
                f"{self.base_url} answered, but not with a chat completion; does an "
                "OpenAI-compatible server listen there, and does the address end in /v1?"
            ) from None
        return Reply(text=self._without_key(text), finish_reason=str(reason))

    def _refusal(self, error: Any) -> Exception:
        status, said = error.status_code, _shortened(self._without_key(_message(error)))
        # A spent budget comes as 429, which elsewhere means "later".
        if (status in RETRIED or status >= 500) and error.code != "insufficient_quota":
            header = error.response.headers.get("retry-after")
            return _Passing(f"answered {status} ({said})", wait_s=_seconds(header))
        if status in (401, 403):
            how = f"set the environment variable {KEY_VARIABLE} to a key that it accepts."
        elif status == 404:
            how = f"is {self.model!r} a model there, and does the address end in /v1?"
        else:
            how = "the request will not be repeated."
        return EndpointError(f"The judge at {self.base_url} answered {status} ({said}); {how}")

    def _without_key(self, text: str) -> str:
        is_secret = len(self._key) >= SHORTEST_SECRET
        return text.replace(self._key, f"[{KEY_VARIABLE}]") if is_secret else text


class _Passing(Exception):
    """A failure that another try may mend."""

    def __init__(self, problem: str, *, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.problem, self.wait_s = problem, wait_s


def _message(error: Any) -> str:
    """What the server said, wherever it put it."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or body.get("detail") or body.get("error") or error.body or "")


def _shortened(text: str) -> str:
    return " ".join(text.split()).rstrip(".")[:200] or "without a word"


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
