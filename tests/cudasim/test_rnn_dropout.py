"""The state that cuDNN's RNNs draw their masks from, with a stand-in for cuDNN.

`Cudnn` keeps the buffer as torch does: one for the device, made anew with a number drawn from the
device's generator where that was given a seed or a state, saved by autograd before the operator
runs, and moved on without a version. What it holds is a number, so that every operator can tell
which masks it would have drawn. The real one is in tests/cuda/test_exact.py, for GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_helpers import draws, generator, simulated_only
from helpers import Run, checkpointed, plain
from torch import Tensor

from torch_reprise import _C, Checkpointer, CheckpointError, checkpoint, ledger

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("seeded"), simulated_only]

SIZE = 1 << 20


class Cudnn:
    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.masks: defaultdict[str, list[int]] = defaultdict(list)

    def _write(self, number: int) -> None:
        assert self.buffer is not None
        values = torch.zeros(SIZE, dtype=torch.uint8)
        values[:8].copy_(torch.tensor([number]).view(torch.uint8))
        self.buffer.data.copy_(values)  # no version is counted

    def _read(self) -> int:
        assert self.buffer is not None
        return int(self.buffer.data.cpu()[:8].view(torch.int64))

    def rnn(self, x: Tensor, name: str) -> Tensor:
        g = generator(0)
        found = _C.philox_fields(g)
        assert found is not None
        if self.buffer is None or not found[2]:
            seed = 1000 * (1 + g.initial_seed()) + g.get_offset()
            torch.rand(4, device="cuda:0")
            self.buffer = torch.empty(SIZE, dtype=torch.uint8, device="cuda:0")
            self._write(seed)
            _C.keep_rnn_state(g)
        result = (x * self.buffer)[:8]  # saves the buffer, and runs after that
        self.masks[name].append(self._read())
        self._write(self._read() + 1)
        return result

    def outcome(self) -> list[Any]:
        return [self._read(), _C.philox_fields(generator(0))]


Program = Callable[[Run, Cudnn], None]


def leaf() -> Tensor:
    return torch.ones(1, device="cuda:0", requires_grad=True)


def several_steps(run: Run, cudnn: Cudnn) -> None:
    for step in range(3):
        x = leaf()
        out = run(lambda t, name=f"step {step}": cudnn.rnn(t, name), x)
        torch.rand(4, device="cuda:0")
        out.sum().backward()
    cudnn.rnn(leaf(), "at last")


def with_other_draws(run: Run, cudnn: Cudnn) -> None:
    for step in range(3):
        run(
            lambda t, name=f"step {step}": draws(cudnn.rnn(draws(t), name)), leaf()
        ).sum().backward()
    cudnn.rnn(leaf(), "at last")


def several_at_once(run: Run, cudnn: Cudnn) -> None:
    def fn(t: Tensor, name: str) -> Tensor:
        return cudnn.rnn(cudnn.rnn(t, f"{name}, first")[:1], f"{name}, second")[:1]

    one = run(fn, leaf(), "one")
    cudnn.rnn(leaf(), "outside")
    two = run(fn, one, "two")
    two.sum().backward()
    cudnn.rnn(leaf(), "at last")


def one_inside_of_another(run: Run, cudnn: Cudnn) -> None:
    def inner(t: Tensor, name: str) -> Tensor:
        return cudnn.rnn(t, name)[:1]

    def outer(t: Tensor) -> Tensor:
        t = inner(run(inner, t, "inner one"), "outer one")
        return inner(run(inner, t, "inner two"), "outer two")

    run(outer, leaf()).sum().backward()
    cudnn.rnn(leaf(), "at last")


def seeded_between(run: Run, cudnn: Cudnn) -> None:
    for step in range(2):
        out = run(lambda t, name=f"step {step}": draws(cudnn.rnn(t, name)), leaf())
        torch.cuda.manual_seed_all(3)
        out.sum().backward()
        cudnn.rnn(leaf(), f"after step {step}")


def put_back_between(run: Run, cudnn: Cudnn) -> None:
    """The generator comes back to where it stood, and is new to RNNs all the same."""
    cudnn.rnn(leaf(), "at first")
    with torch.random.fork_rng(devices=[0]):
        out = run(lambda t: draws(cudnn.rnn(t, "inside")), leaf())
    out.sum().backward()
    cudnn.rnn(leaf(), "at last")


def seeded_inside(run: Run, cudnn: Cudnn) -> None:
    """The function makes the state anew itself, and puts the generator back."""
    cudnn.rnn(leaf(), "at first")

    def fn(t: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[0]):
            torch.cuda.manual_seed(7)
            return cudnn.rnn(t, "inside")

    for _ in range(2):
        run(fn, leaf()).sum().backward()
    _C.keep_rnn_state(generator(0))  # so that what is in the buffer shows
    cudnn.rnn(leaf(), "at last")


def a_backward_inside(run: Run, cudnn: Cudnn) -> None:
    cudnn.rnn(leaf(), "at first")

    def fn(t: Tensor) -> Tensor:
        inner = run(lambda u: cudnn.rnn(u, "inner"), t)
        (gradient,) = torch.autograd.grad(inner.sum(), t, create_graph=True)
        return cudnn.rnn(t * gradient, "outer")

    run(fn, leaf().sin()).sum().backward()
    cudnn.rnn(leaf(), "at last")


PROGRAMS: list[Program] = [
    several_steps,
    with_other_draws,
    several_at_once,
    one_inside_of_another,
    seeded_between,
    put_back_between,
    seeded_inside,
    a_backward_inside,
]


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[None]:
    _C.set_rnn_state_size(0, SIZE)
    yield
    _C.set_rnn_state_size(0, 0)


def played(program: Program, run: Run) -> Cudnn:
    torch.cuda.manual_seed_all(7)
    cudnn = Cudnn()
    program(run, cudnn)
    return cudnn


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_masks_of_the_replay_are_those_of_the_forward(program: Program) -> None:
    expected = played(program, plain)
    before = ledger.replays()
    found = played(program, checkpointed())
    assert ledger.replays() > before
    assert found.outcome() == expected.outcome()
    for name, masks in expected.masks.items():
        assert set(found.masks[name]) == set(masks), name
    assert sum(map(len, found.masks.values())) > sum(map(len, expected.masks.values()))


def test_what_is_kept() -> None:
    cudnn, before = Cudnn(), ledger.stashed_bytes()
    out = checkpoint(lambda t: cudnn.rnn(t, "inside"), leaf(), use_reentrant=False)
    assert SIZE < ledger.stashed_bytes() - before < SIZE + 100
    again = Checkpointer(preserve_rng_state=False)(lambda t: cudnn.rnn(t, "not kept"), leaf())
    assert ledger.stashed_bytes() - before < SIZE + 100
    del out
    assert ledger.stashed_bytes() == before
    del again


def test_an_error_in_the_replay_leaves_the_state_as_it_was() -> None:
    cudnn = Cudnn()
    cudnn.rnn(leaf(), "at first")
    calls = []

    def fn(t: Tensor) -> Tensor:
        y = cudnn.rnn(t, "inside")
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("again")
        return draws(y).exp()

    out = checkpoint(fn, leaf(), use_reentrant=False)
    before = cudnn.outcome()
    with pytest.raises((ValueError, CheckpointError)):
        out.sum().backward()
    assert cudnn.outcome() == before
