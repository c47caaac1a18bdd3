"""The page of a recording in a headless browser: what it shows, hover, zoom, the table, names.

Needs a Chromium (report/browser.py says which). Without one these tests are skipped, and with
REPRISE_REQUIRE_BROWSER=1 they fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report.browser import NAMES, VARIABLE, Browser, Page, find
from report.made import TWO_EVENTS, TWO_ROWS, events, recording, row

from torch_reprise._report._picture import picture
from torch_reprise.ledger import Event, Row

REQUIRE = "REPRISE_REQUIRE_BROWSER"
MARKUP = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find() is None:
        reason = f"no browser: {VARIABLE} is not set and none of {', '.join(NAMES)} is on PATH"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1 is set, but there is {reason}")
        pytest.skip(reason)
    with Browser() as found:
        yield found


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a recording. No page may complain or load anything but itself."""
    pages: list[tuple[Page, Path]] = []

    def open_page(rows: list[Row], of: list[list[Event]], **options: Any) -> Page:
        path = recording(rows, of).save(tmp_path / f"report-{len(pages)}.html")
        page = browser.open(path, **options)
        pages.append((page, path))
        return page

    yield open_page
    for page, path in pages:
        for complaint in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            assert page.events(complaint) == []
        requests = page.events("Network.requestWillBeSent")
        assert [one["request"]["url"] for one in requests] == [path.as_uri()]
        page.close()


def place(page: Page, chart: str, time: float, height: float) -> tuple[float, float]:
    """Where in the window: at a share of the shown time and of the height, from the top."""
    script = f"document.getElementById('{chart}')"
    left, top, right, bottom = map(float, page.run(f"{script}.dataset.plot").split())
    page.run(f"{script}.scrollIntoView({{block: 'center'}})")
    box_left, box_top = page.run(
        f"(() => {{ const b = {script}.getBoundingClientRect(); return [b.left, b.top]; }})()"
    )
    return (box_left + left + time * (right - left), box_top + top + height * (bottom - top))


def hover(page: Page, chart: str, time: float, height: float) -> list[str]:
    """The lines of the tooltip there; none if there is no tooltip."""
    page.mouse("Moved", *place(page, chart, time, height))
    return lines_of_tip(page)


def lines_of_tip(page: Page) -> list[str]:
    page.run("new Promise((done) => requestAnimationFrame(done))")
    found: list[str] = page.run(
        "document.getElementById('tip').hidden ? [] :"
        " [...document.getElementById('tip').children].map((line) => line.textContent)"
    )
    return found


def column(page: Page, number: int) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelectorAll('tbody tr')].map((r) => r.cells[{number}].textContent)"
    )
    return found


def text_of(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).textContent"))


def hidden(page: Page, selector: str) -> bool:
    return bool(page.run(f"document.querySelector({selector!r}).offsetParent === null"))


# What it shows.


