"""What the pages say of the code, held to the code."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS, SOURCE, TESTS = ROOT / "docs", ROOT / "src" / "loralloc", ROOT / "tests"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture
def write_page(monkeypatch):
    """The scripts that write pages, as modules."""
    monkeypatch.syspath_prepend(ROOT / "pages")
    return __import__


def test_every_page_has_its_place_in_the_site():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": ([\w-]+\.md)$", config, re.MULTILINE)) == {
        path.name for path in DOCS.glob("*.md")
    }
    settings = yaml.safe_load(config)
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False


def test_the_page_of_the_command_line_is_what_the_parsers_say(write_page):
    assert page("cli.md") == write_page("command_line").page(), "run `make pages`"


def test_the_page_of_what_runs_where_is_what_the_methods_say(write_page):
    assert page("support.md") == write_page("support").page(), "run `make pages`"
    named = re.findall(r"`(tests/[\w/]+\.py)`", page("support.md"))
    assert len(named) >= 12
    for path in named:
        assert (ROOT / path).is_file(), path


def test_the_notebook_is_the_page(write_page):
    notebook = write_page("notebook").notebook
    assert json.loads(page("quickstart.ipynb")) == notebook(page("quickstart.md")), "`make pages`"


def test_the_pictures_are_what_is_drawn(write_page):
    for name, draw in write_page("pictures").PICTURES.items():
        assert page(f"images/{name}.svg") == draw(), "run `make pages`"


def test_the_reference_has_every_public_name_once():
    import loralloc

    found = re.findall(r"^::: loralloc\.(\w+)$", page("reference.md"), re.MULTILINE)
    assert sorted(found) == sorted(name for name in loralloc.__all__ if name != "__version__")


def test_every_file_in_the_index_of_the_paper_is_there():
    files = re.findall(r"`([\w/]+\.\w+)`", page("paper.md"))
    assert len(files) > 100
    for name in files:
        assert (SOURCE / name).is_file() or (TESTS / name).is_file(), name


def test_every_error_message_is_one_of_ours():
    headings = re.findall(r"^### `+ ?(.+?) ?`+$", page("errors.md"), re.MULTILINE)
    assert len(headings) == page("errors.md").count("\n### ")
    said = list(texts_in_the_source())
    for heading in headings:
        assert any(heading in text for text in said), heading


def texts_in_the_source():
    """Every text of the source; what an f-string fills in is left out."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value for v in node.values if isinstance(v, ast.Constant))
                yield "\0".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture
def stand_in(llama_folder, tmp_path, monkeypatch):
    """A tiny model in the place of the one that a page names, whose text is run as it is."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m").symlink_to(llama_folder)
    monkeypatch.setenv("LORALLOC_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_the_quickstart_runs(stand_in, capsys):
    scope = {}
    for code in python_of("quickstart.md"):
        exec(code, scope)
    says_what_happened(capsys.readouterr().out)


@pytest.mark.slow
def test_the_notebook_runs(stand_in, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.reads(page("quickstart.ipynb"), as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    says_what_happened("".join(o.get("text", "") for o in outputs if o.get("name") == "stdout"))


def says_what_happened(printed: str) -> None:
    assert "rounds come after the steps" in printed
    assert re.search(r"step \d+: (\d+) ranks pruned, \1 given", printed)
    assert re.search(r"ranks at the start and now: (\d+) \1", printed)
    assert re.search(r"LORA with \d+ ranks of their own", printed)


def python_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


@pytest.fixture
def modules_of(tmp_path, monkeypatch):
    """A page's modules, which begin with their name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(of: str) -> list[str]:
        rest = []
        for code in python_of(of):
            if named := re.match(r'"""(\w+)\.py"""', code):
                (tmp_path / f"{named[1]}.py").write_text(code)
                names.append(named[1])
            else:
                rest.append(code)
        return rest

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["norms:by_norm", "pulls:Pulls"])
def test_the_scores_of_the_page_decide_a_run(place, modules_of, llama_folder, write_rows, tmp_path):
    from loralloc import Record, prepare, train

    assert modules_of("add-a-score.md") == []
    rows = [{"sentence": f"the film {i} is good", "label": i % 2} for i in range(32)]
    for split in ("train", "dev"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", rows)
    options = {
        "task": "sst2",
        "dataset_name": str(tmp_path / "sst2"),
        "model_name_or_path": str(llama_folder),
        "allocation": {"score": place, "rounds_at": [3, 6]},
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }
    train(prepare(options))
    rounds = Record.load(tmp_path / "run").rounds
    assert [entry.score for entry in rounds] == [place] * 2
    (term,) = rounds[1].terms
    values = [value for of in rounds[1].terms[term].values() for value in of]
    gone = sum(len(ranks) for ranks in rounds[1].pruned.values())
    lost = [
        rounds[1].terms[term][module][rank]
        for module, ranks in rounds[1].pruned.items()
        for rank in ranks
    ]
    assert gone and sorted(lost) == sorted(values)[:gone]


def test_the_task_of_the_page_is_trained(modules_of, stand_in, write_rows, tmp_path, monkeypatch):
    from loralloc.tasks.catalog import TASKS

    (script,) = modules_of("add-a-task.md")
    rows = [{"text": f"the film {i} is good", "label": i % 2} for i in range(40)]
    for split in ("train", "dev"):
        write_rows(tmp_path / "data" / "tweets" / f"{split}.jsonl", rows)
    monkeypatch.setitem(TASKS, "tweets", None)  # is taken away again
    exec(script, {})
    assert (tmp_path / "runs" / "tweets-smollm2-135m" / "allocation.json").is_file()


def test_the_page_of_what_runs_where_has_every_method_and_every_recipe():
    rows = [line.split(" | ") for line in page("support.md").splitlines() if line.startswith("| ")]
    methods = {row[0].strip("| `") for row in rows if len(row) == 9}
    from loralloc.methods.catalog import METHODS

    assert set(METHODS) <= methods
    named = {link for row in rows for link in re.findall(r"\((recipes/\w+\.md)", row[0])}
    assert named == {f"recipes/{path.name}" for path in (DOCS / "recipes").glob("*.md")}
