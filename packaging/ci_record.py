"""Writes down, as JSON, what a run of tests really ran: the support matrix is made from these.

    python -m pytest -p ci_record --record build/ci/test.json    (with this folder on PYTHONPATH)
    python packaging/ci_record.py build/ci/native.xml            (what ctest --output-junit wrote)

A record says which torch, CUDA, Python and system ran, which paths, whether something left tests
out, and how many passed, failed and were skipped. Nothing in it is an aim or a setting: all of it
is asked from the process that ran. For ctest, which knows no torch, it is asked from the
interpreter that the native tests were built with.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What is running: torch with its CUDA and devices, Python, system, torch-reprise."""
    import torch

    import torch_reprise

    return {
        "torch_reprise": torch_reprise.__version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cuda_devices": torch.cuda.device_count(),
        # tests/cudasim/launch.py preloads it.
        "simulated": "libcudasim" in os.environ.get("LD_PRELOAD", ""),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def from_junit(report: Path) -> dict[str, Any]:
    """The record of what ctest wrote. ElementTree is fine: the file is one of our own build."""
    root = ElementTree.parse(report).getroot()
    tests, failed, skipped = (int(root.get(name, "0")) for name in ("tests", "failures", "skipped"))
    disabled = int(root.get("disabled", "0"))
    return {
        **environment(),
        "paths": ["ctest"],
        "left_out": disabled,
        "passed": tests - failed - skipped - disabled,
        "failed": failed,
        "skipped": skipped,
        "exit_status": 1 if failed else 0,
    }


def main(arguments: list[str]) -> None:
    (report,) = arguments
    write(Path(report).with_suffix(".json"), from_junit(Path(report)))


# --- the plugin of pytest; the annotations are Any because main() must not need pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", metavar="FILE", help="write what was run to FILE, as JSON")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--record")
    if path:
        # Now: a test may change the working directory.
        config.pluginmanager.register(_Recorder(Path(path).absolute()), "reprise-recorder")


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        path.unlink(missing_ok=True)  # a run that is killed leaves none

    def pytest_deselected(self, items: list[Any]) -> None:
        self.left_out += len(items)

    # Not pytest_sessionfinish, in which tests/conftest.py may still turn the session into a failed
    # one.
    def pytest_unconfigure(self, config: Any) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        session = getattr(reporter, "_session", None)
        if session is None:
            return  # nothing was run: --help
        stats = {name: len(reports) for name, reports in reporter.stats.items()}
        write(
            self.path,
            {
                **environment(),
                "paths": [str(path) for path in config.args],
                "left_out": self.left_out,
                "passed": stats.get("passed", 0) + stats.get("xpassed", 0),
                "failed": stats.get("failed", 0) + stats.get("error", 0),
                "skipped": stats.get("skipped", 0) + stats.get("xfailed", 0),
                "exit_status": int(session.exitstatus),
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
