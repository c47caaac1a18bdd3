"""Tests with other people's libraries: collected where these are installed, and nowhere else.

`make test-integrations` installs them into an environment of its own and sets
REPRISE_REQUIRE_INTEGRATIONS=1, which makes a missing one an error. In another environment where
one is missing nothing of this folder is collected, and a line after the collection says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `comparing`, whichever import mode pytest runs in

REQUIRE = "REPRISE_REQUIRE_INTEGRATIONS"
LIBRARIES = ("accelerate", "lightning", "peft", "timm", "torchvision", "transformers")

missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
if missing and os.environ.get(REQUIRE) == "1":
    raise pytest.UsageError(
        f"{REQUIRE}=1 is set, but these are not installed: {', '.join(missing)} "
        "(requirements/integrations.txt)"
    )
collect_ignore_glob = ["test_*.py"] if missing else []

# Before any of them is imported: nothing here may ask for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# What these libraries say of each other, and is not for us to mend. All else stays an error.
FOREIGN_WARNINGS = [
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT asks Transformers
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning, torch
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            for line in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(line))


def pytest_report_collectionfinish() -> str:
    """Not in the header, which is printed before this file is found when all tests are run."""
    if missing:
        return f"tests/integrations: not collected, for there is no {', '.join(missing)}"
    return f"tests/integrations: collected, with {', '.join(LIBRARIES)}"


@pytest.fixture(autouse=True)
def one_thread(ambient_state: None) -> Iterator[None]:
    """The models are far too small to be shared by threads. `ambient_state` puts it back."""
    torch.set_num_threads(1)
    yield
