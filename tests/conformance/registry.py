"""Cases and verdicts: what a case consists of, and the list of all of them."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from .implementations import Implementation

# The rows that have to have a case. Written out, so that none can get lost with its file.
# fmt: off
ROWS = (
    "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R9", "R10", "R11",
    "A1", "A2", "A3", "A4", "A5", "A6", "A7",
    "S1", "S2", "S3", "S4", "S5", "S6",
    "G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G9", "G10", "G11",
    "Q1", "Q2", "Q3",
)
# fmt: on

CHAPTERS = {
    "R": "Random numbers",
    "A": "Ambient state",
    "S": "Side effects",
    "G": "Ways of using the graph",
    "Q": "Sequences and messages",
}


class Verdict(str, enum.Enum):
    EXACT = "exact"
    CLEAR = "clear error"
    OBSCURE = "obscure error"
    SILENT = "silently different"
    # Equal because the function was not run again. Its memory was not saved either.
    NO_REPLAY = "no replay"
    NOT_RUN = "not run"


class Outcome(NamedTuple):
    verdict: Verdict
    detail: str = ""


class Needs(str, enum.Enum):
    """What a case wants of the machine."""

    NOTHING = "nothing"
    CUDA = "CUDA"
    SIMULATION = "the counters of the simulated CUDA"
    PRIVATE_DEVICE = "the test device (tests/devices)"
    TWO_ACCELERATORS = "CUDA and the test device"
    NUMPY = "NumPy"


NEEDS_CUDA = (Needs.CUDA, Needs.SIMULATION, Needs.TWO_ACCELERATORS)


class Raised(NamedTuple):
    """An exception without its traceback, which would hold every tensor of its frames."""

    kinds: tuple[str, ...]
    """The names of its class and of the classes that it derives from."""
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        return cls(tuple(c.__name__ for c in type(error).__mro__), str(error))

    def __str__(self) -> str:
        return f"{self.kinds[0]}: {self.message}"


@dataclass(frozen=True)
class ClearError:
    """The error that tells a user what is wrong: one of these classes, with this in its message."""

    kinds: tuple[str, ...]
    pattern: str

    def matches(self, raised: Raised) -> bool:
        return bool(set(self.kinds) & set(raised.kinds)) and bool(
            re.search(self.pattern, raised.message, re.DOTALL)
        )


Program = Callable[[Implementation], Any]
Check = Callable[[Implementation], Outcome]


@dataclass(frozen=True)
class Case:
    row: str
    title: str
    issues: tuple[int, ...] = ()
    program: Program | None = None
    """Returns what is to be compared with what it returns when it is played plainly."""
    check: Check | None = None
    """In place of a program, where equality is not the question: judges by itself."""
    allowed: frozenset[Verdict] = frozenset({Verdict.EXACT})
    """The verdicts with which an implementation has passed."""
    error: ClearError | None = None
    reproducible: bool = True
    """False: the function does something else each time, so only an error can be right."""
    plain_raises: bool = False
    """Plain autograd raises, so only an error can be right."""
    replays: int | None = None
    """How many calls of the function there are besides those of the plain program; None: some."""
    may_skip_replay: bool = False
    """Being called once is right too: nothing was to be saved here."""
    needs: Needs = Needs.NOTHING
    devices: int = 1
    fresh_process: bool = False
    """Each time in a process of its own, since it changes what cannot be changed back."""

    @property
    def key(self) -> str:
        return f"{self.row}: {self.title}"

    @property
    def needs_cuda(self) -> bool:
        return self.needs in NEEDS_CUDA


CASES: list[Case] = []


F = TypeVar("F", bound=Callable[..., Any])


def _allowed(options: dict[str, Any]) -> frozenset[Verdict]:
    given: tuple[Verdict, ...] | None = options.pop("allowed", None)
    if given is not None:
        return frozenset(given)
    must_raise = options.get("plain_raises", False) or not options.get("reproducible", True)
    return frozenset({Verdict.CLEAR if must_raise else Verdict.EXACT})


def case(row: str, title: str, **options: Any) -> Callable[[Program], Program]:
    """Adds the decorated program as a case; the options are the fields of `Case`."""
    return _adding("program", row, title, options)


def check(row: str, title: str, **options: Any) -> Callable[[Check], Check]:
    """Adds the decorated function as a case that judges by itself."""
    return _adding("check", row, title, options)


def _adding(field: str, row: str, title: str, options: dict[str, Any]) -> Callable[[F], F]:
    allowed = _allowed(options)

    def add(function: F) -> F:
        CASES.append(Case(row, title, **{field: function}, allowed=allowed, **options))
        return function

    return add


def all_cases() -> list[Case]:
    from . import cases  # noqa: F401, importing them fills the list

    return sorted(CASES, key=lambda c: ROWS.index(c.row))
