"""What is measured: programs made of segments, and the checkpoint functions that run these.

A program does not know how its segments are run, so that the same program is the plain one, the one
with ``torch.utils.checkpoint`` and the one with this library.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ledger
from .._demo.model import GPT
from .._demo.run import MemoryTrace, Run
from ._common import Overheads, measure_overheads

# Runs one segment: ``segment(function, input)`` gives what ``function(input)`` gives.
Segment = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
Functions = Mapping[str, Mapping[str, Segment]]

FORMS = ("non-reentrant", "reentrant")
STATISTICS = ("min", "median")
PLAIN = "plain"


def plainly(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Runs a segment without checkpointing."""
    return function(value)


REMAT = "torch_remat"


class _CpuGenerator:
    """What torch_remat wants to be given to replay with the random numbers of the forward."""

    def snapshot(self) -> Tensor:
        return torch.get_rng_state()

    def restore(self, state: Tensor) -> None:
        torch.set_rng_state(state)


def remat() -> dict[str, Segment]:
    """Checkpointing by torch_remat, where it is installed; it has one form."""
    try:
        module = importlib.import_module(REMAT)
    except ModuleNotFoundError:
        return {}
    decorate = module.checkpoint(recompute_state_hooks=(_CpuGenerator(),))
    return {REMAT: lambda function, value: decorate(function)(value)}


AGAIN = "called again"


def call_again(function: Callable[[Tensor], Tensor], value: Tensor) -> None:
    """Runs a segment for nothing, with a graph of its own."""
    with torch.enable_grad():
        function(value.detach().requires_grad_())


def called_again(times: int = 1) -> Segment:
    """No checkpointing: backward calls the function so many times more and keeps nothing.

    What checkpointing costs that has no bookkeeping at all, for a forward in the middle of a
    backward is not as fast as one in a loop.
    """

    def segment(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        result = function(value)

        def call(gradient: Tensor) -> None:
            for _ in range(times):
                call_again(function, value)

        result.register_hook(call)  # type: ignore[no-untyped-call]
        return result

    return segment


def implementations() -> dict[str, dict[str, Segment]]:
    """Checkpoint functions by form and name: ``torch`` and ``ours`` in both forms."""
    import torch.utils.checkpoint

    import torch_reprise

    return {
        form: {
            "torch": partial(torch.utils.checkpoint.checkpoint, use_reentrant=form == "reentrant"),
            "ours": partial(torch_reprise.checkpoint, use_reentrant=form == "reentrant"),
        }
        for form in FORMS
    }


def by_label(functions: Functions) -> dict[str, Segment]:
    """The same functions in one mapping, named ``"name, form"``."""
    return {
        f"{name}, {form}": segment
        for form, by_name in functions.items()
        for name, segment in by_name.items()
    }


def variants(functions: Functions) -> dict[str, Segment]:
    """The plain program first, then every checkpoint function."""
    return {PLAIN: plainly, **by_label(functions)}


@dataclass(frozen=True)
class Workload:
    """One program to measure.

    Attributes:
        name: as it stands in the table.
        chain: the segments; each takes what the one before gave.
        leaves: the input first, then the parameters; a step leaves its gradients there.
        per: what a figure is for, "segment" or "step".
    """

    name: str
    chain: Sequence[Callable[[Tensor], Tensor]]
    leaves: Sequence[Tensor]
    per: str

    @property
    def divisor(self) -> int:
        return len(self.chain) if self.per == "segment" else 1

    def forward(self, segment: Segment = plainly) -> Tensor:
        value = self.leaves[0]
        for function in self.chain:
            value = segment(function, value)
        return value

    def step(self, segment: Segment = plainly) -> None:
        torch.autograd.backward(self.forward(segment).sum())

    def gradients(self, segment: Segment) -> list[Tensor]:
        """Gradients of one step from a fixed seed; the random state is put back."""
        self.drop_gradients()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.step(segment)
        result = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        self.drop_gradients()
        return result

    def drop_gradients(self) -> None:
        """Steps add to the gradients in place; called before they grow out of range."""
        for leaf in self.leaves:
            leaf.grad = None


def one_operator(segments: int) -> Workload:
    """A chain of segments with one ``tanh`` on 4x4 each."""
    value = torch.randn(4, 4, requires_grad=True)
    return Workload("one operator, tanh 4x4", [torch.tanh] * segments, [value], "segment")


def matmul_tanh() -> Workload:
    """One segment of 8 x (matmul, tanh) on 4x4: 24 saved tensors."""
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(8)]

    def layers(value: Tensor) -> Tensor:
        for weight in weights:
            value = torch.tanh(value @ weight)
        return value

    value = torch.randn(4, 4, requires_grad=True)
    return Workload("8 x (matmul, tanh) 4x4", [layers], [value, *weights], "segment")


