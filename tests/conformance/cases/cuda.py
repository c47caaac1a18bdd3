"""R and G on CUDA devices, real or simulated (tests/cudasim), which exist in the CUDA build alone.

Under the simulation kernels never run, so that values mean nothing. What is compared there is where
generators stand, in the forward, in the replay and afterwards, and how often a function ran; on
real devices values as well.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .. import environment
from ..implementations import Implementation, find
from ..registry import Needs, Outcome, Verdict, case, check
from .common import agreed, grads

ROUNDS = 10
TIMEOUT = 20.0  # of a device's thread that waits for the others, in seconds


def _leaf(device: str = "cpu") -> Tensor:
    return torch.ones(8, device=device).requires_grad_()


def _draws(x: Tensor) -> Tensor:
    return dropout(x.sin(), 0.5).exp()


def _offset(device: int = 0) -> int:
    """Where a device's generator stands; while a graph is captured, counted from its launch."""
    return int(torch.cuda.default_generators[device].get_state().view(torch.int64)[1])


def _offsets() -> list[int]:
    return [_offset(device) for device in range(torch.cuda.device_count())]


def _values(*tensors: Tensor | None) -> list[Tensor | None]:
    return [] if environment.simulated() else list(tensors)


@case("R3", "dropout on a device that no argument is on", needs=Needs.CUDA)
def no_argument_there(use: Implementation) -> Any:
    torch.cuda.init()
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        use.tick()
        seen.append(_offset())
        mask = dropout(torch.ones(8, device="cuda:0"), 0.5)
        return (x * mask.cpu()).sin()

    x = _leaf()
    out = use.checkpoint(fn, x)
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case("R3", "argument moved to the device inside of the function", needs=Needs.CUDA)
def moved_inside(use: Implementation) -> Any:
    torch.cuda.init()
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        use.tick()
        seen.append(_offset())
        return _draws(x.to("cuda:0")).cpu().sin()

    x = _leaf()
    out = use.checkpoint(fn, x)
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case("R4", "CUDA first initialised inside of the function", needs=Needs.CUDA, fresh_process=True)
def first_use(use: Implementation) -> Any:
    assert not torch.cuda.is_initialized()
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        use.tick()
        moved = x.to("cuda:0")
        seen.append(_offset())
        return _draws(moved).cpu().sin()

    x = _leaf()
    out = use.checkpoint(fn, x)
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case("R5", "tensors in keyword arguments alone", needs=Needs.CUDA)
def keywords_alone(use: Implementation) -> Any:
    torch.cuda.init()
    seen: list[int] = []

    def fn(*, x: Tensor) -> Tensor:
        use.tick()
        seen.append(_offset())
        return _draws(x)

    x = _leaf("cuda:0")
    out = use.checkpoint(fn, x=x)
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case("R5", "tensors in a list alone", needs=Needs.CUDA)
def list_alone(use: Implementation) -> Any:
    torch.cuda.init()
    seen: list[int] = []

    def fn(items: list[Tensor]) -> Tensor:
        use.tick()
        seen.append(_offset())
        return _draws(items[0])

    x = _leaf("cuda:0")
    out = use.checkpoint(fn, [x])
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case("R5", "tensors in an object of the user's class alone", needs=Needs.CUDA)
def object_alone(use: Implementation) -> Any:
    """torch looks into lists, tuples and dicts, and not into what it does not know."""
    torch.cuda.init()
    seen: list[int] = []

    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def fn(batch: Batch) -> Tensor:
        use.tick()
        seen.append(_offset())
        return _draws(batch.x)

    x = _leaf("cuda:0")
    out = use.checkpoint(fn, Batch(x))
    torch.rand(4, device="cuda:0")
    out.sum().backward()
    return {"offsets at entry": agreed(seen), "values": _values(out, x.grad)}


