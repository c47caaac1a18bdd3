"""Seed and offset of a CUDA generator, read and written where they lie.

`compat::philox_fields` goes around torch's virtuals; here is what it takes for granted of them. The
tests of segments and captures run both ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cuda_helpers import draws, generator, leaf, offsets
from helpers import both_forms

from torch_reprise import _C, Checkpointer, checkpoint, rng

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("seeded")]

CHANGES: dict[str, Callable[[torch.Generator], object]] = {
    "draw": lambda g: torch.rand(5, device="cuda:0", generator=g),
    "seed": lambda g: g.manual_seed(2**63 + 11),
    "new seed": lambda g: g.seed(),
    "offset": lambda g: g.set_offset(2**40 + 4),
    "state": lambda g: g.set_state(torch.Generator("cuda").manual_seed(5).get_state()),
    "state of another": lambda g: g.graphsafe_set_state(
        torch.Generator("cuda").manual_seed(6).graphsafe_get_state()
    ),
}


def told_by_torch(g: torch.Generator) -> tuple[int, int]:
    return g.initial_seed(), g.get_offset()


def fields(g: torch.Generator) -> tuple[int, int]:
    found = _C.philox_fields(g)
    assert found is not None
    return found[:2]


def keeps_rnn_state(g: torch.Generator) -> bool:
    found = _C.philox_fields(g)
    assert found is not None
    return found[2]


@pytest.mark.parametrize("of", ["default", "explicit", "clone"])
@pytest.mark.parametrize("change", CHANGES)
def test_they_are_what_torch_says(change: str, of: str) -> None:
    g = generator(0) if of == "default" else torch.Generator("cuda:0")
    if of == "clone":
        g = g.clone_state()
    assert fields(g) == told_by_torch(g)
    before = told_by_torch(g)
    CHANGES[change](g)
    assert fields(g) == told_by_torch(g) != before


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_is_put_back_is_the_one_that_torch_gives(change: str) -> None:
    g = generator(0)
    torch.rand(3, device="cuda:0")
    expected = g.get_state()
    snapshot = rng.capture()
    CHANGES[change](g)
    assert not torch.equal(g.get_state(), expected)
    assert rng.capture() != snapshot
    snapshot.restore()
    assert torch.equal(g.get_state(), expected)
    assert rng.capture() == snapshot


def test_other_generators_have_none() -> None:
    assert _C.philox_fields(torch.default_generator) is None


def test_an_offset_that_torch_refuses_is_refused() -> None:
    state = torch.cuda.get_rng_state(0)
    state.view(torch.int64)[1] = 6
    snapshot = rng.RngSnapshot.from_state_tensors({"cuda:0": state})
    with pytest.raises(RuntimeError, match="multiple of 4"):
        snapshot.restore()


def test_a_generator_with_a_state_of_another_one_is_rewound() -> None:
    """A segment's generator may get another state object between forward and backward."""
    g = generator(0)
    seen: list[tuple[int, int]] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(told_by_torch(g))
        return draws(x)

    y = checkpoint(fn, leaf("cuda:0"), use_reentrant=False)
    g.graphsafe_set_state(torch.Generator("cuda").manual_seed(6).graphsafe_get_state())
    between = told_by_torch(g)
    y.sum().backward()
    assert seen[1] == seen[0] and told_by_torch(g) == between


@both_forms
def test_generators_that_share_a_state(use_reentrant: bool) -> None:
    other = torch.Generator("cuda:0")
    other.graphsafe_set_state(generator(0).graphsafe_get_state())
    seen: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        torch.rand(4, device="cuda:0")
        torch.rand(4, device="cuda:0", generator=other)
        seen.append(generator(0).get_offset())
        return draws(x.to("cuda:0")).cpu()

    y = Checkpointer(use_reentrant=use_reentrant, early_stop=False)(fn, leaf())
    torch.rand(4, device="cuda:0")
    before = offsets()
    y.sum().backward()
    assert seen == [8, 8]
    assert offsets() == before


def seen_by_segment(
    g: torch.Generator, between: Callable[[], object], use_reentrant: bool
) -> list[bool]:
    """The flag as the forward and the replay of a segment that draws find it."""
    seen: list[bool] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(keeps_rnn_state(g))
        return draws(x)

    out = checkpoint(fn, leaf("cuda:0"), use_reentrant=use_reentrant)
    between()
    out.sum().backward()
    return seen


@both_forms
@pytest.mark.parametrize("kept", [False, True])
def test_whether_an_rnn_draws_a_seed_is_as_in_the_forward(kept: bool, use_reentrant: bool) -> None:
    """torch clears the flag where a generator is set; a replay sets one, and is not seen by it."""
    g = generator(0).manual_seed(3)
    assert not keeps_rnn_state(g)
    torch.rand(4, device="cuda:0")
    if kept:
        _C.keep_rnn_state(g)
    between = functools.partial(torch.rand, 4, device="cuda:0")
    assert seen_by_segment(g, between, use_reentrant) == [kept, kept]
    assert keeps_rnn_state(g) is kept
    snapshot = rng.capture()
    snapshot.restore()
    assert keeps_rnn_state(g) is kept, "it stands there already"
    torch.rand(4, device="cuda:0")
    snapshot.restore()
    assert not keeps_rnn_state(g), "as after torch.cuda.set_rng_state"


@both_forms
def test_a_seed_between_forward_and_backward_stays_one_for_rnns(use_reentrant: bool) -> None:
    g = generator(0).manual_seed(3)
    torch.rand(4, device="cuda:0")
    _C.keep_rnn_state(g)
    between = functools.partial(g.manual_seed, 5)
    assert seen_by_segment(g, between, use_reentrant) == [True, True]
    assert not keeps_rnn_state(g)
