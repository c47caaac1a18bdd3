"""The simulated CUDA as the tests see it: is it there, its switch, its counters.

Import this in every program that is run under the simulation and calls backward. When a backward
on a device returns, the thread of that device may still have to drop Python objects, for which it
waits for the GIL. CPython before 3.14 ends such a thread if the interpreter shuts down meanwhile,
and torch's frames do not survive that: "terminate called without an active exception". It is
a program that ends right after backward which is hit, and nothing in this is ours.
"""

from __future__ import annotations

import atexit
import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

DEVICES = 8

# The process and what was preloaded into it.
_process = ctypes.CDLL(None)

# Lets go of the GIL for longer than a thread needs to get it.
atexit.register(time.sleep, 0.1)


def active() -> bool:
    return hasattr(_process, "cudasim_set_capturing")


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, every stream of every device answers that it is being captured.

    There is no graph that the work could go into, so torch refuses what needs one (a draw, for
    example). For a capture with a graph use `torch.cuda.graph`: that is simulated as well.
    """
    _process.cudasim_set_capturing(1)
    try:
        yield
    finally:
        _process.cudasim_set_capturing(0)


def _total(name: str) -> int:
    function = getattr(_process, f"cudasim_{name}")
    function.argtypes = []
    function.restype = ctypes.c_uint64
    return int(function())


def launches() -> int:
    """Kernels and graphs launched since the process started (none of them ran)."""
    return _total("launches")


def synchronizations() -> int:
    """Waits of the host for a stream, an event or a device since the process started."""
    return _total("synchronizations")


def allocations() -> int:
    """Blocks of device or pinned memory asked of CUDA; what torch's cache serves is not here."""
    return _total("allocations")


def capture_queries() -> int:
    """How often it was asked whether a stream is captured: once or more for each look at
    a generator's state, and for each draw."""
    return _total("capture_queries")
