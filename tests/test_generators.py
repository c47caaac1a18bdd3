"""Explicit generators, host generators, divergence, and the public snapshots."""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_reprise
from torch_reprise import Checkpointer, CheckpointError, checkpoint, ledger, rng

Run = Callable[..., Any]
FORMS = pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])

global_generator = torch.Generator()
global_list = [torch.Generator()]


def noise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return x * torch.rand(x.shape, generator=generator)


def uses_a_global(x: Tensor) -> Tensor:
    return noise(noise(x.sin(), global_generator).exp(), global_list[0]).exp()


def with_a_default(x: Tensor, generator: torch.Generator = global_generator) -> Tensor:
    return noise(x.sin(), generator).exp()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner[0].noise = [torch.Generator()]
        with torch.no_grad():
            self.inner[0].weight.fill_(0.3)
            self.inner[0].bias.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = noise(self.inner(x).sin(), self.generator)
        return noise(x, self.inner[0].noise[0]).exp()


def in_an_argument(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(lambda t, gen: noise(t.sin(), gen).exp(), x, g)


def in_a_keyword(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(lambda t, gen: noise(t.sin(), gen).exp(), x, gen=g)


def in_a_container(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(lambda t, d: noise(t.sin(), d["g"][0]).exp(), x, {"g": [g, 3]})


def in_a_closure(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(lambda t: noise(t.sin(), g).exp(), x)


def in_a_partial(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(functools.partial(lambda gen, t: noise(t.sin(), gen).exp(), g), x)


def in_globals(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(uses_a_global, x)


def in_a_default(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(with_a_default, x)


def in_a_module(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(Noisy(), x)


def in_a_bound_method(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(Noisy().forward, x)


def in_a_module_of_a_closure(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    module = Noisy()
    return run(lambda t: module(t), x)


def together_with_the_default_one(run: Run, g: torch.Generator, x: Tensor) -> Tensor:
    return run(lambda t: noise(noise(noise(t, g).sin()), g).exp(), x)


PLACES = [
    in_an_argument,
    in_a_keyword,
    in_a_container,
    in_a_closure,
    in_a_partial,
    in_globals,
    in_a_default,
    in_a_module,
    in_a_bound_method,
    in_a_module_of_a_closure,
    together_with_the_default_one,
]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for position, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(have, want), f"entry {position}: found {have}, expected {want}"


def play(place: Callable[..., Tensor], run: Run) -> list[Tensor]:
    torch.manual_seed(1)
    generator = torch.Generator()
    for seed, each in enumerate([generator, global_generator, *global_list]):
        each.manual_seed(seed)
    x = torch.arange(8.0).reshape(2, 4).requires_grad_()
    y = place(run, generator, x)
    between = torch.rand(3, generator=generator)
    y.sum().backward()
    assert x.grad is not None
    states = [g.get_state() for g in (generator, global_generator, *global_list)]
    return [y.detach(), x.grad, between, torch.get_rng_state(), *states]


@FORMS
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_explicit_generator(place: Callable[..., Tensor], use_reentrant: bool) -> None:
    expected = play(place, lambda fn, *args, **kwargs: fn(*args, **kwargs))
    before = ledger.replays()
    found = play(place, functools.partial(checkpoint, use_reentrant=use_reentrant))
    assert ledger.replays() == before + 1
    assert_same_bits(found, expected)


hidden = {"g": torch.Generator()}


def reaches_further(x: Tensor) -> Tensor:
    return draws_from_hidden(x).exp()


def draws_from_hidden(x: Tensor) -> Tensor:
    return noise(x.sin(), hidden["g"])


def test_a_generator_that_must_be_named() -> None:
    x = torch.ones(4, requires_grad=True)
    hidden["g"].manual_seed(3)
    (expected,) = torch.autograd.grad(reaches_further(x).sum(), x)
    for options, exact in (({"generators": [hidden["g"]]}, True), ({}, False)):
        hidden["g"].manual_seed(3)
        y = Checkpointer(**options)(reaches_further, x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected) == exact


def test_a_generator_counts_once_and_only_if_it_moved() -> None:
    used, unused = torch.Generator(), torch.Generator()

    def fn(x: Tensor, *generators: torch.Generator) -> Tensor:
        return noise(x.sin(), used).exp()

    x = torch.ones(4, requires_grad=True)
    with ledger.record() as record:
        y = checkpoint(fn, x, used, used, unused, use_reentrant=False)
    assert record.rows[0].generators == ("explicit cpu",)
    assert 2500 < ledger.stashed_bytes() < 2600
    del y


def test_generators_are_left_alone_without_preserve_rng_state() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.ones(4, requires_grad=True)
    y = checkpoint(
        lambda t: noise(t.sin(), g).exp(), x, use_reentrant=False, preserve_rng_state=False
    )
    after_forward = g.get_state()
    y.sum().backward()
    assert not torch.equal(g.get_state(), after_forward)


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (3, "generators must be torch.Generator objects, got int"),
        ([torch.Generator(), "cpu"], r"generators\[1\] must be a torch.Generator, got str"),
    ],
)
def test_what_is_no_generator(generators: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Checkpointer(generators=generators)


# Host generators.


def host_noise(x: Tensor) -> Tensor:
    h = x.sin() * random.random()
    return (h * float(np.random.rand())).exp() * random.gauss(0, 1)


def play_host(run: Run) -> tuple[Any, ...]:
    random.seed(4)
    np.random.seed(4)
    x = torch.ones(4, requires_grad=True)
    y = run(host_noise, x)
    between = random.random(), float(np.random.rand())
    y.sum().backward()
    assert x.grad is not None
    return y.tolist(), x.grad.tolist(), between, random.getstate(), np.random.get_state()[2]


def test_host_generators_on_request() -> None:
    expected = play_host(lambda fn, x: fn(x))
    assert play_host(Checkpointer(preserve_host_rng=True)) == expected
    assert play_host(Checkpointer(preserve_host_rng=True, early_stop=False)) == expected
    assert play_host(Checkpointer()) != expected


def test_host_generators_are_put_back_after_an_error() -> None:
    calls = 0

    def fn(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        y = x.sin() * random.random()
        if calls == 2:
            raise ValueError("the replay fails")
        return y.exp()

    x = torch.ones(2, requires_grad=True)
    y = Checkpointer(preserve_host_rng=True)(fn, x)
    state = random.getstate()
    with pytest.raises(ValueError, match="the replay fails"):
        y.sum().backward()
    assert random.getstate() == state


def test_host_generators_need_contexts() -> None:
    with pytest.raises(ValueError, match="preserve_host_rng can only be used with"):
        Checkpointer(use_reentrant=True, preserve_host_rng=True)


# Divergence.


class Draws:
    """Draws `first` numbers in the forward and `later` in a replay, before it saves more."""

    def __init__(self, first: int, later: int, generator: torch.Generator | None = None) -> None:
        self.counts = [first, later]
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        torch.rand(count, generator=self.generator)
        return x.sin().exp()


@FORMS
@pytest.mark.parametrize(("first", "later"), [(3, 7), (7, 3)], ids=["more", "fewer"])
@pytest.mark.parametrize("explicit", [False, True], ids=["default", "explicit"])
def test_a_replay_that_draws_otherwise(
    first: int, later: int, explicit: bool, use_reentrant: bool
) -> None:
    generator = torch.Generator() if explicit else None
    x = torch.ones(4, requires_grad=True)
    run = Checkpointer(use_reentrant=use_reentrant, **({} if use_reentrant else NO_STOP))
    y = run(Draws(first, later, generator), x)
    state = torch.get_rng_state()
    name = "explicit cpu" if explicit else "cpu"
    message = (
        rf"(?s)draws other random numbers.*generator {name}.*began at.*forward ended.*replay ended"
        rf".*{first} numbers in the forward and {later} in the replay"
    )
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


NO_STOP: dict[str, Any] = {"early_stop": False}


def test_an_early_stop_may_stand_before_but_not_beyond() -> None:
    def draws_at_the_end(x: Tensor) -> Tensor:
        y = x.sin().exp()
        torch.rand(7)
        return y

    x = torch.ones(4, requires_grad=True)
    Checkpointer()(draws_at_the_end, x).sum().backward()
    with pytest.raises(CheckpointError, match="7 numbers in the forward and 9 in the replay"):
        Checkpointer()(Draws(7, 9), x).sum().backward()


def test_an_early_stop_passes_saved_tensors_where_the_forward_did() -> None:
    x = torch.ones(4, requires_grad=True)
    y = Checkpointer()(Draws(7, 3), x)
    state = torch.get_rng_state()
    message = r"draws other random numbers.*\n.*position 0 was saved, at .*test_generators.py:\d+"
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_many_blocks_of_numbers_are_counted() -> None:
    x = torch.ones(4, requires_grad=True)
    y = Checkpointer(early_stop=False)(Draws(5000, 70001), x)
    with pytest.raises(CheckpointError, match="5000 numbers in the forward and 70001 in the"):
        y.sum().backward()


@FORMS
def test_a_replay_that_draws_where_the_forward_did_not(use_reentrant: bool) -> None:
    x = torch.ones(4, requires_grad=True)
    y = Checkpointer(use_reentrant=use_reentrant)(Draws(0, 5), x)
    state = torch.get_rng_state()
    message = "(?s)generator cpu.*the forward did not draw from it, the replay did"
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"check_rng": False}, {"determinism_check": "none"}])
def test_the_check_can_be_turned_off(options: dict[str, Any]) -> None:
    x = torch.ones(4, requires_grad=True)
    y = Checkpointer(early_stop=False, **options)(Draws(3, 8), x)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stop_that_was_swallowed_is_no_divergence() -> None:
    def fn(x: Tensor) -> Tensor:
        torch.rand(2)
        try:
            return x.sin()
        except BaseException:
            torch.rand(9)  # not run in the forward
            return x

    x = torch.ones(4, requires_grad=True)
    checkpoint(fn, x, use_reentrant=False).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, x.detach().cos())


# Selective checkpointing with random operators.


@pytest.mark.parametrize("explicit", [False, True], ids=["default", "explicit"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_an_operator_from_the_cache_moves_the_generator(early_stop: bool, explicit: bool) -> None:
    generator = torch.Generator() if explicit else None
    saved = [torch.ops.aten.rand.default, torch.ops.aten.rand.generator]

    def fn(x: Tensor, generator: torch.Generator | None) -> Tensor:
        h = (x.sin() * torch.rand(x.shape, generator=generator)).exp()
        h = h * torch.bernoulli(torch.full(x.shape, 0.5), generator=generator)
        return (h * torch.rand(x.shape, generator=generator)).exp()

    def play_selective(run: Run) -> list[Tensor]:
        torch.manual_seed(2)
        if generator is not None:
            generator.manual_seed(2)
        x = torch.linspace(0, 1, 6).requires_grad_()
        y = run(fn, x, generator)
        y.sum().backward()
        assert x.grad is not None
        state = generator.get_state() if generator is not None else torch.get_rng_state()
        return [y.detach(), x.grad, state]

    contexts = functools.partial(torch_reprise.create_selective_checkpoint_contexts, saved)
    run = functools.partial(
        checkpoint, use_reentrant=False, context_fn=contexts, early_stop=early_stop
    )
    assert_same_bits(play_selective(run), play_selective(lambda fn, *args: fn(*args)))


# Snapshots.


def test_a_snapshot_restores_what_moved() -> None:
    explicit = torch.Generator().manual_seed(1)
    torch.randn(3, dtype=torch.float64)  # leaves a sample over
    before = rng.capture(generators=[explicit, explicit])
    assert before.generators == ("cpu", "explicit cpu")
    assert 5000 < before.nbytes < 5200
    assert before == rng.capture(generators=[explicit])
    expected = torch.randn(5, dtype=torch.float64), torch.rand(2, generator=explicit)
    after = rng.capture(generators=[explicit])
    assert after != before
    lines = before.diff(after).splitlines()
    assert [line.split(":")[0] for line in lines] == ["cpu", "explicit cpu"]
    assert before.diff(before) == ""
    before.restore()
    assert torch.equal(torch.randn(5, dtype=torch.float64), expected[0])
    assert torch.equal(torch.rand(2, generator=explicit), expected[1])


def test_snapshots_of_other_generators_differ() -> None:
    a, b = torch.Generator(), torch.Generator()
    first, second = rng.capture([], [a]), rng.capture([], [b])
    assert first != second and first != 3
    text = first.diff(second)
    assert "only in the first" in text and "only in the second" in text
    with pytest.raises(TypeError, match="other must be an RngSnapshot, got int"):
        first.diff(3)  # type: ignore[arg-type]


def test_a_snapshot_travels() -> None:
    before = rng.capture()
    again = pickle.loads(pickle.dumps(before))
    assert again == before and "cpu" in repr(again)
    states = before.state_tensors()
    assert torch.equal(states["cpu"], torch.get_rng_state())
    torch.rand(3)
    rng.RngSnapshot.from_state_tensors(states).restore()
    assert rng.capture() == before
    with pytest.raises(TypeError, match="default generators only"):
        pickle.dumps(rng.capture(generators=[torch.Generator()]))
    with pytest.raises(ValueError, match="no default generator 'cuda:7'"):
        rng.RngSnapshot.from_state_tensors({"cuda:7": torch.zeros(16, dtype=torch.uint8)})
    with pytest.raises(TypeError, match="contiguous byte tensor"):
        rng.RngSnapshot.from_state_tensors({"cpu": torch.zeros(3)})


def test_a_fork_puts_back_also_after_an_error() -> None:
    before = rng.capture()
    with rng.fork() as entered:
        torch.rand(3)
        assert entered == before != rng.capture()
    assert rng.capture() == before
    with pytest.raises(KeyError), rng.fork("cpu"):
        torch.rand(3)
        raise KeyError
    assert rng.capture() == before


def test_devices_of_a_capture() -> None:
    assert (
        rng.capture("cpu").generators == rng.capture([torch.device("cpu")]).generators == ("cpu",)
    )
    assert rng.capture([]).generators == ()
    assert rng.default_generators()[0] == "cpu"
    with pytest.raises(ValueError, match="'meta' has no default generator now; there are cpu"):
        rng.capture(["meta"])
    with pytest.raises(TypeError, match=r"generators\[0\] must be a torch.Generator"):
        rng.capture(generators=[3])  # type: ignore[list-item]
