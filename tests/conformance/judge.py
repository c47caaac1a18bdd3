"""Plays a case plainly and with an implementation, and says what came of it.

A play starts from fixed seeds and the default settings of torch and leaves them as they were,
whatever the program did and however it ended. It is turned into rows of bytes at once, which hold
no graph. (tests/helpers.py compares in the same way, but needs pytest and torch_reprise, and this
has to run where neither is installed.)
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

with contextlib.suppress(ImportError):
    import numpy.random  # noqa: F401, always or never: something may import it during a play

from . import environment
from .implementations import Implementation, Unsupported, find
from .registry import Case, Outcome, Raised, Verdict

SEED = 7
TIMEOUT = 180.0  # of a process of its own, in seconds
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


class Row(NamedTuple):
    path: str
    about: Any
    content: bytes | None


class Played(NamedTuple):
    """What a play came to: rows, an error, or neither, with the reason."""

    rows: list[Row]
    calls: int
    error: Raised | None = None
    unsupported: str | None = None
    outcome: Outcome | None = None
    """Of a case that judges by itself."""


class SuiteError(Exception):
    """A case is broken: its plain program does not do what the case says."""


def freeze(value: Any, path: str = "result") -> list[Row]:
    """`value` as rows. NaN equals itself in them, and 0.0 differs from -0.0."""
    if isinstance(value, Tensor):
        dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        about = (value.dtype, str(value.device), tuple(value.shape), value.requires_grad)
        return [Row(path, about, bytes(dense.reshape(-1).view(torch.uint8).tolist()))]
    if isinstance(value, dict):
        parts = [freeze(v, f"{path} {k}".removeprefix("result ")) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [freeze(v, f"{path}[{i}]") for i, v in enumerate(value)]
    else:
        return [Row(path, (type(value).__name__, value), None)]
    return [Row(path, (type(value).__name__, len(value)), None), *chain.from_iterable(parts)]


def difference(found: list[Row], expected: list[Row]) -> str | None:
    """The first difference in words."""
    for have, want in zip(found, expected, strict=False):
        if have.path != want.path:
            return f"{have.path} where {want.path} was expected"
        if have.about != want.about:
            return f"{have.path}: {_words(have.about)} where {_words(want.about)} was expected"
        if have.content != want.content:
            return f"{have.path}: other bits"
    if len(found) != len(expected):
        return f"{len(found)} values where {len(expected)} were expected"
    return None


def _words(about: Any) -> str:
    text = str(about[1] if len(about) == 2 else about)
    return text if len(text) <= 60 else f"{text[:57]}..."


def generators() -> list[Row]:
    rows = [Row("CPU generator", None, bytes(torch.get_rng_state().tolist()))]
    rows.append(Row("Python's random", None, repr(random.getstate()).encode()))
    if "numpy.random" in sys.modules:
        rows.append(Row("NumPy's generator", None, pickle.dumps(_numpy_state())))
    if torch.cuda.is_initialized():
        places = [(g.initial_seed(), g.get_offset()) for g in torch.cuda.default_generators]
        rows.append(Row("CUDA generators", ("seed and offset", places), None))
    return rows


def _numpy_state() -> Any:
    kind, key, *rest = sys.modules["numpy.random"].get_state()
    return [kind, key.tolist(), *rest]


# Isolation.


def _settings() -> list[tuple[Any, Callable[[Any], Any]]]:
    """The value of each global setting that a program may leave changed, with its setter."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn

    def deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    pairs: list[tuple[Any, Callable[[Any], Any]]] = [
        (torch.get_default_dtype(), torch.set_default_dtype),
        (
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            deterministic,
        ),
        (torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision),
        (mkldnn.enabled, mkldnn.set_flags),
        (cuda.flash_sdp_enabled(), cuda.enable_flash_sdp),
        (cuda.math_sdp_enabled(), cuda.enable_math_sdp),
        (cuda.mem_efficient_sdp_enabled(), cuda.enable_mem_efficient_sdp),
        (cuda.cudnn_sdp_enabled(), cuda.enable_cudnn_sdp),
        (torch.is_grad_enabled(), torch.set_grad_enabled),
        (torch.is_autocast_cache_enabled(), torch.set_autocast_cache_enabled),
    ]
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        pairs.append((getattr(cudnn, name), functools.partial(setattr, cudnn, name)))
    for device in AUTOCAST_DEVICES:
        pairs += [
            (
                torch.is_autocast_enabled(device),
                functools.partial(torch.set_autocast_enabled, device),
            ),
            (
                torch.get_autocast_dtype(device),
                functools.partial(torch.set_autocast_dtype, device),
            ),
        ]
    return pairs


