"""Recordings made by hand: rows and events that say exactly what the pictures have to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_reprise import ledger
from torch_reprise.ledger import Event, Row

# (milliseconds, kind[, bytes[, storage[, thread]]])
Note = tuple[Any, ...]

SECOND = 10**9


def row(name: str = "f", **fields: Any) -> Row:
    plain = Row(
        name=name,
        depth=0,
        reentrant=False,
        slots=1,
        bytes=0,
        generators=(),
        forward_ms=1.0,
        replay_ms=0.0,
        replays=0,
    )
    return plain._replace(**fields)


def events(*of_rows: Sequence[Note]) -> list[list[Event]]:
    made = []
    for notes in of_rows:
        own = []
        for note in notes:
            at, kind, size, storage, thread = (*note, *(0, 0, 1)[len(note) - 2 :])
            own.append(Event(at / 1e3, kind, thread, size, storage))
        made.append(own)
    return made


class _Native:
    """What the extension gives for a recording."""

    start_ns = 5 * SECOND

    def __init__(self, rows: Sequence[Row], of_rows: Sequence[Sequence[Event]]) -> None:
        self._rows, self._events = rows, of_rows

    def rows(self) -> list[tuple[Any, ...]]:
        return [tuple(one) for one in self._rows]

    def events(self) -> list[list[tuple[Any, ...]]]:
        return [
            [(self.start_ns + round(e.time * SECOND), *e[1:]) for e in own] for own in self._events
        ]


def recording(
    rows: Sequence[Row], of_rows: Sequence[Sequence[Event]] | None = None
) -> ledger.Recording:
    """As if these segments had been recorded."""
    made = ledger.Recording.__new__(ledger.Recording)
    made._recording = _Native(rows, events(*([()] * len(rows))) if of_rows is None else of_rows)
    return made


# Two segments, the second one replayed and used. In milliseconds: held 100 from 0, 300 from 2,
# 700 from 4 to 5, 300 until 6, 100 until 8; without 1000 from 1, 1500 from 3, 1000 from 6.
TWO_ROWS = [
    row("first", bytes=1000, generators=("cpu",), forward_ms=1.5),
    row("second", bytes=500, forward_ms=0.5, replay_ms=1.0, replays=1),
]
TWO_EVENTS = events(
    [
        (0, "hold", 100, 11),
        (0, "forward"),
        (1, "save", 1000),
        (1.5, "forward end"),
        (8, "drop", 100, 11),
    ],
    [
        (2, "hold", 200, 22),
        (2, "forward"),
        (3, "save", 500),
        (3.5, "forward end"),
        (3.5, "replay"),
        (4, "hold", 400, 33),
        (4.5, "replay end"),
        (4.5, "backward"),
        (5, "drop", 400, 33),
        (6, "free", 500),
        (6, "drop", 200, 22),
        (6, "backward end"),
    ],
)
