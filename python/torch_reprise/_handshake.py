"""Refuses an extension module that was built for another torch, CUDA or Python.

The dynamic loader accepts such a module without a word and the process crashes later, or computes
with a wrong layout. So the package compares what the build wrote down (``_build_info.INFO``) with
the running process *before* it loads ``_C``. For that reason this file imports nothing of the
package and nothing of torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

__all__ = ["BuildInfo", "check", "running_python_tag"]


@dataclass(frozen=True)
class BuildInfo:
    """What the extension module was built with; CMake fills it in.

    ``torch_version`` has its local part (``"2.13.0+cpu"``), ``cuda_version`` is
    ``torch.version.cuda`` (None for a torch without CUDA), ``python_tag`` looks like ``"cp311"``.
    """

    version: str
    torch_version: str
    cuda_version: str | None
    python_tag: str
    compiler: str
    build_type: str
    cxx_flags: str


def running_python_tag() -> str:
    """The tag of this interpreter as wheels write it: ``"cp311"``, ``"cp313t"``."""
    return f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"


def check(info: BuildInfo, torch_version: str, cuda_version: str | None, python_tag: str) -> None:
    """Raises ImportError if the process is not the one that ``info`` was built for.

    The message names every difference, both versions of each, and the pip line that mends it. torch
    is compared whole: two builds of one release (``+cpu``, ``+cu130``) differ in the libraries that
    they bring.
    """
    compared = (
        # torch.__version__ is a str that compares as a version number; the characters are meant.
        ("torch", info.torch_version, str(torch_version)),
        ("CUDA", info.cuda_version or "none", cuda_version or "none"),
        ("Python", info.python_tag, python_tag),
    )
    differences = [
        f"  {name}: built for {built}, running {running}"
        for name, built, running in compared
        if built != running
    ]
    if not differences:
        return
    # --no-cache-dir: pip keeps the wheel that it built from the sdist, and does not know that it
    # fits one torch only.
    pip = "pip install --force-reinstall --no-cache-dir --no-build-isolation --no-deps"
    raise ImportError(
        f"torch-reprise {info.version} was built for another environment:\n"
        + "\n".join(differences)
        + f"\nBuild it again for this one:\n  {pip} torch-reprise\n"
        f"or, from a checkout:\n  {pip} .",
        name="torch_reprise",
    )
