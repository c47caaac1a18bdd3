"""What checkpointing keeps in memory, beside ``torch.utils.checkpoint``.

``python benchmarks/memory.py [--rounds N] [--quick] [--csv FILE] [--plot FILE | --no-plot]``

* resident: thousands of live segments, each 8 x (matmul, tanh) on 4x4 (24 saved tensors), with
  their graphs. The growth of the process's resident memory, divided by the segments: whatever they
  are made of, tensors, Python objects, C++ objects, counts. Every measurement has a process of its
  own. The first fifth of the segments is made before the first reading and stays, so that what the
  first ones cost once does not count; before each reading garbage is collected and the allocator
  returns what is free (``malloc_trim``). Linux with glibc only.
* random: bytes that a live segment keeps of random states, for segments that draw and that do not.
  Ours as the ledger counts them, torch's as the state tensors that the garbage collector sees.
* GPT step: bytes of tensors over one step of a GPT: alive when the backward begins (held), and most
  of all at any moment (peak). From every allocation and free of the CPU allocator as torch's
  profiler sees them, see ``_demo.run``. With as many bytes as tensors have, peak resident memory is
  too coarse for this.
* freed: one segment of layers; how many of their recomputed results are alive each time that the
  gradient gets to the next layer. A tensor that is freed at its unpack is gone by then.

The exit status is 1 if something of ours does not hold: more bytes held or at the peak of a GPT
step than torch's, bytes kept for randomness where nothing was drawn, a tensor freed later than in
a plain run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from .._demo.model import GPT, GPTConfig
from .._demo.run import MemoryTrace
from . import _child
from ._command import Command, Options, Report, require_equal_gradients
from ._common import Screen, Summary, Table, collector_off, cores, short
from ._programs import (
    FORMS,
    PLAIN,
    Functions,
    Segment,
    check,
    gpt_trace,
    implementations,
    matmul_tanh,
    random_bytes,
    variants,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("measurement", "program", "form", "implementation", "quantity", "value", "unit")
COMMAND = Command(
    "memory",
    "Memory that segments keep: resident bytes, random states, tensors of a GPT step.",
    rounds=3,
    least=3,
    quick_rounds=1,
)


# --------------------------------------------------------------------------------------------------
# Resident bytes
# --------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Resident memory of this process once everything free has been returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def can_read_resident_bytes() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def grow(tell: _child.Tell, label: str, segments: int) -> float:
    """In a process of its own: bytes that one more live segment of ``label`` takes."""
    torch.set_num_threads(1)
    segment = variants(implementations())[label]
    workload = matmul_tanh()
    workload.step(segment)  # what a first call and a first backward load stays out of it
    alive = [workload.forward(segment) for _ in range(segments // 5)]
    before = resident_bytes()
    alive += [workload.forward(segment) for _ in range(segments)]
    return (resident_bytes() - before) / segments


# --------------------------------------------------------------------------------------------------
# Random states
# --------------------------------------------------------------------------------------------------


def draws(value: Tensor) -> Tensor:
    return F.dropout(value.sin(), 0.5)


RANDOM_PROGRAMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "draws": draws,
    "draws nothing": torch.tanh,
}


# --------------------------------------------------------------------------------------------------
# One step of a GPT
# --------------------------------------------------------------------------------------------------


def gpt_traces(functions: Functions, quick: bool) -> tuple[str, dict[str, MemoryTrace]]:
    """The name of the program, and what each variant does."""
    layers, width, batch, length = (2, 32, 1, 16) if quick else (6, 256, 4, 64)
    model = GPT(GPTConfig(layers, width, max(1, width // 64), length, 128, 0.1))
    inputs = torch.randint(128, (batch, length))
    targets = torch.randint(128, (batch, length))
    name = f"GPT, {layers} blocks, width {width}, batch {batch}x{length}"
    return name, {
        label: gpt_trace(model, segment, inputs, targets)
        for label, segment in variants(functions).items()
    }


# --------------------------------------------------------------------------------------------------
# Freed at its unpack
# --------------------------------------------------------------------------------------------------


def alive_in_backward(segment: Segment, layers: int = 6) -> list[int]:
    """How many of the layers' results are alive as the gradient gets to each of the layers."""
    expired: Callable[[StorageWeakRef], bool] = StorageWeakRef.expired
    results: list[StorageWeakRef] = []
    counts: list[int] = []

    def count(gradient: Tensor) -> None:
        counts.append(sum(not expired(result) for result in results))

    def function(value: Tensor) -> Tensor:
        for _ in range(layers):
            value = torch.tanh(value)
            results.append(StorageWeakRef(value.untyped_storage()))  # type: ignore[no-untyped-call]
            if value.requires_grad:  # not in the first forward of the reentrant form
                value.register_hook(count)  # type: ignore[no-untyped-call]
        return value.cos()

    with collector_off():  # only reference counts may free anything here
        torch.autograd.backward(segment(function, torch.ones(16, requires_grad=True)).sum())
    return counts


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Everything by variant, which is ``"plain"`` or ``"name, form"``.

    Attributes:
        resident: bytes for a segment, one value for each process; empty where it cannot be read.
        random: by program of ``RANDOM_PROGRAMS``, bytes for a segment.
        gpt: over one step of the program called ``gpt_name``.
        alive: live results as the backward passes through the layers.
    """

    gpt_name: str
    gpt: dict[str, MemoryTrace]
    alive: dict[str, list[int]]
    random: dict[str, dict[str, float]]
    resident: dict[str, list[float]] = field(default_factory=dict)


def measure_resident(
    screen: Screen, options: Options, labels: Sequence[str]
) -> dict[str, list[float]]:
    """One value for each variant and round, each from a new process.

    Nothing is timed, so that there may be several at once.
    """
    if not can_read_resident_bytes():
        screen.line("resident bytes: left out, they are read on Linux with glibc only")
        return {}
    segments = 300 if options.quick else 5000
    found: dict[str, list[float]] = {label: [] for label in labels}
    with (
        screen.progress("processes", options.rounds * len(labels)) as bar,
        ThreadPoolExecutor(min(4, cores())) as pool,
    ):
        asked = {
            pool.submit(
                _child.call, __name__, "grow", {"label": label, "segments": segments}
            ): label
            for _ in range(options.rounds)
            for label in labels
        }
        for done in as_completed(asked):
            found[asked[done]].append(done.result())
            bar.step(asked[done])
    return found


def failures(found: Found) -> list[str]:
    """What of ours is not as it has to be, in sentences."""
    said = []
    for form in FORMS:
        theirs, ours = f"torch, {form}", f"ours, {form}"
        for quantity in ("held", "peak"):
            their, our = (getattr(found.gpt[label], quantity) for label in (theirs, ours))
            if our > their:
                said.append(f"GPT step, {form}: {quantity} is {our - their:,} bytes above torch's")
        if found.random["draws nothing"][ours]:
            said.append(f"{ours}: a segment that draws nothing keeps a random state")
        if not freed_in_time(found, ours):
            said.append(f"{ours}: a recomputed tensor is freed later than in a plain run")
    return said


def freed_in_time(found: Found, label: str) -> bool:
    alive, plain = found.alive[label], found.alive[PLAIN]
    return len(alive) == len(plain) and all(a <= b for a, b in zip(alive, plain, strict=True))


def lines(found: Found) -> list[list[object]]:
    """The CSV, in the order of ``COLUMNS``."""
    written: list[list[object]] = []

    def add(measurement: str, program: str, label: str, quantity: str, value: float) -> None:
        name, _, form = label.partition(", ")
        unit = "tensors" if measurement == "freed" else "bytes"
        written.append([measurement, program, form, name, quantity, value, unit])

    for label, values in found.resident.items():
        for statistic in ("min", "median"):
            value = getattr(Summary.of(values), statistic)
            add("resident", "8 x (matmul, tanh) 4x4", label, f"per segment, {statistic}", value)
    for program, by_variant in found.random.items():
        for label, value in by_variant.items():
            add("random", program, label, "per segment", value)
    for label, trace in found.gpt.items():
        add("gpt step", found.gpt_name, label, "held", trace.held)
        add("gpt step", found.gpt_name, label, "peak", trace.peak)
    for label, alive in found.alive.items():
        for layer, count in enumerate(alive):
            add(
                "freed",
                f"{len(alive)} x tanh",
                label,
                f"alive at layer {len(alive) - layer}",
                count,
            )
    return written


def quotient(found: Mapping[str, float], form: str) -> float | None:
    """Ours / torch's, if both were measured."""
    theirs, ours = found.get(f"torch, {form}"), found.get(f"ours, {form}")
    return ours / theirs if theirs and ours is not None else None


