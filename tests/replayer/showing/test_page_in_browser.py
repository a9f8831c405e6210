"""The page that `graft diff --html` writes, in a browser."""

from __future__ import annotations

import random
import re

import pytest
from pages import (
    EXTREMES,
    HOSTILE,
    comparison,
    detail,
    details,
    faulty,
    hostile,
    infinities,
    labels,
    row,
    texts,
)

pytestmark = pytest.mark.browser


SECTIONS = ["order", "layers", "ranks", "table", "worst"]


UNKNOWN = "\u2013"  # what stands in the place of a figure


def large(count=20_000):
    """As many pairs as a page may hold, of hundreds of names, layers and ranks."""
    rng, rows = random.Random(1), []
    for i in range(count):
        name, layer, step = f"block_tap_number_{i % 250}", i // 250 % 40, i // 10_000
        here = {"step": step, "rank": None, "ranks_differ": []}
        if i < 7000 or rng.random() < 0.3:
            rows.append(row(name, layer, **here))
            continue
        size, here["ranks_differ"] = 10 ** rng.uniform(-12, 0), rng.sample(range(1024), 3)
        rows.append(row(name, layer, "differs" if size > 1e-6 else "close", size, **here))
    return comparison(rows, left_out=1234)


def column_of(page, title):
    heads = [text.rstrip(" ▲▼") for text in texts(page, "#table th")]
    return texts(page, f"#table tbody td:nth-child({heads.index(title) + 1})")


def luminance(colour):
    parts = [x / 255 for x in colour[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colour(page, selector, what):
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
    return [int(x) for x in re.findall(r"\d+", text)]


@pytest.mark.parametrize("case", EXTREMES)
def test_every_section_shows_something_and_the_page_never_scrolls_sideways(show, case):
    page = show(EXTREMES[case]())
    for section in SECTIONS:
        if section in ("layers", "ranks") and not page.locator(f"#{section}").is_visible():
            continue  # it would be empty
        assert page.locator(f"#{section} h2").is_visible()
        assert page.locator(f"#{section} > :not(h2)").first.is_visible()
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_table_scrolls_in_its_own_frame_where_it_is_too_wide(show):
    frame = show(faulty(), 400).locator("#rows")
    assert frame.evaluate("e => e.scrollWidth > e.clientWidth")


def test_takes_every_string_as_text(show):
    page = show(hostile())
    assert page.title().startswith("graft diff: B, </script><script>document.title=")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    page.get_by_role("button", name="Details of the first").click()
    assert details(page)["message"] == HOSTILE


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "There is nothing to compare: neither side has a tap."),
        ([row(), row()], "B equals A bit for bit in all 2 pairs."),
        (
            [row(), row("q", 1, "close", 1e-9)],
            "B agrees with A within tolerance in all 2 pairs, 1 of them bit for bit.",
        ),
        (
            [row(), row("q", 1, "differs", 0.1, rank=3)],
            "B differs from A beyond tolerance in 1 of 2 pairs, "
            "first at q layer=1 (step 0, rank 3).",
        ),
        (
            [row("q", 1, "differs", 0.1), row("k", 1, "shape"), row("v", 1, "only_a")],
            "B differs from A in 2 of 2 pairs (1 beyond tolerance, 1 in shape), "
            "first at q layer=1 (step 0); 1 tap is on one side only.",
        ),
        (
            [row(outcome="equal"), row(outcome="error")],
            "B equals A bit for bit in all 1 pair that could be compared; 1 could not be compared.",
        ),
        ([row(outcome="only_b")], "No tap is on both sides; 1 tap is on one side only."),
    ],
)
def test_the_verdict_is_one_sentence(show, rows, said):
    assert show(comparison(rows)).locator("#verdict").text_content() == said


def test_the_first_divergences_stand_out_and_lead_to_their_details(show):
    page = show(faulty())
    assert texts(page, ".line.first")[1].startswith("first divergence beyond tolerance: mlp_out")
    page.get_by_role("button", name="Details of the first beyond tolerance").click()
    assert details(page)["tap"] == "mlp_out layer=3"
    assert details(page)["outcome"] == "differs: beyond tolerance"


