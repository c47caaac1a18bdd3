"""torch_reprise passes each case; no row is lost; the page has the rows of the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import environment, page
from conformance.implementations import find
from conformance.judge import judge
from conformance.registry import ROWS, Case, Verdict, all_cases

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "conformance.md"


def _parameters() -> list[object]:
    # The mark skips without a CUDA device, or fails if one is demanded (tests/conftest.py).
    return [
        pytest.param(case, id=case.key, marks=[pytest.mark.cuda] if case.needs_cuda else [])
        for case in all_cases()
    ]


@pytest.fixture(autouse=True, scope="module")
def prepared() -> None:
    environment.prepare()


@pytest.mark.parametrize("case", _parameters())
def test_ours(case: Case) -> None:
    reason = environment.why_not(case)
    if reason is not None:
        pytest.skip(reason)
    outcome = judge(case, find("torch_reprise"))
    assert outcome.verdict is not Verdict.NOT_RUN, outcome.detail
    assert outcome.verdict in case.allowed, f"{outcome.verdict.value}: {outcome.detail}"


def test_every_row_has_a_case() -> None:
    assert list(dict.fromkeys(case.row for case in all_cases())) == list(ROWS)


def test_no_two_cases_have_the_same_name() -> None:
    keys = [case.key for case in all_cases()]
    assert len(keys) == len(set(keys))


def test_the_page_has_the_cases_of_the_registry() -> None:
    """Its verdicts on others are as of the day it was written; which rows it has is checked."""
    found = page.table_rows(PAGE.read_text(encoding="utf-8"))
    assert found == [(case.row, case.title) for case in all_cases()], (
        "write the page again: python tests/conformance/run.py --write docs/conformance.md"
    )
