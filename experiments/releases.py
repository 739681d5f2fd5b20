"""What a release has to show: that it is built right, and with which versions the tests pass.

    python experiments/releases.py build                      # wheel, sdist, twine check
    python experiments/releases.py install PYTHON [EXTRA ...]  # the wheel, in a clean environment
    python experiments/releases.py suite NAME PYTHON           # all tests with an interpreter
    python experiments/releases.py suite --quick NAME PYTHON   # what `make test-quick` runs of them
    python experiments/releases.py again NAME PYTHON           # those that failed, once more

`suite` takes an interpreter whose environment has loralloc's requirements and the tests'; what it
prints goes to experiments/results/releases.json and from there into docs/support.md (`make pages`).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
RESULTS = ROOT / "experiments" / "results" / "releases.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")

VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps([platform.python_version(), {{p: version(p) for p in {PACKAGES}}}]))
"""
FIRST_CONTACT = """
import subprocess, sys, time
begin = time.perf_counter()
import loralloc
took = time.perf_counter() - begin
assert took < 0.3, took
from loralloc.cli import main
assert main([]) == 0
import loralloc.runs.run, loralloc.evaluation.evaluate, loralloc.experiments.sweep
import loralloc.runs.search, loralloc.runs.exporting, loralloc.runs.resizing, loralloc.adapters.lint
print(f"loralloc {loralloc.__version__} is imported in {took:.3f} s and its verbs are there")
"""
"""Everything that a plain installation has to bring, without an extra."""


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    verbs.add_parser("build").set_defaults(run=lambda args: build())
    verb = verbs.add_parser("install")
    verb.add_argument("python")
    verb.add_argument("extras", nargs="*")
    verb.set_defaults(run=lambda args: install(args.python, args.extras))
    verb = verbs.add_parser("suite")
    verb.add_argument("name")
    verb.add_argument("python")
    verb.add_argument("--quick", action="store_true", help="the quick selection of the tests")
    verb.add_argument("--note", default="", help="what is to be known of the run")
    verb.add_argument("--log", type=Path, help="what pytest printed already, in place of a run")
    verb.set_defaults(run=lambda args: suite(args))
    verb = verbs.add_parser("again")
    verb.add_argument("name")
    verb.add_argument("python")
    verb.set_defaults(run=lambda args: again(args.name, args.python))
    args = parser.parse_args()
    args.run(args)


def build() -> None:
    """Wheel and sdist, and that an index would take them."""
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.glob("loralloc-*"))


def install(python: str, extras: list[str]) -> None:
    """The newest wheel in an environment that holds nothing else, and what it then can do.

    By uv where it is there, which downloads nothing twice, else by pip.
    """
    wheel = max(DIST.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    constraints = ("-c", ROOT / "constraints.txt")
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "bin" / "python"
        if uv := shutil.which("uv"):
            run(uv, "venv", "-q", "--python", python, "--clear", folder)
            run(uv, "pip", "install", "-q", "--python", own, *constraints, wanted)
            run(uv, "pip", "check", "-q", "--python", own)
        else:
            run(python, "-m", "venv", folder)
            run(own, "-m", "pip", "install", "-q", *constraints, wanted)
            run(own, "-m", "pip", "check")
        run(own, "-c", FIRST_CONTACT, cwd=folder)
        run(Path(folder) / "bin" / "loralloc", "--version", cwd=folder)


def suite(args: argparse.Namespace) -> None:
    """The tests with an interpreter, and their figures into the results."""
    found = subprocess.run(
        [args.python, "-c", VERSIONS], capture_output=True, text=True, check=True
    )
    number, versions = json.loads(found.stdout)
    which = ("-m", "not slow", *(["--quick"] if args.quick else []))
    counts, failed = closing(args.log.read_text() if args.log else tests(args.python, *which))
    runs = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    runs[args.name] = {
        "python": number,
        "versions": versions,
        "tests": "quick" if args.quick else "all",
        **counts,
        "which_failed": failed,
        "note": args.note,
    }
    keep(runs)


def again(name: str, python: str) -> None:
    """The tests that failed, once more, after what they found was mended."""
    runs = json.loads(RESULTS.read_text())
    kept = runs[name]
    quick = ["--quick"] if kept["tests"] == "quick" else []
    counts, failed = closing(tests(python, *quick, *kept["which_failed"]))
    kept["run_again"] = kept.get("run_again", []) + kept["which_failed"]
    kept["passed"] += counts["passed"]
    kept["skipped"] += counts["skipped"]
    kept["failed"], kept["which_failed"] = counts["failed"], failed
    keep(runs)


def tests(python: str, *words: str) -> str:
    """What pytest prints."""
    path = os.pathsep.join(str(ROOT / place) for place in ("src", "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-n", "auto", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout


def closing(printed: str) -> tuple[dict[str, int], list[str]]:
    """What pytest counted, and the tests that failed."""
    last = printed.strip().splitlines()[-1]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed)", last)}
    if not found:
        sys.exit(f"pytest closed with: {last}")
    sys.stdout.write(f"{last}\n")
    counts = {word: found.get(word, 0) for word in ("passed", "skipped", "failed")}
    return counts, re.findall(r"^FAILED (\S+)", printed, re.MULTILINE)


def keep(runs: dict[str, object]) -> None:
    """Write the results."""
    RESULTS.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def run(*words: object, **options: object) -> None:
    """A command that has to succeed."""
    subprocess.run([str(word) for word in words], check=True, **options)


if __name__ == "__main__":
    main()
