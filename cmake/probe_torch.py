"""Prints, as JSON, what CMake has to know of the torch that this interpreter imports."""

import json
import sys
from pathlib import Path


def main() -> int:
    try:
        import torch
    except ImportError as error:
        print(
            f"{sys.executable} cannot import torch ({error}). torch-reprise is compiled against "
            "the torch that is installed: install torch first, and pass --no-build-isolation to "
            "pip.",
            file=sys.stderr,
        )
        return 1
    root = Path(torch.__file__).resolve().parent
    found = {
        "version": str(torch.__version__),
        "cuda_repr": repr(torch.version.cuda),
        "python_tag": "cp{}{}{}".format(*sys.version_info[:2], sys.abiflags),
        "include": str(root / "include"),
        "lib": str(root / "lib"),
        "cxx11_abi": int(torch.compiled_with_cxx11_abi()),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
