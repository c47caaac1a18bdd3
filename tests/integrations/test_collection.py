"""Where a library is missing nothing of this folder is collected and the run says so, or fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A module that is None in sys.modules is one that cannot be found.
WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import pytest
raise SystemExit(pytest.main(["tests/integrations", "--collect-only", "-p", "no:cacheprovider"]))
"""


def collect(require: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT],
        cwd=ROOT,
        env={**os.environ, "REPRISE_REQUIRE_INTEGRATIONS": require},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_missing_library_leaves_all_of_them_out_and_is_told() -> None:
    status, printed = collect("0")
    assert status == 5, printed  # nothing was collected
    assert "tests/integrations: not collected, for there is no peft" in printed


def test_a_missing_library_is_an_error_where_they_are_required() -> None:
    status, printed = collect("1")
    assert status == 4, printed  # wrong usage
    assert "REPRISE_REQUIRE_INTEGRATIONS=1 is set, but these are not installed: peft" in printed
