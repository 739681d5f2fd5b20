"""The judge's replies on disk, by the content of what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from loralloc.allocation.files import read_json, write_text


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the judge said."""

    text: str
    """Its words."""

    finish_reason: str
    """Why it stopped, as the endpoint tells: "stop", "length", ..."""


class ReplyCache:
    """One file a reply, named by the hash of the request; a request equal in all is free."""

    def __init__(self, folder: Path) -> None:
        """Keep replies in `folder`, which is made with the first one."""
        self._folder = folder

    def get(self, request: Mapping[str, object]) -> Reply | None:
        """The reply to an equal request; None if there was none.

        Raises:
            ValueError: The file that should hold it does not.
        """
        path = self._path(request)
        if not path.is_file():
            return None
        try:
            reply = Reply(**read_json(path)["reply"])
            if not (isinstance(reply.text, str) and isinstance(reply.finish_reason, str)):
                raise TypeError
            return reply
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no reply of the judge; remove it.") from error

    def put(self, request: Mapping[str, object], reply: Reply) -> None:
        """Keep a reply together with what was asked."""
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"request": request, "reply": asdict(reply)}
        write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def _path(self, request: Mapping[str, object]) -> Path:
        content = json.dumps(request, sort_keys=True).encode()
        return self._folder / f"{hashlib.sha256(content).hexdigest()}.json"
