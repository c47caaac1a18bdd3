"""The record of all segments: what is alive, what was replayed, what it cost.

    >>> from torch_reprise import ledger
    >>> with ledger.record() as r:          # doctest: +SKIP
    ...     loss = model(x).sum()
    ...     loss.backward()
    >>> print(r)                            # doctest: +SKIP

Counters cost a segment a few nanoseconds; a recording costs a microsecond per
segment while it is on, and nothing when it is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from . import _C

__all__ = [
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
    """Bytes that live segments keep for random generators; shared states count once.

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


class Recording:
    """What :func:`record` gives: rows in the order in which the segments began.

    Replays that happen after the ``with`` block still show up in ``rows``.
    """

    def __init__(self) -> None:
        self._recording = _C.start_recording()

    def _stop(self) -> None:
        _C.stop_recording(self._recording)

    @property
    def rows(self) -> list[Row]:
        return [Row(*values) for values in self._recording.rows()]

    def __str__(self) -> str:
        header = (
            "segment",
            "depth",
            "form",
            "slots",
            "not saved",
            "drew from",
            "forward ms",
            "replay ms",
            "replays",
        )
        lines = [header]
        for row in self.rows:
            lines.append(
                (
                    row.name,
                    str(row.depth),
                    "reentrant" if row.reentrant else "hooks",
                    str(row.slots),
                    _readable(row.bytes),
                    ", ".join(row.generators) or "-",
                    f"{row.forward_ms:.3f}",
                    f"{row.replay_ms:.3f}",
                    str(row.replays),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        left = {0, 2, 5}
        text = []
        for line in lines:
            cells = [
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            text.append("  ".join(cells).rstrip())
        text.insert(1, "-" * max(len(line) for line in text))
        return "\n".join(text)


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@contextmanager
def record() -> Iterator[Recording]:
    """Collects a row for each segment that begins in the block, on any thread."""
    recording = Recording()
    try:
        yield recording
    finally:
        recording._stop()
