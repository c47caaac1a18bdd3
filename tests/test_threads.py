"""Several threads, locks and processes: nobody waits for ever, and nothing is mixed."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import both_forms, child_runs_backward
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import (
    _C,
    Checkpointer,
    CheckpointError,
    GraphExecGroup,
    checkpoint,
    is_recomputing,
    ledger,
)


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    """A thread that hangs ends the process, with the stacks of all."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def leaf(n: int = 4) -> Tensor:
    return torch.linspace(0.1, 1.0, n).requires_grad_()


def run(fn: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(fn, *args, use_reentrant=False)


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_counters_are_read_while_groups_replay() -> None:
    """A group is a Python object; taking a reference to it needs the interpreter lock."""
    w = leaf(4)
    over = threading.Event()

    def work() -> None:
        try:
            for _ in range(30):
                with GraphExecGroup():
                    sum(run(lambda x: (x * w).sin(), w).sum() for _ in range(3)).backward()
        finally:
            over.set()

    def look() -> None:
        while not over.is_set():
            ledger.live_slots()

    in_threads(work, look)


def test_a_look_at_a_saved_tensor_while_another_thread_unpacks_the_inputs() -> None:
    unpacking, looked = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def unpack(t: Tensor) -> Tensor:
        unpacking.set()
        looked.wait(0.3)
        return t

    x = leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = run(lambda t: (t * 1).sin(), x)

    def look() -> None:
        unpacking.wait()
        found.append(y.grad_fn._saved_self)
        looked.set()

    in_threads(lambda: y.sum().backward(retain_graph=True), look)
    assert torch.equal(found[0], x * 1)


def test_a_forgotten_recording_is_closed_by_the_collector() -> None:
    for _ in range(3):
        manager = ledger.record()
        recording = manager.__enter__()
        cycle = [manager, recording]
        cycle.append(cycle)
        run(torch.sin, leaf()).sum().backward()
        rows = recording.rows
        del manager, recording, cycle
        gc.collect()
        assert rows[-1].name
    assert _C.live_segments() == 0


def test_a_replay_that_draws_nothing_inside_of_anothers_turn() -> None:
    drawing, begun, over = (threading.Event() for _ in range(3))
    calls = {"noisy": 0, "quiet": 0}

    def noisy(x: Tensor) -> Tensor:
        calls["noisy"] += 1
        y = dropout(x.sin(), 0.5)
        if calls["noisy"] == 2:
            drawing.set()
            begun.wait()
        return y.exp()

    def quiet(x: Tensor) -> Tensor:
        calls["quiet"] += 1
        y = x.sin()
        if calls["quiet"] == 2:
            begun.set()
            over.wait()
        return y.exp()

    noisy_out, quiet_out = run(noisy, leaf(8)), run(quiet, leaf(8))
    torch.rand(100)
    before = torch.get_rng_state()

    def first() -> None:
        noisy_out.sum().backward()
        over.set()

    def second() -> None:
        drawing.wait()
        quiet_out.sum().backward()

    in_threads(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_that_wait_for_each_other_get_an_error() -> None:
    """Two replays cannot both have the one CPU generator, however long they wait."""
    barrier = threading.Barrier(2, timeout=3)
    replaying = threading.Event()

    def fn(x: Tensor) -> Tensor:
        y = dropout(x.sin(), 0.5)
        if replaying.is_set():
            barrier.wait()
        return y.exp()

    outs = [run(fn, leaf(8)) for _ in range(2)]
    replaying.set()
    errors: list[Exception] = []

    def work(out: Tensor) -> None:
        try:
            out.sum().backward()
        except (CheckpointError, threading.BrokenBarrierError) as error:
            errors.append(error)

    state = torch.get_rng_state()
    _C.set_lease_wait_limit(0.3)
    try:
        in_threads(lambda: work(outs[0]), lambda: work(outs[1]))
    finally:
        _C.set_lease_wait_limit(300.0)
    message = next(str(e) for e in errors if isinstance(e, CheckpointError))
    assert "waited 0.3 s for the random generator cpu" in message and "barrier" in message
    assert torch.equal(torch.get_rng_state(), state)
    assert len(errors) == 2
    errors.clear()


@child_runs_backward
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_has_the_turn() -> None:
    has_turn, forked = threading.Event(), threading.Event()
    replaying = threading.Event()

    def slow(x: Tensor) -> Tensor:
        y = dropout(x.sin(), 0.5)
        if replaying.is_set():
            has_turn.set()
            forked.wait()
        return y.exp()

    slow_out = run(slow, leaf())
    out = run(lambda x: dropout(x.sin(), 0.5).exp(), leaf())
    replaying.set()
    status: list[int] = []

    def fork() -> None:
        has_turn.wait()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(20)  # the parent's watchdog is a thread, and not here
                out.sum().backward()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        forked.set()
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    in_threads(lambda: slow_out.sum().backward(), fork)
    assert status == [0]


# --- what belongs to all threads and a replay changes for a while


def backward_in_threads(outs: list[Tensor]) -> None:
    in_threads(*(out.sum().backward for out in outs))


@both_forms
def test_a_batch_norm_whose_segments_go_backward_in_several_threads(use_reentrant: bool) -> None:
    """Replays exchange the values of its buffers: in turns, and without giving memory away."""
    found = []
    for run in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64))
        inputs = [torch.randn(64, 16, requires_grad=True) for _ in range(6)]
        for _ in range(10):
            backward_in_threads([run(module, x) for x in inputs])
        found.append([*module.buffers(), *(x.grad for x in inputs)])
    assert all(map(torch.equal, *found))


