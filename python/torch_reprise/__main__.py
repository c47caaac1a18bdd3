"""``python -m torch_reprise info | run PROGRAM | demo | bench NAME | bench all``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import platform
import sys
from collections.abc import Sequence

import torch

from torch_reprise._build_info import INFO
from torch_reprise._C import HAS_CUDA_KERNELS

# What the extra "demo" installs: needed by the commands, not by the library.
_OPTIONAL = ("matplotlib", "rich")


def _devices() -> list[str]:
    """One line for the CPU and one for each device of the accelerator that torch sees."""
    lines = [f"cpu ({torch.get_num_threads()} threads)"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            line = f"{accelerator.type}:{index}"
            # Not every backend names its devices.
            if hasattr(module, "get_device_name"):
                line += f" ({module.get_device_name(index)})"
            lines.append(line)
    return lines


def info() -> None:
    """Prints what was built, what is running and which devices torch sees."""
    system = f"{platform.system()} {platform.machine()}"
    rows = [
        ("torch-reprise", INFO.version),
        ("torch", str(torch.__version__)),
        ("CUDA", torch.version.cuda or "none (torch without CUDA)"),
        ("Python", f"{platform.python_version()} ({INFO.python_tag}), {system}"),
        ("built with", f"{INFO.compiler}, {INFO.build_type}"),
        ("flags", INFO.cxx_flags or "none"),
        ("CUDA kernels", "compiled" if HAS_CUDA_KERNELS else "none"),
    ]
    rows += [("devices" if n == 0 else "", line) for n, line in enumerate(_devices())]
    for name, value in rows:
        print(f"{name:<15}{value}")


def _benchmarks() -> list[str]:
    try:
        package = importlib.import_module("torch_reprise._bench")
    except ModuleNotFoundError as error:
        if error.name != "torch_reprise._bench":
            raise
        return []
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def _run(module: str, argv: Sequence[str]) -> int:
    """Calls ``main(argv)`` of a module that needs the optional dependencies."""
    try:
        return importlib.import_module(module).main(list(argv)) or 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        print(
            f"This command needs {missing}, which is not installed: "
            "pip install 'torch-reprise[demo]'",
            file=sys.stderr,
        )
        return 2


def _run_all(names: Sequence[str], argv: Sequence[str]) -> int:
    """Runs the benchmarks one after another; the exit status is the largest of theirs."""
    status = 0
    for name in names:
        print(f"== {name}", flush=True)
        status = max(status, _run(f"torch_reprise._bench.{name}", argv))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_reprise", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build flags and devices", allow_abbrev=False)
    commands.add_parser(
        "run",
        help="run a program with torch_reprise in the place of torch.utils.checkpoint",
        add_help=False,
        allow_abbrev=False,
    )
    # Options behind these and "bench NAME", --help among them, belong to the module that runs.
    commands.add_parser(
        "demo",
        help="train a small GPT plain and checkpointed, and compare the bits",
        add_help=False,
        allow_abbrev=False,
    )
    bench = commands.add_parser(
        "bench", help="run a benchmark, or all of them", add_help=False, allow_abbrev=False
    )
    bench.add_argument("name")
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["run"]:
        # All that follows is the program's, "--" and what looks like an option of ours included.
        from ._run import main as run_program

        return run_program(given[1:])
    arguments, rest = parser.parse_known_args(given)
    if arguments.command == "demo":
        return _run("torch_reprise._demo.run", rest)
    if arguments.command == "bench":
        known = _benchmarks()
        if arguments.name == "all":
            if rest not in ([], ["--quick"]):
                parser.error("bench all takes no option but --quick; the others go behind a name")
            return _run_all(known, rest)
        if arguments.name not in known:
            parser.error(
                f"no benchmark {arguments.name!r}; there are: {', '.join(known) or 'none'}, all"
            )
        return _run(f"torch_reprise._bench.{arguments.name}", rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
