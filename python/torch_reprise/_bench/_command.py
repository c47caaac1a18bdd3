"""The command line that all benchmarks share, and what becomes of what they found.

A benchmark is a ``Command`` and a function that measures. The command reads the options, asks for
missing packages before anything runs, lets the function measure on one thread and from a fixed
seed, and then prints its tables and writes its CSV and its picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ._common import Screen, Table, missing, torch_threads, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """What the command line asked for.

    Attributes:
        rounds: how often everything is measured; with ``quick`` few.
        target_s: about how long the plain variant of a workload is repeated in each round.
        quick: whether sizes and rounds are only such that every part runs.
        csv: where to write the figures, if anywhere.
        plot: where to draw, if anywhere.
        device: where the program runs.
    """

    rounds: int
    target_s: float
    quick: bool
    csv: Path | None
    plot: Path | None
    device: str = "cpu"


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        tables: for people.
        columns: of the CSV.
        lines: of the CSV.
        remarks: sentences below the tables.
        failures: what does not hold and has to; makes the exit status 1.
        draw: draws the picture.
    """

    tables: Sequence[Table]
    columns: Sequence[str]
    lines: Sequence[Sequence[object]]
    remarks: Sequence[str] = ()
    failures: Sequence[str] = ()
    draw: Callable[[Figure], object] | None = None


class Differs(Exception):
    """Raised before anything is timed: variants that do not compute what the plain program does."""

    def __init__(self, what: str, variants: Sequence[str]) -> None:
        super().__init__(what)
        self.lines = [f"{what}: {variant}" for variant in variants]


def require_equal_gradients(wrong: Sequence[str]) -> None:
    """Raises ``Differs`` if ``wrong``, names of variants, has any."""
    if wrong:
        raise Differs("gradients differ from the plain step's", wrong)


@dataclass(frozen=True)
class Command:
    """The name and the common options of one benchmark.

    Attributes:
        name: as in ``python -m torch_reprise bench NAME``.
        description: for ``--help``.
        rounds: unless ``--rounds`` says otherwise.
        least: no fewer rounds than that.
        target_s: see ``Options``.
        draws: whether there is a picture.
        on_devices: whether there is ``--device``.
    """

    name: str
    description: str
    rounds: int = 25
    least: int = 15
    quick_rounds: int = 3
    target_s: float = 0.02
    draws: bool = True
    on_devices: bool = False

    def parse(self, argv: Sequence[str] | None) -> Options:
        """Reads the options; a wrong one ends the process with status 2 and a message."""
        parser = argparse.ArgumentParser(
            prog=f"bench {self.name}", description=self.description, allow_abbrev=False
        )
        parser.add_argument(
            "--rounds", type=int, default=self.rounds, help=f"{self.least} or more (%(default)s)"
        )
        parser.add_argument(
            "--csv", type=Path, metavar="FILE", help="also write all figures to this file"
        )
        if self.draws:
            parser.add_argument(
                "--plot",
                type=Path,
                metavar="FILE",
                default=Path(f"bench-{self.name}.png"),
                help="draw to this file (%(default)s)",
            )
            parser.add_argument("--no-plot", action="store_true", help="draw nothing")
        parser.add_argument(
            "--quick",
            action="store_true",
            help="small sizes, few short rounds: shows that it runs, not how fast",
        )
        if self.on_devices:
            parser.add_argument(
                "--device",
                choices=("cpu", "cuda"),
                default="cpu",
                help="where to run (%(default)s)",
            )
        given = parser.parse_args(argv)
        if given.rounds < self.least:
            parser.error(
                f"--rounds must be at least {self.least}, got {given.rounds}; or use --quick"
            )
        device = str(given.device) if self.on_devices else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
        plot = given.plot if self.draws and not given.no_plot else None
        if plot is not None and plot.suffix not in _PICTURES:
            parser.error(f"--plot: the name must end in {' or '.join(_PICTURES)}, got {plot}")
        for option, path in (("--csv", given.csv), ("--plot", plot)):
            if path is not None and not path.absolute().parent.is_dir():
                parser.error(f"{option}: there is no folder {path.parent}")
        return Options(
            rounds=self.quick_rounds if given.quick else given.rounds,
            target_s=self.target_s / 10 if given.quick else self.target_s,
            quick=given.quick,
            csv=given.csv,
            plot=plot,
            device=device,
        )

    def run(self, argv: Sequence[str] | None, measure: Callable[[Screen, Options], Report]) -> int:
        """Everything from the command line to the files.

        Returns:
            0; 1 if a variant computes something else than the plain program or a check failed;
            2 if a package is missing.
        """
        options = self.parse(argv)
        absent = missing("rich") or (missing("matplotlib") if options.plot else None)
        if absent is not None:
            if absent.startswith("matplotlib"):
                absent += ", or use --no-plot"
            print(f"{self.name}: {absent}", file=sys.stderr)
            return 2
        screen = Screen()
        with torch_threads(1), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            screen.facts()
            try:
                report = measure(screen, options)
            except Differs as error:
                for line in error.lines:
                    screen.line(line, style="bold red")
                return 1
        self._show(screen, options, report)
        return 1 if report.failures else 0

    def _show(self, screen: Screen, options: Options, report: Report) -> None:
        for table in report.tables:
            screen.table(table)
        for remark in report.remarks:
            screen.line(remark)
        for failure in report.failures:
            screen.line(failure, style="bold red")
        if options.quick:
            screen.line("--quick: too few and too short rounds for figures to be quoted.")
        if options.csv is not None:
            write_csv(options.csv, report.columns, report.lines)
            screen.line(f"CSV: {options.csv}")
        if options.plot is not None and report.draw is not None:
            from ._plot import save

            save(options.plot, report.draw)
            screen.line(f"plot: {options.plot}")
