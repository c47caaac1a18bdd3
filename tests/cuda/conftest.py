"""Tests of values on a GPU: equal bits of what kernels compute.

Without a GPU nothing here is collected, rather than skipped: a simulated device (tests/cudasim)
computes nothing. Where somebody demands a GPU (REPRISE_FAIL_WITHOUT_CUDA=1) and there is none, the
tests are collected and fail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when cuBLAS is first used: without it no matrix product is promised to be the same twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# `fresh`, which starts processes in which CUDA was not used.
sys.path.insert(0, str(Path(__file__).parent.parent / "cudasim"))

import cudasim

if cudasim.active() or not (
    torch.cuda.is_available() or os.environ.get("REPRISE_FAIL_WITHOUT_CUDA") == "1"
):
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_report_header() -> str:
    if torch.cuda.is_available() and not cudasim.active():
        return f"tests/cuda: on {torch.cuda.get_device_name(0)}"
    return "tests/cuda: not collected, there is no GPU"


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Two runs of the same program have the same bits, which a GPU does not promise by itself."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
