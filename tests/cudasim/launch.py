"""Runs Python under the simulated CUDA.

    python tests/cudasim/launch.py                              the tests of this folder
    python tests/cudasim/launch.py -m pytest tests -k rng       anything else
    python tests/cudasim/launch.py --libraries DIR program.py   libraries built elsewhere

Everything after the launcher's own option goes to the interpreter that runs the launcher, which
has to be the one with the CUDA build of torch. The loader reads LD_PRELOAD when a process starts,
so this cannot be done from inside pytest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARIES = ROOT / "build" / "cudasim" / "lib"


def joined(first: str, rest: str | None) -> str:
    return f"{first}:{rest}" if rest else first


def environment(libraries: Path) -> dict[str, str]:
    """This process's environment with the simulation in it; SystemExit if that cannot be."""
    preloaded = libraries / "libcudasim.so"
    for library in (preloaded, libraries / "libcuda.so.1"):
        # The loader would only print a line about it, and torch would see no device.
        if not library.is_file():
            raise SystemExit(
                f"{library} is missing. Build the simulation:\n"
                f"  cmake -S {HERE} -B {libraries.parent} -DPython_EXECUTABLE={sys.executable}\n"
                f"  cmake --build {libraries.parent}"
            )
    if any(mark in str(libraries) for mark in " :"):
        raise SystemExit(
            f"{libraries}: the loader takes no path with a space or a colon in LD_PRELOAD. "
            "Build the simulation elsewhere and name that folder with --libraries."
        )
    variables = dict(os.environ)
    variables["LD_PRELOAD"] = joined(str(preloaded), variables.get("LD_PRELOAD"))
    variables["LD_LIBRARY_PATH"] = joined(str(libraries), variables.get("LD_LIBRARY_PATH"))
    # torch counts devices by it before it asks the runtime, and it speaks of real ones.
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    return variables


def main(arguments: list[str]) -> None:
    # argparse would take options that are meant for the interpreter.
    libraries = LIBRARIES
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if arguments[:1] == ["--libraries"]:
        if len(arguments) < 2:
            raise SystemExit("--libraries needs the folder of libcudasim.so and libcuda.so.1")
        libraries = Path(arguments[1]).resolve()
        arguments = arguments[2:]
    command = [sys.executable, *(arguments or ["-m", "pytest", str(HERE)])]
    os.execve(sys.executable, command, environment(libraries))


if __name__ == "__main__":
    main(sys.argv[1:])
