"""What a recording's pictures are made of: bytes that add up, spans, layers and the summary."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import checkpointed, leaf
from report.made import TWO_EVENTS, TWO_ROWS, events, row
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import checkpoint, ledger
from torch_reprise._report._picture import MOST_LAYERS, picture
from torch_reprise._report._series import changes, peaks, series
from torch_reprise._report._spans import covered, lanes, spans


def quiet(x: Tensor) -> Tensor:
    return torch.tanh(x).sigmoid()


def noisy(x: Tensor) -> Tensor:
    return dropout(torch.tanh(x), 0.5)


def call(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def held(of: list[list[ledger.Event]]) -> list[tuple[float, int]]:
    """(milliseconds, bytes) at each point at which something changes."""
    sums = series(changes(of), [0] * len(of), 1, limit=10**6)
    return [(time * 1e3, value) for time, value in zip(sums.times, sums.held[0], strict=True)]


def without(of: list[list[ledger.Event]]) -> list[int]:
    return list(accumulate(change.without for change in changes(of) if change.without))


# What events add up to.


def test_the_bytes_of_a_step_add_up() -> None:
    found = held(TWO_EVENTS)
    assert found == [(0, 100), (1, 100), (2, 300), (3, 300), (4, 700), (5, 300), (6, 100), (8, 0)]
    assert without(TWO_EVENTS) == [1000, 1500, 1000]
    peak, peak_without = peaks(changes(TWO_EVENTS))
    assert peak == (0.004, 700) and peak_without == (0.003, 1500)


def test_each_layer_has_its_share() -> None:
    sums = series(changes(TWO_EVENTS), [0, 1], 2, limit=100)
    assert sums.held == [[100, 100, 100, 100, 100, 100, 100, 0], [0, 0, 200, 200, 600, 200, 0, 0]]
    assert sums.without == [0, 1000, 1000, 1500, 1500, 1500, 1000, 1000]


def test_a_storage_that_two_segments_hold_counts_once_for_the_first_and_then_for_the_other() -> (
    None
):
    of = events(
        [(0, "hold", 64, 7), (3, "drop", 64, 7)],
        [(1, "hold", 64, 7), (4, "drop", 64, 7)],
        [(2, "hold", 64, 8), (5, "hold", 64, 7), (6, "drop", 64, 7), (7, "drop", 64, 8)],
    )
    sums = series(changes(of), [0, 1, 2], 3, limit=100)
    assert [time * 1e3 for time in sums.times] == [0, 2, 3, 4, 5, 6, 7]
    assert sums.held == [
        [64, 64, 0, 0, 0, 0, 0],
        [0, 0, 64, 0, 0, 0, 0],
        [0, 64, 64, 64, 128, 64, 0],
    ]


def test_a_storage_held_twice_by_one_segment_is_dropped_with_the_second_drop() -> None:
    of = events([(0, "hold", 8, 7), (1, "hold", 8, 7), (2, "drop", 8, 7), (3, "drop", 8, 7)])
    assert held(of) == [(0, 8), (3, 0)]


def test_what_happens_at_once_is_one_point_and_no_peak_of_its_own() -> None:
    of = events(
        [(0, "hold", 10, 1), (1, "drop", 10, 1)],
        [(1, "hold", 20, 2), (1, "drop", 20, 2), (1, "hold", 5, 3)],
    )
    assert held(of) == [(0, 10), (1, 5)]
    assert peaks(changes(of))[0] == (0.0, 10)


def test_a_shorter_series_keeps_its_peaks_and_its_end() -> None:
    notes: list[Any] = []
    for k in range(3000):
        size = 10_000 if k == 1234 else 7 + k % 5
        notes += [(k, "hold", size, k + 1), (k + 0.5, "drop", size, k + 1)]
        notes += [(k, "save", 1), *([(k, "save", 5000), (k + 0.5, "free", 5000)] * (k == 2345))]
    of = changes(events(sorted(notes, key=lambda note: note[0])))
    sums = series(of, [0], 1, limit=90)
    full = series(of, [0], 1, limit=10**6)
    assert len(full.times) == 6000 and 60 < len(sums.times) <= 93
    assert max(sums.held[0]) == 10_000 and max(sums.without) == max(full.without) == 7346
    assert (sums.times[0], sums.times[-1]) == (full.times[0], full.times[-1])
    assert (sums.held[0][-1], sums.without[-1]) == (0, 3000)
    points = set(zip(full.times, full.held[0], full.without, strict=True))
    assert set(zip(sums.times, sums.held[0], sums.without, strict=True)) <= points


def test_a_real_segment_holds_its_input_and_then_what_it_recomputes() -> None:
    x = leaf(1000) * 1  # an inner node: a leaf is there anyway and does not count
    with ledger.record() as r:
        out = call(quiet, x)
        (own,) = r.events
        assert [(e.kind, e.bytes) for e in own if e.kind in ("hold", "drop")] == [("hold", 4000)]
        assert without(r.events) == [4000, 8000], "the results of tanh and of sigmoid"
        out.sum().backward()
        del out
    sizes = [value for _, value in held(r.events)]
    assert max(sizes) == 12_000 and sizes[-1] == 0, "the input and both results"
    assert without(r.events) == [4000, 8000, 4000, 0]
    assert peaks(changes(r.events))[0].bytes == 12_000


def test_one_input_of_two_real_segments_counts_once() -> None:
    x = leaf(1000) * 1
    with ledger.record() as r:
        first, second = call(quiet, x), call(noisy, x)
        assert [value for _, value in held(r.events) if value][-1] == 4000
        shown = picture(r.rows, r.events)
        assert list(shown.row_peaks) == [4000, 0], "the first one has it"
        del first
        assert list(picture(r.rows, r.events).row_peaks) == [4000, 4000], "then the other"
        del second
    assert held(r.events)[-1][1] == 0


# Spans.


def test_pairs_of_events_are_spans() -> None:
    found = [(s.kind, s.row, s.begin * 1e3, s.end * 1e3) for s in spans(TWO_EVENTS)]
    assert found == [
        ("forward", 0, 0, 1.5),
        ("forward", 1, 2, 3.5),
        ("replay", 1, 3.5, 4.5),
        ("backward", 1, 4.5, 6),
    ]


def test_what_is_still_going_on_ends_with_the_last_event() -> None:
    of = events(
        [(0, "forward"), (1, "replay"), (2, "replay end")], [(1, "forward"), (7, "save", 1)]
    )
    assert [(s.kind, s.end * 1e3) for s in spans(of)] == [
        ("forward", 7),
        ("forward", 7),
        ("replay", 2),
    ]
    assert spans(events([(3, "replay end"), (4, "forward end")])) == [], "an end without a begin"


def test_replays_of_one_segment_on_two_threads_are_told_apart() -> None:
    of = events(
        [
            (0, "replay", 0, 0, 1),
            (1, "replay", 0, 0, 2),
            (2, "replay end", 0, 0, 1),
            (2, "backward", 0, 0, 1),
            (5, "replay end", 0, 0, 2),
            (6, "backward end", 0, 0, 3),
        ]
    )
    found = [(s.kind, s.thread, s.begin * 1e3, s.end * 1e3) for s in spans(of)]
    assert found == [("replay", 1, 0, 2), ("replay", 2, 1, 5), ("backward", 1, 2, 6)]


def test_spans_that_overlap_get_lanes_of_their_own() -> None:
    of = spans(
        events(
            [(0, "backward"), (10, "backward end")],
            [(1, "replay"), (4, "replay end")],
            [(3, "backward"), (12, "backward end")],
            [(10, "forward"), (11, "forward end")],
            [(3, "forward", 0, 0, 2), (12, "forward end", 0, 0, 2)],
        )
    )
    assert [(s.row, lane) for s, lane in zip(of, lanes(of), strict=True)] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (4, 0),
        (3, 0),
    ]


def test_time_in_replays_counts_a_moment_once() -> None:
    of = spans(events([(0, "replay"), (5, "replay end")], [(1, "replay"), (7, "replay end")]))
    assert covered(of) == pytest.approx(0.007, abs=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_a_real_step_has_a_forward_a_replay_and_a_backward(use_reentrant: bool) -> None:
    x = leaf(8) * 1
    with ledger.record() as r:
        out = checkpointed(use_reentrant=use_reentrant)(noisy, x)
        out.sum().backward()
        del out
    found = spans(r.events)
    assert [s.kind for s in found] == ["forward", "replay", "backward"]
    ends = [moment for s in found for moment in (s.begin, s.end)]
    assert ends == sorted(ends) and ends[0] >= 0, "one after the other"
    assert len({s.thread for s in found}) == 1


# Many segments.


def test_few_segments_have_a_layer_each_and_many_share() -> None:
    few = picture([row(f"f{i % 3}") for i in range(MOST_LAYERS)], events(*[()] * MOST_LAYERS))
    assert [layer.rows for layer in few.layers] == [(i,) for i in range(MOST_LAYERS)]
    assert len({layer.colour for layer in few.layers}) == MOST_LAYERS
    for names in (1, 3, 10, 11, 500):
        many = picture([row(f"f{i % names}") for i in range(5000)], events(*[()] * 5000))
        assert names < 10 or len(many.legend) == 10
        assert 20 <= len(many.layers) <= MOST_LAYERS
        assert sorted(i for layer in many.layers for i in layer.rows) == list(range(5000))
        assert all(i in many.layers[many.layer_of[i]].rows for i in range(5000))


def test_names_that_hold_little_share_a_layer() -> None:
    rows = [row(f"f{i}") for i in range(60)]
    of = events(*[[(i, "hold", 1 + 100 * (i % 10 == 0), i + 1)] for i in range(60)])
    shown = picture(rows, of)
    labels = [label for label, _ in shown.legend]
    assert {f"1 \u00d7 f{i}" for i in range(0, 60, 10)} < set(labels)
    assert "51 \u00d7 other functions" in labels


def test_more_spans_than_can_be_drawn_lose_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_reprise._report._picture._MOST_SPANS", 2)
    shown = picture(TWO_ROWS, TWO_EVENTS)
    assert [s.end - s.begin for s in shown.spans] == pytest.approx([0.0015, 0.0015], abs=1e-12)
    assert shown.notes == ["Of 4 spans the longest 2 are drawn."]


def test_the_summary_says_what_it_cost() -> None:
    assert picture(TWO_ROWS, TWO_EVENTS).summary == [
        ("segments", "2"),
        ("replays", "1"),
        ("time in replays", "12.5 % of 8.00 ms"),
        ("peak held", "700 B"),
        ("peak without checkpointing", "1.5 KiB"),
        ("drew from", "cpu"),
    ]
    nothing = picture([], [])
    assert dict(nothing.summary)["segments"] == "0" and "Nothing was recorded" in nothing.notes[0]


def test_the_reentrant_form_says_what_it_does_not_know() -> None:
    shown = picture([row(reentrant=True)], events([(0, "forward"), (1, "forward end")]))
    assert not shown.shows_without and "reentrant" in shown.notes[0]
    assert dict(shown.summary)["peak without checkpointing"] == "-"
