"""Bytes over time: what segments hold, each storage once, and what autograd would have kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from . import Events

if TYPE_CHECKING:
    from torch_reprise.ledger import Event


class Change(NamedTuple):
    """From ``time`` on, ``row`` accounts for so many bytes more (or fewer)."""

    time: float
    row: int
    held: int
    without: int


class _Owners:
    """Which rows have which storage; what that does to the sums of bytes."""

    def __init__(self) -> None:
        # For each storage its owners, in the order in which they came: row -> [how often, bytes].
        self._of: dict[int, dict[int, list[int]]] = {}

    def begin(self, event: Event, row: int) -> list[tuple[int, int]]:
        if event.storage == 0:
            return [(row, event.bytes)]
        owners = self._of.setdefault(event.storage, {})
        if row in owners:
            owners[row][0] += 1
            return []
        is_first = not owners
        owners[row] = [1, event.bytes]
        return [(row, event.bytes)] if is_first else []

    def end(self, event: Event, row: int) -> list[tuple[int, int]]:
        if event.storage == 0:
            return [(row, -event.bytes)]
        owners = self._of.get(event.storage, {})
        if row not in owners:
            return []
        first = next(iter(owners))
        owners[row][0] -= 1
        if owners[row][0] > 0:
            return []
        _, size = owners.pop(row)
        if not owners:
            del self._of[event.storage]
        if row != first:
            return []
        heirs = [(heir, its_size) for heir, (_, its_size) in owners.items()]
        return [(row, -size), *heirs[:1]]


def changes(events: Events) -> list[Change]:
    """What the events do to the sums, in the order of their times.

    A storage that several segments hold, or whose tensors autograd would have kept in several,
    counts for the one that was first; when that one drops it, for the next.
    """
    merged = sorted(
        ((event, row) for row, own in enumerate(events) for event in own),
        key=lambda pair: pair[0].time,  # stable: events of one segment stay in their order
    )
    held, saved = _Owners(), _Owners()
    found: list[Change] = []
    for event, row in merged:
        if event.kind == "save":
            found += [Change(event.time, r, 0, size) for r, size in saved.begin(event, row)]
        elif event.kind == "free":
            found += [Change(event.time, r, 0, size) for r, size in saved.end(event, row)]
        elif event.kind == "hold":
            found += [Change(event.time, r, size, 0) for r, size in held.begin(event, row)]
        elif event.kind == "drop":
            found += [Change(event.time, r, size, 0) for r, size in held.end(event, row)]
    return found


class Series(NamedTuple):
    """Steps: what a point says holds until the next point."""

    times: list[float]
    held: list[list[int]]
    """For each layer the bytes at each time."""
    without: list[int]
    """Bytes that autograd would have kept without checkpointing, at each time."""


def series(of: Sequence[Change], layer_of: Sequence[int], layers: int, limit: int) -> Series:
    """The sums of each layer; ``layer_of`` has the layer of each row.

    If there are many more points than ``limit``, of each stretch of time stay its end and the two
    points where the sums are largest, so that no peak is lost.
    """
    ends = [i for i in range(len(of)) if i + 1 == len(of) or of[i + 1].time != of[i].time]
    kept = set(_kept(of, ends, limit))
    result = Series([], [[] for _ in range(layers)], [])
    now, without = [0] * layers, 0
    for i, change in enumerate(of):
        now[layer_of[change.row]] += change.held
        without += change.without
        if i in kept:
            result.times.append(change.time)
            result.without.append(without)
            for values, value in zip(result.held, now, strict=True):
                values.append(value)
    return result


def _kept(of: Sequence[Change], ends: Sequence[int], limit: int) -> list[int]:
    if len(ends) <= limit:
        return list(ends)
    held = list(accumulate(change.held for change in of))
    without = list(accumulate(change.without for change in of))
    stretches: dict[int, list[int]] = {}
    first, last = of[0].time, of[-1].time
    for i in ends:
        stretches.setdefault(int((of[i].time - first) / (last - first) * limit / 3), []).append(i)
    kept = {ends[0]}
    for inside in stretches.values():
        kept |= {max(inside, key=held.__getitem__), max(inside, key=without.__getitem__)}
        kept.add(inside[-1])
    return sorted(kept)


class Peak(NamedTuple):
    """The largest value of a sum and when it was reached first."""

    time: float
    bytes: int


def peaks(of: Sequence[Change]) -> tuple[Peak, Peak]:
    """Of what is held, and of what would be held without checkpointing."""
    best = [Peak(0.0, 0), Peak(0.0, 0)]
    sums = [0, 0]
    for i, change in enumerate(of):
        sums[0] += change.held
        sums[1] += change.without
        if i + 1 < len(of) and of[i + 1].time == change.time:
            continue  # what happens at once counts when all of it has happened
        for which in (0, 1):
            if sums[which] > best[which].bytes:
                best[which] = Peak(change.time, sums[which])
    return best[0], best[1]


def peaks_of_rows(of: Sequence[Change], rows: int) -> list[int]:
    """The largest number of bytes that each row accounted for."""
    now, best = [0] * rows, [0] * rows
    for change in of:
        now[change.row] += change.held
        best[change.row] = max(best[change.row], now[change.row])
    return best
