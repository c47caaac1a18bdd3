"""Segments on CUDA devices: the generators' offsets are those of the plain program.

Under the simulation kernels do not run, so values mean nothing here; host-side generator state,
order and threads are real. Run through launch.py, see README.md; runs on GPUs as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cudasim
import pytest
import torch
from cuda_helpers import draws, generator, leaf, needs_devices, offsets, simulated_only
from helpers import Run, both_forms, checkpointed, plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from torch_reprise import (
    Checkpointer,
    CheckpointError,
    GraphExecGroup,
    checkpoint,
    checkpoint_sequential,
    ledger,
    rng,
)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("seeded", "philox"), needs_devices(8)]


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


def over_all_devices(run: Run) -> Tensor:
    """A segment on each device inside of the one on the device before."""

    def level(device: int, x: Tensor) -> Tensor:
        y = draws(x.to(f"cuda:{device}"))
        return draws(run(level, device + 1, y) if device < 7 else y)

    return run(level, 0, leaf()).cpu()


def forked(x: Tensor) -> Tensor:
    """Draws, and puts the generators back: they stand where they stood, and draws were made."""
    with torch.random.fork_rng(devices=[1, 3]):
        x = draws(draws(x).to("cuda:3"))
    return draws(x.to("cuda:1"))


PROGRAMS = {
    "on a device": lambda run: run(draws, leaf("cuda:1")).cpu(),
    "moved inside": lambda run: run(wanders, leaf()),
    "keywords and containers": in_keywords,
    "twelve arguments": many_arguments,
    "eight devices": lambda run: sum(run(draws, leaf(f"cuda:{i}")).cpu() for i in range(8)),
    "forked": lambda run: run(forked, leaf("cuda:1")).cpu(),
    "nested over devices": over_all_devices,
    "nested": lambda run: run(lambda t: run(draws, draws(t)).sin(), leaf("cuda:4")).cpu(),
}


@both_forms
@pytest.mark.parametrize("name", PROGRAMS)
def test_offsets_after_forward_and_backward(name: str, use_reentrant: bool) -> None:
    def play(run: Run) -> list[Any]:
        torch.manual_seed(3)
        out = PROGRAMS[name](run)
        after_forward = offsets()
        torch.rand(4, device="cuda:1")
        out.sum().backward()
        return [after_forward, offsets(), torch.get_rng_state().tolist()]

    expected = play(plain)
    before = ledger.replays()
    found = play(checkpointed(use_reentrant=use_reentrant))
    assert ledger.replays() > before
    assert found == expected


@both_forms
@pytest.mark.parametrize("fork", [False, True], ids=["drawn", "drawn and put back"])
def test_a_replay_draws_at_the_offsets_of_the_forward(fork: bool, use_reentrant: bool) -> None:
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[1], enabled=fork):
            seen.append(generator(1).get_offset())
            return draws(draws(x))

    y = checkpoint(fn, leaf("cuda:1"), use_reentrant=use_reentrant)
    torch.rand(100, device="cuda:1")
    y.sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_only_devices_that_matter_are_kept() -> None:
    with ledger.record() as record:
        y = checkpoint(draws, leaf("cuda:6"), use_reentrant=False)
    assert record.rows[0].generators == ("cuda:6",)
    assert ledger.stashed_bytes() == 16
    del y


def test_segments_that_draw_nothing_share_what_they_keep() -> None:
    def quiet(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() * y.sin().cpu()

    x = [leaf()]
    for device in (1, 1, 1):
        x.append(checkpoint(quiet, x[-1], leaf(f"cuda:{device}"), use_reentrant=False))
    assert ledger.stashed_bytes() == 16
    torch.rand(4, device="cuda:1")
    x.append(checkpoint(quiet, x[-1], leaf("cuda:1"), use_reentrant=False))
    assert ledger.stashed_bytes() == 32
    x.append(checkpoint(quiet, x[-1], leaf("cuda:2"), use_reentrant=False))
    assert ledger.stashed_bytes() == 48
    before = offsets()
    x[-1].sum().backward()
    assert offsets() == before
    del x
    assert ledger.stashed_bytes() == 0


def test_a_generator_whose_state_is_exchanged_by_another_thread() -> None:
    """States are looked at without the generator's lock: one that is let go must not be read."""
    g = generator(3)
    kept = g.graphsafe_get_state()
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            g.graphsafe_set_state(torch.Generator("cuda:3").manual_seed(5).graphsafe_get_state())

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(100):
            checkpoint(torch.sin, leaf(), use_reentrant=False).sum().backward()
    finally:
        stop.set()
        thread.join()
        g.graphsafe_set_state(kept)
    assert ledger.stashed_bytes() == 0