def test_says_that_pairs_were_left_out(show):
    page = show(comparison([row()], left_out=1234))
    assert "1,234 pairs left out" in page.locator("#facts").text_content()


def test_the_table_is_worst_first(show):
    rows = [
        row("equal"),
        row("near", None, "close", 1e-9),
        row("far", None, "differs", 0.1),
        row("not_finite", None, "differs"),
        row("further", None, "differs", 0.2),
        row("broken", None, "error"),
    ]
    page = show(comparison(rows))
    assert labels(page) == ["not_finite", "further", "far", "broken", "near", "equal"]


def test_the_table_is_in_the_order_that_the_data_gives(show):
    data = comparison([row("one", None, "differs", 0.1), row("two"), row("three", None, "error")])
    data["rows"]["worst"] = [2, 0, 1]
    assert labels(show(data)) == ["two", "three", "one"]


def test_search_takes_every_word(show):
    page = show(faulty())
    page.get_by_label("Search").fill("ATTN layer=3")
    assert {label.split("_")[0] for label in labels(page)} == {"attn"}
    assert {label.split("=")[1] for label in labels(page)} == {"3"}


def test_search_looks_at_outcomes_and_messages(show):
    page = show(faulty())
    page.get_by_label("Search").fill("no such tap")
    assert labels(page) == ["cache layer=5"]
    page.get_by_label("Search").fill("shape")
    assert labels(page) == ["mask"]


def test_search_that_finds_nothing_says_so(show):
    page = show(faulty())
    page.get_by_label("Search").fill("nowhere")
    assert texts(page, "#table tbody td") == ["No pair fits the search."]


def test_outcomes_can_be_left_out(show):
    page = show(faulty())
    page.get_by_label("differs (").press("Space")
    assert "≠ differs" not in column_of(page, "outcome")
    assert "≈ close" in column_of(page, "outcome")


def test_a_column_sorts_by_keyboard_both_ways(show):
    page = show(comparison([row(f"t{k}", None, "differs", 10.0**-k) for k in (2, 1, 3)]))
    header = page.locator("th", has_text="max abs")
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert labels(page) == ["t1", "t2", "t3"]
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert labels(page) == ["t3", "t2", "t1"]


def test_unknown_figures_sort_last_both_ways(show):
    rows = [
        row("none", None, "differs"),
        row("some", None, "differs", 0.1),
        row("all", None, "differs", "inf"),
    ]
    page = show(comparison(rows))
    header = page.locator("th", has_text="rel diff").get_by_role("button")
    header.press("Enter")
    assert labels(page) == ["all", "some", "none"]
    header.press("Enter")
    assert labels(page) == ["some", "all", "none"]


def test_numbers_have_three_digits_and_stand_right(show):
    page = show(comparison([row("a", 0, "differs", 0.0123456), row("b", 0, "differs", 1.23456e-9)]))
    assert column_of(page, "rel diff") == ["0.0123", "1.23e-09"]
    cell = page.locator("tbody td", has_text="0.0123")
    assert cell.evaluate("e => getComputedStyle(e).textAlign") == "right"


def test_a_click_on_a_row_opens_its_details(show):
    page = show(faulty())
    page.get_by_label("Search").fill("mask")
    page.locator("tbody tr", has_text="mask").locator("td").nth(2).click()
    assert details(page)["tap"] == "mask"
    assert details(page)["message"] == "2x512 in A, 2x1x512 in B"


def test_arrows_and_enter_open_a_row_and_escape_comes_back_to_it(show):
    page = show(faulty())
    page.locator("tbody button").first.focus()
    page.keyboard.press("ArrowDown")
    second = labels(page)[1]
    page.keyboard.press("Enter")
    assert details(page)["tap"] == second
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == second


def test_details_lead_to_the_neighbour_in_execution_order(show):
    page = show(comparison([row("first"), row("second", 1, "differs", 0.1)]))
    page.locator("tbody tr", has_text="first").click()
    page.get_by_role("button", name="Next in order").click()
    assert details(page)["tap"] == "second layer=1"


