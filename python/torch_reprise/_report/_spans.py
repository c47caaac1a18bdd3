"""What lasts: forward, replay and backward of each segment, from events that come in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import Events

KINDS = ("forward", "replay", "backward")


class Span(NamedTuple):
    """One of :data:`KINDS` of the segment with this row; seconds since the recording began."""

    begin: float
    end: float
    row: int
    kind: str
    thread: int
    """Where it began."""


def last_time(events: Events) -> float:
    """When the last event happened; 0 if nothing did."""
    return max((event.time for one in events for event in one), default=0.0)


def first_time(events: Events) -> float:
    """When the first event happened; 0 if nothing did."""
    return min((event.time for one in events for event in one), default=0.0)


def spans(events: Events) -> list[Span]:
    """All spans by their begin, outer ones first. What is still going on ends with the last event.

    Replays of one segment may overlap on several threads, so an end belongs to the last begin on
    its own thread. A backward ends where its last tensor was used or its graph task ended, which
    may be another thread: there an end belongs to the last begin.
    """
    found: list[Span] = []
    last = last_time(events)
    for row, own in enumerate(events):
        begun: list[tuple[str, int, float]] = []
        for event in own:
            if event.kind in KINDS:
                begun.append((event.kind, event.thread, event.time))
                continue
            kind, _, end = event.kind.rpartition(" ")
            if end != "end" or kind not in KINDS:
                continue
            for i in reversed(range(len(begun))):
                begun_kind, thread, begin = begun[i]
                if begun_kind == kind and (kind == "backward" or thread == event.thread):
                    del begun[i]
                    found.append(Span(begin, event.time, row, kind, thread))
                    break
        found += [Span(begin, last, row, kind, thread) for kind, thread, begin in begun]
    return sorted(found, key=lambda span: (span.begin, -span.end, span.row))


def lanes(of: Sequence[Span]) -> list[int]:
    """A lane for each span (in the order of :func:`spans`), counted from 0 on each thread.

    The spans of one lane lie in or beside each other, as viewers of traces want it. Backwards of
    two segments can overlap, for the engine takes the nodes of two branches in turns.
    """
    open_ends: dict[int, list[list[float]]] = {}  # a stack for each lane of each thread
    result = []
    for span in of:
        stacks = open_ends.setdefault(span.thread, [])
        for stack in stacks:
            while stack and stack[-1] <= span.begin:
                stack.pop()
        fitting = (i for i, stack in enumerate(stacks) if not stack or span.end <= stack[-1])
        lane = next(fitting, len(stacks))
        if lane == len(stacks):
            stacks.append([])
        stacks[lane].append(span.end)
        result.append(lane)
    return result


def covered(of: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was going on."""
    total, until = 0.0, float("-inf")
    for span in sorted(of):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total
