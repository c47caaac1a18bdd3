"""Pictures of a recording: the table, the trace, the plot and the page.

One picture is computed (``_picture``) and drawn by whoever is asked to: matplotlib for a PNG, the
page's own script for HTML. Nothing here prints, reads the clock or keeps global state, and nothing
here is imported before a picture is asked for: matplotlib and rich are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_reprise.ledger import Event, Row

Events = Sequence[Sequence["Event"]]
Writer = Callable[[Sequence["Row"], Events, Path], None]


def save(rows: Sequence[Row], events: Events, path: Path) -> None:
    """Writes what the suffix of ``path`` names; ValueError for one that is not known."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        known = ", ".join(WRITERS)
        raise ValueError(
            f"Recording.save() goes by the suffix of the path: one of {known}; got {str(path)!r}"
        )
    writer(rows, events, path)


def _write_html(rows: Sequence[Row], events: Events, path: Path) -> None:
    from ._page import page
    from ._picture import picture

    _write(path, page(picture(rows, events)))


def _write_json(rows: Sequence[Row], events: Events, path: Path) -> None:
    import json

    from ._trace import trace

    _write(path, json.dumps(trace(rows, events)))


def _write_png(rows: Sequence[Row], events: Events, path: Path) -> None:
    from ._picture import picture
    from ._plot import draw

    draw(picture(rows, events), path)


def _write_csv(rows: Sequence[Row], events: Events, path: Path) -> None:
    from ._tables import as_csv

    _write(path, as_csv(rows))


def _write_txt(rows: Sequence[Row], events: Events, path: Path) -> None:
    from ._tables import as_text

    _write(path, as_text(rows) + "\n")


def _write(path: Path, text: str) -> None:
    # Names are what users made them: one with half a surrogate is no reason to have no report.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


WRITERS: dict[str, Writer] = {
    ".html": _write_html,
    ".json": _write_json,
    ".png": _write_png,
    ".csv": _write_csv,
    ".txt": _write_txt,
}