@case(
    "R6",
    "CUDA and another accelerator among the arguments",
    needs=Needs.TWO_ACCELERATORS,
    fresh_process=True,
)
def two_accelerators(use: Implementation) -> Any:
    """Gradients go through the other one: torch's engine has an assertion about streams that fails
    for CUDA tensors in a process with two accelerators, without a segment too."""
    testdev = environment.private_device("philox")
    torch.cuda.init()
    testdev.seed_devices()
    seen: list[int] = []

    def fn(x: Tensor, y: Tensor) -> Tensor:
        use.tick()
        seen.append(_offset())
        _draws(y)
        return testdev.draws(x)  # type: ignore[no-any-return]

    x = torch.linspace(0.1, 1, 16).to("testdev:0").requires_grad_()
    out = use.checkpoint(fn, x, torch.ones(16, device="cuda:0"))
    for device in ("testdev:0", "cuda:0"):
        torch.rand(4, device=device)
    out.sum().backward()
    return testdev.to_host([out, x.grad]), agreed(seen), testdev.states()


@check("R7", "12 tensor arguments on one device cost as much as one", needs=Needs.SIMULATION)
def many_arguments(use: Implementation) -> Outcome:
    """Each look at a generator asks CUDA whether its stream is captured, which is counted."""
    simulation = environment.simulation()
    torch.cuda.init()

    def looks(run: Implementation, count: int) -> int:
        def fn(*xs: Tensor) -> Tensor:
            run.tick()
            total = xs[0]
            for x in xs[1:]:
                total = total + x
            return _draws(total)

        before = simulation.capture_queries()
        xs = [_leaf("cuda:0") for _ in range(count)]
        run.checkpoint(fn, *xs).sum().backward()
        return int(simulation.capture_queries()) - int(before)

    def added(count: int) -> int:
        looks(use, count)  # what is done once is done
        return looks(use, count) - looks(find("plain"), count)

    one, twelve = added(1), added(12)
    if twelve == one:
        return Outcome(Verdict.EXACT)
    return Outcome(Verdict.SILENT, f"{twelve} looks at generators; {one} with one argument")


@case(
    "R11",
    "forward and backward captured into one graph",
    issues=(83148, 170535),
    needs=Needs.CUDA,
    fresh_process=True,
)
def captured(use: Implementation) -> Any:
    """In a process of its own, for a capture that failed spoils the stream for what comes next."""
    torch.cuda.init()
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        use.tick()
        seen.append(_offset())
        return _draws(_draws(x))

    with torch.cuda.stream(torch.cuda.Stream(0)):
        x = _leaf("cuda:0")
        torch.rand(4, device="cuda:0")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(0)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            dropout(x, 0.5)
            out = use.checkpoint(fn, x)
            dropout(x, 0.5)
            after_forward = _offset()
            out.sum().backward()
            after_backward = _offset()
        launched = []
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            launched.append([_offset(), _values(out, x.grad)])
    return agreed(seen), after_forward, after_backward, launched


class _Together(torch.autograd.Function):
    """In backward, waits until as many threads are here as the barrier wants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, barrier: threading.Barrier) -> Tensor:
        ctx.barrier = barrier
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.barrier.wait(TIMEOUT)
        return grad, None


def _race(devices: int) -> None:
    """One segment, whose tensors the threads of all devices ask for at the same moment."""

    @case(
        "G4",
        f"the threads of {devices} devices reach one segment",
        issues=(96764,),
        needs=Needs.CUDA,
        devices=devices,
        replays=ROUNDS,
        fresh_process=True,
    )
    def program(use: Implementation) -> Any:
        torch.cuda.init()
        barrier = threading.Barrier(devices)
        results: list[Any] = []
        for _ in range(ROUNDS):
            seen: list[list[int]] = []

            def fn(*xs: Tensor, seen: list[list[int]] = seen) -> list[Tensor]:
                use.tick()
                seen.append(_offsets())
                return [_draws(x) for x in xs]

            xs = [_leaf(f"cuda:{device}") for device in range(devices)]
            outs = use.checkpoint(fn, *xs)
            torch.rand(4, device="cuda:1")
            waiting = [_Together.apply(out, barrier).sum() for out in outs]
            torch.autograd.backward(waiting)
            results.append([agreed(seen), _offsets(), _values(*outs, *grads(xs))])
        return results


_race(2)
_race(8)
