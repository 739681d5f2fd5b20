"""What the documents show is executed: a document that is out of date fails here."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(name: str) -> list[list[str]]:
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line[:1] == [name]]


def test_the_readme_example_runs_and_its_adapter_opens_without_loralloc(
    llama_folder, write_rows, tmp_path, monkeypatch
):
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    rows = [{"prompt": f"the film {i} is", "completion": " good and warm"} for i in range(64)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "dev.jsonl", rows[:32])
    # A folder in the place of the hub's model: the text is run as it is printed.
    shutil.copytree(llama_folder, tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example, scope)
    losses = [e["loss"] for e in scope["trainer"].state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.3
    opened = (
        "import sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(llama_folder)!r})\n"
        "PeftModel.from_pretrained(base, 'adapter').merge_and_unload()\n"
        "assert 'loralloc' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", opened], check=True, cwd=tmp_path)


def test_the_guides_run_from_python_trains(llama_folder, write_rows, tmp_path, monkeypatch):
    shown = blocks(ROOT / "docs" / "guide.md", "python")
    (example,) = [block for block in shown if "loralloc.prepare(" in block]
    rows = [{"sentence": f"the film {i} is good", "label": i % 2} for i in range(64)]
    write_rows(tmp_path / "data" / "sst2" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "sst2" / "dev.jsonl", rows[:32])
    shutil.copytree(llama_folder, tmp_path / "models" / "smollm2-135m")
    monkeypatch.setenv("LORALLOC_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "runs" / "sst2-smollm2-135m" / "allocation.json").is_file()


@pytest.mark.parametrize("command", commands("loralloc"), ids=" ".join)
def test_every_command_shown_is_understood(command, monkeypatch, tmp_path):
    from loralloc.cli import _parser
    from loralloc.runs.settings import resolve

    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text((ROOT / "examples" / "sft.yaml").read_text())
    args, rest = _parser().parse_known_args(command[1:])
    if getattr(args, "takes_more_flags", False):
        resolve(rest, config=args.config)
    else:
        assert not rest


def test_every_make_target_shown_exists():
    makefile = (ROOT / "Makefile").read_text()
    shown = commands("make")
    assert shown
    for command in shown:
        assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command


def test_the_api_page_has_every_public_name_once_and_no_other():
    import loralloc

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(loralloc.__all__)


def test_the_guide_shows_every_option_of_the_allocation_with_its_default():
    from loralloc import AllocationConfig

    (block,) = blocks(ROOT / "docs" / "guide.md", "yaml")
    shown = yaml.safe_load(block)["allocation"]
    assert shown == {f.name: f.default for f in fields(AllocationConfig)}


def test_the_example_configuration_is_a_trl_configuration_and_resolves():
    from trl import ModelConfig, ScriptArguments, SFTConfig

    from loralloc.runs.settings import resolve

    path = ROOT / "examples" / "sft.yaml"
    trl_fields = {
        f.name for group in (ModelConfig, ScriptArguments, SFTConfig) for f in fields(group)
    }
    assert set(yaml.safe_load(path.read_text())) - {"allocation"} <= trl_fields
    assert resolve([], config=path).allocation.recovery_epochs == 0.2


def test_the_attach_example_runs(bert_folder, tmp_path, monkeypatch):
    rows = ["text,label"] + [f"the film is {w},{i}" for i, w in enumerate(("bad", "good"))] * 16
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["attach.py", str(bert_folder), "train.csv", "dev.csv", "output"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "attach.py"), run_name="__main__")
    assert (tmp_path / "output" / "allocation.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
