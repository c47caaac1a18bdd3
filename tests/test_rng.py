"""Random numbers: the replay draws what the forward drew, and nobody outside can tell it ran."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Changing,
    Run,
    assert_exact,
    both_forms,
    checkpointed,
    grads,
    in_threads,
    leaf,
    message_of,
    plain,
)
from torch import Tensor, nn
from torch.nn.functional import dropout

import torch_reprise
from torch_reprise import DefaultDeviceType, ledger


def draws(x: Tensor) -> Tensor:
    return dropout(x.sin(), 0.5).exp()


def draws_nothing(x: Tensor) -> Tensor:
    return x.sin().exp()


# Exactness.


def uniform_and_normal(x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + torch.sin(x) * torch.randn_like(x)


def in_place_fills(x: Tensor) -> Tensor:
    noise = torch.empty_like(x).uniform_(-1, 1) + torch.empty_like(x).normal_().exponential_()
    return (x * noise).exp() * torch.empty_like(x).bernoulli_(0.5)


def permutations(x: Tensor) -> Tensor:
    order = torch.randperm(x.numel())
    picks = torch.multinomial(torch.ones(x.numel()), 4, replacement=True)
    return x.flatten()[order].sin() * x.flatten()[picks].sum() * torch.randint(1, 9, (1,))


def random_depth(x: Tensor) -> Tensor:
    for _ in range(int(torch.randint(1, 6, (1,)))):
        x = torch.tanh(x) * torch.rand(())
    return x


def sampled(x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, x.exp()).rsample().sin()


def gumbel(x: Tensor) -> Tensor:
    return torch.nn.functional.gumbel_softmax(x, dim=-1).exp() * torch.alpha_dropout(x, 0.3, True)


KINDS = (draws, uniform_and_normal, in_place_fills, permutations, random_depth, sampled, gumbel)


@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
@both_forms
def test_every_kind_of_draw(function: Callable[[Tensor], Tensor], use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf(4, 4)
        out = run(function, x)
        between = torch.rand(3)
        out.sum().backward()
        return out, between, torch.rand(3), grads([x])

    for seed in range(3):
        assert_exact(program, replays=1, seed=seed, use_reentrant=use_reentrant)


@both_forms
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_second_number_of_a_normal_pair(
    count: int, dtype: torch.dtype, use_reentrant: bool
) -> None:
    """A normal draw makes two numbers and keeps one for the next, beside the engine's state.

    An odd number of draws leaves one there; a stash that forgets it shifts every draw after it.
    """

    def program(run: Run) -> Any:
        def function(t: Tensor) -> Tensor:
            t = t * torch.randn(count, dtype=dtype).sum()
            return torch.sin(t * torch.empty(3, dtype=dtype).normal_(0.5, 2.0))

        x = leaf(3, dtype=dtype)
        before = torch.randn(count, dtype=dtype)
        out = run(function, x)
        between = torch.randn(count, dtype=dtype)
        out.sum().backward()
        return out, before, between, torch.randn(count, dtype=dtype), grads([x])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


@both_forms
def test_a_seed_set_inside(use_reentrant: bool) -> None:
    def function(x: Tensor) -> Tensor:
        h = dropout(x.sin(), 0.3)
        torch.manual_seed(99)
        return dropout(h.exp(), 0.5)

    def program(run: Run) -> Any:
        x = leaf(16)
        out = run(function, x)
        between = torch.rand(2)
        out.sum().backward()
        return out, between, torch.rand(2), grads([x])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_a_state_set_inside_and_forked_generators() -> None:
    kept = torch.get_rng_state()

    def function(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            h = dropout(x.sin(), 0.5)
        h = dropout(h, 0.5).exp()
        torch.set_rng_state(kept)
        return dropout(h, 0.5)

    def program(run: Run) -> Any:
        x = leaf(16)
        out = run(function, x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)


@both_forms
def test_another_seed_between_forward_and_backward(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf(16)
        out = run(draws, run(draws, x))
        torch.manual_seed(1234)
        out.sum().backward(retain_graph=True)
        torch.rand(7)
        out.sum().backward()
        return out, grads([x]), torch.rand(3)

    assert_exact(program, replays=4, use_reentrant=use_reentrant)


def test_draws_in_tensor_hooks_during_backward() -> None:
    """The engine runs user code between two replays, which draws from the real stream."""

    def program(run: Run) -> Any:
        x = leaf(8)
        h = run(draws, x)
        h.register_hook(lambda grad: grad * torch.rand(8))
        out = run(draws, h)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=2)


# Without it.


@both_forms
def test_preserve_rng_state_false(use_reentrant: bool) -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch.rand(4))
        return (x * seen[-1]).sin()

    x = leaf(4)
    call = checkpointed(use_reentrant=use_reentrant, preserve_rng_state=False)
    live = ledger.stashed_bytes()
    torch.manual_seed(3)
    out = call(function, x)
    assert ledger.stashed_bytes() == live
    out.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(seen[0], torch.rand(4))
    assert torch.equal(seen[1], torch.rand(4)), "the replay goes on in the stream"
    found = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(8)
    assert torch.equal(found, torch.rand(4)), "and leaves it where it stopped"
    # The outputs are those of the forward, the gradient is that of the numbers the replay drew.
    assert torch.equal(x.grad, seen[1] * torch.cos(x.detach() * seen[1]))


@both_forms
def test_preserve_rng_state_false_is_exact_where_nothing_is_drawn(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf(4)
        out = run(draws_nothing, x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1, preserve_rng_state=False, use_reentrant=use_reentrant)


# Only what moved is kept.


@both_forms
def test_a_segment_that_draws_nothing_keeps_no_state(use_reentrant: bool) -> None:
    x = leaf(8)
    call = checkpointed(use_reentrant=use_reentrant)
    live = ledger.stashed_bytes()
    quiet = call(draws_nothing, x)
    assert ledger.stashed_bytes() == live
    noisy = call(draws, x)
    one = ledger.stashed_bytes() - live
    assert 0 < one <= torch.get_rng_state().nbytes
    second = call(draws, x)
    assert live + one <= ledger.stashed_bytes() <= live + 2 * one
    del noisy, second
    assert ledger.stashed_bytes() == live
    quiet.sum().backward()


def test_segments_that_begin_in_the_same_state_share_it() -> None:
    x, call = leaf(8), checkpointed()
    live = ledger.stashed_bytes()
    alone = call(draws, x)
    one = ledger.stashed_bytes() - live
    del alone
    nested = call(lambda t: call(lambda u: call(draws, u), t.sin()).sin(), x)
    assert ledger.stashed_bytes() - live == one, "three segments, no draw between their starts"
    nested.sum().backward()
    assert ledger.stashed_bytes() == live


def test_a_segment_that_puts_the_state_back_itself_is_rewound() -> None:
    """It ends where it began, and draws all the same."""

    def function(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return draws(x)

    def program(run: Run) -> Any:
        x = leaf(8)
        out = run(function, x)
        bytes_kept.append(ledger.stashed_bytes())
        out.sum().backward()
        return out, grads([x])

    bytes_kept: list[int] = []
    assert_exact(program, replays=1)
    assert bytes_kept[0] == 0 and bytes_kept[1] > 2500


def _seed_again(generator: torch.Generator) -> None:
    generator.get_state()
    torch.rand(3)
    generator.manual_seed(0)


def _read_after_drawing_and_seed_again(generator: torch.Generator) -> None:
    torch.rand(3)
    generator.get_state()
    generator.manual_seed(0)


def _put_back(generator: torch.Generator) -> None:
    state = generator.get_state()
    torch.rand(3)
    generator.set_state(state)


def _put_back_after_setting_another(generator: torch.Generator) -> None:
    state = generator.get_state()
    torch.rand(3)
    torch.Generator().set_state(state)
    generator.get_state()
    generator.set_state(state)


@pytest.mark.parametrize(
    "draw_and_return",
    [_seed_again, _read_after_drawing_and_seed_again, _put_back, _put_back_after_setting_another],
)
def test_every_way_of_setting_a_state_is_noticed(
    draw_and_return: Callable[[torch.Generator], None],
) -> None:
    """No copy that torch makes of an engine on the way leaves our mark in it."""

    def function(x: Tensor) -> Tensor:
        draw_and_return(torch.default_generator)
        return x.sin().cos()

    torch.manual_seed(0)
    before = ledger.stashed_bytes()
    out = torch_reprise.checkpoint(function, leaf(4), use_reentrant=False)
    assert ledger.stashed_bytes() - before > 2500
    del out


def test_a_segment_that_puts_the_state_back_around_another_one_is_rewound() -> None:
    """The inner one begins where the outer one did, after the outer one drew."""

    def program(run: Run) -> Any:
        def function(x: Tensor) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                noise = torch.rand_like(x)
            return run(torch.sin, x * x * noise)

        x = leaf(8)
        out = run(function, x)
        torch.rand(7)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=2)


# Restored afterwards, whatever happens.


@both_forms
def test_the_generator_is_restored_after_the_replay(use_reentrant: bool) -> None:
    x = leaf(8)
    out = checkpointed(use_reentrant=use_reentrant)(draws, x)
    torch.randn(3)
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@both_forms
def test_the_generator_is_restored_when_the_replay_raises(use_reentrant: bool) -> None:
    def broken(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        torch.rand(5)
        raise KeyError("replay")

    x = leaf(8)
    out = checkpointed(use_reentrant=use_reentrant)(Changing(draws, broken), x)
    torch.randn(3)
    state = torch.get_rng_state()
    message_of(KeyError, lambda: out.sum().backward())
    assert torch.equal(torch.get_rng_state(), state)


@both_forms
def test_a_forward_that_raises_leaves_the_stream_where_it_is(use_reentrant: bool) -> None:
    def broken(x: Tensor) -> Tensor:
        torch.rand(5)
        raise KeyError("forward")

    def state_after(run: Run) -> Tensor:
        torch.manual_seed(11)
        message_of(KeyError, lambda: run(broken, leaf(8)))
        return torch.get_rng_state()

    call = checkpointed(use_reentrant=use_reentrant)
    assert torch.equal(state_after(call), state_after(plain))


def test_replays_in_several_threads_take_turns() -> None:
    """Every replay rewinds the one CPU generator of the process: only one at a time may."""
    replaying, drawn = threading.Event(), threading.Event()
    entered = [threading.Event(), threading.Event()]

    def function(index: int, x: Tensor) -> Tensor:
        h = dropout(x.sin(), 0.5)
        if replaying.is_set():
            entered[index].set()
            # In vain, unless both are in here: then 0 goes on from where 1 put the generator.
            (entered[1] if index == 0 else drawn).wait(0.5)
        h = dropout(h, 0.5)
        if replaying.is_set() and index == 0:
            drawn.set()
        return h.exp()

    leaves = [leaf(64), leaf(64)]
    sums = [checkpointed()(function, i, x).sum() for i, x in enumerate(leaves)]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        if replaying.is_set() and index == 1:
            entered[0].wait()
        (found[index],) = torch.autograd.grad(sums[index], leaves[index], retain_graph=True)

    work(0)
    work(1)
    expected, state = dict(found), torch.get_rng_state()
    replaying.set()
    in_threads(2, work)
    assert all(torch.equal(found[index], expected[index]) for index in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)


# The helpers that torch has.


@pytest.fixture
def default_device_type() -> Iterator[None]:
    kept = DefaultDeviceType.get_device_type()
    yield
    DefaultDeviceType.set_device_type(kept)


@pytest.mark.usefixtures("default_device_type")
def test_default_device_type() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert DefaultDeviceType.get_device_type() == (accelerator.type if accelerator else "cpu")
    DefaultDeviceType.set_device_type("meta")
    assert DefaultDeviceType.get_device_type() == "meta"
    DefaultDeviceType.set_device_type()
    assert DefaultDeviceType.get_device_type() == "cuda"


def test_device_states_of_cpu_and_meta_tensors() -> None:
    assert torch_reprise.get_device_states(torch.ones(2), 3, {"a": [torch.ones(1)]}) == ([], [])
    assert torch_reprise.get_device_states() == ([], [])
    state = torch.get_rng_state()
    torch_reprise.set_device_states([], [])
    torch_reprise.set_device_states([0], [state], device_type="meta")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
@both_forms
def test_dropout_on_a_cuda_device(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        torch.cuda.manual_seed_all(5)
        model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh()).cuda()
        x = torch.randn(8, 16, device="cuda", requires_grad=True)
        out = run(model, dropout(x, 0.3))
        between = torch.rand(3, device="cuda")
        out.sum().backward()
        return out, between, torch.cuda.get_rng_state(), grads([x]), grads(model)

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


@pytest.mark.cuda
def test_states_of_cuda_devices_come_and_go() -> None:
    x = torch.ones(1, device="cuda")
    devices, states = torch_reprise.get_device_states(x)
    assert devices == [x.get_device()]
    first = torch.rand(4, device="cuda")
    torch_reprise.set_device_states(devices, states, device_type="cuda")
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_snapshots_are_equal_by_content() -> None:
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    before = torch_reprise.rng.capture([], [one, other])
    assert before == torch_reprise.rng.capture([], [other, one])
    torch.rand(2, generator=other)
    assert before != torch_reprise.rng.capture([], [other, one])


def test_a_device_may_be_named_by_itself() -> None:
    assert torch_reprise.rng.capture(torch.device("cpu")).generators == ("cpu",)


def test_without_the_check_generators_of_others_are_left_alone() -> None:
    """Somebody else draws while a replay runs that draws nothing: a thread, a hook."""

    def fn(x: Tensor) -> Tensor:
        if torch_reprise.is_recomputing():
            drawn.append(torch.rand(3))  # stands for the thread
        return x.sin().exp()

    drawn: list[Tensor] = []
    torch.manual_seed(0)
    y = torch_reprise.Checkpointer(check_rng=False)(fn, leaf(3))
    y.sum().backward()
    assert not torch.equal(torch.rand(3), drawn[0]), "no number comes twice"


class MadeInTheFirstCall(nn.Module):
    """Draws before its dropout, but once."""

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.rand(4)
        return dropout(x * self.scale, 0.5).tanh()


@both_forms
@pytest.mark.parametrize("make", [MadeInTheFirstCall, lambda: nn.LazyLinear(4)])
def test_numbers_that_only_the_forward_draws_are_seen_although_the_replay_stops_early(
    make: Callable[[], nn.Module], use_reentrant: bool
) -> None:
    module = nn.Sequential(make(), nn.Dropout(0.5), nn.Tanh())
    x = leaf(3, 4)
    y = torch_reprise.checkpoint(module, x, use_reentrant=use_reentrant)
    before = torch.get_rng_state()
    with pytest.raises(torch_reprise.CheckpointError, match="draws other random numbers"):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert_exact(lambda run: [run(module, x), grads([x])], use_reentrant=use_reentrant, replays=0)


def test_that_check_is_off_with_the_others() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5), nn.Tanh())
    torch_reprise.Checkpointer(check_rng=False)(module, leaf(3, 4)).sum().backward()
