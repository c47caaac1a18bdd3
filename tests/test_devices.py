"""Runs tests/devices in processes of their own, one for each kind of generator.

A backend that is registered stays for the life of a process and becomes its accelerator, so that
the rest of the suite must not meet it. The library comes from the package's own build
(REPRISE_TEST_DEVICE names it; `make test` sets it), else it is built here, into build/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "devices"
LIBRARY = "REPRISE_TEST_DEVICE"
# How many tests there are at least: a run that collected next to nothing has shown nothing.
AT_LEAST = 85


def checked_run(*command: str | Path) -> None:
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stdout}{result.stderr}"


@pytest.fixture(scope="module")
def library() -> Path:
    given = os.environ.get(LIBRARY)
    if given:
        path = Path(given).resolve()
        assert path.is_file(), f"{LIBRARY} names {path}, which does not exist: build it first"
        return path
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    cmake = cmake or shutil.which("cmake")
    assert cmake, f"no cmake to build the test device with: pip install cmake, or set {LIBRARY}"
    build = ROOT / "build" / f"devices-{torch.__version__}"
    checked_run(cmake, "-S", SOURCES, "-B", build, f"-DPython_EXECUTABLE={sys.executable}")
    checked_run(cmake, "--build", build)
    return build / "libreprise_test_device.so"


@pytest.mark.parametrize("kind", ["opaque", "philox"])
def test_segments_on_a_private_device(kind: str, library: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = {**os.environ, LIBRARY: str(library), "REPRISE_TEST_GENERATOR": kind}
    environment.pop("PYTEST_ADDOPTS", None)  # what is selected out here says nothing about there
    result = subprocess.run(
        [sys.executable, "-m", "pytest", SOURCES, "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["skipped"]) == 0, result.stdout
    assert int(suite.attrib["tests"]) >= AT_LEAST, result.stdout