def table(found: Found) -> list[Table]:
    """One table of bytes, one of what is alive in backward."""
    bytes_table = Table(
        "Bytes",
        ("", PLAIN, "form", "torch", "ours", "ours / torch"),
        caption=(
            "Resident: growth of the process for one live segment of 8 x (matmul, tanh) 4x4,\n"
            "its graph included. Random states: what one live segment keeps of them. GPT step:\n"
            f"tensors of one forward and backward, {found.gpt_name}."
        ),
    )

    def add(name: str, values: Mapping[str, float], form: Callable[[float], str]) -> None:
        cells = {label: form(value) for label, value in values.items()}
        for number, kind in enumerate(FORMS):
            bytes_table.add(
                "" if number else name,
                "" if number else cells.get(PLAIN, "-"),
                kind,
                cells.get(f"torch, {kind}", "-"),
                cells.get(f"ours, {kind}", "-"),
                short(quotient(values, kind)),
            )

    if found.resident:
        minima = {label: min(values) for label, values in found.resident.items()}
        add("resident, a segment", minima, kib)
    for program, by_variant in found.random.items():
        add(f"random states, {program}", by_variant, lambda value: f"{value:,.0f} B")
    for quantity, name in (("held", "held for backward"), ("peak", "peak")):
        values = {label: getattr(trace, quantity) for label, trace in found.gpt.items()}
        add(f"GPT step, {name}", values, mib)
    alive_table = Table(
        "Results of 6 layers that are alive as the backward gets to each of them",
        ("", *(f"layer {layer}" for layer in range(6, 0, -1)), "freed at its unpack"),
    )
    for label, alive in found.alive.items():
        verdict = "-" if label == PLAIN else "yes" if freed_in_time(found, label) else "no"
        alive_table.add(label, *map(str, alive), verdict)
    return [bytes_table, alive_table]


