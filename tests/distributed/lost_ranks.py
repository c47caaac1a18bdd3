"""Tests that are lost in every way there is, for test_ranks.py; not collected, no torch."""

from __future__ import annotations

import os
import sys
import threading

from ranks import on_each_rank


def wait_for_nothing() -> None:
    threading.Event().wait()


@on_each_rank
def passes() -> None:
    pass


@on_each_rank
def fails_on_one_rank(rank: int) -> None:
    if sys.argv[1] == str(rank):
        raise ValueError("this rank only")
    wait_for_nothing()


@on_each_rank
def dies() -> None:
    print("last words", flush=True)
    os._exit(7)


@on_each_rank(limit=1.5)
def hangs() -> None:
    wait_for_nothing()
