"""Segments on a backend that torch knows nothing of: exact on every device, whatever the generator.

The device is host memory (runtime.h), so that results can be compared bit for bit. Each test runs
twice, in two processes: with generators whose state is opaque (get_offset throws) and with
generators of the Philox shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import testdev
import torch
from helpers import (
    Changing,
    Run,
    assert_exact,
    both_forms,
    checkpointed,
    plain,
)
from testdev import DEVICES, draws, draws_nothing, leaf_on, on_devices, seed_devices
from torch import Tensor, nn
from torch.nn.functional import dropout

import torch_reprise
from torch_reprise import checkpoint, ledger

each_device = pytest.mark.parametrize("device", DEVICES)
each_index = pytest.mark.parametrize("index", range(len(DEVICES)))


# The device itself: what the tests below take for granted.


@each_index
def test_the_state_tells_all(index: int) -> None:
    device = DEVICES[index]
    start = testdev.state(index)
    assert start.dtype == torch.uint8 and start.device.type == "cpu"
    assert start.numel() == testdev.STATE_BYTES[testdev.kind()]
    first = torch.rand(5, device=device)
    assert not torch.equal(testdev.state(index), start)
    second = torch.rand(5, device=device)
    assert not torch.equal(first.cpu(), second.cpu())
    torch.ops.testdev.set_generator_state(index, start)
    assert torch.equal(torch.rand(5, device=device).cpu(), first.cpu())
    assert torch.equal(torch.rand(5, device=device).cpu(), second.cpu())


@each_index
def test_a_draw_moves_the_generator_of_its_device_alone(index: int) -> None:
    cpu = torch.get_rng_state()
    before = testdev.states()
    for draw in (
        lambda x: x.bernoulli_(0.5),
        lambda x: x.bernoulli_(torch.full_like(x, 0.5)),
        lambda x: x.uniform_(),
        lambda x: x.normal_(),
        lambda x: dropout(x, 0.5),
    ):
        draw(torch.ones(8, device=DEVICES[index]))
        after = testdev.states()
        moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert moved == [i == index for i in range(len(DEVICES))]
        before = after
    assert torch.equal(torch.get_rng_state(), cpu)


@each_device
def test_an_explicit_generator_is_one_of_its_own(device: str) -> None:
    before = testdev.states()
    generator = torch.Generator(device).manual_seed(5)
    first = torch.rand(4, device=device, generator=generator)
    again = torch.rand(4, device=device, generator=generator.manual_seed(5))
    assert torch.equal(first.cpu(), again.cpu())
    for a, b in zip(testdev.states(), before, strict=True):
        assert torch.equal(a, b)
    other = DEVICES[1 - DEVICES.index(device)]
    with pytest.raises(ValueError, match=f"expected one of {other}.*got one of {device}"):
        torch.rand(4, device=other, generator=generator)


def test_offsets() -> None:
    generator = torch.Generator(DEVICES[1])
    if testdev.kind() == "opaque":
        with pytest.raises(RuntimeError, match="get_offset: the state .* testdev:1 is opaque"):
            generator.get_offset()
        with pytest.raises(RuntimeError, match="set_offset: the state .* testdev:1 is opaque"):
            generator.set_offset(4)
    else:
        torch.rand(5, device=DEVICES[1], generator=generator)
        assert generator.get_offset() == 8
        generator.set_offset(4)
        assert generator.get_offset() == 4


def test_states_of_another_size_are_refused() -> None:
    size = testdev.STATE_BYTES[testdev.kind()]
    with pytest.raises(RuntimeError, match=f"has {size} bytes, got {size + 1}"):
        torch.Generator(DEVICES[0]).set_state(torch.zeros(size + 1, dtype=torch.uint8))


def test_random_ops_without_a_kernel_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="testdev has no kernel"):
        torch.randint(3, (4,), device=DEVICES[0])


def test_there_is_no_python_module_to_lean_on() -> None:
    module = torch.get_device_module("testdev")
    for name in ("_initialized", "is_initialized", "device", "get_rng_state", "set_rng_state"):
        assert not hasattr(module, name)


# Exactness.


def uniform_and_normal(x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + torch.sin(x) * torch.randn_like(x)


def in_place_fills(x: Tensor) -> Tensor:
    noise = torch.empty_like(x).uniform_(-1, 1) + torch.empty_like(x).normal_()
    return (x * noise).exp() * torch.empty_like(x).bernoulli_(x.detach().sigmoid())


def random_depth(x: Tensor) -> Tensor:
    for _ in range(1 + int(4 * torch.rand((), device=x.device))):
        x = torch.tanh(x) * torch.rand((), device=x.device)
    return x


DRAWS = (draws, uniform_and_normal, in_place_fills, random_depth)


@pytest.mark.parametrize("function", DRAWS, ids=lambda function: function.__name__)
@each_device
@both_forms
def test_every_kind_of_draw(
    function: Callable[[Tensor], Tensor], device: str, use_reentrant: bool
) -> None:
    def program(run: Run) -> Any:
        x = leaf_on(device, 4, 4)
        out = run(function, x)
        between = torch.rand(3, device=device)
        out.sum().backward()
        return out, x.grad, between, torch.rand(3, device=device)

    assert_exact(on_devices(program), replays=1, use_reentrant=use_reentrant)


@both_forms
def test_segments_on_both_devices_and_the_cpu(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        xs = [leaf_on(device, 3, 3) for device in ("cpu", *DEVICES)]
        outs = list(xs)
        for _ in range(2):
            outs = [run(draws, x) for x in outs]
        sum(x.sum().cpu() for x in outs).backward()
        return outs, [x.grad for x in xs]

    assert_exact(on_devices(program), replays=6, use_reentrant=use_reentrant)


def wanders(x: Tensor) -> Tensor:
    x = draws(x)
    for device in (*DEVICES, "cpu"):
        x = draws(x.to(device))
    return x


@pytest.mark.parametrize("device", ["cpu", *DEVICES])
@both_forms
def test_a_function_that_moves_between_devices(device: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf_on(device, 5)
        out = run(wanders, x)
        out.sum().backward()
        return out, x.grad

    assert_exact(on_devices(program), replays=1, use_reentrant=use_reentrant)


@pytest.mark.parametrize("inner_reentrant", [False, True])
@both_forms
def test_nested_segments(inner_reentrant: bool, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        inner = plain if run is plain else checkpointed(use_reentrant=inner_reentrant)

        def outer(x: Tensor) -> Tensor:
            y = inner(draws, draws(x))
            return inner(draws, y.to(DEVICES[1])).sin()

        x = leaf_on(DEVICES[0], 4)
        out = run(outer, x)
        out.sum().backward()
        return out, x.grad

    assert_exact(on_devices(program), use_reentrant=use_reentrant)


@both_forms
def test_a_module_trained_for_steps(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4)
        )
        for i, block in enumerate(blocks):
            block.to(DEVICES[i // 2])
        optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            x = torch.randn(2, 4).to(DEVICES[0])
            for i, block in enumerate(blocks):
                x = run(block, x.to(DEVICES[i // 2]).requires_grad_())
            loss = x.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, list(blocks.parameters())

    assert_exact(on_devices(program), replays=12, use_reentrant=use_reentrant)


@each_index
@both_forms
def test_a_state_set_between_forward_and_backward(index: int, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf_on(DEVICES[index], 6)
        out = run(draws, x)
        torch.ops.testdev.manual_seed(index, 99)
        out.sum().backward()
        return out, x.grad, torch.rand(2, device=DEVICES[index])

    assert_exact(on_devices(program), replays=1, use_reentrant=use_reentrant)


@pytest.mark.parametrize("where", ["argument", "closure"])
@both_forms
def test_an_explicit_generator_is_rewound(where: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        reached = torch.Generator(DEVICES[1]).manual_seed(5)

        def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
            noise = torch.empty_like(x).bernoulli_(0.5, generator=generator)
            return draws(x.sin() * noise)

        def function(x: Tensor) -> Tensor:
            return noisy(x, reached)

        x = leaf_on(DEVICES[1], 16)
        out = run(noisy, x, reached) if where == "argument" else run(function, x)
        between = torch.rand(3, device=DEVICES[1], generator=reached)
        out.sum().backward()
        return out, x.grad, between, reached.get_state()

    assert_exact(on_devices(program), replays=1, use_reentrant=use_reentrant)


def test_two_backwards_through_one_segment() -> None:
    def program(run: Run) -> Any:
        x = leaf_on(DEVICES[1], 6)
        out = run(draws, x)
        (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        torch.rand(3, device=DEVICES[1])
        (second,) = torch.autograd.grad(out.sum(), x)
        return out, first, second

    assert_exact(on_devices(program), replays=2)


# Where the generators stand when something raises.


class Stop(Exception):
    pass


def raises_after_a_draw(x: Tensor) -> Tensor:
    dropout(x.sin(), 0.5)
    raise Stop


@each_index
@both_forms
def test_a_replay_that_raises_puts_the_generators_back(index: int, use_reentrant: bool) -> None:
    seed_devices()
    out = torch_reprise.checkpoint(
        Changing(draws, raises_after_a_draw),
        leaf_on(DEVICES[index], 4),
        use_reentrant=use_reentrant,
    )
    before = testdev.states()
    with pytest.raises(Stop):
        out.sum().backward()
    for after, state in zip(testdev.states(), before, strict=True):
        assert torch.equal(after, state)


@both_forms
def test_a_forward_that_raises_leaves_its_draws_drawn(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        with pytest.raises(Stop):
            run(raises_after_a_draw, leaf_on(DEVICES[1], 4))
        return torch.rand(2, device=DEVICES[1])

    assert_exact(on_devices(program), replays=0, use_reentrant=use_reentrant)


@each_index
@both_forms
def test_a_replay_that_draws_more_is_named(index: int, use_reentrant: bool) -> None:
    def draws_more(x: Tensor) -> Tensor:
        torch.rand(2, device=x.device)
        return draws(x)

    seed_devices()
    out = torch_reprise.checkpoint(
        Changing(draws, draws_more),
        leaf_on(DEVICES[index], 4),
        use_reentrant=use_reentrant,
        early_stop=False,
    )
    before = testdev.states()
    with pytest.raises(torch_reprise.CheckpointError, match=f"generator {DEVICES[index]}"):
        out.sum().backward()
    for after, state in zip(testdev.states(), before, strict=True):
        assert torch.equal(after, state)


# What a segment keeps.


@each_index
@both_forms
def test_the_stash_is_the_device_that_was_drawn_from(index: int, use_reentrant: bool) -> None:
    before = ledger.stashed_bytes()
    x = leaf_on(DEVICES[index], 4)
    with ledger.record() as recording:
        out = torch_reprise.checkpoint(draws, x, use_reentrant=use_reentrant)
    assert [row.generators for row in recording.rows] == [(DEVICES[index],)]
    assert ledger.stashed_bytes() - before == testdev.STATE_BYTES[testdev.kind()]
    out.sum().backward()
    del out
    assert ledger.stashed_bytes() == before


@each_device
@both_forms
def test_a_segment_that_draws_nothing_keeps_the_state_of_its_device(
    device: str, use_reentrant: bool
) -> None:
    """That it stands where it stood does not show that nothing was drawn and put back."""
    before = ledger.stashed_bytes()
    states = testdev.states()
    x = leaf_on(device, 4)
    with ledger.record() as recording:
        out = torch_reprise.checkpoint(draws_nothing, x, use_reentrant=use_reentrant)
    assert [row.generators for row in recording.rows] == [()]
    assert ledger.stashed_bytes() - before == testdev.STATE_BYTES[testdev.kind()]
    out.sum().backward()
    for after, state in zip(testdev.states(), states, strict=True):
        assert torch.equal(after, state)


@both_forms
def test_a_function_that_draws_everywhere_keeps_everything(use_reentrant: bool) -> None:
    with ledger.record() as recording:
        out = torch_reprise.checkpoint(wanders, leaf_on(DEVICES[1], 4), use_reentrant=use_reentrant)
    assert [row.generators for row in recording.rows] == [("cpu", *DEVICES)]
    out.sum().backward()


@both_forms
def test_the_number_of_arguments_costs_nothing(use_reentrant: bool) -> None:
    """Twelve tensors on one device are one generator: read and set as often as for one tensor."""

    def calls(arguments: int) -> list[tuple[int, int]]:
        xs = [leaf_on(DEVICES[1], 4) for _ in range(arguments)]
        counts = [testdev.state_calls()]
        out = torch_reprise.checkpoint(
            lambda *xs: draws(sum(xs)), *xs, use_reentrant=use_reentrant, early_stop=False
        )
        counts.append(testdev.state_calls())
        torch.rand(3, device=DEVICES[1])
        out.sum().backward()
        counts.append(testdev.state_calls())
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counts)]

    forward, backward = calls(1)
    assert calls(12) == [forward, backward]
    assert forward[1] == 0 and backward[1] == 2, "set once to rewind and once to put back"


def test_the_generators_are_listed() -> None:
    assert torch_reprise.rng.default_generators() == ["cpu", *DEVICES]


def test_without_the_stash_the_numbers_are_others() -> None:
    """Values depend on the generator: the tests above would see a missing stash."""
    seed_devices()
    x = leaf_on(DEVICES[1], 64)
    masks = []

    def noted(x: Tensor) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(0.5)
        masks.append(mask.detach().cpu())
        return x.sin() * mask

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    torch_reprise.checkpoint(noted, x, **options).sum().backward()
    assert len(masks) == 2 and not torch.equal(*masks)


@both_forms
def test_segments_on_a_device_are_replayed_when_they_are_asked_for(use_reentrant: bool) -> None:
    """On the CPU the earlier ones would be replayed before the last weight has its gradient."""
    weights = [leaf_on(DEVICES[0], 4) for _ in range(3)]
    replayed: list[int] = []

    def segment(number: int) -> Any:
        calls = 0

        def function(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                assert all(weight.grad is not None for weight in weights[number + 1 :])
                replayed.append(number)
            return (x * weights[number]).sin()

        return function

    x = leaf_on(DEVICES[0], 4)
    for number in range(3):
        x = checkpoint(segment(number), x, use_reentrant=use_reentrant)
    x.sum().backward()
    assert replayed == [2, 1, 0]