def test_a_replay_that_draws_more_names_the_device_and_both_counts() -> None:
    counts = [1, 2]

    def fn(x: Tensor) -> Tensor:
        for _ in range(counts.pop(0)):
            torch.rand(4, device="cuda:2")
        return x.sin()

    y = checkpoint(fn, leaf("cuda:2"), use_reentrant=False, early_stop=False)
    message = "(?s)generator cuda:2.*4 numbers in the forward and 8 in the replay"
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()


# Explicit generators.


def noisy(x: Tensor, explicit: torch.Generator) -> Tensor:
    noise = torch.empty_like(x).bernoulli_(0.5, generator=explicit)
    return draws(x.sin() * noise).exp()


class Noisy(torch.nn.Module):
    def __init__(self, explicit: torch.Generator) -> None:
        super().__init__()
        self.explicit = explicit

    def forward(self, x: Tensor) -> Tensor:
        return noisy(x, self.explicit)


def runs_with_a_generator(run: Run, where: str, explicit: torch.Generator) -> Tensor:
    x = leaf("cuda:4")
    if where == "argument":
        return run(noisy, x, explicit)
    if where == "container":
        return run(lambda t, many: noisy(t, many["a"][0]), x, {"a": [explicit]})
    if where == "closure":
        return run(lambda t: noisy(t, explicit), x)
    return run(Noisy(explicit), x)


@both_forms
@pytest.mark.parametrize("where", ["argument", "container", "closure", "attribute"])
def test_explicit_generators(where: str, use_reentrant: bool) -> None:
    def play(run: Run) -> list[Any]:
        torch.cuda.manual_seed_all(7)
        explicit = torch.Generator("cuda:4").manual_seed(3)
        torch.rand(4, device="cuda:4", generator=explicit)
        out = runs_with_a_generator(run, where, explicit)
        torch.rand(4, device="cuda:4", generator=explicit)
        after_forward = explicit.get_offset()
        out.sum().backward()
        return [after_forward, explicit.get_offset(), explicit.initial_seed(), offsets()]

    expected = play(plain)
    assert expected[:3] == [12, 12, 3]
    assert play(checkpointed(use_reentrant=use_reentrant)) == expected


@both_forms
def test_a_replay_rewinds_explicit_generators(use_reentrant: bool) -> None:
    named = torch.Generator("cuda:4").manual_seed(3)
    reached = torch.Generator("cuda:5").manual_seed(4)
    many = [named]
    seen: list[tuple[int, int, int]] = []

    def draw(x: Tensor) -> Tensor:
        seen.append((many[0].get_offset(), reached.get_offset(), generator(5).get_offset()))
        y = noisy(x, many[0]).to("cuda:5")
        return noisy(y, reached)

    options = Checkpointer(generators=[named], use_reentrant=use_reentrant)
    y = options(draw, leaf("cuda:4"))
    for explicit in (named, reached):
        torch.rand(4, device=explicit.device, generator=explicit)
    torch.rand(4, device="cuda:5")
    y.sum().backward()
    assert seen == [(0, 0, 0)] * 2
    assert (named.get_offset(), reached.get_offset(), generator(5).get_offset()) == (8, 8, 8)


# Several devices in one call.