def _drop_modes(functions: int, dispatches: int) -> None:
    """Modes beyond that many: an implementation has left them."""
    while torch._C._len_torch_function_stack() > functions:
        torch.overrides._pop_mode()
    while torch._C._len_torch_dispatch_stack() > dispatches:
        _python_dispatch._pop_mode()


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Fixed seeds inside; settings, modes and generators as before afterwards."""
    settings = _settings()
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    torch.manual_seed(SEED)
    random.seed(SEED)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(SEED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _drop_modes(*modes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for value, put in settings:
                put(value)
        torch.clear_autocast_cache()
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def play_here(case: Case, use: Implementation) -> Played:
    """In this process; in a copy of the context, so that context variables are isolated too."""
    played = contextvars.copy_context().run(_play, case, use)
    # An error of a backward may be in a cycle with its frames, and those hold graphs.
    if played.error is not None:
        gc.collect()
    return played


def _play(case: Case, use: Implementation) -> Played:
    with isolated():
        try:
            if case.check is not None:
                outcome = case.check(use)
                return Played([], use.calls, outcome=outcome)
            assert case.program is not None
            rows = freeze(case.program(use))
        except Unsupported as missing:
            return Played([], use.calls, unsupported=f"{use.title} {missing}")
        except Exception as error:
            return Played([], use.calls, error=Raised.of(error))
        return Played([*rows, *generators()], use.calls)


def play_in_a_process(case: Case, use: Implementation) -> Played:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "played"
        program = Path(__file__).with_name("fresh.py")
        try:
            child = subprocess.run(
                [sys.executable, str(program), case.key, use.spec, str(output)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Played([], 0, error=Raised(("Hangs",), f"no end after {TIMEOUT:.0f} s"))
        if not output.is_file():
            return Played([], 0, error=Raised(("ProcessDied",), _how_it_ended(child)))
        played: Played = pickle.loads(output.read_bytes())
        return played


def _how_it_ended(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"the process was ended by {signal.Signals(-child.returncode).name}"
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the process ended with status {child.returncode}: {last}"


def play(case: Case, use: Implementation) -> Played:
    return play_in_a_process(case, use) if case.fresh_process else play_here(case, use)


# Verdicts.


def judge(case: Case, use: Implementation) -> Outcome:
    """The verdict on `use`, which has to be a fresh object."""
    reason = environment.why_not(case)
    if reason is not None:
        return Outcome(Verdict.NOT_RUN, reason)
    expected = None if case.check is not None else play(case, find("plain"))
    if expected is not None:
        _require_sane(case, expected)
    outcome = _verdict(case, play(case, use), expected)
    return outcome._replace(detail=one_line(outcome.detail))


def _require_sane(case: Case, expected: Played) -> None:
    raised = expected.error is not None
    if raised != case.plain_raises:
        raise SuiteError(f"{case.key}: the plain program raised: {expected.error}")
    if expected.calls == 0:
        raise SuiteError(f"{case.key}: its function never says that it runs (use.tick())")


def _verdict(case: Case, found: Played, expected: Played | None) -> Outcome:
    if found.unsupported is not None:
        return Outcome(Verdict.NOT_RUN, found.unsupported)
    if found.error is not None:
        clear = case.error is not None and case.error.matches(found.error)
        return Outcome(Verdict.CLEAR if clear else Verdict.OBSCURE, str(found.error))
    if found.outcome is not None:
        return found.outcome
    assert expected is not None
    if case.plain_raises:
        return Outcome(Verdict.SILENT, "no error, where the plain program raises one")
    if not case.reproducible:
        return Outcome(Verdict.SILENT, "no error, though the replay was not the forward")
    different = difference(found.rows, expected.rows)
    if different is not None:
        return Outcome(Verdict.SILENT, different)
    replays = found.calls - expected.calls
    if case.replays is not None and replays > case.replays:
        return Outcome(Verdict.SILENT, f"{replays} replays where {case.replays} are enough")
    if replays <= 0 and not case.may_skip_replay:
        return Outcome(Verdict.NO_REPLAY, "the function ran once: nothing was recomputed")
    return Outcome(Verdict.EXACT)


def one_line(text: str, limit: int = 160) -> str:
    """The text without line breaks, folders and addresses, which differ between machines."""
    text = re.sub(r"(?<![\w/])/(?:[^/\s\"']+/)+", "", " ".join(text.split()))
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
