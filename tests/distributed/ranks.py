"""Two processes that run the tests of this folder together: the launcher and the worker.

A test that is decorated with `on_each_rank` runs in every worker, not in pytest's process. The
workers are started once (torch takes seconds to import), form a gloo group and wait for names of
tests. A test fails if it fails on any rank. After a failure the workers are thrown away, since
their collectives no longer match, and the next test gets new ones.

What cannot be told by an exception is still a failure with a text of its own:

- a worker that died: its exit status and the end of what it printed;
- a worker that hangs longer than the test's limit: faulthandler prints the stacks of all its
  threads and ends it;
- a worker that waits for one that has failed: it gets a few seconds, then its stacks are taken.

The file is also the program that the workers run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import inspect
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZE = 2
LIMIT = 60.0
"""Seconds that a test may take on a rank."""
GRACE = 3.0
"""Seconds that a rank may go on after another one has failed."""
START = 180.0
"""Seconds until the workers have imported torch and found each other."""
HERE = Path(__file__).resolve().parent
SHOWN = 6_000
"""Characters of what a worker printed that are shown."""


class RankFailure(AssertionError):
    """A test failed on a rank, or a rank was lost."""


class Worker:
    """One rank, seen from pytest's process."""

    def __init__(self, rank: int, folder: Path, with_torch: bool) -> None:
        self.rank = rank
        self.printed = folder / f"rank{rank}.txt"
        ours, theirs = Pipe()
        self.connection = ours
        arguments = [str(rank), str(theirs.fileno()), str(folder / "store")]
        if not with_torch:
            arguments.pop()
        with self.printed.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "ranks.py"), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        theirs.close()

    def answer(self) -> str | None:
        """What the worker says about the test: a traceback, or None if it passed."""
        try:
            return self.connection.recv()
        except EOFError:
            status = self.process.wait(GRACE)
            return f"the worker ended with status {status} and without an answer"

    def stacks(self) -> str:
        """Lets faulthandler print the stacks of all threads, and ends the worker."""
        self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        self.kill()
        return "gave no answer in time, or waits for a rank that has failed"

    def tail(self) -> str:
        return self.printed.read_text(errors="replace")[-SHOWN:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Ranks:
    """The workers, started when they are first needed and after each failure.

    Without torch they start in no time and form no group: for tests of the launcher.
    """

    def __init__(self, new_folder: Callable[[], Path], with_torch: bool = True) -> None:
        self._new_folder = new_folder
        self._with_torch = with_torch
        self._workers: list[Worker] = []

    def run(self, file: Path, name: str, arguments: dict[str, Any], options: Options) -> None:
        """Runs the test on all ranks; raises RankFailure with what all of them have to say."""
        __tracebackhide__ = True
        if not self._workers:
            folder = self._new_folder()
            self._workers = [Worker(r, folder, self._with_torch) for r in range(SIZE)]
            self._require(self._answers(START))
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # it died since; recv will say so
                worker.connection.send((str(file), name, arguments, options))
        self._require(self._answers(options.limit + 2 * GRACE))

    def _answers(self, limit: float) -> dict[int, str | None]:
        answers: dict[int, str | None] = {}
        waiting = {w.connection: w for w in self._workers}
        deadline = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                worker = waiting.pop(connection)  # type: ignore[call-overload]
                answers[worker.rank] = worker.answer()
                if answers[worker.rank] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                for worker in waiting.values():
                    answers[worker.rank] = worker.stacks()
                break
        return answers

    def _require(self, answers: dict[int, str | None]) -> None:
        __tracebackhide__ = True
        if not any(answers.values()):
            return
        printed = {w.rank: w.tail() for w in self._workers}
        self.close()
        raise RankFailure(
            "\n".join(
                f"--- rank {rank}: {said or 'passed'}\n"
                + (f"    it printed:\n{printed[rank]}" if printed[rank] else "")
                for rank, said in sorted(answers.items())
            )
        )

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


class Options:
    """How a test runs: its time limit, and whether its own code makes cycles that hold graphs."""

    def __init__(self, limit: float, needs_gc: bool) -> None:
        self.limit = limit
        self.needs_gc = needs_gc


def on_each_rank(
    function: Callable[..., None] | None = None, *, limit: float = LIMIT, needs_gc: bool = False
) -> Callable[..., Any]:
    """Makes a test run in every worker, with the values of its parameters (they are pickled).

    The test must leave no segments behind; with `needs_gc` the garbage collector may free them.
    """
    if function is None:
        return functools.partial(on_each_rank, limit=limit, needs_gc=needs_gc)
    case = function

    @functools.wraps(case)
    def on_ranks(ranks: Ranks, **arguments: Any) -> None:
        __tracebackhide__ = True
        file = Path(inspect.getfile(case)).resolve()
        ranks.run(file, case.__qualname__, arguments, Options(limit, needs_gc))

    own = inspect.signature(case)
    fixture = inspect.Parameter("ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    on_ranks.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[fixture, *own.parameters.values()]
    )
    return on_ranks


# What follows runs in the workers.


@contextlib.contextmanager
def nothing_left(options: Options) -> Iterator[None]:
    """The counters of live objects are after a test what they were before.

    Without a collection, but with a wait: gloo's threads let go of what they have sent and received
    some milliseconds after everybody else.
    """
    from torch_reprise import ledger

    def counters() -> tuple[int, int, int]:
        return ledger.live_segments(), ledger.live_slots(), ledger.stashed_bytes()

    before = counters()
    yield
    if options.needs_gc:
        gc.collect()
    deadline = time.monotonic() + GRACE
    while (left := counters()) != before and time.monotonic() < deadline:
        time.sleep(0.001)
    if left != before:
        gc.collect()
        raise AssertionError(
            f"left behind (segments, slots, bytes of states): {left} where it was {before}; after "
            f"a garbage collection {counters()}"
        )


def run_one(file: str, name: str, arguments: dict[str, Any], options: Options) -> str | None:
    """Runs a test; its traceback, or None if it passed."""
    faulthandler.dump_traceback_later(options.limit, exit=True)
    try:
        case = inspect.unwrap(getattr(importlib.import_module(Path(file).stem), name))
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.manual_seed(0)
        checks = nothing_left(options) if torch is not None else contextlib.nullcontext()
        with warnings.catch_warnings(), checks:
            case(**arguments)
    except BaseException as error:
        return "".join(traceback.format_exception(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def join_group(rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)


def serve(connection: Connection, rank: int, store: str | None) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if store is not None:
        join_group(rank, store)
    connection.send(None)
    warnings.simplefilter("error")
    with contextlib.suppress(EOFError):  # pytest has ended
        while True:
            connection.send(run_one(*connection.recv()))


if __name__ == "__main__":
    # `Options` is pickled by pytest's process, where this file is the module `ranks`.
    sys.modules["ranks"] = sys.modules["__main__"]
    serve(Connection(int(sys.argv[2])), int(sys.argv[1]), (sys.argv[3:] or [None])[0])
