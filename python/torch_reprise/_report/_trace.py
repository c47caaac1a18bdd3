"""A recording in the trace event format of Chrome, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import Events
from ._series import changes, series
from ._spans import lanes, spans

if TYPE_CHECKING:
    from torch_reprise.ledger import Row

_MOST_POINTS = 20_000  # of a counter; viewers draw no more, and files stay small
_LANES = 1000  # more than a thread has: a track's number is thread * _LANES + lane


def trace(rows: Sequence[Row], events: Events) -> dict[str, Any]:
    """``{"traceEvents": [...], ...}``; times are microseconds since the recording began."""
    pid = os.getpid()
    found: list[dict[str, Any]] = []
    tracks: dict[int, str] = {}
    all_spans = spans(events)
    for span, lane in zip(all_spans, lanes(all_spans), strict=True):
        row = rows[span.row]
        track = span.thread * _LANES + lane
        tracks[track] = f"thread {span.thread}" + (f", overlapping {lane}" if lane else "")
        found.append(
            {
                "ph": "X",
                "name": f"{span.kind} {row.name}",
                "cat": span.kind,
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "pid": pid,
                "tid": track,
                "args": {
                    "segment": span.row + 1,
                    "depth": row.depth,
                    "form": "reentrant" if row.reentrant else "hooks",
                    "bytes not saved": row.bytes,
                    "drew from": list(row.generators),
                },
            }
        )
    sums = series(changes(events), [0] * len(rows), 1, _MOST_POINTS)
    counters = (("bytes held", sums.held[0]), ("bytes without checkpointing", sums.without))
    for name, values in counters:
        before = None
        for time, value in zip(sums.times, values, strict=True):
            if value != before:
                found.append(
                    {
                        "ph": "C",
                        "name": name,
                        "cat": "memory",
                        "ts": time * 1e6,
                        "pid": pid,
                        "tid": 0,
                        "args": {"bytes": value},
                    }
                )
            before = value
    names: list[tuple[str, int, dict[str, Any]]] = [("process_name", 0, {"name": "torch_reprise"})]
    for track in sorted(tracks):
        names.append(("thread_name", track, {"name": tracks[track]}))
        names.append(("thread_sort_index", track, {"sort_index": track}))
    head = [
        {"ph": "M", "name": name, "pid": pid, "tid": track, "args": args}
        for name, track, args in names
    ]
    return {"traceEvents": head + found, "displayTimeUnit": "ms"}
