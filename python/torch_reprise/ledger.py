"""The record of all segments: what is alive, what was replayed, what it cost.

    >>> from torch_reprise import ledger
    >>> with ledger.record() as r:          # doctest: +SKIP
    ...     loss = model(x).sum()
    ...     loss.backward()
    >>> print(r)                            # doctest: +SKIP
    >>> r.save("report.html")               # doctest: +SKIP

Counters cost a segment a few nanoseconds; a recording costs a microsecond per
segment and, for its events, up to one per saved tensor while it is on, and nothing
when it is off (``python -m torch_reprise bench replay``). Nothing here prints. What
draws is imported when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _C
from ._errors import require_bool

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Event",
    "Recording",
    "Row",
    "bytes_not_saved",
    "live_segments",
    "live_slots",
    "record",
    "replays",
    "segments",
    "stashed_bytes",
]


def live_segments() -> int:
    """How many segments are held by graphs (or are running) now."""
    return int(_C.live_segments())


def live_slots() -> int:
    """How many saved tensors those segments stand for."""
    return int(_C.live_slots())


def stashed_bytes() -> int:
    """Bytes that live segments keep of random states and of buffers; shared states count once.

    A segment that drew no number keeps none. While a forward runs its segment
    holds all generators' states, since it is not known yet which will move.
    """
    return int(_C.stashed_bytes())


def segments() -> int:
    """Segments begun since import."""
    return int(_C.segments())


def replays() -> int:
    """Replays since import, of both forms."""
    return int(_C.replays())


def bytes_not_saved() -> int:
    """Bytes of tensors that autograd asked to save and segments dropped, since import.

    Parameters and what shares memory with a segment's inputs do not count, for
    they stay anyway. A tensor that two operators save counts twice.
    """
    return int(_C.bytes_not_saved())


class Row(NamedTuple):
    """One segment of a recording."""

    name: str
    """What was checkpointed: the function's qualified name or the module's class."""
    depth: int
    """How many segments lie around it; 0 for an outermost one."""
    reentrant: bool
    slots: int
    """Saved tensors that it stands for (none in the reentrant form)."""
    bytes: int
    """As in :func:`bytes_not_saved`, for this segment."""
    generators: tuple[str, ...]
    """The generators that its forward moved, e.g. ``("cpu", "cuda:0")``."""
    forward_ms: float
    """Wall time of the forward in milliseconds, on the host."""
    replay_ms: float
    """Wall time of all its replays in milliseconds, on the host."""
    replays: int


class Event(NamedTuple):
    """Something that happened to one segment of a recording.

    ``kind`` is one of

    * ``"forward"``, ``"replay"``, ``"backward"`` and each of them with ``" end"``;
    * ``"hold"``, ``"drop"``: the segment keeps a storage of so many bytes, and does not any more:
      inputs, and what a replay computed until backward takes it. Parameters do not count. Several
      segments may hold one storage;
    * ``"save"``, ``"free"``: autograd would have kept a tensor of so many bytes from here to
      there without checkpointing (not known for the reentrant form).
    """

    time: float
    """Seconds since the recording began."""
    kind: str
    thread: int
    """As profilers of torch number threads."""
    bytes: int
    storage: int
    """Which storage, as long as a segment holds it; otherwise 0."""


class Recording:
    """What :func:`record` gives: rows in the order in which the segments began.

    Replays that happen after the ``with`` block still show up.

    * ``rows``: a :class:`Row` for each segment; ``events``: for each row its :class:`Event` s.
    * ``print(r)``: the rows as plain ASCII text; ``table()``: as a table of rich.
    * ``trace()``: forward, replay and backward of each segment and the bytes held, in the trace
      event format that Perfetto and ``chrome://tracing`` open.
    * ``save(path)``: by its suffix ``.html`` (a page with everything, which needs no network),
      ``.png``, ``.json`` (the trace), ``.csv`` (the rows) or ``.txt`` (what ``print`` shows).
    """

    def __init__(self, limit: int | None = None, events: bool = True) -> None:
        self._recording = _C.start_recording(limit, events)

    def _stop(self) -> None:
        _C.stop_recording(self._recording)

    @property
    def rows(self) -> list[Row]:
        return [Row(*values) for values in self._recording.rows()]

    @property
    def events(self) -> list[list[Event]]:
        """A list for each row, in the order in which things happened."""
        start = self._recording.start_ns
        return [
            [
                Event((ns - start) / 1e9, kind, thread, size, storage)
                for ns, kind, thread, size, storage in of_row
            ]
            for of_row in self._recording.events()
        ]

    def _both(self) -> tuple[list[Row], list[list[Event]]]:
        # Read while segments begin on other threads, the second may have more.
        rows = self.rows
        events = self.events[: len(rows)]
        return rows, events

    def table(self) -> Table:
        """The rows as a ``rich.table.Table``; ImportError if rich is not installed."""
        from ._report._tables import as_rich

        return as_rich(self.rows)

    def trace(self) -> dict[str, Any]:
        """The recording in the trace event format, ready for ``json.dump``.

        Complete events for forward, replay and backward on the threads where they began (those
        that overlap get a track of their own), and counters for the bytes held and the bytes
        without checkpointing.
        """
        from ._report._trace import trace

        return trace(*self._both())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes what the suffix of ``path`` names and returns the path.

        ValueError for a suffix that is not known, ImportError if ``.png`` is asked for and
        matplotlib is not installed.
        """
        from ._report import save

        target = Path(path)
        save(*self._both(), target)
        return target

    def __str__(self) -> str:
        from ._report._tables import as_text

        return as_text(self.rows)


@contextmanager
def record(limit: int | None = None, *, events: bool = True) -> Iterator[Recording]:
    """Collects a row for each segment that begins in the block, on any thread.

    ``limit``: only for the first so many segments. ``events=False``: rows only, which costs less
    time and memory; the pictures then have no time axis.

    Raises:
        TypeError, ValueError: ``limit`` is no number of segments, or ``events`` no bool.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"limit must be an int or None, got {type(limit).__name__}: {limit!r:.100}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    require_bool("events", events)
    recording = Recording(limit, events)
    try:
        yield recording
    finally:
        recording._stop()
