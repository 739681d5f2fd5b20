import argparse
import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from loralloc.cli import env
from loralloc.runs import machine


def report(monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(env, "Console", lambda: Console(file=stream, width=80))
    parser = argparse.ArgumentParser()
    env.add_parser(parser.add_subparsers())
    args = parser.parse_args(["env", *flags])
    args.wait_policy = "passive"
    assert args.run(args) == 0
    return stream.getvalue()


def report_data(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return json.loads(report(monkeypatch, "--json"))


def test_versions_and_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = report_data(monkeypatch)
    for package in ("torch", "transformers", "peft", "trl", "accelerate", "datasets"):
        assert data[package] == version(package)
    assert data["python"] == ".".join(map(str, sys.version_info[:3]))
    assert data["torch_threads"] == torch.get_num_threads()
    assert data["bf16_arithmetic_on_this_cpu"] is machine.cpu_has_bf16()
    assert not [name for name, value in data.items() if "not known" in str(value)]


def test_the_table_has_every_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(env, "_cpu_model", lambda: "[bold]Model T[/bold]")
    lines = report(monkeypatch).splitlines()
    assert next(line for line in lines if line.startswith("torch ")).split()[1] == version("torch")
    assert next(line for line in lines if line.startswith("bf16")).split()[-1] == "yes"
    assert next(line for line in lines if line.startswith("CPU ")).split()[1] == "[bold]Model"
    assert all(any(line.startswith(name) for line in lines) for name in env.facts(wait_policy=""))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package-of-ours",))
    assert report_data(monkeypatch)["no-such-package-of-ours"] == "not installed"


def test_a_broken_installation_is_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` fails
    data = report_data(monkeypatch)
    assert data["torch_threads"].startswith("not known (ModuleNotFoundError: ")
    assert data["gpus"].startswith("not known (ModuleNotFoundError: ")
    assert data["peft"] == version("peft")


def test_cores_are_counted_once_for_all_their_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cores = [(socket, core) for socket in (0, 1) for core in (0, 1, 2) for _thread in (0, 1)]
    blocks = [
        f"processor\t: {i}\nmodel name\t: Sum: 2\nphysical id\t: {socket}\ncore id\t\t: {core}\n"
        for i, (socket, core) in enumerate(cores)
    ]
    listing = tmp_path / "cpuinfo"
    listing.write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", listing)
    data = report_data(monkeypatch)
    assert (data["cpu"], data["physical_cores"]) == ("Sum: 2", 6)


def test_without_linux_torch_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 10}, raising=False
    )
    data = report_data(monkeypatch)
    assert (data["cpu"], data["physical_cores"]) == ("arm", 10)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.6
    assert report_data(monkeypatch)["physical_cores"] is None
    assert "not known" in report(monkeypatch)


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(name="GPU A", total_memory=80 * 2**30)] * 2
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    assert report_data(monkeypatch)["gpus"] == ["GPU A (80 GiB)"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report_data(monkeypatch)["gpus"] == []


@pytest.mark.parametrize(
    ("hub", "transformers", "offline"),
    [("", "", False), ("1", "", True), ("true", "", True), ("", "1", True), ("0", "1", False)],
)
def test_offline_is_what_the_hub_client_reads(
    monkeypatch: pytest.MonkeyPatch, hub: str, transformers: str, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", hub)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", transformers)
    assert report_data(monkeypatch)["hub_offline"] is offline


def test_the_cache_is_told_without_the_name_of_its_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("LORALLOC_CACHE", str(tmp_path / "cache"))
    data = report_data(monkeypatch)
    assert data["model_cache"] == str(Path("~/cache/models"))
    assert data["built-in_models_cached"] == []
    cached = tmp_path / "cache" / "models" / "minilm-l6"
    cached.mkdir(parents=True)
    (cached / "config.json").touch()
    assert report_data(monkeypatch)["built-in_models_cached"] == ["minilm-l6"]


def test_no_large_package_but_torch_is_imported() -> None:
    script = """
import sys
from loralloc.cli import env
assert "torch" not in sys.modules
env.facts(wait_policy="")
assert not {"transformers", "peft", "trl", "datasets", "accelerate"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_wordnet_is_told_with_its_version_or_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    folder = tmp_path / "wordnet"
    folder.mkdir()
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    told = report_data(monkeypatch)["wordnet"]
    assert "`apt install wordnet-base`" in told
    assert told.endswith("METEOR is missing without it.")
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("  1 WordNet 7.5 Copyright 2026 by nobody.\n", "utf-8")
    assert report_data(monkeypatch)["wordnet"] == f"7.5 in {Path('~/wordnet')}"


MODULE = (sys.executable, "-m", "loralloc", "env", "--json")
SCRIPT = (str(Path(sys.executable).with_name("loralloc")), "env", "--json")
# What a benchmark imports after PyTorch takes seconds, and nothing is asked of it here.
BENCHMARK = (
    sys.executable,
    "-c",
    "import sys; sys.modules['loralloc.cli.progress'] = None\n"
    "try: import harness\n"
    "except ImportError: pass\n",
)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def in_a_fresh_process(command: tuple[str, ...], **variables: str) -> tuple[str, str]:
    """What a command prints, and how long OpenMP said that it spins when PyTorch loaded it."""
    free = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=BENCHMARKS,
        env={**free, "OMP_DISPLAY_ENV": "verbose", **variables},
    )
    # as GNU's runtime tells it, or LLVM's and Intel's
    spins = re.search(r"(?:GOMP_SPINCOUNT = |KMP_BLOCKTIME=)'(\w+)", done.stderr)
    assert spins, done.stderr
    return done.stdout, spins[1].removesuffix("ms")


def test_idle_threads_sleep_before_pytorch_could_let_them_spin() -> None:
    report, spins = in_a_fresh_process(SCRIPT)
    assert json.loads(report)["openmp_wait_policy"] == "passive (set by loralloc)"
    assert spins == "0"


def test_the_users_own_wait_policy_stays() -> None:
    report, spins = in_a_fresh_process(MODULE, OMP_WAIT_POLICY="ACTIVE")
    assert json.loads(report)["openmp_wait_policy"] == "active (from OMP_WAIT_POLICY)"
    assert spins != "0"


def test_idle_threads_sleep_in_benchmarks_too() -> None:
    assert in_a_fresh_process(BENCHMARK)[1] == "0"
