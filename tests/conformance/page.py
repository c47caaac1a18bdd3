"""The table, as docs/conformance.md and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .registry import CHAPTERS, Case, Outcome, Verdict

TITLES = {"torch.utils.checkpoint": "torch", "torch_reprise": "torch_reprise"}

INTRODUCTION = """\
# Conformance

A program with checkpointing should be the program without it. Each row below is a small program in
which that is not easy, most of them from what users reported. It is played without checkpointing
and with each implementation, from the same seeds, and everything that it returns is compared:
outputs, gradients, buffers, the state of every generator afterwards, and how often its function
ran.

| verdict | means |
|---|---|
| exact | all of it is equal, bit for bit, and the function was run again in backward |
| clear error | an error that says what is wrong; its class and the words it needs are in the case |
| obscure error | any other error |
| silently different | something differs, and nobody is told |
| no replay | equal, but the function ran only once: nothing was recomputed |
| not run | the machine lacks something, or the implementation has no such feature |

Some cases are not about equality. Where a function does something else each time it runs, or where
a saved tensor is changed in place, only a clear error is right; the sizes of segments, the number
of looks at a generator and the tensors that are alive after a partial backward are judged by
themselves. An issue is one of pytorch/pytorch. An option that makes an implementation more careful
and that has to be asked for (the host's generators, comparing values) is asked for where the
implementation has it. A verdict of torch_reprise in bold is one with which it does not pass.
"""

RUN_IT = """\
## Run it on another implementation

```sh
python tests/conformance/run.py --implementation package.module:function
```

adds a column. The function is called as `torch.utils.checkpoint.checkpoint` is, with
`use_reentrant=False` (or True, in the cases of the reentrant form) and, where a case wants them,
`early_stop`, `debug` and `context_fn`. `checkpoint_sequential`, `GraphExecGroup` and
`create_selective_checkpoint_contexts` are taken from the same module; what it does not have is not
run. An implementation that is called in another way is a class derived from
`conformance.implementations.Implementation`, which is where the columns above come from; name it in
place of the function. The exit status is 1 if it does not pass a case that was run.

`--only R1,S` runs these rows or chapters, `--without torch_reprise` leaves a column out, and
nothing but torch has to be installed. `--separately` is for an implementation that ends the
process: each play gets one of its own. Cases that need CUDA run where torch sees a device, or under
the simulated CUDA of this repository:

```sh
python tests/cudasim/launch.py tests/conformance/run.py --only-cuda --save build/cuda.json
python tests/conformance/run.py --merge build/cuda.json --write docs/conformance.md
```

This page is written by `run.py`. To add a case, write a program in `tests/conformance/cases/`: it
takes the implementation and returns what is to be compared.
"""


class Column(NamedTuple):
    spec: str
    title: str
    version: str | None


class Result(NamedTuple):
    """The verdict on one implementation, and where it was found if not in this run."""

    outcome: Outcome
    elsewhere: str = ""


Results = dict[tuple[str, str], Result]  # by key of the case and spec of the implementation


def issues(case: Case) -> str:
    return ", ".join(f"#{number}" for number in case.issues)


def passed(case: Case, outcome: Outcome) -> bool:
    return outcome.verdict in case.allowed


def note(case: Case, columns: Sequence[Column], results: Results) -> str:
    """Why the verdicts are what they are: a sentence for each that needs one."""
    found = [(c.title, results[case.key, c.spec].outcome) for c in columns]
    reasons = {o.detail for _, o in found if o.verdict is Verdict.NOT_RUN}
    if len(reasons) == 1 and all(o.verdict is Verdict.NOT_RUN for _, o in found):
        return reasons.pop()
    parts = []
    for title, outcome in found:
        if outcome.detail and outcome.verdict not in (Verdict.EXACT, Verdict.CLEAR):
            detail = outcome.detail.removeprefix(f"{title} ")
            parts.append(f"{title}: {_short(detail)}")
    elsewhere = {results[case.key, c.spec].elsewhere for c in columns} - {""}
    return "; ".join([*parts, *sorted(elsewhere)])


def _short(text: str, limit: int = 110) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _cell(text: str) -> str:
    for character in "|<>*_`":
        text = text.replace(character, f"\\{character}")
    return text


def _verdict(case: Case, result: Result, ours: bool) -> str:
    verdict = str(result.outcome.verdict.value)
    good = passed(case, result.outcome)
    return (
        f"**{verdict}**"
        if ours and not good and result.outcome.verdict is not Verdict.NOT_RUN
        else verdict
    )


def markdown(
    cases: Iterable[Case], columns: Sequence[Column], results: Results, made_with: str
) -> str:
    cases = list(cases)
    lines = [INTRODUCTION, f"Made with {made_with}.\n"]
    head = ["row", "case", "issues", *(c.title for c in columns), "notes"]
    for letter, chapter in CHAPTERS.items():
        lines += [f"## {letter}: {chapter}\n", _row(head), _row(["---"] * len(head))]
        for case in cases:
            if case.row[0] != letter:
                continue
            verdicts = [
                _verdict(case, results[case.key, c.spec], c.spec == "torch_reprise")
                for c in columns
            ]
            remark = _cell(note(case, columns, results))
            lines.append(_row([case.row, _cell(case.title), issues(case), *verdicts, remark]))
        lines.append("")
    lines += [_about_cuda(cases), RUN_IT]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _about_cuda(cases: Iterable[Case]) -> str:
    rows = dict.fromkeys(case.row for case in cases if case.needs_cuda)
    return f"""\
## Rows that need CUDA devices

{", ".join(rows)} need CUDA devices. On a machine without any they run under the simulated CUDA of
tests/cudasim, where everything on the host is torch's own and kernels never run: there they compare
where generators stand in the forward, in the replay and afterwards, and how often a function ran.
Rows that were not run at all say so in their notes.
"""


def table_rows(text: str) -> list[tuple[str, str]]:
    """Row and title of each line of the tables of a page."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "\0").split("|")]
        if len(cells) > 4 and cells[1][:1] in CHAPTERS and cells[1][1:].isdigit():
            title = cells[2].replace("\0", "|")
            for character in "|<>*_`":
                title = title.replace(f"\\{character}", character)
            found.append((cells[1], title))
    return found


# On the terminal.


def show(cases: Iterable[Case], columns: Sequence[Column], results: Results) -> None:
    try:
        _show_with_rich(list(cases), columns, results)
    except ImportError:
        _show_plainly(list(cases), columns, results)


def _show_with_rich(cases: list[Case], columns: Sequence[Column], results: Results) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {
        Verdict.EXACT: "green",
        Verdict.CLEAR: "green",
        Verdict.OBSCURE: "yellow",
        Verdict.SILENT: "bold red",
        Verdict.NO_REPLAY: "yellow",
        Verdict.NOT_RUN: "dim",
    }
    table = Table(show_lines=False)
    for title in ("row", "case", *(c.title for c in columns)):
        table.add_column(title)
    for case in cases:
        cells = [Text(case.row), Text(case.title)]
        for column in columns:
            verdict = results[case.key, column.spec].outcome.verdict
            cells.append(Text(str(verdict.value), style=styles[verdict]))
        table.add_row(*cells)
    # Not narrowed to 80 columns where the output is a file.
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


def _show_plainly(cases: list[Case], columns: Sequence[Column], results: Results) -> None:
    lines = [["row", "case", *(c.title for c in columns)]]
    for case in cases:
        verdicts = [str(results[case.key, c.spec].outcome.verdict.value) for c in columns]
        lines.append([case.row, case.title, *verdicts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