def test_a_batch_norm_that_another_thread_uses_during_replays() -> None:
    """Its memory stays where it is: nobody reads or writes what was given back."""
    module = torch.nn.BatchNorm1d(64)
    value = torch.randn(64, 64)
    over = threading.Event()

    def forwards() -> None:
        while not over.is_set():
            with torch.no_grad():
                module(value)

    def replays() -> None:
        try:
            for _ in range(300):
                run(module, value.clone().requires_grad_()).sum().backward()
        finally:
            over.set()

    where = [b.data_ptr() for b in module.buffers()]
    in_threads(forwards, replays)
    assert [b.data_ptr() for b in module.buffers()] == where


@both_forms
def test_settings_after_replays_that_overlap(use_reentrant: bool) -> None:
    def fn(x: Tensor) -> Tensor:
        if is_recomputing():
            time.sleep(0.005)
        return (x * torch.tensor(2.0).to(x.dtype)).sin() + (torch.get_default_dtype().itemsize - 8)

    def values() -> tuple[object, ...]:
        backends = torch.backends.cuda
        return (
            torch.get_default_dtype(),
            backends.flash_sdp_enabled(),
            backends.math_sdp_enabled(),
        )

    before = values()
    inputs = [leaf() for _ in range(4)]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outs = [checkpoint(fn, x, use_reentrant=use_reentrant) for x in inputs]
    finally:
        torch.set_default_dtype(torch.float32)
    assert values() == before
    backward_in_threads(outs)
    assert values() == before
    assert all(torch.equal(x.grad, inputs[0].grad) for x in inputs)


@both_forms
def test_a_replay_that_ends_leaves_the_settings_of_another_one(use_reentrant: bool) -> None:
    """One needs the settings that are there anyway, and takes no turn with them."""
    begun, set_by_other, ended = threading.Event(), threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    def plain(x: Tensor) -> Tensor:
        if is_recomputing():
            begun.set()
            set_by_other.wait(20)
        return x.sin()

    def other(x: Tensor) -> Tensor:
        if is_recomputing():
            set_by_other.set()
            ended.wait(20)
        seen.append(torch.get_default_dtype())
        return x.cos()

    out_of_plain = checkpoint(plain, leaf(), use_reentrant=use_reentrant)
    torch.set_default_dtype(torch.float64)
    try:
        out_of_other = checkpoint(other, leaf(), use_reentrant=use_reentrant)
    finally:
        torch.set_default_dtype(torch.float32)

    def backward_of_plain() -> None:
        try:
            out_of_plain.sum().backward()
        finally:
            ended.set()

    def backward_of_other() -> None:
        begun.wait(20)
        out_of_other.sum().backward()

    in_threads(backward_of_plain, backward_of_other)
    assert seen == [torch.float64, torch.float64]
    assert torch.get_default_dtype() == torch.float32


