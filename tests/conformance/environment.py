"""What this machine has for the cases: CUDA (real or simulated), the test device, NumPy."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .registry import Case, Needs

TESTS = Path(__file__).resolve().parent.parent
NO_CUDA = "needs CUDA (simulated by make test-cudasim)"


def simulated() -> bool:
    """Is this process under the simulation of tests/cudasim?"""
    return hasattr(ctypes.CDLL(None), "cudasim_set_capturing")


def _from_tests(folder: str, name: str) -> ModuleType:
    path = str(TESTS / folder)
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module(name)


@functools.cache
def simulation() -> Any:
    """tests/cudasim/cudasim.py, which also lets device threads finish before the process ends."""
    return _from_tests("cudasim", "cudasim")


def prepare() -> None:
    """Once in each process that runs cases."""
    if simulated():
        simulation()


@functools.cache
def _device_library() -> tuple[Path | None, str]:
    try:
        return _from_tests(".", "device_library").device_library(), ""
    except Exception as error:
        return None, f"the test device cannot be built: {error}".splitlines()[0]


def private_device(kind: str) -> Any:
    """Loads the test device into this process, for good; `kind` is opaque or philox."""
    library, reason = _device_library()
    assert library is not None, reason
    testdev = _from_tests("devices", "testdev")
    os.environ[testdev.LIBRARY] = str(library)
    os.environ[testdev.KIND] = kind
    testdev.load()
    # torch's own form wants to know it before it runs anything, and built-in devices without the
    # module API of CUDA (MPS) have it.
    torch.get_device_module("testdev").get_amp_supported_dtype = lambda: [torch.float16]
    return testdev


def why_not(case: Case) -> str | None:
    """Why `case` cannot run here; None if it can."""
    if case.needs_cuda:
        if not torch.cuda.is_available():
            return NO_CUDA
        if torch.cuda.device_count() < case.devices:
            return f"needs {case.devices} CUDA devices"
        if case.needs is Needs.SIMULATION and not simulated():
            return f"needs {case.needs.value}"
    if case.needs in (Needs.PRIVATE_DEVICE, Needs.TWO_ACCELERATORS):
        library, reason = _device_library()
        if library is None:
            return reason
    if case.needs is Needs.NUMPY and importlib.util.find_spec("numpy") is None:
        return "needs NumPy"
    return None