@both_forms
def test_a_sequence_over_eight_devices(use_reentrant: bool) -> None:
    def stage(device: int) -> Callable[[Tensor], Tensor]:
        return lambda x: draws(x.to(f"cuda:{device}"))

    stages = [stage(device) for device in range(8)]

    def play(run: Callable[[Tensor], Tensor]) -> list[Any]:
        torch.cuda.manual_seed_all(7)
        out = run(leaf("cuda:0"))
        between = offsets()
        torch.rand(4, device="cuda:6")
        out.sum().backward()
        return [between, offsets()]

    def one_after_the_other(x: Tensor) -> Tensor:
        for function in stages:
            x = function(x)
        return x

    before = ledger.replays()
    found = play(lambda x: checkpoint_sequential(stages, 4, x, use_reentrant=use_reentrant))
    assert ledger.replays() == before + 3  # the last of the four runs without a checkpoint
    assert found == play(one_after_the_other)


def test_a_group_of_calls_over_devices() -> None:
    """Two backward calls through a segment on three devices: one replay, at its own offsets."""
    seen: list[list[tuple[int, int]]] = []

    def fn(*xs: Tensor) -> list[Tensor]:
        seen.append(offsets())
        return [draws(x) for x in xs]

    xs = [leaf(f"cuda:{device}") for device in (0, 3, 7)]
    outs = checkpoint(fn, *xs, use_reentrant=False)
    torch.rand(4, device="cuda:3")
    standing = offsets()
    before = ledger.replays()
    with GraphExecGroup():
        for x in reversed(xs):
            torch.autograd.grad([out.sum() for out in outs], x, [None] * 3, retain_graph=True)
    assert ledger.replays() == before + 1
    assert len(seen) == 2 and seen[0] == seen[1]
    assert offsets() == standing


# What it costs.


@simulated_only
@both_forms
def test_the_number_of_arguments_costs_nothing(use_reentrant: bool) -> None:
    """A generator of a device is looked at as often with twelve tensors there as with one."""

    def looks(run: Run, arguments: int) -> int:
        xs = [leaf("cuda:1") for _ in range(arguments)]
        before = cudasim.capture_queries()
        run(lambda *xs: draws(sum(xs)), *xs).sum().backward()
        return cudasim.capture_queries() - before

    def added_by(run: Run, arguments: int) -> int:
        return looks(run, arguments) - looks(plain, arguments)

    def torchs(function: Callable[..., Any], *args: Any) -> Any:
        return torch_checkpoint(function, *args, use_reentrant=use_reentrant)

    run = checkpointed(use_reentrant=use_reentrant)
    added_by(run, 1)  # the first use of a device asks more
    assert added_by(run, 12) == added_by(run, 1)
    assert added_by(torchs, 12) > added_by(torchs, 1), "the counter must see such looks"


def test_snapshots_of_all_devices() -> None:
    before = rng.capture()
    assert before.generators == ("cpu", *(f"cuda:{i}" for i in range(8)))
    states = before.state_tensors()
    for i in range(8):
        assert torch.equal(states[f"cuda:{i}"], torch.cuda.get_rng_state(i))
    torch.rand(4, device="cuda:7")
    assert before.diff(rng.capture()).startswith("cuda:7: philox seed")
    before.restore()
    assert rng.capture() == before


@both_forms
@pytest.mark.parametrize("where", ["cpu", "cuda:0"])
def test_the_current_device_of_the_forward(where: str, use_reentrant: bool) -> None:
    devices: list[int] = []

    def fn(x: Tensor) -> Tensor:
        devices.append(torch.cuda.current_device())
        noise = torch.rand(8, device="cuda").to(x.device)
        torch.cuda.set_device(3)
        return (x * noise).exp()

    found = []
    for run in (plain, checkpointed(use_reentrant=use_reentrant)):
        torch.cuda.set_device(0)
        x = torch.ones(8, device=where, requires_grad=True)
        torch.manual_seed(7)
        with torch.cuda.device(1):
            y = run(fn, x)
        torch.cuda.set_device(2)
        y.sum().backward()
        found.append((torch.cuda.current_device(), offsets()))
    torch.cuda.set_device(0)
    assert devices == [1, 1, 1], "in the plain run, the forward and the replay"
    assert found[0] == found[1]


def test_cuda_without_a_number_is_the_current_device() -> None:
    with torch.cuda.device(2):
        assert rng.capture("cuda").generators == ("cuda:2",)
        before = generator(2).get_offset()
        with rng.fork(["cuda"]):
            torch.rand(4, device="cuda")
        assert generator(2).get_offset() == before
