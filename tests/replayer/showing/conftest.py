"""A browser, and pages in it."""

from __future__ import annotations

import shutil

import pytest

from replayer.showing.page import render

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def tab():
    """A tab of a browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        tab = browser.new_page()
        tab.set_default_timeout(5000)
        yield tab
        browser.close()


@pytest.fixture
def show(tab, tmp_path):
    """Open the page of some data from disk; it may complain of nothing and fetch nothing."""
    seen = []
    listeners = {
        "console": lambda message: seen.append(message.text),
        "pageerror": lambda error: seen.append(str(error)),
        "request": lambda request: seen.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    path = tmp_path / "page.html"

    def show(data, width=1280, scheme="light"):
        path.write_text(render(data), encoding="utf-8")
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(media="screen", color_scheme=scheme)
        tab.goto(path.as_uri())
        return tab

    yield show
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert seen == [path.as_uri()]
