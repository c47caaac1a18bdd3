"""Tests that want CUDA devices: the simulated ones, or real ones where there are some.

Without either nothing here is collected, rather than skipped: a skip says that something was
missing on this machine, and nothing is. `launch.py` runs them, and fails if the simulation cannot
be loaded. On a GPU only what is about the simulation itself is left out; where somebody demands
a GPU (REPRISE_FAIL_WITHOUT_CUDA=1) and there is none, the tests are collected and fail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_reprise

sys.path.insert(0, str(Path(__file__).parent))  # `cudasim`, whichever import mode pytest runs in

import cudasim

if cudasim.active():
    collect_ignore_glob = []
elif torch.cuda.is_available() or os.environ.get("REPRISE_FAIL_WITHOUT_CUDA") == "1":
    collect_ignore_glob = ["test_simulation.py"]
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # tests/conftest.py says what it does; --confcutdir may leave that out.
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_report_header() -> str:
    if cudasim.active():
        return "CUDA: simulated, kernels never run (tests/cudasim/README.md)"
    if torch.cuda.is_available():
        return f"tests/cudasim: on {torch.cuda.device_count()} real devices, no simulation"
    return "tests/cudasim: not collected, the simulation is not loaded (see its README.md)"


@pytest.fixture(params=["fields", "virtuals"])
def philox(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to a CUDA generator: its members, and torch's virtuals, which ask the driver."""
    torch_reprise._C.enable_philox_fields(request.param == "fields")
    yield
    torch_reprise._C.enable_philox_fields(True)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Every device's generator at seed 7, offset 0; put back afterwards."""
    torch.cuda.init()
    states = torch.cuda.get_rng_state_all()
    torch.cuda.manual_seed_all(7)
    yield
    torch.cuda.set_rng_state_all(states)
