"""The rows of a recording as text: plain, for a spreadsheet, and as a table of rich."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from torch_reprise.ledger import Row

HEADER = (
    "segment",
    "depth",
    "form",
    "slots",
    "not saved",
    "drew from",
    "forward ms",
    "replay ms",
    "replays",
)
_LEFT = {0, 2, 5}  # columns of words; numbers stand to the right


def readable(count: float) -> str:
    """A number of bytes with a unit, e.g. ``80.5 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def ascii_only(text: str) -> str:
    """For logs: what is no printable ASCII is written as an escape."""
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def cells(row: Row) -> tuple[str, ...]:
    """One row under :data:`HEADER`."""
    return (
        row.name,
        str(row.depth),
        "reentrant" if row.reentrant else "hooks",
        str(row.slots),
        readable(row.bytes),
        ", ".join(row.generators) or "-",
        f"{row.forward_ms:.3f}",
        f"{row.replay_ms:.3f}",
        str(row.replays),
    )


def as_text(rows: Sequence[Row]) -> str:
    """Columns of plain ASCII."""
    lines = [HEADER, *(tuple(ascii_only(cell) for cell in cells(row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = []
    for line in lines:
        padded = [
            cell.ljust(width) if i in _LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
    text.insert(1, "-" * max(len(line) for line in text))
    return "\n".join(text)


def as_csv(rows: Sequence[Row]) -> str:
    """The fields of the rows with nothing rounded; generators are separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields: Any = ("name", "depth", "reentrant", "slots", "bytes", "generators")
    writer.writerow((*fields, "forward_ms", "replay_ms", "replays"))
    for row in rows:
        writer.writerow(row._replace(generators=" ".join(row.generators)))  # type: ignore[arg-type]
    return text.getvalue()


def as_rich(rows: Sequence[Row]) -> Table:
    """A table for a terminal."""
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError(
            "Recording.table() needs rich, which is not installed: "
            "pip install 'torch-reprise[demo]'; print(recording) needs nothing"
        ) from error
    table = Table(header_style="bold", title_justify="left")
    for i, title in enumerate(HEADER):
        table.add_column(
            title, justify="left" if i in _LEFT else "right", overflow="fold", no_wrap=i != 0
        )
    for row in rows:
        # Text: square brackets in a name are no markup.
        table.add_row(
            *(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in cells(row))
        )
    return table
