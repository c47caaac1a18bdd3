"""Prints the folder of cuda_runtime_api.h in the packages that a CUDA torch is installed with."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    spec = find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for root in roots:
        for header in sorted(Path(root).glob("*/include/cuda_runtime_api.h")):
            print(header.parent)
            return 0
    print(
        f"{sys.executable} has no cuda_runtime_api.h among its packages (looked in {roots}). "
        "Install the CUDA build of torch there, or pass -DCUDASIM_CUDA_INCLUDE=<folder>.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
