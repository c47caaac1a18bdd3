"""What every test starts from and has to leave behind.

Autouse fixtures put torch's CPU generator, Python's `random`, the default dtype, the grad mode and
the number of threads back, and assert that the ledger's counters of live objects are what they were
before the test. The counters are read without running the garbage collector: a segment that only
a collection can free is a leak by the library's own promise. A test whose *own* code makes
a reference cycle (an exception kept in a local, say) is marked `needs_gc` and gets one collection
first.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

# inductor compiles in this process: its pool of processes would leave threads behind, and there are
# tests of what a process does that has none.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parent))  # `helpers`, whichever import mode pytest runs in

from torch_reprise import ledger

FAIL_WITHOUT_CUDA = "REPRISE_FAIL_WITHOUT_CUDA"
test_failed = pytest.StashKey[bool]()


def live_objects() -> dict[str, int]:
    return {
        "live_segments": ledger.live_segments(),
        "live_slots": ledger.live_slots(),
        "stashed_bytes": ledger.stashed_bytes(),
    }


def what_is_left(before: dict[str, int]) -> str:
    """The counters that grew since `before`, in words; empty if none did.

    They may shrink: the traceback of an earlier test that failed was dropped.
    """
    after = live_objects()
    return ", ".join(
        f"ledger.{name}() was {before[name]} and is {after[name]}"
        for name in before
        if after[name] > before[name]
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"cuda: needs a CUDA device; skipped without one, failed if {FAIL_WITHOUT_CUDA}=1",
    )
    config.addinivalue_line(
        "markers",
        "needs_gc: the test's own code makes a reference cycle that holds a graph",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get(FAIL_WITHOUT_CUDA) == "1":
        pytest.fail(f"{FAIL_WITHOUT_CUDA}=1 is set, but torch {torch.__version__} sees no device")
    pytest.skip(f"torch {torch.__version__} sees no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[test_failed] = item.stash.get(test_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def ambient_state() -> Iterator[None]:
    cpu_state = torch.get_rng_state()
    python_state = random.getstate()
    dtype = torch.get_default_dtype()
    grad_enabled = torch.is_grad_enabled()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        random.setstate(python_state)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad_enabled)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = live_objects()
    yield
    if request.node.stash.get(test_failed, False):
        return  # its traceback holds its tensors, and it has something better to report
    if request.node.get_closest_marker("needs_gc") is not None and what_is_left(before):
        gc.collect()
    left = what_is_left(before)
    # A device thread of autograd drops the last references of a backward that failed after the
    # call has returned; on the CPU the caller's thread does, and nothing is waited for.
    deadline = time.monotonic() + 5.0
    while left and torch.accelerator.current_accelerator() and time.monotonic() < deadline:
        time.sleep(0.01)
        left = what_is_left(before)
    if not left:
        return
    gc.collect()
    later = what_is_left(before)
    pytest.fail(
        f"{request.node.nodeid} left segments behind: {left}. "
        + (
            f"A garbage collection did not free them ({later}): something still holds them."
            if later
            else "A garbage collection freed them: a reference cycle held them."
        ),
        pytrace=False,
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # The traceback of a failed test holds the tensors of its frames, so a session that failed
    # already would report leaks that are none.
    if exitstatus != pytest.ExitCode.OK:
        return
    gc.collect()
    left = what_is_left(dict.fromkeys(live_objects(), 0))
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nleak at the end of the session: {left}", file=sys.stderr)
