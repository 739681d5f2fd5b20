"""A real server that speaks OpenAI's protocol, with a real model behind it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from loralloc.evaluation.judge.contestants import Contestant
from loralloc.evaluation.judge.endpoint import Endpoint, EndpointError
from loralloc.evaluation.judge.questions import Question
from loralloc.evaluation.judge.replies import ReplyCache
from loralloc.evaluation.judge.review import Judge
from loralloc.runs.models import is_cached, locate

READY_S = 300
"""Longest wait for the server, and for a reply: a busy machine is not a broken one."""


@contextmanager
def served(folder: str, log: Path):
    """`transformers serve` with one model, ended with the block whatever happens in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Path(sys.executable).with_name("transformers")
    words = [serve, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        server = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        end = time.monotonic() + READY_S
        while not _is_up(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except urllib.error.URLError:
        return False


@pytest.mark.slow
@pytest.mark.reliability
def test_a_model_served_by_transformers_judges(tmp_path, monkeypatch):
    if not is_cached("smollm2-135m"):
        pytest.skip("smollm2-135m is not cached; `loralloc demo` fetches it")
    pytest.importorskip("fastapi", reason="needs `pip install transformers[serving]`")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = locate("smollm2-135m")
    question = Question(number=1, turns=("Name a fruit.", "Another."))
    good, bad = (
        Contestant(name=name, source=tmp_path, answers={1: answers})
        for name, answers in (("good", ("An apple.", "A pear.")), ("bad", ("A car.", "")))
    )
    with served(folder, tmp_path / "server.log") as url:
        options = {"max_tokens": 24, "timeout_s": READY_S}
        judge = Judge(Endpoint(url, model=folder, **options), ReplyCache(tmp_path / "replies"))
        result = judge.compare(good, bad, [question])
        (comparison,) = result.comparisons
        for review in (comparison.first_shown_first, comparison.second_shown_first):
            # So small a model seldom keeps to the form; it must not be read as if it had.
            assert review.text
            assert (review.scores is None) == (review.missing is not None)
        assert 2 <= judge.num_asked <= 4
        again = Judge(Endpoint(url, model=folder, **options), ReplyCache(tmp_path / "replies"))
        assert again.compare(good, bad, [question]) == result
        assert again.num_asked == 0
        with pytest.raises(EndpointError, match=r"answered 400 .*Server is pinned to"):
            Endpoint(url, model="another", timeout_s=READY_S).ask(
                [{"role": "user", "content": "a"}]
            )
