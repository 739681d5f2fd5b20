"""Fuzz the readers of strangers' files: a million inputs of each, or as many as ten minutes give.

Run: python experiments/fuzz.py [--seconds S] [--inputs N] [TARGET ...]  (`pip install atheris`)

atheris (libFuzzer) chooses bytes by what the code does with them; `tests/hostile/inputs.py` makes a
file of them, and `tests/hostile/readers.py` says what readers may do. What was found goes into
`--corpus`, from which a next run goes on; a part of it is kept in `tests/hostile/corpus`, which
`make test` reads. Numbers go to experiments/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

RESULTS = ROOT / "experiments" / "results" / "fuzz.json"
KEPT = ROOT / "tests" / "hostile" / "corpus"
TARGETS = ("allocation.json", "adapter_config.json", "settings", "task-rows")

ONE = "--one"
"""Comes first where a process is to fuzz a target, with libFuzzer's own options behind it."""

LONGEST_INPUT_S = 5
"""An input that takes longer hangs."""

MOST_MEMORY_MB = 2048

LONGEST_INPUT = 64
"""Bytes; each change takes some eight."""

MOST_KEPT = 40
"""Inputs of a target that stay in the repository."""

_DONE = re.compile(r"Done (\d+) runs in (\d+) second")


def main() -> None:
    """Fuzz every target in a process of its own, and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="longest time of a target [600]")
    parser.add_argument("--inputs", type=int, default=10**6, help="inputs of a target [1,000,000]")
    parser.add_argument("--corpus", type=Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    data: dict[str, Any] = {"targets": {}}
    if args.json.is_file():
        data = json.loads(args.json.read_text())
    for name in args.targets or TARGETS:
        found = _fuzzed(name, args)
        before = data["targets"].get(name, {})
        going_on = before.get("atheris") == found["atheris"] and not before.get("faults")
        for what in ("inputs", "seconds"):
            found[f"{what}_all"] = found[what] + (before.get(f"{what}_all", 0) if going_on else 0)
        data["targets"][name] = found
        args.json.write_text(json.dumps(data, indent=1) + "\n")
        sys.stdout.write(f"{name}: {found['inputs']:,} inputs, {len(found['faults'])} faults\n")
        sys.stdout.flush()
    sys.exit(any(found["faults"] for found in data["targets"].values()))


def _fuzzed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    corpus = args.corpus / name
    corpus.mkdir(parents=True, exist_ok=True)
    for path in (KEPT / name).glob("*"):  # libFuzzer lets those go that shorter ones stand for
        shutil.copy(path, corpus / path.name)
    faults = args.corpus / "faults" / name
    faults.mkdir(parents=True, exist_ok=True)
    words = [
        *(sys.executable, __file__, ONE, name, str(corpus), f"-runs={args.inputs}"),
        *(f"-max_total_time={args.seconds}", f"-timeout={LONGEST_INPUT_S}"),
        *(f"-rss_limit_mb={MOST_MEMORY_MB}", f"-max_len={LONGEST_INPUT}"),
        "-len_control=0",  # changes go deeper the longer an input is
        *(f"-artifact_prefix={faults}/", "-print_final_stats=1"),
    ]
    log = args.corpus / f"{name}.log"
    with log.open("w") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    done = _DONE.findall(text)
    ran = int(done[-1][0]) if done else int((re.findall(r"#(\d+)\t", text) or [0])[-1])
    left = [path.name for path in sorted(faults.iterdir())]
    found = {
        "command": "python experiments/fuzz.py",
        "atheris": version("atheris"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, one core",
        "inputs": ran,
        "seconds": int(done[-1][1]) if done else 0,
        "corpus": len(list(corpus.iterdir())),
        "faults": left or ([log.name] if code else []),
    }
    if not found["faults"]:
        _keep(name, corpus)
    return found


def _keep(name: str, corpus: Path) -> None:
    """Let the repository have inputs that go different ways, short ones and long ones."""
    shutil.rmtree(KEPT / name, ignore_errors=True)
    (KEPT / name).mkdir(parents=True)
    every = sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in every[:: math.ceil(len(every) / MOST_KEPT) or 1]:
        shutil.copy(path, KEPT / name / path.name[:12])


def _fuzz(name: str, words: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["loralloc"]):
        from hostile.readers import fuzzed, hasten

    hasten()
    folder = Path(tempfile.mkdtemp(prefix="loralloc-fuzz-", dir=_memory()))

    def one(data: bytes) -> None:
        fuzzed(name, data, folder)

    atheris.Setup([sys.argv[0], *words], one)
    atheris.Fuzz()


def _memory() -> str | None:
    """Where files lie in memory, on systems that have such a place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        _fuzz(sys.argv[2], sys.argv[3:])
    else:
        main()
