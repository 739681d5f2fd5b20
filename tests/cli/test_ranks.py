import argparse
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from loralloc.cli import ranks


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the verb prints."""
    stream = io.StringIO()
    monkeypatch.setattr(ranks, "Console", lambda: Console(file=stream, width=80))
    return stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two rounds."""
    states = [{"h.0.q": 8, "h.0.v": 8}, {"h.0.q": 5, "h.0.v": 11}, {"h.0.q": 0, "h.0.v": 16}]
    added = [{"h.0.v": 3}, {"h.0.v": 5}]
    rounds = [
        {"round": i, "ranks_after": state, "added": given}
        for i, (state, given) in enumerate(zip(states[1:], added, strict=True), start=1)
    ]
    data = {"version": 1, "config": {}, "initial_ranks": states[0], "rounds": rounds}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "allocation.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def call(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    ranks.add_parser(parser.add_subparsers())
    args = parser.parse_args(["ranks", *map(str, words)])
    return int(args.run(args))


def test_the_last_round_is_shown(screen: io.StringIO, folder: Path) -> None:
    assert call(folder) == 0
    shown = screen.getvalue()
    assert "after round 2 of 2" in shown
    assert "0 -8" in shown and "16 +8" in shown
    assert "16 ranks at the start, 16 now; modules: 1 gained, 1 lost (1 emptied)" in shown


def test_an_earlier_round_is_shown(screen: io.StringIO, folder: Path) -> None:
    assert call(folder, "--round", "1") == 0
    assert "5 -3" in screen.getvalue() and "16 +8" not in screen.getvalue()


def test_what_no_round_has_scored_can_be_left_out(screen: io.StringIO, folder: Path) -> None:
    assert call(folder, "--scored") == 0
    shown = " ".join(screen.getvalue().split())
    assert "after round 2 of 2 (every module started with 8), without the 5 that it gave" in shown
    assert "11 +3" in shown and "16 +8" not in shown
    assert "16 ranks at the start, 11 now and 5 that no round has scored yet; modules" in shown


def test_a_picture_is_drawn_and_named(screen: io.StringIO, folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / ("long" * 20) / "[red]ranks.png"
    picture.parent.mkdir()
    assert call(folder, "--png", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"picture: {picture}\n" in screen.getvalue()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--round", "3"], "Round 3 was asked for, but the run holds 2 rounds"),
        (["--round", "-1"], "Round -1 was asked for"),
        (["--png", "ranks.bmp"], "ranks.bmp ends in '.bmp'"),
        (["--png", "no/such/folder/ranks.png"], "does not exist; create it first"),
    ],
)
def test_bad_input_prints_nothing(
    screen: io.StringIO, folder: Path, flags: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        call(folder, *flags)
    assert screen.getvalue() == ""


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no allocation\.json"):
        call(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        call(tmp_path / "nothing")