def test_details_lead_to_the_tap_in_the_table(show):
    page = show(faulty())
    page.get_by_role("button", name="Details of the first beyond tolerance").click()
    page.get_by_role("button", name="This tap in the table").click()
    assert set(labels(page)) == {"mlp_out layer=3"}


def test_details_of_a_worst_tensor_lead_to_its_positions(show):
    page = show(comparison([row("q", 0, "differs", 0.1)], [detail(0)]))
    page.get_by_role("button", name="Details of the first").click()
    page.get_by_role("button", name="Its positions and values").click()
    assert page.evaluate("document.activeElement.id") == "worst-0"


def test_arrow_keys_go_along_the_chart_and_enter_opens_a_point(show):
    page = show(faulty())
    page.locator("#order-chart").focus()
    assert page.locator("#order-readout").text_content().startswith("57. mlp_out layer=3, step 0")
    page.keyboard.press("ArrowRight")
    assert page.locator("#order-readout").text_content().startswith("58. mlp_out layer=3, step 0")
    page.keyboard.press("Enter")
    assert (details(page)["tap"], details(page)["rank"]) == ("mlp_out layer=3", "1")


def test_up_goes_to_the_next_point_that_is_not_equal(show):
    rows = [row("a", 0, "close", 1e-9), row("b"), row("c"), row("d", 0, "close", 1e-9)]
    page = show(comparison(rows))
    page.locator("#order-chart").press("Home")
    page.locator("#order-chart").press("ArrowUp")
    assert page.locator("#order-readout").text_content().startswith("4. d")


def test_readouts_are_announced(show):
    page = show(faulty())
    assert page.locator("#order-readout").get_attribute("aria-live") == "polite"
    assert set(page.locator(".readout").evaluate_all("all => all.map(e => e.ariaLive)")) == {
        "polite"
    }


def test_a_point_shows_itself_below_the_pointer_and_opens_by_a_click(show):
    page = show(comparison([row("logits", None, "differs", 0.3)]))
    chart = page.locator("#order-chart")
    chart.scroll_into_view_if_needed()
    box, readout = chart.bounding_box(), page.locator("#order-readout")
    middle = box["x"] + (68 + box["width"] - 10) / 2  # the one point is midway along the axis
    for down in range(20, int(box["height"]), 20):
        page.mouse.move(middle, box["y"] + down)
        if readout.text_content().startswith("1. logits"):
            break
    page.mouse.click(middle, box["y"] + down)
    assert details(page)["tap"] == "logits"


def test_a_name_can_be_taken_out_of_the_chart_by_keyboard(show):
    page = show(comparison([row("a", 0), row("b", 0), row("c", 0)]))
    name = page.locator(".legend").get_by_role("button", name="b", exact=True)
    name.press("Space")
    assert name.get_attribute("aria-pressed") == "false"
    page.locator("#order-chart").press("Home")
    page.locator("#order-chart").press("ArrowRight")
    assert page.locator("#order-readout").text_content().startswith("3. c")


def test_each_name_has_a_marker_of_its_own(show):
    page = show(faulty())
    shapes = page.locator(".legend path").evaluate_all("all => all.map(e => e.getAttribute('d'))")
    assert len(shapes) == len(set(shapes)) == 11


def test_a_gradient_is_told_from_its_tensor(show):
    rows = [row("h", 0), row("h", 0, kind="grad")]
    assert texts(show(comparison(rows)), ".legend button")[:2] == ["h", "h (grad)"]


def test_both_charts_show_the_measure_that_is_chosen(show):
    page = show(faulty())
    page.locator("#order select").select_option("times_floor")
    assert page.locator("#layers select").input_value() == "times_floor"
    page.locator("#layers .scroller").focus()
    assert "worst times floor" in page.locator("#layers .readout").text_content()


def test_times_floor_is_offered_only_where_a_floor_was_given(show):
    offered = texts(show(comparison([row("a", 0, "differs", 0.1)])), "#order option")
    assert offered == ["rel diff", "max abs", "mean abs"]


