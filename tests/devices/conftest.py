"""The tests here need a process of their own, with the test device loaded into it.

tests/test_devices.py makes that process and chooses the kind of generator with a variable; without
it nothing is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import testdev

if testdev.KIND in os.environ:
    testdev.load()
else:
    collect_ignore_glob = ["*"]


def pytest_report_header(config: pytest.Config) -> str:
    if testdev.KIND in os.environ:
        return f"test device: {testdev.kind()} generators, from {os.environ[testdev.LIBRARY]}"
    return (
        f"test device: {testdev.KIND} is not set, so nothing in tests/devices is collected; run "
        f"tests/test_devices.py, or set it to opaque or philox and {testdev.LIBRARY} to the library"
    )


@pytest.fixture(autouse=True)
def device_generators() -> Iterator[None]:
    before = testdev.states()
    yield
    testdev.set_states(before)
