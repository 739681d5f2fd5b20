"""The page as a person uses it, in a headless Chromium; skipped where there is none."""

import shutil
from pathlib import Path

import pytest
from run_folders import EVIL, SIZES, make_allocation, make_run

from loralloc.report.folders import read_runs
from loralloc.report.page import report_on, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium on the PATH, which the page is opened in (Debian: apt install chromium)",
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    evil = make_allocation(kinds=(f"self_attn.{EVIL.replace('.', '')}", "mlp.b"), terms=(EVIL,))
    make_run(folder / "runs" / "a", figures={"accuracy": 71.5}, frontier=SIZES)
    make_run(folder / "runs" / "b", seed=1, allocation=make_allocation(num_layers=40))
    make_run(folder / "runs" / "c", settings={"task": EVIL}, allocation=evil, figures={EVIL: 1})
    make_run(folder / "runs" / "d", method="lora", rank=8)
    (written,) = write(report_on(read_runs([folder / "runs"])), folder / "out", formats=["html"])
    return written


@pytest.fixture
def opened(browser, path):
    """Opens the page; what the console says and what is asked of a network must stay silent."""
    said, asked = [], []

    def open_it(**options):
        tab = browser.new_page(**options)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    tabs = []
    yield open_it
    assert said == []
    assert asked == [path.as_uri()] * len(tabs)
    for tab in tabs:
        assert tab.evaluate("window.hit") is None
        tab.close()


def ranks_in(panel) -> list[int]:
    return [int(text) for text in panel.locator("[data-cell]").all_inner_texts()]


def test_the_slider_shows_the_ranks_of_every_round(opened, path) -> None:
    page = opened()
    panel = page.locator(".panel").first
    run = read_runs([path.parents[1] / "runs" / "a"])[0]
    assert run.allocation is not None
    states = [run.allocation["initial_ranks"]]
    states += [entry["ranks_after"] for entry in run.allocation["rounds"]]
    slider = panel.locator("[type=range]")
    slider.focus()
    for number in reversed(range(len(states))):
        assert sorted(ranks_in(panel)) == sorted(states[number].values())
        told = f"after round {number} of 4, step {5 * number}" if number else "at the start"
        assert panel.locator("output").inner_text() == told
        slider.press("ArrowLeft")
    assert panel.locator(".heat .lost, .heat .gained").count() == 0
    slider.press("End")
    assert panel.locator(".heat .lost").count() > 0 < panel.locator(".heat .gained").count()
    panel.get_by_label("without ranks that no round has scored").check()
    given = sum(run.allocation["rounds"][-1]["added"].values())
    assert sum(ranks_in(panel)) == sum(states[-1].values()) - given
    assert "+" in panel.locator(".heat .gained").first.get_attribute("title")


def test_tabs_show_one_run_or_all_side_by_side(opened) -> None:
    page = opened()
    tabs, panels = page.get_by_role("tab"), page.locator(".panel")
    assert [panels.nth(i).is_visible() for i in range(3)] == [True, False, False]
    tabs.nth(1).click()
    assert [panels.nth(i).is_visible() for i in range(3)] == [False, True, False]
    tabs.nth(1).press("ArrowRight")
    assert [panels.nth(i).is_visible() for i in range(3)] == [False, False, True]
    assert tabs.nth(2).get_attribute("aria-selected") == "true"
    page.get_by_label("all runs side by side").check()
    assert all(panels.nth(i).is_visible() for i in range(3))
    slider = panels.nth(1).locator("[type=range]")
    slider.focus()
    slider.press("Home")
    assert panels.locator("output").all_inner_texts() == ["at the start"] * 3


def test_light_and_dark_follow_the_reader(opened) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert light.evaluate(colour) == "rgb(255, 255, 255)" != dark.evaluate(colour)
    line = "getComputedStyle(document.querySelector('svg path[style*=run1]')).stroke"
    assert light.evaluate(line) != dark.evaluate(line)
    for page in (light, dark):
        before = page.evaluate(colour)
        page.get_by_role("button", name="light / dark").click()
        assert page.evaluate(colour) != before


def test_nothing_is_wider_than_a_phone(opened) -> None:
    page = opened(viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    heat = page.locator(".panel").first.locator(".heat")
    assert heat.evaluate("heat => heat.scrollWidth <= heat.clientWidth")


def test_paper_shows_all_runs_in_ink_on_white(opened) -> None:
    page = opened(color_scheme="dark", viewport={"width": 720, "height": 1000})
    page.emulate_media(media="print")
    assert all(panel.is_visible() for panel in page.locator(".panel").all())
    assert not page.locator(".tabs").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") == 720