def test_the_map_of_layers_goes_by_keyboard_from_its_worst_cell(show):
    rows = [row(name, layer, "close", 1e-9) for layer in (0, 1, 2) for name in ("q", "out")]
    rows[3] = row("out", 1, "differs", 0.25)
    page = show(comparison(rows))
    cells, readout = page.locator("#layers .scroller"), page.locator("#layers .readout")
    cells.focus()
    assert readout.text_content().startswith("out, layer 1: worst rel diff 0.250 of 1 pair")
    cells.press("ArrowUp")
    assert readout.text_content().startswith("q, layer 1: worst rel diff 1.00e-09")
    cells.press("ArrowDown")
    cells.press("Enter")
    assert details(page)["tap"] == "out layer=1"


def test_a_cell_without_a_tap_says_so(show):
    page = show(comparison([row("q", 0, "close", 1e-9), row("k", 1, "close", 1e-8)]))
    page.locator("#layers .scroller").press("ArrowUp")
    assert page.locator("#layers .readout").text_content() == "q, layer 1: not tapped"


def test_sections_that_would_be_empty_are_left_out_and_their_links_too(show):
    target = {"path": "runs/target", "ranks": 1, "records": 9, "command": ""}
    page = show(comparison([row("logits", None, "differs", 0.1, rank=0)], b=target))
    for section, is_there in (("layers", False), ("ranks", False), ("order", True)):
        assert page.locator(f"#{section}").is_visible() is is_there
        assert page.locator(f'nav a[href="#{section}"]').is_visible() is is_there


def test_the_chart_is_within_the_first_screen_and_every_control_says_what_it_does(show):
    page = show(faulty(), 1400)
    page.set_viewport_size({"width": 1400, "height": 1000})
    box = page.locator("#order-chart").bounding_box()
    assert box["y"] + box["height"] <= 1000
    for one in page.locator("button, select, input").all():
        words = one.get_attribute("title") or one.text_content() or one.get_attribute("id")
        assert words and len(words) > 3, one.evaluate("e => e.outerHTML")


def test_of_long_names_both_ends_are_shown_and_all_on_hover(show):
    long = "model.decoder.layers.self_attention.linear_qkv.lora_adapter.output.hidden"
    page = show(comparison([row(f"{long}_{end}", 3, "differs", 0.1) for end in ("a", "b")]))
    names = texts(page, "#table tbody td button")
    assert len(set(names)) == 2 and all(len(name) == 48 and "…" in name for name in names)
    assert page.locator("#table tbody td button").first.get_attribute("title").startswith("All fig")


@pytest.mark.parametrize(
    ("ranks", "outcome", "said"),
    [
        ([[0], [1], [2], [3]], "differs", "All 4 ranks differ."),
        ([[2], [2]], "differs", "Only rank 2 of 4 differs."),
        ([[0, 1], [3]], "differs", "3 of 4 ranks differ: 0-1, 3."),
        ([[1]], "close", "Only rank 1 of 4 differs within tolerance."),
        ([[0], [1]], "equal", "No rank differs: all pairs are equal."),
        ([[0]], "error", "No rank differs in a pair that could be compared."),
    ],
)
def test_says_which_ranks_differ(show, ranks, outcome, said):
    target = {"path": "runs/target", "ranks": 4, "records": 9, "command": ""}
    size = 0.1 if outcome in ("differs", "close") else None
    rows = [
        row("q", 0, outcome, size, **({"rank": r[0]} if len(r) == 1 else {"ranks_differ": r}))
        for r in ranks
    ]
    assert show(comparison(rows, b=target)).locator("#ranks-said").text_content() == said


def test_counts_the_pairs_that_a_rank_has_part_in(show):
    rows = [row("q", 0, "differs", 0.1, ranks_differ=[0, 1]), row("q", 1, "differs", 0.1, rank=1)]
    page = show(comparison(rows))
    page.locator("#ranks .scroller").press("Home")
    assert page.locator("#ranks .readout").text_content().startswith("q, rank 0: part in 1 pair ")
    page.locator("#ranks .scroller").press("ArrowRight")
    assert page.locator("#ranks .readout").text_content().startswith("q, rank 1: part in 2 pairs ")


