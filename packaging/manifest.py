"""versions.toml, pyproject.toml and the pinned tools, for the other programs of this folder.

Imports nothing but the standard library (and tomli, which pytest brings, on Python 3.10).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Torch:
    """A version of torch that a wheel is built for."""

    release: str
    makefile: str
    tested: str


@dataclass(frozen=True)
class Step:
    """A run of tests that leaves a record; only one of these paths confirms anything."""

    what: str
    paths: tuple[str, ...]
    simulated: bool = False


def _toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def torches() -> list[Torch]:
    return [Torch(**entry) for entry in _toml(ROOT / "packaging" / "versions.toml")["torch"]]


def steps() -> dict[str, Step]:
    """The steps by name, in the order in which the README lists them."""
    return {
        name: Step(**{**entry, "paths": tuple(entry["paths"])})
        for name, entry in _toml(ROOT / "packaging" / "versions.toml")["steps"].items()
    }


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    found: dict[str, Any] = _toml(ROOT / "pyproject.toml")["project"]
    return found


def canonical(name: str) -> str:
    """A package's name as indexes compare it: ``scikit_build.Core`` is ``scikit-build-core``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(requirements: Path) -> dict[str, list[str]]:
    """The lines of a requirements file by package; several where they differ by Python."""
    lines: dict[str, list[str]] = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            name = re.match(r"[A-Za-z0-9._-]+", line)
            assert name, f"{requirements.name}: not a requirement: {line}"
            lines.setdefault(canonical(name[0]), []).append(line)
    return lines


def tools(kind: str) -> list[str]:
    """The pinned requirements for ``build`` or ``test``."""
    names = _toml(ROOT / "packaging" / "versions.toml")["tools"][kind]
    lines = pinned(ROOT / "requirements" / "dev.txt")
    return [line for name in names for line in lines[canonical(name)]]
