"""torch_reprise.ledger: counters of what is alive, totals, and rows of a recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Counted, both_forms, checkpointed, in_threads, leaf, message_of
from torch import Tensor, nn
from torch.nn.functional import dropout

import torch_reprise
from torch_reprise import GraphExecGroup, checkpoint, ledger


def quiet(x: Tensor) -> Tensor:
    return torch.tanh(x).sigmoid()


def noisy(x: Tensor) -> Tensor:
    return dropout(torch.tanh(x), 0.5)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


# Counters.


def test_counters_are_integers_that_begin_at_zero() -> None:
    assert torch_reprise.ledger is ledger
    for name in ("live_segments", "live_slots", "stashed_bytes"):
        value = getattr(ledger, name)()
        assert type(value) is int and value == 0, name
    for name in ("replays", "bytes_not_saved"):
        value = getattr(ledger, name)()
        assert type(value) is int and value >= 0, name


def test_live_segments_and_slots_follow_the_graph() -> None:
    x = leaf(8)
    outs = []
    for count in range(1, 4):
        outs.append(call(quiet, x))
        assert ledger.live_segments() == count
        assert ledger.live_slots() == 2 * count, "tanh and sigmoid each save their result"
    outs.pop().sum().backward()
    assert (ledger.live_segments(), ledger.live_slots()) == (2, 4)
    outs.pop().sum().backward(retain_graph=True)
    assert (ledger.live_segments(), ledger.live_slots()) == (1, 2), "the dropped graph is gone"
    outs.clear()
    assert (ledger.live_segments(), ledger.live_slots()) == (0, 0)


def test_a_nested_segment_counts_for_itself() -> None:
    x = leaf(8)
    out = call(lambda t: call(quiet, t.sin()).cos(), x)
    assert ledger.live_segments() == 2
    out.sum().backward()
    assert ledger.live_segments() == 0


def test_a_slot_of_a_dropped_branch_is_not_live() -> None:
    x = leaf(8)
    first, second = call(lambda t: (t.tanh(), t.sigmoid()), x)
    assert ledger.live_slots() == 2
    del first
    assert ledger.live_slots() == 1
    second.sum().backward()
    assert ledger.live_slots() == 0


@both_forms
def test_replays_are_counted_as_the_function_is_called(use_reentrant: bool) -> None:
    function = Counted(noisy)
    x = leaf(8)
    before = ledger.replays()
    out = checkpointed(use_reentrant=use_reentrant)(function, x)
    assert (function.calls, ledger.replays()) == (1, before)
    for count in (1, 2, 3):
        out.sum().backward(retain_graph=True)
        assert (function.calls, ledger.replays()) == (1 + count, before + count)


def test_a_replay_that_raises_counts() -> None:
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("replay")
        return quiet(x)

    out = call(function, leaf(8))
    before = ledger.replays()
    message_of(KeyError, lambda: out.sum().backward(retain_graph=True))
    out.sum().backward()
    assert len(calls) == 3 and ledger.replays() == before + 2


def test_a_group_counts_one_replay() -> None:
    out = call(quiet, leaf(8))
    before = ledger.replays()
    with GraphExecGroup():
        for _ in range(3):
            out.sum().backward(retain_graph=True)
    assert ledger.replays() == before + 1


def test_bytes_not_saved_grow_with_every_segment() -> None:
    x = leaf(100)
    before = ledger.bytes_not_saved()
    out = call(quiet, x)
    assert ledger.bytes_not_saved() - before == 2 * 400
    out.sum().backward(retain_graph=True)
    assert ledger.bytes_not_saved() - before == 2 * 400, "a replay saves nothing anew"
    call(quiet, x.double())
    assert ledger.bytes_not_saved() - before == 2 * 400 + 2 * 800


def test_stashed_bytes_follow_the_segments_that_drew() -> None:
    x = leaf(8)
    drew = call(noisy, x)
    bytes_kept = ledger.stashed_bytes()
    assert bytes_kept > 0
    other = call(quiet, x)
    assert ledger.stashed_bytes() == bytes_kept
    drew.sum().backward(retain_graph=True)
    assert ledger.stashed_bytes() == bytes_kept
    del drew
    assert ledger.stashed_bytes() == 0
    other.sum().backward()


# A recording.


def test_a_recording_has_one_row_a_segment() -> None:
    model, x = nn.Linear(8, 8), leaf(4, 8)
    with ledger.record() as r:
        h = call(quiet, x)
        h = call(noisy, h)
        out = call(model, h)
        out.sum().backward()
    assert [row.name for row in r.rows] == ["quiet", "noisy", "Linear"]
    assert [row.depth for row in r.rows] == [0, 0, 0]
    assert [row.replays for row in r.rows] == [1, 1, 1]
    assert (r.rows[0].slots, r.rows[0].bytes) == (2, 2 * x.nbytes)
    assert [row.generators for row in r.rows] == [(), ("cpu",), ()]
    for row in r.rows:
        assert isinstance(row.forward_ms, float) and row.forward_ms > 0
        assert isinstance(row.replay_ms, float) and row.replay_ms > 0


def test_rows_of_nested_segments() -> None:
    def outer(t: Tensor) -> Tensor:
        return call(quiet, t.sin()).cos()

    with ledger.record() as r:
        out = call(outer, leaf(8))
        forward = [(row.name.rpartition(".")[2], row.depth) for row in r.rows]
        out.sum().backward()
    assert forward == [("outer", 0), ("quiet", 1)]
    assert r.rows[0].forward_ms >= r.rows[1].forward_ms, "the outer one contains the inner one"


def test_a_row_of_a_segment_that_is_not_replayed() -> None:
    with ledger.record() as r:
        call(quiet, leaf(8))
    (row,) = r.rows
    assert (row.replays, row.replay_ms) == (0, 0.0)


def test_a_reentrant_segment_has_a_row_without_slots() -> None:
    with ledger.record() as r:
        out = checkpointed(use_reentrant=True)(noisy, leaf(8))
        out.sum().backward()
    (row,) = r.rows
    assert (row.name, row.slots, row.replays, row.generators) == ("noisy", 0, 1, ("cpu",))
    assert row.reentrant


def test_replays_after_the_recording_do_not_lose_the_row() -> None:
    with ledger.record() as r:
        out = call(quiet, leaf(8))
    out.sum().backward(retain_graph=True)
    call(noisy, leaf(8))
    assert len(r.rows) == 1, "a segment that begins later is not part of it"
    del out


def test_recordings_nest_and_an_error_ends_one() -> None:
    with ledger.record() as whole:
        call(quiet, leaf(8))
        with pytest.raises(KeyError), ledger.record() as part:
            call(noisy, leaf(8))
            raise KeyError("leave")
        call(quiet, leaf(8))
    assert [row.name for row in whole.rows] == ["quiet", "noisy", "quiet"]
    assert [row.name for row in part.rows] == ["noisy"]


def test_a_recording_holds_no_segment() -> None:
    with ledger.record() as r:
        out = call(noisy, leaf(8))
        del out
        assert (ledger.live_segments(), ledger.stashed_bytes()) == (0, 0)
    assert len(r.rows) == 1


def test_segments_of_all_threads_are_recorded() -> None:
    with ledger.record() as r:
        in_threads(3, lambda index: call(quiet, leaf(4)).sum().backward())
    assert [(row.name, row.replays) for row in r.rows] == [("quiet", 1)] * 3


def test_it_prints_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with ledger.record() as r:
        call(lambda t: call(noisy, t.sin()), leaf(1000)).sum().backward()
        call(quiet, leaf(8))
    print(r)
    lines = capsys.readouterr().out.splitlines()
    assert str(r).splitlines() == lines
    text = str(r)
    for word in ("segment", "depth", "slots", "not saved", "drew from", "forward ms", "replay ms"):
        assert word in lines[0], text
    for name in ("noisy", "quiet", "lambda"):
        assert sum(name in line for line in lines) == 1, text
    (noisy_line,) = (line for line in lines if "noisy" in line)
    assert "cpu" in noisy_line


def test_an_empty_recording_prints() -> None:
    with ledger.record() as r:
        pass
    assert list(r.rows) == [] and isinstance(str(r), str) and str(r)


def test_views_of_parameters_are_no_bytes_that_were_not_saved() -> None:
    linear = nn.Linear(8, 8)
    before = ledger.bytes_not_saved()
    out = call(lambda t: linear(t.sin()), leaf(4, 8))
    # sin keeps its argument, an input; the product keeps sin's result and the transposed weight.
    assert ledger.bytes_not_saved() - before == 4 * 8 * 4
    out.sum().backward()
