"""What all pictures of this package have in common: ink, quiet ink, the frame of a chart.

Those of the demo, of the benchmarks and of a recording start from it. Nothing is imported here.
"""

from __future__ import annotations

from typing import Any

INK = "#26323d"
QUIET = "#6b7884"

# For matplotlib's rc_context; a picture adds sizes and what it wants otherwise.
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#c8d0d8",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
