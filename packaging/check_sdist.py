"""Builds the sdist and checks that it is all that a build needs, and nothing that git ignores.

    python packaging/check_sdist.py [--dist dist]

Compared with git: every tracked file of what is built and read has to be in it, and no file that
git does not know. A file that is not ignored and not added yet is named, not refused, so that one
can build in the middle of work; in CI's clone there are none. Then CMake configures the unpacked
sdist in a folder away from the checkout. The compile is that of `make wheels`, which builds from
the sdist and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from manifest import ROOT, project

# What a build, its tests and its readers need. The rest of a checkout may be in it.
NEEDED_FOLDERS = ("cmake", "csrc", "docs", "packaging", "python", "requirements", "tests")
NEEDED_FILES = ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml")
# pyproject.toml leaves these out: they are about this checkout.
LEFT_OUT = (".ci/", ".github/")


def _git_files(*options: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {name for name in listed.stdout.split("\0") if name}
    return {name for name in names if (ROOT / name).is_file()}  # deleted ones are not missed


def build(folder: Path) -> Path:
    """The sdist, made by the build backend."""
    folder.mkdir(parents=True, exist_ok=True)
    program = (
        "import sys; from scikit_build_core.build import build_sdist; "
        "print(build_sdist(sys.argv[1]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", program, folder.resolve()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise SystemExit(f"the sdist was not built:\n{made.stdout}{made.stderr}")
    return folder / made.stdout.split()[-1]


def names_in(sdist: Path) -> set[str]:
    root = f"{sdist.name.removesuffix('.tar.gz')}/"
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    outside = [member.name for member in members if not member.name.startswith(root)]
    if outside:
        raise SystemExit(f"{sdist.name} has files outside of {root}: {outside}")
    return {member.name.removeprefix(root) for member in members if member.isfile()}


def problems(names: set[str], tracked: set[str], others: set[str]) -> list[str]:
    """What is wrong with an sdist of these files, given what git tracks and does not ignore."""
    wanted = {
        name for name in tracked if name in NEEDED_FILES or name.partition("/")[0] in NEEDED_FOLDERS
    }
    found = [f"missing: {name}" for name in sorted(wanted - names)]
    found += [f"missing: {name}" for name in NEEDED_FILES if name not in tracked | names]
    unknown = names - tracked - others - {"PKG-INFO"}
    found += [f"not in git: {name}" for name in sorted(unknown)]
    found += [f"does not belong: {name}" for name in sorted(names) if name.startswith(LEFT_OUT)]
    return found


def unpack_changed(sdist: Path, folder: Path) -> None:
    """Makes `folder` what is in the sdist and touches only the files that differ.

    An sdist gives every file the same time, whatever is in it: a build folder that is used again
    would not compile what changed.
    """
    root = f"{sdist.name.removesuffix('.tar.gz')}/"
    kept = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            if not member.isfile():
                continue
            name = member.name.removeprefix(root)
            if name == member.name or ".." in Path(name).parts:
                raise SystemExit(f"{sdist.name} has a file outside of {root}: {member.name}")
            stream = archive.extractfile(member)
            assert stream is not None
            content = stream.read()
            path = folder / name
            kept.add(path)
            if path.is_file() and path.read_bytes() == content:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def configure(sdist: Path) -> None:
    """CMake has to find all that it reads inside of the sdist."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if cmake is None:
        raise SystemExit("no cmake beside this Python: make build installs it")
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "build")
        unpack_changed(sdist, source)
        command = [cmake, "-S", source, "-B", target, "--log-level=WARNING"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", "-DREPRISE_NATIVE_TESTS=ON"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise SystemExit(f"CMake does not configure the sdist:\n{made.stdout}{made.stderr}")


def checked(folder: Path) -> Path:
    """The sdist, built into `folder`; SystemExit if its contents are not right."""
    sdist = build(folder)
    expected = f"{project()['name'].replace('-', '_')}-{project()['version']}.tar.gz"
    if sdist.name != expected:
        raise SystemExit(f"the sdist is called {sdist.name}, expected {expected}")
    names = names_in(sdist)
    others = _git_files("--others", "--exclude-standard")
    found = problems(names, _git_files("--cached"), others)
    if found:
        raise SystemExit("\n".join([f"{sdist.name}:", *found]))
    for name in sorted(names & others):
        print(f"not added to git yet: {name}")
    print(f"{sdist.name}: {len(names)} files, nothing missing", flush=True)
    return sdist


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the sdist and check it.")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    configure(checked(parser.parse_args(arguments).dist))
    print("CMake configures it away from the checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
