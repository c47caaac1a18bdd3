"""Q: sequences of functions, and what an error says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..implementations import Implementation
from ..registry import Outcome, Raised, Verdict, case, check
from .common import clear, leaf


@check("Q1", "checkpoint_sequential, 9 functions in 5 segments", issues=(68423,))
def sizes_of_segments(use: Implementation) -> Outcome:
    """A replay runs the functions of one segment in their order, and the last segment runs once.

    So a step back in the order of the replayed functions is where another segment begins.
    """
    ran: list[int] = []

    def numbered(index: int) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            use.tick()
            ran.append(index)
            return x.sin()

        return fn

    x = leaf(4)
    out = use.sequential([numbered(i) for i in range(9)], 5, x)
    forward, ran[:] = list(ran), []
    out.sum().backward()
    if forward != list(range(9)):
        return Outcome(Verdict.SILENT, f"the forward ran {forward}")
    sizes: list[int] = []
    for position, index in enumerate(ran):
        if position == 0 or index < ran[position - 1]:
            sizes.insert(0, 0)
        sizes[0] += 1
    sizes.append(9 - len(set(ran)))
    text = f"segments of {', '.join(map(str, sizes))} functions"
    if len(ran) != len(set(ran)) or len(sizes) != 5:
        return Outcome(Verdict.SILENT, f"{text}; replayed: {ran}")
    even = max(sizes) - min(sizes) <= 1
    return Outcome(Verdict.EXACT if even else Verdict.SILENT, "" if even else text)


@case(
    "Q2",
    "more segments than functions",
    issues=(152752,),
    allowed=(Verdict.EXACT, Verdict.CLEAR),
    error=clear(r"(?i)segments", "ValueError"),
)
def more_segments(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return x.sin()

    x = leaf(4)
    out = use.sequential([fn, fn, fn], 5, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = [3, 2]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[: self.rows.pop(0)])


class _Model(nn.Module):
    def __init__(self, use: Implementation) -> None:
        super().__init__()
        self.use = use
        self.blocks = nn.ModuleList([nn.Linear(4, 4), _Layer()])

    def forward(self, x: Tensor) -> Tensor:
        self.use.tick()
        for block in self.blocks:
            x = block(x)
        return x


def _line_of(function: Callable[..., Any], part: str) -> int:
    lines, first = inspect.getsourcelines(function)
    (index,) = (i for i, line in enumerate(lines) if part in line)
    return first + index


@check(
    "Q3",
    "an error names the operator, the source line and the module",
    issues=(153021,),
    allowed=(Verdict.CLEAR,),
)
def names_the_place(use: Implementation) -> Outcome:
    out = use.checkpoint(_Model(use), leaf(3, 4))
    try:
        out.sum().backward()
    except Exception as error:
        raised = Raised.of(error)
    else:
        return Outcome(Verdict.SILENT, "no error, though the replay was not the forward")
    line = _line_of(_Layer.forward, "torch.tanh")
    wanted = {
        "operator": r"(?i)tanh",
        "source line": rf"sequences\.py\"?(:|, line ){line}\b",
        "module": r"\bblocks\.1\b",
    }
    missing = [name for name, part in wanted.items() if not re.search(part, raised.message)]
    if missing:
        return Outcome(Verdict.OBSCURE, f"without {' and '.join(missing)}; {raised}")
    return Outcome(Verdict.CLEAR, str(raised))
