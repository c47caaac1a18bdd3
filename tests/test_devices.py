"""Runs tests/devices in processes of their own, one for each kind of generator.

A backend that is registered stays for the life of a process and becomes its accelerator, so that
the rest of the suite must not meet it. The library comes from device_library.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from device_library import LIBRARY, ROOT, SOURCES, device_library

# How many tests there are at least: a run that collected next to nothing has shown nothing.
AT_LEAST = 87


@pytest.mark.parametrize("kind", ["opaque", "philox"])
def test_segments_on_a_private_device(kind: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = {**os.environ, LIBRARY: str(device_library()), "REPRISE_TEST_GENERATOR": kind}
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
