"""Environments for building and testing wheels, each with one torch.

torch is installed once for each version, into an environment with nothing else in it. Those that
build or test start as a new environment into which that one's packages are linked (hard links:
pip writes new files and never into old ones), so a fresh environment costs a second and not
several gigabytes. What pip then finds is what it would have installed itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a shell may have set for its own builds, and what would lead out of the environment.
_LEAKS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "VIRTUAL_ENV")
_LEAKING = ("PYTHON", "CMAKE_", "SKBUILD_", "PYTEST_", "REPRISE_", "LD_")


def clean_variables(environment: Path) -> dict[str, str]:
    """This process's variables without those that change what is built or what is imported."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in _LEAKS and not name.startswith(_LEAKING)
    }
    if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ:
        variables["CMAKE_BUILD_PARALLEL_LEVEL"] = os.environ["CMAKE_BUILD_PARALLEL_LEVEL"]
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables["PYTHONNOUSERSITE"] = "1"
    variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return variables


def run(
    environment: Path,
    arguments: Sequence[str | Path],
    cwd: Path,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Runs the environment's Python and returns what it printed; SystemExit if it failed."""
    result = subprocess.run(
        [environment / "bin" / "python", *arguments],
        cwd=cwd,
        env={**clean_variables(environment), **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        command = " ".join(str(part) for part in arguments)
        raise SystemExit(f"{result.stdout}\nfailed in {environment}: python {command}")
    return result.stdout


def pip(environment: Path, arguments: Sequence[str | Path]) -> str:
    return run(environment, ["-m", "pip", *arguments], cwd=environment)


def site_packages(environment: Path) -> Path:
    """Where pip puts packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def with_torch(folder: Path, release: str, pip_requirement: str) -> Path:
    """An environment with that torch and pip alone; made again when what it holds should change."""
    stamp = folder / "holds.txt"
    holds = f"{sys.version}\n{pip_requirement}\ntorch=={release}\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == holds:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip(folder, ["install", "-qq", pip_requirement])
    pip(folder, ["install", "-qq", f"torch=={release}"])
    stamp.write_text(holds, encoding="utf-8")
    return folder


def fresh(folder: Path, base: Path, requirements: Sequence[str]) -> Path:
    """A new environment with the packages of `base` and these."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    shutil.copytree(
        site_packages(base),
        site_packages(folder),
        copy_function=_link,
        symlinks=True,
        dirs_exist_ok=True,
    )
    if requirements:
        pip(folder, ["install", "-qq", *requirements])
    return folder
