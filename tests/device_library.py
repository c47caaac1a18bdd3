"""The test device (tests/devices) as a shared library: where it is, built if it has to be.

REPRISE_TEST_DEVICE names it if it was built together with the package, as `make test` does;
otherwise it is built into build/, once for each torch.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "devices"
LIBRARY = "REPRISE_TEST_DEVICE"


def _checked_run(*command: str | Path) -> None:
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stdout}{result.stderr}"


@functools.cache
def device_library() -> Path:
    given = os.environ.get(LIBRARY)
    if given:
        path = Path(given).resolve()
        assert path.is_file(), f"{LIBRARY} names {path}, which does not exist: build it first"
        return path
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    cmake = cmake or shutil.which("cmake")
    assert cmake, f"no cmake to build the test device with: pip install cmake, or set {LIBRARY}"
    build = ROOT / "build" / f"devices-{torch.__version__}"
    _checked_run(cmake, "-S", SOURCES, "-B", build, f"-DPython_EXECUTABLE={sys.executable}")
    _checked_run(cmake, "--build", build)
    return build / "libreprise_test_device.so"
