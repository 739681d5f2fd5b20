"""The predictions of one evaluation on disk: written as they come, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralloc.allocation.files import read_json, refuse_links, write_text

EVAL_NAME = "eval.json"
PREDICTIONS_NAME = "predictions.jsonl"


class Predictions:
    """A folder with `eval.json` and `predictions.jsonl`.

    The first is written before the first prediction: its `settings` say what the predictions in the
    second are of. The second has one line an example, batch by batch as they come; `finish` puts
    them into the examples' order.

    Args:
        folder: Where they are, or will be.
        settings: All that a prediction depends on but the prompt, as JSON has it.
        prompts: What the model is given, of each example.
        gold: The right answer, or all of them.
        score: Scores the prediction of an index.
        replaces: Whether what is in the folder goes, once there is a first prediction.

    Raises:
        ValueError: If the folder holds predictions of something else, or of more examples.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        prompts: Sequence[str],
        gold: Sequence[str | list[str]],
        score: Callable[[int, str], float | None],
        replaces: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.before: dict[str, Any] = {}
        """What `eval.json` said of an earlier call."""
        self._prompts = prompts
        self._gold = gold
        self._score = score
        self._replaces = replaces
        self._lines: dict[int, dict[str, Any]] = {}
        refuse_links([folder, folder / EVAL_NAME, folder / PREDICTIONS_NAME])
        if (folder / EVAL_NAME).exists() and not replaces:
            self.before = read_json(folder / EVAL_NAME)
            self._check_settings()
            self._read()

    @property
    def done(self) -> set[int]:
        """Indices of the examples that have a prediction."""
        return set(self._lines)

    @property
    def texts(self) -> list[str]:
        """All predictions in the order of the examples, once every example has one."""
        return [self._lines[i]["prediction"] for i in range(len(self._prompts))]

    @property
    def num_truncated(self) -> int:
        """Examples whose prompt was cut at its beginning."""
        return sum(line.get("truncated", False) for line in self._lines.values())

    def add(self, indices: Sequence[int], texts: Sequence[str], truncated: set[int]) -> None:
        """Append the predictions of a batch, whole or not at all."""
        if self._replaces:
            _clear(self.folder)
            self._replaces = False
        if not (self.folder / EVAL_NAME).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / EVAL_NAME, {"settings": self.settings, "figures": None})
        new = {
            i: self._line(i, text, i in truncated) for i, text in zip(indices, texts, strict=True)
        }
        with (self.folder / PREDICTIONS_NAME).open("a", encoding="utf-8") as file:
            file.write("".join(map(_as_line, new.values())))
        self._lines |= new

    def finish(self, result: Mapping[str, Any]) -> None:
        """Put the predictions in order, and write the result beside its settings."""
        ordered = [self._lines[i] for i in range(len(self._prompts))]
        write_text(self.folder / PREDICTIONS_NAME, "".join(map(_as_line, ordered)))
        _write_json(self.folder / EVAL_NAME, {"settings": self.settings, **result})

    def _line(self, index: int, text: str, truncated: bool) -> dict[str, Any]:
        line = {
            "index": index,
            "prompt": self._prompts[index],
            "gold": self._gold[index],
            "prediction": text,
            "score": self._score(index, text),
        }
        return {**line, "truncated": True} if truncated else line

    def _check_settings(self) -> None:
        old = self.before.get("settings")
        if not isinstance(old, dict):
            raise ValueError(f"{self.folder} holds the evaluation of a run without a task; {_MEND}")
        names = [
            name for name in {**old, **self.settings} if old.get(name) != self.settings.get(name)
        ]
        if names:
            name = names[0]
            raise ValueError(
                f"{self.folder} holds predictions with {name} {old.get(name)!r}, and {name} is "
                f"{self.settings.get(name)!r} now; {_MEND}"
            )

    def _read(self) -> None:
        """Read what an earlier call predicted; a last line that is cut short is dropped."""
        path = self.folder / PREDICTIONS_NAME
        found = path.read_bytes() if path.exists() else b""
        kept = found[: found.rfind(b"\n") + 1]  # a kill may have cut a letter, too
        try:
            whole = kept.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; {_MEND}") from error
        if kept != found:
            write_text(path, whole)
        for number, row in enumerate(whole.split("\n")[:-1], start=1):  # texts may have others
            line = self._parsed(row, number)
            index = line["index"]
            if index >= len(self._prompts):
                raise ValueError(
                    f"{self.folder} holds predictions of more than the {len(self._prompts)} "
                    f"examples asked for; raise `--limit`, or {_MEND}"
                )
            if (line["prompt"], line["gold"]) != (self._prompts[index], self._gold[index]):
                raise ValueError(
                    f"{self.folder} holds predictions of other data, which differs first in "
                    f"example {index + 1}; {_MEND}"
                )
            self._lines[index] = line

    def _parsed(self, row: str, number: int) -> dict[str, Any]:
        try:
            line: dict[str, Any] = json.loads(row)
            texts = line["prompt"], line["gold"], line["prediction"]
            if all(isinstance(text, str | list) for text in texts) and line["index"] >= 0:
                return line
            raise TypeError("it has other kinds of values")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"Line {number} of {self.folder / PREDICTIONS_NAME} is no prediction "
                f"({error!s:.100}); {_MEND}"
            ) from error


_MEND = "replace them with `--overwrite`, or name another `--output_dir`."


def _clear(folder: Path) -> None:
    """Remove an earlier evaluation from a folder, and nothing else."""
    for name in (EVAL_NAME, PREDICTIONS_NAME):
        (folder / name).unlink(missing_ok=True)


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
