"""``python -m torch_reprise run [options] script.py args...``: an unmodified program.

Puts :func:`torch_reprise.install` in force and runs the program as ``python script.py
args...`` or ``python -m module args...`` would: ``sys.argv``, ``sys.path`` and
``__main__`` are the program's own, its exit status is passed on. At the end, also after an
error, a line on stderr says what segments did, and the report that was asked for is written.

For launchers that start Python themselves: ``torchrun -m torch_reprise run train.py ...``.
Processes that the program starts are its own, and run without it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from . import ledger
from ._install import install
from ._report import WRITERS
from ._report._tables import readable

# A report of more segments is neither read nor drawn.
_SEGMENTS_IN_REPORT = 2000


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torch_reprise run",
        description="Run a program with torch_reprise in the place of torch.utils.checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write what the first segments did: .html, .png, .json (a trace), .csv or .txt",
    )
    parser.add_argument(
        "--segments",
        metavar="N",
        type=int,
        default=_SEGMENTS_IN_REPORT,
        help="how many segments the report holds (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no closing line on stderr")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="the script, or with -m the module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program gets")
    options = parser.parse_args(argv)
    # argparse takes a "--" behind the program for its own.
    place = len(argv) - len(options.arguments) - 1
    if place > 0 and argv[place] == "--" and argv[place - 1] == options.program:
        options.arguments.insert(0, "--")
    if options.segments < 1:
        parser.error(f"--segments must be at least 1, got {options.segments}")
    if options.report is not None:
        if options.report.suffix.lower() not in WRITERS:
            parser.error(
                f"--report goes by the suffix, one of {', '.join(WRITERS)}; got {options.report}"
            )
        if not options.report.absolute().parent.is_dir():
            parser.error(f"--report: there is no folder {options.report.absolute().parent}")
    if not options.module and not Path(options.program).exists():
        parser.error(f"there is no file {options.program}")
    return options


def _summary() -> str:
    segments, replays = ledger.segments(), ledger.replays()
    if segments == 0:
        return "torch_reprise: the program checkpointed nothing."
    return (
        f"torch_reprise: {segments:,} segments, {replays:,} replays, "
        f"{readable(ledger.bytes_not_saved())} not saved for backward."
    )


@contextlib.contextmanager
def _as_main(options: argparse.Namespace) -> Iterator[None]:
    """The process as the program expects to find it."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [options.program, *options.arguments]
    # What Python puts first: the folder of a script, the current one for a module. It has
    # put the current folder there for us.
    first = os.getcwd() if options.module else str(Path(options.program).resolve().parent)
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path[0] = first
    else:
        sys.path.insert(0, first)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _run_script(path: str) -> None:
    """As ``__main__``, which stays in ``sys.modules``: what it pickles is found there."""
    if Path(path).is_dir() or Path(path).suffix in (".zip", ".pyz"):
        runpy.run_path(path, run_name="__main__")
        return
    absolute = str(Path(path).absolute())
    with io.open_code(absolute) as file:
        code = compile(file.read(), absolute, "exec")
    module = ModuleType("__main__")
    module.__file__ = absolute
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def main(argv: Sequence[str]) -> int:
    """Runs the program; what it raises, ``SystemExit`` included, passes through."""
    options = _parse(argv)
    install()
    with contextlib.ExitStack() as stack:
        if not options.quiet:
            stack.callback(lambda: print(_summary(), file=sys.stderr, flush=True))
        if options.report is not None:
            recording = stack.enter_context(ledger.record(limit=options.segments))
            stack.callback(_write, options.report, recording)
        stack.enter_context(_as_main(options))
        if options.module:
            runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        else:
            _run_script(options.program)
    return 0


def _write(path: Path, recording: ledger.Recording) -> None:
    """Does not raise: the program's own error, or its success, is what counts."""
    try:
        recording.save(path)
    except (OSError, ImportError) as error:
        print(f"torch_reprise: the report was not written: {error}", file=sys.stderr)
