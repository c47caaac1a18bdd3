"""Instructions of a checkpointed step, counted by valgrind: repeatable on a busy machine.

``python benchmarks/instructions.py`` runs each workload of ``overhead.py`` in a process of its own
under callgrind, for the plain step, one forward, torch and ours, and prints

    O = I(checkpointed step) - I(plain step) - I(one forward with gradients)

in thousands of instructions. Needs valgrind; takes about five minutes. Instructions are not time:
a copy of 2.5 KB is one of them, and so is a load that misses the cache.

The last column is the share of O, ours, that goes into taking and dropping the interpreter lock:
what CPython's functions for it execute, and what they call, in ours less in the plain step and
one forward.

``python benchmarks/instructions.py 2`` does the third workload alone.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# By workload: so many that switching the counter on and off, which is counted too, does not matter.
STEPS = (10, 200, 4)
VARIANTS = ("plain", "forward", "torch", "ours")
FORMS = ("non-reentrant", "reentrant")


def counted(place: int, variant: str, form: str) -> None:
    """Runs in the process that valgrind watches: warms up, then lets it count."""
    import torch

    from torch_reprise._bench._programs import implementations, plainly
    from torch_reprise._bench.overhead import workloads

    torch.set_num_threads(1)
    workload = workloads()[place]
    segment = implementations()[form].get(variant, plainly)

    def step() -> None:
        if variant == "forward":
            workload.forward()
        else:
            workload.step(segment)

    gc.disable()
    for _ in range(3):
        step()
    workload.drop_gradients()
    step()
    switch = ["callgrind_control", "-i", "on", str(os.getpid())]
    subprocess.run(switch, check=True, stdout=subprocess.DEVNULL)
    for _ in range(STEPS[place]):
        step()
    switch[2] = "off"
    subprocess.run(switch, check=True, stdout=subprocess.DEVNULL)


# What takes and drops the lock, with all that it calls; and what calls these, by itself.
LOCK = ("take_gil", "drop_gil")
AROUND = (
    "PyGILState_Ensure",
    "PyGILState_Release",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)


def in_functions(out: Path, names: tuple[str, ...], inclusive: bool) -> int:
    """Instructions of the functions in what callgrind wrote."""
    option = f"--inclusive={'yes' if inclusive else 'no'}"
    done = subprocess.run(
        ["callgrind_annotate", option, "--threshold=100", "--auto=no", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    total = 0
    for line in done.stdout.splitlines():
        match = re.match(r"\s*([\d,]+) \([^)]*\)\s+(\S+?):(\w+)(?: \[|$)", line)
        # The same function again under the name of a header is code of others inlined into it.
        if match and match[3] in names and (not inclusive or match[2].endswith("ceval_gil.h")):
            total += int(match[1].replace(",", ""))
    return total


def count(place: int, variant: str, form: str) -> tuple[float, float]:
    """Instructions of one step: all, and those for the interpreter lock."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={Path(folder) / 'out'}", sys.executable, __file__]
        done = subprocess.run(
            [*command, str(place), variant, form], capture_output=True, text=True, check=False
        )
        found = [line.split() for line in done.stderr.splitlines() if "Collected :" in line]
        if done.returncode != 0 or not found or found[0][-1] == "0":
            raise SystemExit(f"valgrind counted nothing:\n{done.stderr}")
        out = Path(folder) / "out"
        lock = in_functions(out, LOCK, True) + in_functions(out, AROUND, False)
    return int(found[0][-1]) / STEPS[place], lock / STEPS[place]


def main() -> int:
    if len(sys.argv) == 4:
        counted(int(sys.argv[1]), sys.argv[2], sys.argv[3])
        return 0
    if shutil.which("valgrind") is None:
        print("instructions: valgrind is needed here and not installed", file=sys.stderr)
        return 2
    from torch_reprise._bench._common import Screen, Table
    from torch_reprise._bench.overhead import workloads

    table = Table(
        "Thousands of instructions",
        (
            *("workload", "form", "plain step", "forward", "O torch", "O ours", "ours / torch"),
            "lock, of O ours",
        ),
    )
    chosen = [int(place) for place in sys.argv[1:]]
    for place, workload in enumerate(workloads()):
        if chosen and place not in chosen:
            continue
        per = workload.divisor * 1e3

        def counts(variant: str, form: str, place: int = place, per: float = per) -> list[float]:
            return [figure / per for figure in count(place, variant, form)]

        plain, forward = (counts(v, FORMS[0]) for v in VARIANTS[:2])
        base, base_lock = (p + f for p, f in zip(plain, forward, strict=True))
        for form in FORMS:
            (theirs, _), (ours, lock) = (counts(v, form) for v in VARIANTS[2:])
            theirs, ours, lock = theirs - base, ours - base, lock - base_lock
            table.add(
                workload.name if form == FORMS[0] else f"  per {workload.per}",
                form,
                *(f"{figure:,.1f}" for figure in (plain[0], forward[0], theirs, ours)),
                f"{ours / theirs:.3f}",
                f"{lock / ours:.1%}",
            )
    Screen().table(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
