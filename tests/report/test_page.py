import base64
import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from run_folders import EVIL, SIZES, make_allocation, make_run

from loralloc.report.drawing import LIGHT
from loralloc.report.folders import read_runs
from loralloc.report.page import FORMATS, page, report_on, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two ALoRA runs, one with a frontier, and three of LoRA of several sizes."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "alora-a", figures={"accuracy": 71.5}, frontier=SIZES)
    second = make_allocation(num_rounds=2, outside=("head",))
    make_run(folder / "alora-b", seed=1, allocation=second)
    for rank in (2, 4, 8):
        make_run(folder / f"lora-{rank}", method="lora", rank=rank, figures={"accuracy": 70.0})
    return folder


@pytest.fixture(scope="module")
def html(folder) -> str:
    return page(report_on(read_runs([folder])))


def test_the_page_has_every_section(html) -> None:
    anchors = re.findall(r'<section id="(\w+)"', html)
    assert anchors == ["results", "budgets", "learning", "frontier", "ranks", "rounds"]
    assert all(f'href="#{anchor}"' in html for anchor in anchors)
    assert html.count('role="tab"') == html.count('role="tabpanel"') == 2


def test_a_run_without_rounds_has_no_empty_section(tmp_path) -> None:
    make_run(tmp_path / "run", method="houlsby")
    anchors = re.findall(r'<section id="(\w+)"', page(report_on(read_runs([tmp_path]))))
    assert anchors == ["results", "learning"]


def test_the_page_names_no_address(html) -> None:
    bare = html.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert "http" not in bare.replace("http-equiv", "")
    assert not re.search(r"@import|url\((?!#)|(?<!xlink:)href=\"(?!#|data:,)|\bsrc=", bare)


def test_its_policy_lets_its_own_script_run_and_no_other(html) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_ranks_of_every_round_are_there(folder, html) -> None:
    (text,) = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    for data, name in zip(json.loads(text), ("alora-a", "alora-b"), strict=True):
        record = json.loads((folder / name / "allocation.json").read_text())
        start, *later = data["rounds"]
        assert sorted(start["ranks"]) == sorted(record["initial_ranks"].values())
        assert not any(start["new"])
        for shown, entry in zip(later, record["rounds"], strict=True):
            assert sorted(shown["ranks"]) == sorted(entry["ranks_after"].values())
            assert sum(shown["new"]) == sum(entry["added"].values())
    assert ">head " in html


def test_no_two_elements_share_an_id_and_every_reference_leads_somewhere(html) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert {a or b for a, b in referred} <= set(ids)


def test_every_colour_of_a_figure_follows_the_theme(folder) -> None:
    report = report_on(read_runs([folder]))
    assert len(report.drawings) == len({drawing.name for drawing in report.drawings})
    for drawing in report.drawings:
        svg = drawing.inline()
        assert svg == drawing.inline()
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set(), drawing.name
        named = {name for name in LIGHT if f"var(--{name})" in svg}
        assert "faint" in named and len(named) >= 3


def test_what_a_folder_says_is_text_and_nothing_else(tmp_path) -> None:
    kinds = (f"self_attn.{EVIL.replace('.', '')}", "mlp.b")
    for seed in (0, 1):
        make_run(
            tmp_path / f"run{seed}",
            seed=seed,
            settings={"task": EVIL, "model_name_or_path": EVIL, "learning_rate": EVIL + str(seed)},
            figures={EVIL: 1.0},
            allocation=make_allocation(kinds=kinds, outside=(EVIL,), terms=(EVIL, "_only")),
        )
    html = page(report_on(read_runs([tmp_path])))
    assert "<img" not in html
    assert html.count("</script>") == 2
    assert "&lt;/script&gt;" in html


def test_every_figure_and_table_is_a_file(folder, tmp_path) -> None:
    report = report_on(read_runs([folder / "alora-b"]))
    written = write(report, tmp_path / "out", formats=FORMATS)
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    suffixes = [path.suffix for path in written]
    assert suffixes.count(".png") == suffixes.count(".svg") == len(report.drawings) + 1
    assert suffixes.count(".md") == suffixes.count(".tex") == len(report.tables)
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        elif path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")


def test_only_what_is_asked_for_is_written(folder, tmp_path) -> None:
    report = report_on(read_runs([folder / "lora-2"]))
    (path,) = write(report, tmp_path, formats=["markdown"])
    assert path.name == "results.md" and list(tmp_path.iterdir()) == [path]
