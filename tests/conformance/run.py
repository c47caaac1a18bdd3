"""Runs the cases on the implementations that are installed, prints the table, writes the page.

    python tests/conformance/run.py --write docs/conformance.md
    python tests/conformance/run.py --implementation package.module:function --only R1,S

Ends with 1 if torch_reprise (or what --implementation names) does not pass a case that was run, and
with 2 if a case itself is broken.
"""

# ruff: noqa: E402, the path comes first
from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib.util
import json
import os
import sys
from pathlib import Path

# In place of this folder: the package is beside it, and modules here are no top-level modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
# As `python -m` would: somebody's implementation may lie where this is called.
sys.path.append(str(Path.cwd()))

import torch

from conformance import environment, page
from conformance.implementations import STANDARD, find, version
from conformance.judge import SuiteError, judge
from conformance.page import Column, Result, Results
from conformance.registry import Case, Outcome, Verdict, all_cases

HANGS_AFTER = 300.0  # a single case, in seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--write", type=Path, metavar="PAGE", help="write the page (docs/conformance.md)")
    add(
        "--implementation",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="one more column; may be given several times",
    )
    add(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help=f"leave a column out, one of {', '.join(STANDARD)}",
    )
    add("--only", default="", metavar="ROWS", help="rows or chapters: R1,A,S3")
    add("--only-cuda", action="store_true", help="only the cases that need CUDA devices")
    add("--save", type=Path, metavar="JSON", help="save the verdicts of this run")
    add(
        "--merge",
        type=Path,
        metavar="JSON",
        help="take verdicts on cases that are not run here from a saved run",
    )
    add("--separately", action="store_true", help="each play in a process of its own")
    add("--details", action="store_true", help="print what was found, not only the verdict")
    return parser.parse_args()


def selected(only: str, only_cuda: bool) -> list[Case]:
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    return [
        case
        for case in all_cases()
        if (not wanted or case.row in wanted or case.row[0] in wanted)
        and (case.needs_cuda or not only_cuda)
    ]


def specs(options: argparse.Namespace) -> list[str]:
    unknown = set(options.without) - set(STANDARD)
    if unknown:
        raise SystemExit(f"--without {', '.join(unknown)}: the columns are {', '.join(STANDARD)}")
    standard = [s for s in STANDARD if s not in options.without]
    installed = [s for s in standard if importlib.util.find_spec(s.partition(".")[0]) is not None]
    # torch first: what others change in torch when they are imported is not torch's doing.
    return [*installed, *options.implementation]


def run(cases: list[Case], found: list[str]) -> tuple[list[Column], Results]:
    columns, results = [], Results()
    for spec in found:
        columns.append(Column(spec, find(spec).title, version(spec)))
        for number, case in enumerate(cases, 1):
            if sys.stderr.isatty():
                print(f"\r{spec} {number}/{len(cases)}  ", end="", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
            results[case.key, spec] = Result(judge(case, find(spec)))
            faulthandler.cancel_dump_traceback_later()
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
    return columns, results


def where() -> str:
    if environment.simulated():
        return f"on simulated CUDA devices, torch {torch.__version__}"
    if torch.cuda.is_available():
        return f"on {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return f"on the CPU, torch {torch.__version__}"


def save(path: Path, results: Results) -> None:
    verdicts = [
        {
            "case": key,
            "implementation": spec,
            "verdict": r.outcome.verdict.value,
            "detail": r.outcome.detail,
        }
        for (key, spec), r in results.items()
        if r.outcome.verdict is not Verdict.NOT_RUN
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": where(), "verdicts": verdicts}, indent=1) + "\n")


def merge(path: Path, results: Results) -> None:
    saved = json.loads(path.read_text())
    for entry in saved["verdicts"]:
        key = entry["case"], entry["implementation"]
        here = results.get(key)
        if here is not None and here.outcome.verdict is Verdict.NOT_RUN:
            outcome = Outcome(Verdict(entry["verdict"]), entry["detail"])
            results[key] = Result(outcome, saved["where"])


def made_with(columns: list[Column]) -> str:
    others = [
        f"{c.title} {c.version}" if c.version else c.title for c in columns if c.title != "torch"
    ]
    return ", ".join([f"torch {torch.__version__}", *others])


def failures(cases: list[Case], columns: list[Column], results: Results) -> list[str]:
    """What must pass and does not: torch_reprise's cases, and those of --implementation."""
    lines = []
    for case in cases:
        for column in columns:
            if column.spec in STANDARD and column.spec != "torch_reprise":
                continue
            outcome = results[case.key, column.spec].outcome
            if outcome.verdict is not Verdict.NOT_RUN and not page.passed(case, outcome):
                lines.append(
                    f"{column.title}: {case.key}: {outcome.verdict.value}: {outcome.detail}"
                )
    return lines


def main() -> int:
    options = arguments()
    environment.prepare()
    cases = selected(options.only, options.only_cuda)
    if options.separately:
        cases = [dataclasses.replace(case, fresh_process=True) for case in cases]
    if options.write and (options.only or options.only_cuda):
        raise SystemExit("--write needs all rows: it cannot go with --only or --only-cuda")
    try:
        columns, results = run(cases, specs(options))
    except SuiteError as error:
        print(f"broken case: {error}", file=sys.stderr)
        return 2
    if options.merge:
        merge(options.merge, results)
    page.show(cases, columns, results)
    if options.details:
        for case in cases:
            for column in columns:
                outcome = results[case.key, column.spec].outcome
                print(f"{case.key} [{column.title}] {outcome.verdict.value}: {outcome.detail}")
    if options.save:
        save(options.save, results)
    if options.write:
        options.write.write_text(page.markdown(cases, columns, results, made_with(columns)))
    failed = failures(cases, columns, results)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if environment.simulated() else sys.exit(status)
