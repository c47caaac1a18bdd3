"""Builds a wheel for each tested torch, from the sdist, checks it and tests it installed.

    python packaging/build_wheels.py [--torch 2.13.0] [--fresh] [--record build/ci]

For each torch of versions.toml:

1. an environment with that torch, cmake, ninja and scikit-build-core, and nothing of the checkout;
2. `pip wheel` of the unpacked sdist (check_sdist.py made it, and checked it);
3. label_wheel.py names it after its torch; check_wheel.py and `twine check` look at it;
4. a fresh environment with the torch, pytest and the wheel. pip has to be content with the torch
   that is there. The handshake, `info` and pip have to tell one version.
5. the tests that versions.toml lists for the step "wheel", copied out of the sdist into a folder
   of their own, so that no file of a checkout can be imported.

What is kept between two runs, in build/wheels: the environment with nothing but torch, and the
objects that ninja made, which it compiles again when a source or torch has changed. --fresh drops
both. The wheels come to dist/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import check_sdist
import check_wheel
import environments
from label_wheel import label_wheel
from manifest import ROOT, Torch, pinned, steps, tools, torches

WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"

ASK = """\
import importlib.metadata as metadata
import json
import os
import torch
import torch_reprise
from torch_reprise._build_info import INFO

print(json.dumps({
    "package": metadata.version("torch-reprise"),
    "version": torch_reprise.__version__,
    "torch": str(torch.__version__),
    "built with": INFO.torch_version,
    "folder": os.path.dirname(torch_reprise.__file__),
}))
"""


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def torch_distribution(environment: Path) -> str:
    program = "import importlib.metadata as m; print(m.version('torch'))"
    return environments.run(environment, ["-c", program], cwd=environment).split()[-1]


def build(release: str, source: Path, base: Path) -> Path:
    """The labelled wheel of the unpacked sdist."""
    say(f"torch {release}: building the wheel (minutes the first time)")
    environment = environments.fresh(WORK / release / "build-env", base, tools("build"))
    raw = WORK / release / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    objects = WORK / release / "objects"
    # In messages, torch's headers are torch/include/... and our files csrc/...
    hidden = (environments.site_packages(environment), source, objects)
    settings = {
        "build-dir": objects,
        "cmake.define.CMAKE_PROJECT_TOP_LEVEL_INCLUDES": source / "packaging" / "no_paths.cmake",
        "cmake.define.REPRISE_HIDDEN_PREFIXES": ";".join(str(prefix) for prefix in hidden),
    }
    environments.pip(
        environment,
        [
            *("wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", raw),
            *(f"--config-settings={name}={value}" for name, value in settings.items()),
            source,
        ],
    )
    (wheel,) = raw.glob("*.whl")
    return label_wheel(wheel, DIST, torch_distribution(base))


def check(wheel: Path) -> None:
    oldest = check_wheel.check(wheel, forbidden=(str(ROOT), tempfile.gettempdir() + "/"))
    needs = " and ".join(f"{library} {version}" for library, version in oldest.items())
    say(f"{wheel.name}: contents and metadata are fine; needs {needs}")


def twine(files: Sequence[Path], fresh: bool) -> None:
    environment = WORK / "tools-env"
    requirements = ROOT / "packaging" / "requirements.txt"
    stamp = environment / "holds.txt"
    holds = requirements.read_text(encoding="utf-8")
    if fresh or not stamp.is_file() or stamp.read_text(encoding="utf-8") != holds:
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        environments.pip(environment, ["install", "-qq", "-r", requirements])
        stamp.write_text(holds, encoding="utf-8")
    environments.run(environment, ["-m", "twine", "check", "--strict", *files], WORK)
    say(f"twine check: {len(files)} files are fine")


def install(release: str, wheel: Path, base: Path) -> Path:
    """A fresh environment with the wheel, which has agreed with the torch that was there."""
    environment = environments.fresh(WORK / release / "test-env", base, tools("test"))
    before = torch_distribution(environment)
    environments.pip(environment, ["install", "-qq", wheel])
    environments.pip(environment, ["check"])
    after = torch_distribution(environment)
    if before != after:
        raise SystemExit(f"pip put torch {after} in the place of {before} for {wheel.name}")
    with tempfile.TemporaryDirectory() as elsewhere:
        answer = environments.run(environment, ["-c", ASK], Path(elsewhere)).splitlines()[-1]
        info = environments.run(environment, ["-m", "torch_reprise", "info"], Path(elsewhere))
    told = json.loads(answer)
    version = wheel.name.split("-")[1]
    if not (told["package"] == told["version"] == version) or told["torch"] != told["built with"]:
        raise SystemExit(f"{wheel.name} installed tells {told}")
    if not Path(told["folder"]).is_relative_to(environment):
        raise SystemExit(f"{wheel.name} is installed, imported is {told['folder']}")
    if f"torch-reprise  {version}\n" not in info:
        raise SystemExit(f"`python -m torch_reprise info` does not say {version}:\n{info}")
    print(info.rstrip(), flush=True)
    return environment


def test(release: str, environment: Path, source: Path, record: Path | None) -> None:
    paths = steps()["wheel"].paths
    say(f"torch {release}: testing the installed wheel")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(source / "tests", folder / "tests")
        shutil.copy(source / "pyproject.toml", folder)
        shutil.copy(ROOT / "packaging" / "ci_record.py", folder)
        written = folder / "record.json"
        command = ["-m", "pytest", "-q", "-p", "ci_record", "--record", written, *paths]
        started = time.monotonic()
        printed = environments.run(environment, command, folder)
        print(printed.splitlines()[-1], flush=True)
        say(f"torch {release}: tested in {time.monotonic() - started:.0f} s")
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
            shutil.copy(written, record / f"wheel-{release}.json")


def wanted(release: str | None) -> list[Torch]:
    known = torches()
    chosen = [torch for torch in known if release in (None, torch.release)]
    if not chosen:
        names = ", ".join(torch.release for torch in known)
        raise SystemExit(f"no torch {release} in packaging/versions.toml; there are {names}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, check and test the wheels.")
    parser.add_argument("--torch", metavar="RELEASE", help="only this one of versions.toml")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run")
    parser.add_argument("--record", type=Path, help="a folder for the records of the tests")
    options = parser.parse_args(arguments)
    chosen = wanted(options.torch)
    (pip_requirement,) = pinned(ROOT / "requirements" / "dev.txt")["pip"]
    if options.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    say("sdist")
    sdist = check_sdist.checked(DIST)
    source = WORK / "source"
    check_sdist.unpack_changed(sdist, source)
    made = []
    for torch in chosen:
        release = torch.release
        say(f"torch {release}: environment")
        base = environments.with_torch(WORK / release / "torch", release, pip_requirement)
        wheel = build(release, source, base)
        check(wheel)
        test(release, install(release, wheel, base), source, options.record)
        made.append(wheel)
    twine([sdist, *made], options.fresh)
    for wheel in made:
        say(f"{wheel.relative_to(ROOT)} ({wheel.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
