"""The documentation site: it builds without a warning, and a browser finds nothing amiss in it."""

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
BUILDERS = ("mkdocs", "zensical")

pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH (Debian: apt install chromium)"
)


@pytest.fixture(scope="module", params=BUILDERS)
def built(request, tmp_path_factory) -> Path:
    """The folder of the site, as each builder makes it from the same file."""
    for package in ("mkdocs", "material", "mkdocstrings", "zensical"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    project = tmp_path_factory.mktemp(request.param)
    shutil.copy(ROOT / "mkdocs.yml", project)
    shutil.copytree(ROOT / "docs", project / "docs")
    (project / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "-m", request.param, "build", "--strict"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement, not a warning
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "WARNING" not in said, said
    return project / "build" / "site"


@pytest.fixture
def address(built):
    """Where the site is served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def test_every_page_is_built(built):
    names = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert names <= {page.stem for page in built.glob("*.html")}
    assert (built / "quickstart.ipynb").is_file()


@needs_chromium
def test_every_link_leads_somewhere_and_nothing_is_asked_of_another_machine(browser, address):
    said, foreign, failed = [], [], []
    tab = browser.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("requestfailed", lambda request: failed.append((request.failure, request.url)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(address) else foreign.append(request.url),
    )
    waiting, names, wanted = [f"{address}/index.html"], {}, {}
    while waiting:
        url = waiting.pop()
        response = tab.goto(url)
        assert response is not None and response.ok, (url, wanted.get(url))
        if not url.endswith(".html"):
            continue
        names[url] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        assert tab.locator("img").evaluate_all("all => all.every(i => i.naturalWidth > 0)"), url
        for link in tab.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            page, _, anchor = link.partition("#")
            if page.startswith(address):
                page = page + "index.html" if page.endswith("/") else page
                if (
                    page not in wanted
                    and page.endswith(".html")
                    and page != f"{address}/index.html"
                ):
                    waiting.append(page)
                wanted.setdefault(page, set()).add((anchor, url))
    assert len(names) >= len(list((ROOT / "docs").glob("*.md")))
    lost = [
        (page, anchor, source)
        for page, links in wanted.items()
        for anchor, source in links
        if anchor and page in names and anchor not in names[page]
    ]
    assert lost == []
    assert said == [] == foreign
    # What a page still loads when it is left is broken off by the browser itself.
    assert [each for each in failed if each[0] != "net::ERR_ABORTED"] == []


@needs_chromium
def test_nothing_is_wider_than_a_phone(browser, address, built):
    tab = browser.new_page(viewport={"width": 360, "height": 740})
    for page in sorted(built.glob("*.html")):
        tab.goto(f"{address}/{page.name}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360, page.name


@needs_chromium
def test_no_table_runs_out_of_its_page(browser, address, built):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    wide = (
        "[...document.querySelectorAll('article table')].filter(t => t.scrollWidth > t.clientWidth)"
    )
    for page in sorted(built.glob("*.html")):
        tab.goto(f"{address}/{page.name}")
        assert tab.evaluate(f"{wide}.map(t => t.innerText.slice(0, 80))") == [], page.name


@needs_chromium
def test_the_search_finds_a_word(browser, address, built):
    tab = browser.new_page()
    tab.goto(f"{address}/index.html", wait_until="networkidle")
    opens = ".md-search__input" if "mkdocs" in str(built) else ".md-search__button"
    tab.locator(opens).first.click()
    tab.locator("input:focus").wait_for()
    assert tab.locator("a:visible", has_text="churn").count() == 0
    tab.keyboard.type("churn", delay=30)
    tab.locator("a:visible", has_text="churn").first.wait_for()
