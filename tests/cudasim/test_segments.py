"""Segments on simulated CUDA devices: the generators' offsets are those of the plain program.

Kernels do not run, so values mean nothing here; host-side generator state, order and
threads are real. Run through launch.py, see README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import CheckpointError, checkpoint, ledger, rng

FORMS = pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
Run = Callable[..., Any]


def offsets() -> list[tuple[int, int]]:
    return [(g.initial_seed(), g.get_offset()) for g in torch.cuda.default_generators]


def leaf(device: str = "cpu") -> Tensor:
    return torch.ones(8, device=device).requires_grad_()


def draws(x: Tensor) -> Tensor:
    return dropout(x.sin(), 0.5).exp()


def wanders(x: Tensor) -> Tensor:
    """Begins on the CPU, draws on two devices that no argument is on."""
    y = draws(x.to("cuda:2")).to("cuda:5")
    return draws(draws(y)).cpu().exp()


def in_keywords(run: Run) -> Tensor:
    return run(
        lambda t, **kw: draws(t * kw["items"][0].cpu()) + draws(kw["items"][0]).cpu(),
        leaf(),
        items=[leaf("cuda:3")],
    )


def many_arguments(run: Run) -> Tensor:
    return run(lambda *ts: draws(sum(ts)), *[leaf("cuda:1") for _ in range(12)]).cpu()


PROGRAMS = {
    "on a device": lambda run: run(draws, leaf("cuda:1")).cpu(),
    "moved inside": lambda run: run(wanders, leaf()),
    "keywords and containers": in_keywords,
    "twelve arguments": many_arguments,
    "eight devices": lambda run: sum(run(draws, leaf(f"cuda:{i}")).cpu() for i in range(8)),
    "nested": lambda run: run(lambda t: run(draws, draws(t)).sin(), leaf("cuda:4")).cpu(),
}


@FORMS
@pytest.mark.parametrize("name", PROGRAMS)
def test_offsets_after_forward_and_backward(name: str, use_reentrant: bool) -> None:
    def play(run: Run) -> list[Any]:
        torch.manual_seed(3)
        out = PROGRAMS[name](run)
        after_forward = offsets()
        torch.rand(4, device="cuda:1")
        out.sum().backward()
        return [after_forward, offsets(), torch.get_rng_state().tolist()]

    torch.cuda.init()
    expected = play(lambda fn, *args, **kwargs: fn(*args, **kwargs))
    before = ledger.replays()
    found = play(lambda fn, *a, **kw: checkpoint(fn, *a, use_reentrant=use_reentrant, **kw))
    assert ledger.replays() > before
    assert found == expected


@FORMS
def test_a_replay_draws_at_the_offsets_of_the_forward(use_reentrant: bool) -> None:
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(torch.cuda.default_generators[1].get_offset())
        return draws(draws(x))

    torch.cuda.init()
    y = checkpoint(fn, leaf("cuda:1"), use_reentrant=use_reentrant)
    torch.rand(100, device="cuda:1")
    y.sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_only_devices_that_matter_are_kept() -> None:
    torch.cuda.init()
    with ledger.record() as record:
        y = checkpoint(draws, leaf("cuda:6"), use_reentrant=False)
    assert record.rows[0].generators == ("cuda:6",)
    assert ledger.stashed_bytes() == 16
    del y


def test_a_replay_that_draws_more_names_the_device_and_both_counts() -> None:
    counts = [1, 2]

    def fn(x: Tensor) -> Tensor:
        for _ in range(counts.pop(0)):
            torch.rand(4, device="cuda:2")
        return x.sin()

    torch.cuda.init()
    y = checkpoint(fn, leaf("cuda:2"), use_reentrant=False, early_stop=False)
    message = "(?s)generator cuda:2.*4 numbers in the forward and 8 in the replay"
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()


def test_snapshots_of_all_devices() -> None:
    torch.cuda.init()
    before = rng.capture()
    assert before.generators == ("cpu", *(f"cuda:{i}" for i in range(8)))
    states = before.state_tensors()
    for i in range(8):
        assert torch.equal(states[f"cuda:{i}"], torch.cuda.get_rng_state(i))
    torch.rand(4, device="cuda:7")
    assert before.diff(rng.capture()).startswith("cuda:7: philox seed")
    before.restore()
    assert rng.capture() == before
