"""A judge that reads nothing: scores that follow from the length of a request, on this machine.

For trying an experiment where no judge is at hand. Its scores mean nothing.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "scripted"


@contextmanager
def scripted_judge() -> Iterator[str]:
    """Serve on localhost, and give the address up to "/v1"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply_to(request: bytes) -> str:
    """Two scores from 1 to 10 that depend on the request, and always the same."""
    number = zlib.crc32(request)
    first, second = 1 + number % 10, 1 + number // 10 % 10
    return (
        f"Review of A: not read.\nReview of B: not read.\nScore of A: {first}\nScore of B: {second}"
    )


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answer a chat completion."""
        request = self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": reply_to(request)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": NAME,
                "choices": [choice],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
