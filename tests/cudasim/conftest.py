"""These tests exist only under the simulation: without it torch has no device for them.

They are not collected then, rather than skipped: a skip says that something was missing on this
machine, and nothing is. `launch.py` runs them, and fails if the simulation cannot be loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `cudasim`, whichever import mode pytest runs in

import cudasim

collect_ignore_glob = [] if cudasim.active() else ["test_*.py"]


def pytest_report_header() -> str:
    if cudasim.active():
        return "CUDA: simulated, kernels never run (tests/cudasim/README.md)"
    return "tests/cudasim: not collected, the simulation is not loaded (see its README.md)"
