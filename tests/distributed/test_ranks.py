"""The launcher itself: what fails on a rank fails here, and says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import lost_ranks
import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import SIZE, Options, RankFailure, Ranks, nothing_left, on_each_rank
from torch import nn

from torch_reprise import checkpoint


@on_each_rank
def test_a_test_runs_on_every_rank() -> None:
    seen = [torch.zeros(1) for _ in range(SIZE)]
    dist.all_gather(seen, torch.tensor([float(dist.get_rank())]))
    assert [t.item() for t in seen] == [0.0, 1.0]
    assert dist.get_backend() == "gloo" and torch.get_num_threads() == 1


@pytest.fixture
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    workers = Ranks(lambda: tmp_path_factory.mktemp("light"), with_torch=False)
    yield workers
    workers.close()


def failure(case: Callable[..., object], workers: Ranks, **arguments: object) -> dict[int, str]:
    """What each rank has to say."""
    with pytest.raises(RankFailure) as caught:
        case(ranks=workers, **arguments)
    _, first, second = re.split(r"^--- rank [01]: ", str(caught.value), flags=re.MULTILINE)
    return {0: first, 1: second}


def test_an_error_on_one_rank_is_a_failure_and_the_next_test_gets_new_workers(
    light: Ranks,
) -> None:
    said = failure(lost_ranks.fails_on_one_rank, light, rank=1)
    assert "ValueError: this rank only" in said[1]
    assert "waits for a rank that has failed" in said[0] and "in fails_on_one_rank" in said[0]
    lost_ranks.passes(ranks=light)


def test_a_worker_that_dies_is_a_failure_with_its_last_words(light: Ranks) -> None:
    for said in failure(lost_ranks.dies, light).values():
        assert "ended with status 7 and without an answer" in said and "last words" in said


def test_a_worker_that_hangs_shows_its_stacks(light: Ranks) -> None:
    for said in failure(lost_ranks.hangs, light).values():
        assert "Timeout" in said and "in wait_for_nothing" in said and "in hangs" in said


def test_a_segment_left_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.01)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(
        AssertionError, match=r"left behind .*: \(1, 1, 0\) where it was \(0, 0, 0\)"
    ):
        with nothing_left(Options(limit=1.0, needs_gc=False)):
            y = checkpoint(nn.Tanh(), x, use_reentrant=False)
    del y
