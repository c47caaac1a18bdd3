"""The support matrix in the README: what the last run of CI really ran, and nothing else.

    python packaging/support_matrix.py                     print the table
    python packaging/support_matrix.py --write README.md   put it between the two markers
    python packaging/support_matrix.py --check README.md   fail if the README says more than ran

Each row is one torch, Python and system, made from the records in build/ci (ci_record.py). A record
counts only if its run was a whole one: the step and the paths of versions.toml, nothing left out,
at least one test passed and none failed, on the torch releases of the manifest. The table has no
numbers of tests: they change daily, and --check would say nothing worth knowing.

--check allows a README that says less than ran; it names what is new.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifest import ROOT, Step, steps, torches

BEGIN = "<!-- support matrix: written by packaging/support_matrix.py from what CI ran -->"
END = "<!-- end of the support matrix -->"
HEADER = ("torch", "CUDA", "Python", "system", "passed in CI")


@dataclass(frozen=True)
class Configuration:
    torch: str
    cuda: str
    python: str
    system: str


Matrix = dict[Configuration, list[str]]


def why_not(record: dict[str, Any], step: Step | None, releases: Iterable[str]) -> str:
    """Why a record confirms nothing; empty if it does."""
    if step is None:
        return "packaging/versions.toml has no such step"
    if record["torch"].partition("+")[0] not in releases:
        return f"packaging/versions.toml has no torch {record['torch']}"
    if record["paths"] != list(step.paths):
        return f"ran {' '.join(record['paths'])}, a whole run is {' '.join(step.paths)}"
    if record["left_out"]:
        return f"left out {record['left_out']} tests"
    if record["failed"] or record["exit_status"] != 0:
        return f"{record['failed']} tests failed, exit status {record['exit_status']}"
    if record["passed"] == 0:
        return "no test passed"
    if record["simulated"] != step.simulated:
        return f"simulated is {record['simulated']}, expected {step.simulated}"
    return ""


def matrix(folder: Path) -> tuple[Matrix, list[str]]:
    """What the records in `folder` confirm, and the complaints about those that do not."""
    known = steps()
    releases = {torch.release for torch in torches()}
    rows: dict[Configuration, set[str]] = {}
    complaints = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        step = known.get(path.stem.partition("-")[0])
        reason = why_not(record, step, releases)
        if reason:
            complaints.append(f"{path.name}: {reason}")
            continue
        assert step is not None
        row = Configuration(
            record["torch"], record["cuda"] or "none", record["python"], record["system"]
        )
        rows.setdefault(row, set()).add(step.what)
    order = [step.what for step in known.values()]
    by_version = sorted(rows, key=lambda row: [int(n) for n in re.findall(r"\d+", row.torch)])
    return {row: sorted(rows[row], key=order.index) for row in by_version}, complaints


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: Matrix) -> str:
    lines = [_line(HEADER), "|" + "---|" * len(HEADER)]
    for row, what in rows.items():
        lines.append(_line((row.torch, row.cuda, row.python, row.system, ", ".join(what))))
    return "\n".join(lines)


def _block(text: str, name: str) -> tuple[str, str, str]:
    """What is before the block, in it, and after it."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name} has no block between\n{BEGIN}\n{END}")
    return before, inside, after


def read(text: str, name: str = "README.md") -> Matrix:
    """The table of a text, back in the form that it was written from."""
    lines = [line for line in _block(text, name)[1].splitlines() if line.startswith("|")]
    rows: Matrix = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) != len(HEADER):
            raise SystemExit(f"{name}: a row of the support matrix has {len(cells)} cells: {line}")
        rows[Configuration(*cells[:-1])] = [what for what in cells[-1].split(", ") if what]
    if lines[:1] != [_line(HEADER)] or not rows:
        raise SystemExit(f"{name}: no support matrix between the markers")
    return rows


def beyond(claimed: Matrix, confirmed: Matrix) -> list[str]:
    """What the first says and the second does not."""
    return [
        f"torch {row.torch}, CUDA {row.cuda}, Python {row.python}, {row.system}: {what}"
        for row, all_of_it in claimed.items()
        for what in all_of_it
        if what not in confirmed.get(row, [])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The support matrix from the records of CI.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, default=ROOT / "build" / "ci")
    options = parser.parse_args(arguments)
    confirmed, complaints = matrix(options.records)
    for complaint in complaints:
        print(f"confirms nothing: {complaint}", file=sys.stderr)
    if options.check:
        claimed = read(options.check.read_text(encoding="utf-8"), options.check.name)
        missing = beyond(claimed, confirmed)
        for line in missing:
            print(f"{options.check.name} says it, no record confirms it: {line}", file=sys.stderr)
        for line in beyond(confirmed, claimed):
            print(f"ran, and {options.check.name} does not say it: {line}")
        if not missing:
            print(f"every line of the support matrix in {options.check.name} ran")
        return 1 if missing else 0
    if complaints or not confirmed:
        print(
            f"no table: {options.records} has to confirm something, and all of it", file=sys.stderr
        )
        return 1
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, _, after = _block(text, options.write.name)
        made = f"{before}{BEGIN}\n{table(confirmed)}\n{END}{after}"
        options.write.write_text(made, encoding="utf-8")
    else:
        print(table(confirmed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
