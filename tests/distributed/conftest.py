"""The workers that the tests of this folder run in: one set for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    workers = Ranks(lambda: tmp_path_factory.mktemp("ranks"))
    yield workers
    workers.close()