def test_a_strip_reads_out_its_positions(show):
    found = detail(0)
    found["strip"] |= {"max_abs": [0.0, 0.5, "inf"], "rel_diff": [0.0, 0.25, None], "size": 10}
    page = show(comparison([row("q", 0, "differs", 0.1)], [found]))
    strip, readout = page.locator("#worst .scroller"), page.locator("#worst .readout")
    strip.press("Home")
    assert readout.text_content() == "t 0-3: max abs 0, rel diff 0"
    strip.press("ArrowRight")
    assert readout.text_content() == "t 4-7: max abs 0.500, rel diff 0.250"
    strip.press("ArrowRight")
    assert readout.text_content() == "t 8-9: max abs inf, rel diff " + UNKNOWN


def test_a_histogram_says_in_words_where_the_sides_are_furthest_apart(show):
    found = detail(0)
    found["histogram"] = {"low": 0.0, "high": 4.0, "a": [5, 90, 5, 0], "b": [5, 60, 35, 0]}
    page = show(comparison([row("q", 0, "differs", 0.1)], [found]))
    label = page.locator("#worst svg").get_attribute("aria-label")
    assert "furthest apart from 1.00 to 2.00: 90 in A, 60 in B" in label


def test_a_tensor_without_strip_histogram_and_heads_still_shows(show):
    found = {"row": 0, "strip": None, "histogram": None, "by": None}
    page = show(comparison([row("q", 0, "differs", 0.1)], [found]))
    assert page.locator("#worst h3").text_content() == "q layer=0"


def test_infinities_are_shown_as_such(show):
    page = show(infinities())
    assert column_of(page, "rel diff") == ["inf", UNKNOWN, "0.500", UNKNOWN]
    page.locator("#order-chart").focus()
    assert "rel diff inf; max abs inf" in page.locator("#order-readout").text_content()


def test_twenty_thousand_pairs(show):
    page = show(large())
    assert len(labels(page)) == 50
    assert page.locator(".legend button").all_text_contents()[10] == "240 other names"
    assert page.get_by_role("status").text_content() == "1-50 of 20,000 pairs"
    page.get_by_role("button", name="Next page").click()
    assert page.get_by_role("status").text_content() == "51-100 of 20,000 pairs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show, scheme):
    page = show(faulty(), scheme=scheme)
    behind = colour(page, "body", "backgroundColor"), colour(page, "th", "backgroundColor")
    assert (luminance(behind[0]) < 0.5) == (scheme == "dark")
    for selector in ("#verdict", ".soft", ".hint", "nav a", "td button", ".line.first"):
        for ground in behind:
            assert contrast(colour(page, selector, "color"), ground) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scale_of_colours_reads_in_greyscale(show, scheme):
    canvas = show(faulty(), scheme=scheme).locator("#layers .gradient")
    data = canvas.evaluate("e => [...e.getContext('2d').getImageData(0, 5, 140, 1).data]")
    shades = [luminance(data[k : k + 3]) for k in range(0, len(data), 4)]
    assert shades == sorted(shades, reverse=scheme == "light")
    assert contrast(data[:3], data[-4:-1]) > 7


def test_charts_follow_the_colour_scheme(show):
    page = show(faulty())
    drawn = "document.querySelector('#order canvas').toDataURL()"
    light = page.evaluate(drawn)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {drawn} !== light", arg=light)


def test_the_first_stop_of_the_keyboard_skips_to_the_table(show):
    page = show(faulty())
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "table"


def test_prints_without_its_controls(show):
    page = show(faulty(), scheme="dark")
    page.emulate_media(media="print")
    assert not page.get_by_label("Search").is_visible()
    assert page.locator("tbody tr").first.is_visible()
    assert luminance(colour(page, "body", "color")) < 0.1
