"""What ``rng`` measures in a process of its own: segments that draw from one number of devices.

``measure`` is called through ``_child``. What the operations are is told in ``rng``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

import torch_reprise
from torch_reprise import rng

from . import _child
from ._common import Summary, Thunk, calibrate, interleave
from ._programs import STATISTICS, random_bytes

OPERATIONS = ("capture", "restore", "fork", "by hand", "cycle")
ARGUMENTS = (1, 12)
NAMES = ("torch", "ours")
# In one graph, so that starting a backward, which takes longer than they, is no part of the noise.
SEGMENTS = 20

# ``call(function, value, *tensors)`` runs a segment.
Call = Callable[..., Tensor]


def segment_calls() -> dict[str, dict[bool, Call]]:
    """Both libraries with and without the random state, otherwise called alike.

    A ``Checkpointer`` and not ``checkpoint`` for ours: the latter has a short way for calls with
    all options at their defaults, and that would count as a cost of the random state.
    """
    return {
        "torch": {
            preserve: partial(
                torch_checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=preserve
            )
            for preserve in (True, False)
        },
        "ours": {
            preserve: torch_reprise.Checkpointer(preserve_rng_state=preserve)
            for preserve in (True, False)
        },
    }


class Case:
    """One segment: what it draws from, and its tensor arguments.

    Attributes:
        draws: "all", "one" or "none" of the devices.
        arguments: tensors on each device.
        on_cuda: whether torch has device states to look after.
    """

    def __init__(self, count: int, draws: str, arguments: int) -> None:
        self.draws = draws
        self.arguments = arguments
        self.on_cuda = count > 0
        devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
        self.tensors = [torch.zeros(4, device=d) for d in devices for _ in range(arguments)]
        drawn = {"all": devices, "one": devices[:1], "none": []}[draws]
        self.noise = [torch.zeros(4, device=device) for device in drawn]
        self.value = torch.ones(4, 4, requires_grad=True)
        self.gradient = torch.ones(4, 4)
        # A plain function of few names: objects behind it would be searched for generators.
        noise = self.noise

        def function(value: Tensor, *tensors: Tensor) -> Tensor:
            for target in noise:
                target.uniform_()
            return torch.tanh(value)

        self.function = function

    def draw(self) -> None:
        for target in self.noise:
            target.uniform_()

    def forward(self, call: Call, segments: int = 1) -> Tensor:
        value = self.value
        for _ in range(segments):
            value = call(self.function, value, *self.tensors)
        return value

    def step(self, call: Call) -> None:
        torch.autograd.backward(self.forward(call, SEGMENTS), self.gradient)

    # What torch does, as torch.utils.checkpoint calls it.

    def torch_capture(self) -> tuple[Tensor, list[int], list[Tensor]]:
        state = torch.get_rng_state()
        if not self.on_cuda:
            return state, [], []
        return (state, *torch_checkpoint.get_device_states(*self.tensors))

    def torch_restore(self, states: tuple[Tensor, list[int], list[Tensor]]) -> None:
        torch.set_rng_state(states[0])
        if self.on_cuda:
            torch_checkpoint.set_device_states(states[1], states[2], device_type="cuda")

    def torch_by_hand(self) -> None:
        before = self.torch_capture()
        self.draw()
        with torch.random.fork_rng(devices=before[1], device_type="cuda"):
            self.torch_restore(before)
            self.draw()

    def ours_by_hand(self) -> None:
        before = rng.capture()
        self.draw()
        with rng.fork():
            before.restore()
            self.draw()

    def operations(self) -> dict[str, Thunk]:
        """What is timed by itself, by ``"operation, name"``, and the draws that are subtracted."""
        theirs, ours = self.torch_capture(), rng.capture()

        def after_draw(operation: Thunk) -> Thunk:
            def both() -> None:
                self.draw()
                operation()

            return both

        def torch_fork() -> None:
            with torch.random.fork_rng(devices=theirs[1], device_type="cuda"):
                self.draw()

        def ours_fork() -> None:
            with rng.fork():
                self.draw()

        return {
            "draw": after_draw(lambda: None),
            "draw twice": after_draw(self.draw),
            "capture, torch": after_draw(self.torch_capture),
            "capture, ours": after_draw(rng.capture),
            "restore, torch": after_draw(partial(self.torch_restore, theirs)),
            "restore, ours": after_draw(ours.restore),
            "fork, torch": torch_fork,
            "fork, ours": ours_fork,
            "by hand, torch": self.torch_by_hand,
            "by hand, ours": self.ours_by_hand,
        }

    def steps(self) -> dict[str, Thunk]:
        """Steps of ``SEGMENTS`` segments; with and without the state next to each other."""
        return {
            f"{'cycle' if preserve else 'no cycle'}, {name}": partial(self.step, call)
            for name, by_preserve in segment_calls().items()
            for preserve, call in by_preserve.items()
        }

    def subtracted(self, operation: str, name: str) -> str:
        """Whose time is taken from that of ``"operation, name"``."""
        return {"by hand": "draw twice", "cycle": f"no cycle, {name}"}.get(operation, "draw")

    # Checks

    def drawn(self) -> list[Tensor]:
        """The numbers drawn last, as bytes: where no kernel runs there may be a NaN."""
        return [target.cpu().view(torch.uint8) for target in self.noise]

    def outcome(self, call: Call) -> list[Tensor]:
        """All that a step leaves behind: gradient, generator states, numbers of both forwards."""
        torch.manual_seed(0)
        self.value.grad = None
        result = self.forward(call)
        first = self.drawn()
        torch.autograd.backward(result, self.gradient)
        assert self.value.grad is not None
        gradient, self.value.grad = self.value.grad, None
        return [gradient, *rng.capture().state_tensors().values(), *first, *self.drawn()]

    def wrong(self) -> list[str]:
        """Names what does not leave behind what the plain step does."""
        expected = self.outcome(lambda function, *args: function(*args))
        return [
            f"{name}, draws from {self.draws}, {self.arguments} tensors a device"
            for name, by_preserve in segment_calls().items()
            if not all(map(torch.equal, self.outcome(by_preserve[True]), expected))
        ]


def kinds(count: int) -> list[str]:
    """Which devices a segment draws from; with one device, all are one."""
    return ["all", "one", "none"] if count > 1 else ["all", "none"]


def numbers(quick: bool) -> Sequence[int]:
    """How many tensor arguments a segment has on each device."""
    return ARGUMENTS[:1] if quick else ARGUMENTS


def cases(count: int, quick: bool) -> list[Case]:
    return [Case(count, draws, n) for n in numbers(quick) for draws in kinds(count)]


def measure(
    tell: _child.Tell, count: int, quick: bool, rounds: int, target_s: float
) -> dict[str, Any]:
    """All operations on the CPU (``count`` 0) or on ``count`` CUDA devices.

    Returns:
        ``wrong``: the names of what does not compute what the plain step does; if there are none,
        ``rows``: for each case, operation and statistic the ``rng.COLUMNS`` from ``draws`` on.
    """
    torch.set_num_threads(1)
    if count:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        if torch.cuda.device_count() != count:
            raise RuntimeError(f"{count} devices expected, found {torch.cuda.device_count()}")
    programs = cases(count, quick)
    wrong = [name for program in programs for name in program.wrong()]
    if wrong:
        return {"wrong": wrong, "rows": []}
    rows = [row for program in programs for row in _rows(program, tell, rounds, target_s)]
    return {"wrong": [], "rows": rows}


def _rows(case: Case, tell: _child.Tell, rounds: int, target_s: float) -> list[list[object]]:
    def after_round() -> None:
        if case.on_cuda:  # what was launched does not run into the next stretch
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)
        case.value.grad = None
        tell(f"draws from {case.draws}, {case.arguments} tensors a device")

    times: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    # A cycle is a small difference of steps: long stretches, since each begins cold.
    for thunks, stretch_s in ((case.operations(), target_s), (case.steps(), 8 * target_s)):
        # torch's can take a hundred times as long as ours: each its own number of calls.
        own = {name: calibrate(thunk, stretch_s) for name, thunk in thunks.items()}
        times.update(interleave(thunks, rounds=rounds, inner=own, after_round=after_round))
        inner.update(own)
    calls = segment_calls()
    found = [random_bytes(partial(case.forward, calls[name][True])) for name in NAMES]
    kept = [*(one.each for one in found), *(one.shared for one in found)]
    rows: list[list[object]] = []
    for operation in OPERATIONS:
        labels = [f"{operation}, {name}" for name in NAMES]
        scale = 1e6 / SEGMENTS if operation == "cycle" else 1e6
        summaries = [
            Summary.of_difference(times[label], times[case.subtracted(operation, name)])
            for label, name in zip(labels, NAMES, strict=True)
        ]
        for statistic in STATISTICS:
            figures = [scale * getattr(summary, statistic) for summary in summaries]
            ratio: object = figures[1] / figures[0] if figures[0] > 0 else ""
            head = [case.draws, case.arguments, operation, statistic, rounds]
            rows.append([*head, *(inner[label] for label in labels), *figures, ratio, *kept])
    return rows