def test_the_page_tells_the_summary_and_the_segments(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    assert page.run("document.title") == "Checkpointed segments - torch-reprise"
    words = page.run("[...document.querySelectorAll('#summary > div')].map((d) => d.innerText)")
    assert [tuple(one.split("\n")) for one in words] == picture(TWO_ROWS, TWO_EVENTS).summary
    assert column(page, 1) == ["first", "second"]
    assert column(page, 5) == ["1000 B", "500 B"]
    assert column(page, 6) == ["100 B", "600 B"]
    assert column(page, 7) == ["cpu", "-"]
    legend = page.run("[...document.querySelectorAll('#layers li')].map((one) => one.textContent)")
    assert legend == ["- - without checkpointing", "#1 first", "#2 second"]


def colour_at(page: Page, chart: str, time: float, height: float) -> str:
    x, y = place(page, chart, time, height)
    # Copied first: the browser warns of a canvas that is drawn to and read from in turns.
    pixel = page.run(
        f"(() => {{ const c = document.getElementById('{chart}'), b = c.getBoundingClientRect();"
        " const copy = document.createElement('canvas'); copy.width = copy.height = 1;"
        " const g = copy.getContext('2d', { willReadFrequently: true });"
        f" g.drawImage(c, Math.round({x} - b.left), Math.round({y} - b.top), 1, 1, 0, 0, 1, 1);"
        " return [...g.getImageData(0, 0, 1, 1).data]; })()"
    )
    return "#{:02x}{:02x}{:02x}".format(*pixel[:3])


def test_the_charts_are_drawn_in_the_colours_of_the_picture(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    first, second = (layer.colour for layer in picture(TWO_ROWS, TWO_EVENTS).layers)
    # The scale ends at 1.1 * 1500: at 4.5 ms of 8 the first layer is 100 high, the second 600.
    for size, colour in ((50, first), (150, second), (650, second)):
        assert colour_at(page, "memory", 4.25 / 8, 1 - size / 1650) == colour, size
    assert colour_at(page, "memory", 4.25 / 8, 1 - 750 / 1650) not in (first, second)
    for time, line, colour in ((1, 0, "#9aa7b4"), (4, 1, "#ee7f35"), (5, 1, "#4d5f73")):
        # The chart has at least the height of three lines.
        assert colour_at(page, "timeline", time / 8, (line + 0.5) / 3) == colour, (time, line)


def test_the_charts_have_names_for_who_cannot_see_them(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = {
        node["name"]["value"]: node.get("description", {}).get("value", "")
        for node in nodes
        if node.get("role", {}).get("value") in ("image", "img") and not node.get("ignored")
    }
    assert set(found) == {
        "Bytes held by segments",
        "Forward, replay and backward of each segment",
    }
    assert all("peak held: 700 B" in description for description in found.values())
    assert page.run("document.documentElement.lang") == "en"


def test_the_reentrant_form_is_explained(show: Open) -> None:
    page = show([row(reentrant=True)], events([(0, "forward"), (1, "forward end")]))
    assert "reentrant" in text_of(page, ".note")
    assert "without" not in text_of(page, "#layers") and hidden(page, "#closer")


# The mouse and the keyboard.


def test_pointing_at_the_bytes_tells_who_holds_them(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    assert hover(page, "memory", 4.5 / 8, 1 - 300 / 1650) == [
        "at 4.500 ms",
        "held 700 B",
        "without checkpointing 1.5 KiB",
        "#2 second: 600 B",
        "#1 first: 100 B",
    ]
    low = hover(page, "memory", 4.5 / 8, 1 - 50 / 1650)
    assert low[3:] == ["#1 first: 100 B", "#2 second: 600 B"], "the one that is pointed at"
    assert page.run("document.querySelector('#tip .title:nth-child(4)').textContent") == low[3]
    assert hover(page, "memory", 7 / 8, 0.1)[1:] == [
        "held 100 B",
        "without checkpointing 1000 B",
        "#1 first: 100 B",
    ]
    assert hover(page, "memory", -0.05, 0.5) == [], "beside the axes there is nothing to tell"


def test_pointing_at_a_span_tells_what_and_when(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    assert hover(page, "timeline", 4 / 8, 1.5 / 3) == [
        "#2 second",
        "replay: 1.000 ms",
        "from 3.500 ms to 4.500 ms, thread 1",
        "not saved 500 B, peak held 600 B",
    ]
    assert hover(page, "timeline", 0.5 / 8, 0.5 / 3)[:2] == ["#1 first", "forward: 1.500 ms"]
    assert hover(page, "timeline", 0.5 / 8, 0.5 / 3)[-1] == "drew from cpu"
    assert hover(page, "timeline", 7.5 / 8, 1.5 / 3) == [], "nothing goes on there"
    page.mouse("Moved", 2, 2)
    assert lines_of_tip(page) == []


def test_a_tooltip_stays_in_the_window(show: Open) -> None:
    page = show([row("n" * 200)], events([(0, "forward"), (9, "hold", 1, 1), (9, "forward end")]))
    assert hover(page, "timeline", 0.999, 0.5 / 3)
    box = page.run(
        "(() => { const b = document.getElementById('tip').getBoundingClientRect();"
        " return [b.left, b.top, innerWidth - b.right, innerHeight - b.bottom]; })()"
    )
    assert min(box) >= 0


def test_dragging_looks_closer_and_a_button_goes_back(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    assert hidden(page, "#reset")
    page.mouse("Moved", *place(page, "memory", 0.5, 0.5))
    page.mouse("Pressed", *place(page, "memory", 0.5, 0.5))
    page.mouse("Moved", *place(page, "memory", 0.7, 0.5))
    page.mouse("Released", *place(page, "memory", 0.75, 0.5))
    assert not hidden(page, "#reset")
    at = hover(page, "memory", 0.5, 0.5)[0]
    assert 4.98 < float(at.split()[1]) < 5.02, "4 to 6 ms are shown"
    assert hover(page, "timeline", 0.1, 1.5 / 3)[1] == "replay: 1.000 ms"
    page.click("#reset")
    assert hidden(page, "#reset")
    at = hover(page, "memory", 0.5, 0.5)[0]
    assert 3.98 < float(at.split()[1]) < 4.02


def test_the_scale_can_leave_the_dashed_line_alone(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    _, second = (layer.colour for layer in picture(TWO_ROWS, TWO_EVENTS).layers)
    assert colour_at(page, "memory", 4.25 / 8, 0.2) != second
    page.click("#closer")
    assert page.run("document.getElementById('closer').ariaPressed") == "true"
    assert colour_at(page, "memory", 4.25 / 8, 0.2) == second, "the scale ends at 1.1 * 700"


def test_arrow_keys_step_through_the_points(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS)
    page.run("document.getElementById('memory').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.key(key)
        seen.append(lines_of_tip(page)[:2])
    assert seen == [
        ["at 0.0 \u00b5s", "held 100 B"],
        ["at 1.000 ms", "held 100 B"],
        ["at 2.000 ms", "held 300 B"],
        ["at 1.000 ms", "held 100 B"],
    ]
    page.key("Escape")
    assert lines_of_tip(page) == []


# The table.


def test_the_table_is_sorted_by_the_heading_that_is_clicked(show: Open) -> None:
    rows = [
        row(name, bytes=size, replays=1) for name, size in zip("bac", (2, 3000, 100), strict=True)
    ]
    page = show(rows, events([], [], []))
    assert column(page, 0) == ["1", "2", "3"]

    def heading(number: int) -> str:
        return f"th:nth-child({number + 1}) button"

    def order(number: int) -> str | None:
        return page.run(f"document.querySelectorAll('th')[{number}].getAttribute('aria-sort')")

    assert (order(0), order(5)) == ("ascending", None)
    page.click(heading(5))
    assert column(page, 5) == ["2.9 KiB", "100 B", "2 B"] and order(5) == "descending"
    assert order(0) is None
    page.click(heading(5))
    assert column(page, 0) == ["1", "3", "2"] and order(5) == "ascending"
    page.click(heading(1))
    assert column(page, 1) == ["a", "b", "c"]
    page.click(heading(10))
    assert column(page, 0) == ["1", "2", "3"], "equal ones stay in the order in which they began"


# Names, sizes and looks.


def test_a_name_is_text_whatever_it_is(show: Open) -> None:
    names = [MARKUP, "<!--<script>", "&lt;b&gt;", "\u202e\u0634\u6ce8", "a\nb", ""]
    of = [[(i, "hold", 64, i + 1), (i, "forward"), (i + 1, "forward end")] for i in range(6)]
    page = show([row(name) for name in names], events(*of))
    assert column(page, 1) == names
    assert hover(page, "timeline", 0.5 / 6, 0.5 / 6)[0] == f"#1 {MARKUP}"
    assert text_of(page, "#layers li") == f"#1 {MARKUP}"
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('img, script').length") == 4


def test_a_script_that_got_in_would_not_run(show: Open, browser: Browser, tmp_path: Path) -> None:
    path = recording(TWO_ROWS, TWO_EVENTS).save(tmp_path / "broken.html")
    text = path.read_text(encoding="utf-8")
    broken = text.replace(
        "<h1>", "<script>window.hacked = 1</script><img src=x onerror='hacked = 1'><h1>"
    )
    assert broken != text
    path.write_text(broken, encoding="utf-8")
    page = browser.open(path)
    assert page.run("typeof window.hacked") == "undefined"
    assert column(page, 1) == ["first", "second"]
    page.close()


def test_nothing_recorded_is_said(show: Open) -> None:
    page = show([], [])
    assert "Nothing was recorded" in text_of(page, ".note")
    assert hidden(page, "#memory") and hidden(page, "table")
    page = show([row()], events([]))
    assert "without events" in text_of(page, ".note")
    assert hidden(page, "#memory") and column(page, 1) == ["f"]


def test_thousands_of_segments_stay_usable(show: Open, tmp_path: Path) -> None:
    count = 5000
    rows = [
        row(f"a_module.of_a_model.layers.{i % 48}.forward", bytes=i, replays=1)
        for i in range(count)
    ]
    of = []
    for i in range(count):
        back = 3 * count - i
        saved = [(i + k / 20, "save", 1000) for k in range(10)]
        held = [(back + k / 40, "hold", 1000, i * 10 + k + 1) for k in range(10)]
        freed = [(back + 0.5 + k / 40, "drop", 1000, i * 10 + k + 1) for k in range(10)]
        own = [(i, "forward"), *saved, (i + 0.5, "forward end"), (back, "replay"), *held]
        own += [(back + 0.5, "replay end"), (back + 0.5, "backward"), *freed]
        of.append([*own, (back + 0.9, "backward end")])
    page = show(rows, events(*of))
    assert (tmp_path / "report-0.html").stat().st_size < 5_000_000
    assert len(column(page, 0)) == 200 and text_of(page, "#more") == "Show all 5,000"
    end = 3 * count + 0.9  # ms
    told = hover(page, "timeline", 2500.25 / end, 2500.5 / count)
    number = int(told[0].split()[0].lstrip("#").replace(",", ""))
    assert abs(number - 2500) < 20 and told[1] == "forward: 500.0 \u00b5s"
    assert hover(page, "memory", 0.9, 0.5)[2] == "without checkpointing 47.7 MiB"
    page.click("th:nth-child(6) button")
    assert column(page, 0)[0] == "5,000"
    page.click("#more")
    assert len(column(page, 0)) == count and hidden(page, "#more")


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_can_be_read_in_light_and_in_dark(show: Open) -> None:
    grounds = []
    for dark in (False, True):
        page = show(TWO_ROWS, TWO_EVENTS, dark=dark)
        style = "getComputedStyle(document.querySelector({!r})).{}"
        ground = luminance(page.run(style.format("body", "backgroundColor")))
        grounds.append(ground)
        for selector in ("h1", "dt", "td", "#hint", "th button"):
            ink = luminance(page.run(style.format(selector, "color")))
            light, deep = max(ground, ink), min(ground, ink)
            assert (light + 0.05) / (deep + 0.05) >= 4.5, (dark, selector)
        replay = colour_at(page, "timeline", 4 / 8, 1.5 / 3)
        page.run(
            "void (window.changed = new Promise((done) => "
            "matchMedia('(prefers-color-scheme: dark)').addEventListener('change',"
            " () => requestAnimationFrame(done))))"
        )
        page.dark(not dark)
        page.run("window.changed")
        assert colour_at(page, "timeline", 4 / 8, 1.5 / 3) != replay, "the charts follow a change"
    assert grounds[0] > 0.9 and grounds[1] < 0.02


def test_a_narrow_window_does_not_scroll_sideways(show: Open) -> None:
    page = show(TWO_ROWS, TWO_EVENTS, width=390, height=800)
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert hover(page, "timeline", 4 / 8, 1.5 / 3)[1] == "replay: 1.000 ms"
