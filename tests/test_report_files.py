"""What a recording is written to: the trace, tables, every suffix of `save`, and silence."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import leaf, message_of
from report.made import TWO_EVENTS, TWO_ROWS, events, recording, row
from torch import Tensor, nn
from torch.nn.functional import dropout

from torch_reprise import checkpoint, ledger
from torch_reprise._report._picture import picture
from torch_reprise._report._tables import ascii_only

ROOT = Path(__file__).resolve().parent.parent
MARKUP = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def quiet(x: Tensor) -> Tensor:
    return torch.tanh(x).sigmoid()


def noisy(x: Tensor) -> Tensor:
    return dropout(torch.tanh(x), 0.5)


def call(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


# The trace.


def test_the_trace_has_spans_on_threads_and_counters() -> None:
    found = recording(TWO_ROWS, TWO_EVENTS).trace()
    assert json.loads(json.dumps(found)) == found
    events_of = found["traceEvents"]
    for event in events_of:
        assert {"ph", "name", "pid", "tid", "args"} <= event.keys()
        assert event["ph"] in "XCM" and type(event["pid"]) is int and type(event["tid"]) is int
        if event["ph"] != "M":
            assert event["ts"] >= 0
    complete = [
        (e["name"], e["cat"], round(e["ts"]), round(e["dur"]), e["args"]["segment"])
        for e in events_of
        if e["ph"] == "X"
    ]
    assert complete == [
        ("forward first", "forward", 0, 1500, 1),
        ("forward second", "forward", 2000, 1500, 2),
        ("replay second", "replay", 3500, 1000, 2),
        ("backward second", "backward", 4500, 1500, 2),
    ]
    counted: dict[str, list[tuple[int, int]]] = {}
    for e in events_of:
        if e["ph"] == "C":
            counted.setdefault(e["name"], []).append((round(e["ts"]), e["args"]["bytes"]))
    assert counted == {
        "bytes held": [
            (0, 100), (2000, 300), (4000, 700), (5000, 300), (6000, 100), (8000, 0),
        ],
        "bytes without checkpointing": [(0, 0), (1000, 1000), (3000, 1500), (6000, 1000)],
    }  # fmt: skip
    names = {e["tid"]: e["args"]["name"] for e in events_of if e["name"] == "thread_name"}
    assert names == {1000: "thread 1"}
    assert {e["tid"] for e in events_of if e["ph"] == "X"} == {1000}


def test_the_spans_of_a_track_lie_in_or_beside_each_other() -> None:
    def outer(x: Tensor) -> Tensor:
        return call(quiet, x.sin()) + call(noisy, x.cos())

    with ledger.record() as r:
        x = leaf(8) * 1
        (call(outer, x) + call(quiet, x)).sum().backward()
    tracks: dict[int, list[tuple[float, float]]] = {}
    for e in r.trace()["traceEvents"]:
        if e["ph"] == "X":
            tracks.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"]))
    assert sum(len(track) for track in tracks.values()) == 12
    for track in tracks.values():
        for a, b in track:
            for c, d in track:
                assert b <= c or d <= a or (a <= c and d <= b) or (c <= a and b <= d)


def test_counters_of_a_long_recording_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_reprise._report._trace._MOST_POINTS", 30)
    notes = [(k, "hold" if k % 2 == 0 else "drop", 8, k // 2 + 1) for k in range(1000)]
    counters = [
        e for e in recording([row()], events(notes)).trace()["traceEvents"] if e["ph"] == "C"
    ]
    assert 10 < len(counters) < 35
    assert max(e["args"]["bytes"] for e in counters) == 8


# Events, tables and files.


def test_events_are_seconds_since_the_beginning() -> None:
    r = recording(TWO_ROWS, TWO_EVENTS)
    assert r.events == TWO_EVENTS
    with ledger.record() as real:
        call(quiet, leaf(8)).sum().backward()
    (own,) = real.events
    assert own[0].kind == "forward" and type(own[0]) is ledger.Event
    times = [event.time for event in own]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 3600


def test_a_recording_can_be_limited_and_go_without_events() -> None:
    with ledger.record(limit=2) as few, ledger.record(events=False) as rows_only:
        for _ in range(3):
            call(quiet, leaf(8))
    assert [len(few.rows), len(few.events)] == [2, 2] and all(few.events)
    assert rows_only.events == [[], [], []]
    assert "without events" in picture(rows_only.rows, rows_only.events).notes[0]


def test_printing_is_plain_ascii() -> None:
    text = str(recording([row("Bl\u00f6ck\n\u0634\x1b[31m"), row("f")]))
    assert text.isascii() and len(text.splitlines()) == 4
    assert "Bl\\xf6ck\\n\\u0634\\x1b[31m" in text
    assert ascii_only("plain.<locals>.f") == "plain.<locals>.f"


def test_the_table_of_rich_shows_names_as_they_are() -> None:
    console = pytest.importorskip("rich.console")
    table = recording([*TWO_ROWS, row("[red]f[/red]\x1b[31m")]).table()
    assert table.row_count == 3
    out = console.Console(width=160, record=True, file=open("/dev/null", "w"))
    with out.file:
        out.print(table)
    text = out.export_text()
    assert "[red]f[/red]?[31m" in text and "first" in text and "not saved" in text


def test_a_csv_has_the_fields_of_the_rows(tmp_path: Path) -> None:
    rows = [*TWO_ROWS, row('a "b", c\nd', generators=("cpu", "cuda:0"), reentrant=True)]
    path = recording(rows).save(tmp_path / "rows.csv")
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(ledger.Row._fields)
    assert [one["name"] for one in found] == [one.name for one in rows]
    assert [float(one["forward_ms"]) for one in found] == [one.forward_ms for one in rows]
    assert [int(one["bytes"]) for one in found] == [one.bytes for one in rows]
    assert (found[2]["generators"], found[2]["reentrant"]) == ("cpu cuda:0", "True")


def test_the_suffix_says_what_is_written(tmp_path: Path) -> None:
    r = recording(TWO_ROWS, TWO_EVENTS)
    for name in ("a.html", "a.json", "a.csv", "a.txt", "B.TXT"):
        path = r.save(str(tmp_path / name))
        assert path == tmp_path / name and path.stat().st_size > 0
    assert json.loads((tmp_path / "a.json").read_text()) == r.trace()
    assert (tmp_path / "a.txt").read_text() == f"{r}\n"


@pytest.mark.parametrize("name", ["report.pdf", "report", "report."])
def test_an_unknown_suffix_is_an_error_that_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    text = message_of(ValueError, lambda: recording([]).save(tmp_path / name))
    assert re.search(r"\.html, \.json, \.png, \.csv, \.txt; got '.*report", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_what_is_not_installed_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    r = recording(TWO_ROWS, TWO_EVENTS)
    wanted = {"matplotlib": lambda: r.save(tmp_path / "a.png"), "rich": r.table}[missing]
    text = message_of(ImportError, wanted)
    assert f"needs {missing}" in text and "pip install 'torch-reprise[demo]'" in text
    r.save(tmp_path / "a.html")


def test_a_page_holds_no_markup_of_a_name(tmp_path: Path) -> None:
    r = recording([row(MARKUP), row("<!--<script>"), row("\ud800 half")], events([], [], []))
    text = r.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 4, "three scripts and the data"
    assert "<img" not in text and "<!--" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["names"] == [MARKUP, "<!--<script>", "\ud800 half"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), "nothing to load"


# The PNG.


def colours_of(path: Path) -> tuple[tuple[int, int], set[str]]:
    image = pytest.importorskip("PIL.Image", reason="comes with matplotlib").open(path)
    assert image.format == "PNG"
    found = image.convert("RGB").getcolors(image.width * image.height)
    return image.size, {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in found}


def test_a_png_is_a_picture_of_the_layers_and_the_spans(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="a PNG is drawn by matplotlib")
    size, colours = colours_of(recording(TWO_ROWS, TWO_EVENTS).save(tmp_path / "a.png"))
    assert size == (1725, 970)
    shown = picture(TWO_ROWS, TWO_EVENTS)
    assert {layer.colour for layer in shown.layers} < colours
    assert {"#9aa7b4", "#ee7f35", "#4d5f73"} < colours, "forward, replay and backward"


@pytest.mark.parametrize("rows", [0, 1, 3, 30, 400])
def test_a_png_grows_with_its_segments_up_to_a_size(rows: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="a PNG is drawn by matplotlib")
    names = ["f", "$x^", "_hidden", "\u6ce8\u610f\n\x1b", "n" * 300, MARKUP]
    r = recording(
        [row(names[i % 6], depth=i % 3) for i in range(rows)],
        events(
            *[[(i, "hold", 9, i + 1), (i, "forward"), (i + 2, "save", 99)] for i in range(rows)]
        ),
    )
    (width, height), _ = colours_of(r.save(tmp_path / "a.png"))
    assert width == 1725
    few = {0: 970, 1: 1285, 3: 1285, 30: 2055}  # without events there is no second view
    assert height == few.get(rows, 1695)


# Silence.

QUIET = """
import sys
import torch_reprise, torch
from torch_reprise import ledger
optional = ("matplotlib", "rich", "torch_reprise._report")
assert not [name for name in optional if name in sys.modules], "imported too early"
with ledger.record() as r:
    x = torch.randn(8, requires_grad=True)
    torch_reprise.checkpoint(torch.tanh, x * 1, use_reentrant=False).sum().backward()
for suffix in ("html", "json", "csv", "txt"):
    r.save(sys.argv[1] + "/a." + suffix)
str(r), r.trace(), r.rows, r.events
assert "matplotlib" not in sys.modules and "rich" not in sys.modules
try:
    import matplotlib
except ImportError:
    sys.exit()
settings = matplotlib.rcParams
before = {name: settings[name] for name in settings if name != "backend"}  # read, it is chosen
r.save(sys.argv[1] + "/a.png")
assert "matplotlib.pyplot" not in sys.modules
assert {name: settings[name] for name in before} == before
"""


def test_nothing_is_printed_and_nothing_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert {path.suffix for path in tmp_path.iterdir()} >= {".html", ".json", ".csv", ".txt"}


# The guide.


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the guide draws a PNG")
    rich = pytest.importorskip("rich", reason="the guide prints a table")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rich, "print", lambda *args: None)
    text = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {"nn": nn}
    for code in blocks:
        exec(compile(code, "docs/ledger.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "report.png", "trace.json"}
    names.clear()
