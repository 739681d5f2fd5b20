"""A chat endpoint on localhost that says what a test wants it to say."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_S = 30


@dataclass(frozen=True, kw_only=True)
class Say:
    """One response."""

    text: str = "Review of A: fine.\nReview of B: fine.\nScore of A: 7\nScore of B: 5"
    finish_reason: str = "stop"
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes | None = None
    """In place of a chat completion with the text."""
    hangs: bool = False
    """No response until the server is closed."""


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict
    body: dict

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"]


def error(status: int, message: str = "no", *, code: str | None = None, **headers) -> Say:
    """A refusal as OpenAI words it."""
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return Say(status=status, headers=named, body=body)


def scores(a: float, b: float) -> Say:
    return Say(text=f"Review of A: so.\nReview of B: so.\nScore of A: {a:g}\nScore of B: {b:g}")


class ScriptedServer:
    """Says the lines of `script` in turn, then what `otherwise` makes of a request."""

    def __init__(self) -> None:
        self.script: list[Say] = []
        self.otherwise: Callable[[Request], Say] = lambda request: Say()
        self.requests: list[Request] = []
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _next(self, request: Request) -> Say:
        self.requests.append(request)
        return self.script.pop(0) if self.script else self.otherwise(request)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                say = server._next(Request(self.path, headers, json.loads(content)))
                if say.hangs:
                    server._closing.wait(HANG_S)
                    return
                choice = {
                    "index": 0,
                    "finish_reason": say.finish_reason,
                    "message": {"role": "assistant", "content": say.text},
                }
                completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                body = say.body or json.dumps({**completion, "choices": [choice]}).encode()
                self.send_response(say.status)
                headers = {"Content-Type": "application/json", **say.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        return Handler