def kib(count: float) -> str:
    return f"{count / 2**10:.1f} KiB"


def mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def draw(found: Found, figure: Figure) -> None:
    """Bars: resident bytes and random states of a segment, tensors of a GPT step."""
    from ._plot import bars

    figure.set_size_inches(13.5, 4.8)
    resident, random, gpt = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    labels = list(found.gpt)
    if found.resident:
        minima = {label: [min(values) / 2**10] for label, values in found.resident.items()}
        bars(resident, ["8 x (matmul, tanh) 4x4"], minima, "{:.1f}".format)
    resident.set_title("Resident memory of a segment (KiB)")
    by_label = {
        label: [by_variant[label] for by_variant in found.random.values()] for label in labels[1:]
    }
    bars(random, list(found.random), by_label, "{:,.0f}".format)
    random.set_title("Random states of a segment (bytes)")
    steps = {label: [trace.held / 2**20, trace.peak / 2**20] for label, trace in found.gpt.items()}
    bars(gpt, ["held for backward", "peak"], steps, short)
    gpt.set_title("Tensors of a GPT step (MiB)")
    gpt.set_xlabel(found.gpt_name.removeprefix("GPT, "))
    for axes in (resident, random, gpt):
        axes.margins(y=0.12)
    handles, names = gpt.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))


def run(screen: Screen, options: Options, functions: Functions) -> Report:
    """Checks, then measures everything; the resident bytes last, for they take longest."""
    workload = matmul_tanh()
    require_equal_gradients(check(workload, functions))
    chosen = variants(functions)
    gpt_name, traces = gpt_traces(functions, options.quick)
    value = torch.ones(16, requires_grad=True)
    found = Found(
        gpt_name,
        traces,
        {label: alive_in_backward(segment) for label, segment in chosen.items()},
        {
            program: {
                label: random_bytes(partial(segment, function, value)).each
                for label, segment in chosen.items()
                if label != PLAIN
            }
            for program, function in RANDOM_PROGRAMS.items()
        },
    )
    # A process takes as long to start as to measure: fewer of them to see that it works.
    second = f", {FORMS[1]}"
    labels = [label for label in chosen if not (options.quick and label.endswith(second))]
    found.resident = measure_resident(screen, options, labels)
    return Report(
        table(found),
        COLUMNS,
        lines(found),
        failures=failures(found),
        draw=partial(draw, found),
    )


def main(argv: Sequence[str] | None = None, functions: Functions | None = None) -> int:
    """Runs the benchmark: arguments and result as those of ``overhead.main``."""
    return COMMAND.run(argv, partial(run, functions=functions or implementations()))
