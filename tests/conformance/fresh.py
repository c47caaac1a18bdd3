"""Plays one case in this process and ends: `fresh.py "row: title" implementation output`."""

# ruff: noqa: E402, the path comes first
from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.path.append(str(Path.cwd()))

from conformance import environment
from conformance.implementations import find
from conformance.judge import play_here
from conformance.registry import all_cases


def main(key: str, spec: str, output: str) -> None:
    environment.prepare()
    (case,) = (c for c in all_cases() if c.key == key)
    played = play_here(case, find(spec))
    Path(output).write_bytes(pickle.dumps(played))
    # Not through the interpreter's end: device threads of autograd may still be busy.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
