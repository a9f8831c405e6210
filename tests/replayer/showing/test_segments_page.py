"""The page that `graft localize --html` writes, in a browser."""

from __future__ import annotations

import pytest
import torch
from layered import job
from pages import texts

from recorder import Recorder, tap
from replayer import localize
from replayer.showing.faults import lines, verdict, write_page

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(tab, tmp_path):
    """Write the page of a result and open it from disk; it may complain of nothing."""
    seen = []
    listeners = {
        "console": lambda message: seen.append(message.text),
        "pageerror": lambda error: seen.append(str(error)),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def open_page(found, width=1280):
        write_page(found, tmp_path / "page.html")
        tab.set_viewport_size({"width": width, "height": 800})
        tab.goto((tmp_path / "page.html").as_uri())
        return tab

    yield open_page
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert seen == []


@pytest.fixture
def found(run):
    with Recorder(run):
        job(steps=2)()
    return localize(run, job({("up", 3): lambda x: 2 * x}, steps=2))


def test_the_verdict_stands_first_and_faults_lead_the_table(open_page, found):
    page = open_page(found)
    assert texts(page, "#verdict") == [verdict(found)]
    assert texts(page, "#lines p") == lines(found)[1:]
    assert page.locator("#body tr").count() == 24 and page.locator("#body tr.fault").count() == 2
    first = texts(page, "#body tr:first-child > *")
    assert first[:3] == ["up layer=3 step=0", "down layer=2", "0"] and first[6] == "scaled"
    assert page.locator("#chart svg .fault").count() == 2
    assert texts(page, "#unjudged li") == ["All that was tapped was judged."]


def test_the_table_is_searched_and_the_chart_is_walked(open_page, found):
    page = open_page(found)
    page.fill("#find", "LAYER=3 step=1")
    assert page.locator("#body tr").count() == 2 and texts(page, "#shown") == ["2 of 2 shown"]
    page.check("#only")
    assert page.locator("#body tr").count() == 1
    page.focus("#chart svg")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert texts(page, "#pointed")[0].startswith("up layer=3 step=0, rank 0: 1.0e+0 (up to 1.9e-6")


@pytest.mark.parametrize("width", [360, 1280])
def test_hostile_names_are_text_and_nothing_runs_over(open_page, run, width):
    name = "<img src=x onerror=alert(1)>" * 2 + "&lt;"

    def target(factor):
        x = tap("a", torch.ones(4, 8))
        y = tap(name, x * factor, layer="</script><b>")
        return y.sum()

    with Recorder(run):
        target(1.0)
    page = open_page(localize(run, lambda: target(2.0)), width)
    assert name in texts(page, "#verdict")[0] and page.locator("img, b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_to_show_is_said(open_page, run):
    with Recorder(run):
        job()()
    page = open_page(localize(run, lambda: tap("other", torch.ones(3))))
    assert texts(page, "#chart") == ["There is no segment."]
    assert page.locator("#lines .first").count() == 1 and page.locator("#unjudged li").count() == 1