@dataclass(frozen=True)
class Nested(Workload):
    """``depth`` segments, each inside the one before; one ``tanh`` in each.

    Attributes:
        operator: what stands for the tanh, so that calls can be counted.
    """

    depth: int = 1
    operator: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, segment: Segment = plainly) -> Tensor:
        def level(inside: int, value: Tensor) -> Tensor:
            if inside:
                value = segment(partial(level, inside - 1), value)
            return self.operator(value)

        return segment(partial(level, self.depth - 1), self.leaves[0])


def saved_tensors(count: int) -> Workload:
    """One segment with ``count`` saved tensors."""

    def layers(value: Tensor) -> Tensor:
        for _ in range(count):
            value = torch.tanh(value)
        return value

    value = torch.randn(4, 4, requires_grad=True)
    return Workload(f"{count} x tanh 4x4", [layers], [value], "segment")


def nested(depth: int) -> Nested:
    value = torch.randn(4, 4, requires_grad=True)
    return Nested(f"{depth} deep, tanh 4x4", [], [value], "step", depth)


def check(workload: Workload, functions: Functions) -> list[str]:
    """Names the variants whose gradients are not those of the plain step, bit for bit."""
    expected = workload.gradients(plainly)
    wrong = []
    for label, segment in by_label(functions).items():
        found = workload.gradients(segment)
        same = len(found) == len(expected) == len(workload.leaves)
        if not (same and all(map(torch.equal, found, expected))):
            wrong.append(f"{workload.name}: {label}")
    return wrong


def measure(
    workload: Workload,
    functions: Functions,
    *,
    rounds: int,
    target_s: float,
    on_round: Callable[[], object] = lambda: None,
) -> Overheads:
    """Times all forms of all functions on one workload, named ``"name, form"``."""

    def after_round() -> None:
        workload.drop_gradients()
        on_round()

    with torch.random.fork_rng(devices=[]):
        result = measure_overheads(
            workload.step,
            workload.forward,
            {
                label: partial(workload.step, segment)
                for label, segment in by_label(functions).items()
            },
            rounds=rounds,
            target_s=target_s,
            after_round=after_round,
        )
    workload.drop_gradients()
    return result


def gpt_trace(model: GPT, segment: Segment, inputs: Tensor, targets: Tensor) -> MemoryTrace:
    """Live tensor bytes over one forward and backward, counted from the start of the forward."""
    optimizer = torch.optim.SGD(model.parameters())  # clears the gradients, nothing more
    run = Run("", segment, model, optimizer, torch.get_rng_state())
    run.measure_memory(inputs, targets)
    optimizer.zero_grad(set_to_none=True)
    assert run.memory is not None
    return run.memory


def state_tensor_bytes() -> int:
    """Bytes of all live byte tensors, which is what torch's random states are."""
    gc.collect()
    # By type: asking some of torch's deprecated objects for their class warns.
    tensors = (found for found in gc.get_objects() if issubclass(type(found), Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype is torch.uint8)


class RandomBytes(NamedTuple):
    """Bytes of random states that live segments keep.

    Attributes:
        each: by what every further segment adds.
        shared: what there is besides, however many they are.
    """

    each: float
    shared: float


def random_bytes(segment: Callable[[], Tensor], segments: int = 50) -> RandomBytes:
    """What segments keep of random states, in either library's form.

    ``segment`` runs one and returns what keeps it alive.
    """
    kept = []
    alive: list[Tensor] = []
    for _ in range(3):
        kept.append(state_tensor_bytes() + ledger.stashed_bytes())
        alive += [segment() for _ in range(segments)]
    del alive
    each = (kept[2] - kept[1]) / segments
    return RandomBytes(each, kept[1] - kept[0] - segments * each)
