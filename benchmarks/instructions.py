"""Instructions of a checkpointed step, counted by valgrind: repeatable on a busy machine.

``python benchmarks/instructions.py`` runs each workload of ``overhead.py`` in a process of its own
under callgrind, for the plain step, one forward, torch and ours, and prints

    O = I(checkpointed step) - I(plain step) - I(one forward with gradients)

in thousands of instructions. Needs valgrind; takes about five minutes. Instructions are not time:
a copy of 2.5 KB is one of them, and so is a load that misses the cache.
"""

from __future__ import annotations

import gc
import os
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


def count(place: int, variant: str, form: str) -> float:
    """Instructions of one step."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={Path(folder) / 'out'}", sys.executable, __file__]
        done = subprocess.run(
            [*command, str(place), variant, form], capture_output=True, text=True, check=False
        )
    found = [line.split() for line in done.stderr.splitlines() if "Collected :" in line]
    if done.returncode != 0 or not found or found[0][-1] == "0":
        raise SystemExit(f"valgrind counted nothing:\n{done.stderr}")
    return int(found[0][-1]) / STEPS[place]


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
        ("workload", "form", "plain step", "forward", "O torch", "O ours", "ours / torch"),
    )
    for place, workload in enumerate(workloads()):
        per = workload.divisor * 1e3
        plain, forward = (count(place, v, FORMS[0]) / per for v in VARIANTS[:2])
        for form in FORMS:
            theirs, ours = (count(place, v, form) / per - plain - forward for v in VARIANTS[2:])
            table.add(
                workload.name if form == FORMS[0] else f"  per {workload.per}",
                form,
                *(f"{figure:,.1f}" for figure in (plain, forward, theirs, ours)),
                f"{ours / theirs:.3f}",
            )
    Screen().table(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