@both_forms
def test_modules_and_objects_after_replays_that_overlap(use_reentrant: bool) -> None:
    class State:
        steps = 0

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, state: State) -> Tensor:
            if is_recomputing():
                time.sleep(0.002)
            state.steps += 1
            return (x * (2 if self.training else 3)).sin() * state.steps

    expected: list[Tensor] = []
    for run in (
        lambda f, *args: f(*args),
        functools.partial(checkpoint, use_reentrant=use_reentrant),
    ):
        module, state = Block(), State()
        inputs = [leaf() for _ in range(4)]
        outs = [run(module, x, state) for x in inputs]
        module.eval()
        backward_in_threads(outs)
        assert not module.training
        assert state.steps == 4
        gradients = [x.grad for x in inputs if x.grad is not None]
        expected = expected or gradients
        assert all(map(torch.equal, gradients, expected))


def test_host_generators_of_replays_in_several_threads() -> None:
    def fn(x: Tensor) -> Tensor:
        for _ in range(5):
            x = (x * random.random()).sin()
            time.sleep(0.0005)
        return x

    found = []
    for run in (lambda f, x: f(x), Checkpointer(preserve_host_rng=True)):
        random.seed(3)
        inputs = [leaf() for _ in range(4)]
        outs = [run(fn, x) for x in inputs]
        state = random.getstate()
        backward_in_threads(outs)
        assert random.getstate() == state
        found.append([x.grad for x in inputs])
    assert all(map(torch.equal, *found))


def test_a_replay_that_is_forgotten_while_it_runs_is_freed_without_a_lock() -> None:
    """One thread ends the group in which another one replays; a third reads the counters."""
    for _ in range(30):
        running = threading.Event()

        def fn(x: Tensor) -> Tensor:
            y = x.sin()
            if is_recomputing() and not running.is_set():  # noqa: B023
                running.set()  # noqa: B023
                time.sleep(0.01)
            return y.cos()

        out = run(fn, leaf()).sum()
        group = GraphExecGroup()

        def backward() -> None:
            with group:  # noqa: B023
                out.backward()  # noqa: B023

        thread = threading.Thread(target=backward)
        thread.start()
        running.wait()
        with group:
            pass
        while thread.is_alive():
            ledger.live_slots()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process")
def test_forks_while_another_thread_begins_segments() -> None:
    """No lock of ours is held by a thread that is not in the child."""
    over = threading.Event()

    def segments() -> None:
        while not over.is_set():
            names: dict[str, Any] = {}
            exec("def f(x):\n" + "    x = x.sin()\n" * 20 + "    return x", names)
            run(names["f"], leaf()).sum().backward()

    def forks() -> None:
        try:
            for _ in range(40):
                child = os.fork()
                if child == 0:
                    signal.alarm(5)  # ends a child that hangs
                    names: dict[str, Any] = {}
                    exec("def f(x): return x.sin().cos()", names)
                    run(names["f"], torch.ones(4, requires_grad=True))
                    ledger.live_slots()
                    ledger.stashed_bytes()
                    os._exit(0)
                _, status = os.waitpid(child, 0)
                hung.append(os.WIFSIGNALED(status))
        finally:
            over.set()

    hung: list[bool] = []
    in_threads(segments, forks)
    # torch and CPython have locks of their own that may be held at a fork, seldom.
    assert sum(hung) <= 1
