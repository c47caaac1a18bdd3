"""The picture as one HTML page that loads nothing: data, style and script are inside of it.

The scripts draw the data on two canvases and build the table. Names of functions reach the page as
JSON only, with every ``<`` escaped, and the scripts write them as text; beyond that the page's
policy runs no script but ours (by their hashes) and opens no connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

from ._picture import Picture, short

# Beyond this many segments the table has the ones that took longest.
_MOST_ROWS = 10_000


def page(picture: Picture) -> str:
    """The whole document."""
    style = _read("page.css")
    scripts = [_read(name) for name in ("report.js", "charts.js", "table.js")]
    values = {
        "style": style,
        "style-hash": _hash(style),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "script-hashes": " ".join(_hash(script) for script in scripts),
        "summary": "\n".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in picture.summary
        ),
        "notes": "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(picture)),
        "description": html.escape(", ".join(f"{n}: {v}" for n, v in picture.summary)),
        "data": _json(_data(picture)),
    }
    parts = _read("page.html").split("@@")  # text, name, text, name, ..., text
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts))


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json(data: Any) -> str:
    """For the inside of a script element: nothing in it can end the element or begin a comment."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _notes(picture: Picture) -> list[str]:
    notes = list(picture.notes)
    if len(picture.rows) > _MOST_ROWS:
        notes.append(f"The table has the {_MOST_ROWS:,} segments that took longest.")
    return notes


def _data(picture: Picture) -> dict[str, Any]:
    """What the scripts read. Times are microseconds since the first event."""

    def moment(time: float) -> float:
        return round((time - picture.begin) * 1e6, 1)

    shown = range(len(picture.rows))
    if len(shown) > _MOST_ROWS:
        by_time = sorted(shown, key=lambda i: -_milliseconds(picture, i))
        chosen = sorted(by_time[:_MOST_ROWS])
    else:
        chosen = list(shown)
    names: dict[str, int] = {}
    generators: dict[str, int] = {}
    table = []
    for i in chosen:
        row = picture.rows[i]
        table.append(
            [
                i,
                names.setdefault(row.name, len(names)),
                row.depth,
                int(row.reentrant),
                row.slots,
                row.bytes,
                picture.row_peaks[i],
                generators.setdefault(", ".join(row.generators), len(generators)),
                round(row.forward_ms, 4),
                round(row.replay_ms, 4),
                row.replays,
            ]
        )
    return {
        "names": list(names),
        "short": [short(name) for name in names],
        "generators": list(generators),
        "table": table,
        "count": len(picture.rows),
        "layers": [{"label": layer.label, "colour": layer.colour} for layer in picture.layers],
        "legend": picture.legend,
        "layerOf": list(picture.layer_of),
        "start": picture.begin * 1e6,
        "length": moment(picture.end),
        "times": [moment(time) for time in picture.series.times],
        "held": picture.series.held,
        "without": picture.series.without if picture.shows_without else None,
        "withoutLabel": picture.without_label,
        "peak": [moment(picture.peak.time), picture.peak.bytes],
        "top": max(picture.peak.bytes, picture.peak_without.bytes),
        "spans": [[s.row, s.kind, moment(s.begin), moment(s.end), s.thread] for s in picture.spans],
    }


def _milliseconds(picture: Picture, index: int) -> float:
    row = picture.rows[index]
    return row.forward_ms + row.replay_ms
