"""Trains one small GPT four times from one seed and compares the runs bit for bit.

``python -m torch_reprise demo [--steps N] [--out demo.png]``

The reference run uses no checkpointing; the others call every block through a checkpoint function.
All runs take turns, one step each, in rotating order, so that a machine that is slow for a while is
slow for all of them. Each run owns its network, its optimizer and its random state, which is put in
before and taken out after every step.

What is compared, by value and by bytes: the loss and the random state after every step, and all
gradients and parameters after the last one. The exit status is 0 only if all of it is equal.

How the memory is measured: one step that is not part of the training runs under torch's profiler,
which sees every allocation and every free of the CPU allocator. That is the same for all runs and
touches neither saved-tensor hooks nor dispatch. What a library keeps outside of tensors is not
seen; for random states that is a few kilobytes a block.

How the bookkeeping is measured: as in ``benchmarks/overhead.py``, on the trained network, with one
short input on one thread. There the arithmetic is small, and what checkpointing adds on top of it,
which does not grow with the tensors, is not lost in the noise of large multiplications.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .._bench._common import Screen, Table, measure_overheads, missing, torch_threads
from . import data, plot
from .model import GPT, BlockCall, GPTConfig, call_plainly

# A checkpoint function is called as ``function(block, hidden)``; None runs the block plainly.
Checkpoint = Callable[..., Tensor]
Implementations = Mapping[str, Checkpoint | None]

PLAIN = "no checkpointing"
OURS = "torch_reprise"

_FORWARD = "reprise.demo.forward"
_BACKWARD = "reprise.demo.backward"


def implementations() -> Implementations:
    """The runs of the demo. Exactly one is None: the reference that the others must equal."""
    import torch.utils.checkpoint

    import torch_reprise

    return {
        PLAIN: None,
        "torch.utils.checkpoint": partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
        OURS: partial(torch_reprise.checkpoint, use_reentrant=False),
        f"{OURS}, reentrant": partial(torch_reprise.checkpoint, use_reentrant=True),
    }


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryTrace:
    """Live tensor bytes over one forward and backward, counted from the start of the forward.

    Attributes:
        forward: bytes alive after each allocation or free of the forward, in their order.
        backward: the same for the backward.
    """

    forward: list[int]
    backward: list[int]

    @property
    def held(self) -> int:
        """Bytes alive when the backward begins: what the forward keeps for it."""
        return self.forward[-1]

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment; in the backward, gradients are among them."""
        return max(self.forward + self.backward)


@dataclass
class Run:
    """One training run and what was noted about it, one entry a step."""

    name: str
    checkpoint: Checkpoint | None
    model: GPT
    optimizer: torch.optim.Optimizer
    random_state: Tensor
    losses: list[Tensor] = field(default_factory=list)
    random_states: list[Tensor] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    memory: MemoryTrace | None = None

    @property
    def call(self) -> BlockCall:
        return call_plainly if self.checkpoint is None else self.checkpoint

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of training, with this run's random state in place of the global one."""
        torch.set_rng_state(self.random_state)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.model.run_blocks(self.model.embed(inputs), self.call)
        loss = self.model.loss(hidden, targets)
        torch.autograd.backward(loss)
        self.optimizer.step()
        end = time.perf_counter()
        self.random_state = torch.get_rng_state()
        self.random_states.append(self.random_state)
        self.losses.append(loss.detach())
        self.step_s.append(end - start)

    def measure_memory(self, inputs: Tensor, targets: Tensor) -> None:
        """Runs one forward and backward under the profiler. Gradients are dropped before."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(self.random_state)
        with (
            _quiet_profiler(),
            profile(
                activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profiler,
        ):
            with record_function(_FORWARD):
                hidden = self.model.run_blocks(self.model.embed(inputs), self.call)
                loss = self.model.loss(hidden, targets)
                del hidden
            with record_function(_BACKWARD):
                torch.autograd.backward(loss)
        self.memory = _memory_trace(profiler)


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's native library from writing its start and stop to stderr."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _memory_trace(profiler: profile) -> MemoryTrace:
    """Adds up the allocator's events in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = {event["name"]: event for event in events if event.get("name") in (_FORWARD, _BACKWARD)}
    begin, backward = spans[_FORWARD]["ts"], spans[_BACKWARD]["ts"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["ts"] >= begin
    )
    trace, total = MemoryTrace([0], []), 0
    for when, size in changes:
        total += size
        (trace.forward if when < backward else trace.backward).append(total)
    return trace


# --------------------------------------------------------------------------------------------------
# All runs
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What of a run equals the reference run, and where the first differences are."""

    losses: bool
    gradients: bool
    parameters: bool
    random_state: bool
    differences: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.losses and self.gradients and self.parameters and self.random_state


@dataclass(frozen=True)
class Report:
    """All runs, and by name what was found about them.

    Attributes:
        reference: the run without checkpointing.
        runs: all runs in order, the reference among them.
        verdicts: of the checkpointed runs.
        step_ms: median time of a training step.
        bookkeeping_us: of the checkpointed runs, for one block, once it has been measured.
    """

    reference: Run
    runs: list[Run]
    verdicts: dict[str, Verdict]
    step_ms: dict[str, float]
    bookkeeping_us: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return all(verdict.exact for verdict in self.verdicts.values())


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo, see ``--help``."""

    steps: int
    batch: int
    context: int
    layers: int
    width: int
    heads: int
    dropout: float
    seed: int


def train(
    settings: Settings,
    functions: Implementations,
    on_step: Callable[[float], object] = lambda loss: None,
) -> Report:
    """Trains one run for each entry of ``functions`` and compares them with the one that is None.

    The caller's random state is as before afterwards.
    """
    references = [name for name, function in functions.items() if function is None]
    if len(references) != 1:
        raise ValueError(f"exactly one implementation must be None, got {len(references)}")
    corpus = data.load()
    config = GPTConfig(
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        context=settings.context,
        vocabulary=len(corpus.alphabet),
        dropout=settings.dropout,
    )
    batches = corpus.batches(settings.steps, settings.batch, settings.context, settings.seed)
    with torch.random.fork_rng(devices=[]):
        runs = [_new_run(name, fn, config, settings.seed) for name, fn in functions.items()]
        for number, (inputs, targets) in enumerate(batches):
            shift = number % len(runs)
            for run in runs[shift:] + runs[:shift]:
                run.step(inputs, targets)
            on_step(float(runs[0].losses[-1]))
        reference = next(run for run in runs if run.checkpoint is None)
        verdicts = {run.name: _compare(run, reference) for run in runs if run is not reference}
        for run in runs:  # only now: it replaces the gradients that were compared
            run.measure_memory(*batches[-1])
    first = min(5, settings.steps // 4)  # the first steps warm up
    step_ms = {run.name: 1e3 * statistics.median(run.step_s[first:]) for run in runs}
    return Report(reference, runs, verdicts, step_ms)


def _new_run(name: str, function: Checkpoint | None, config: GPTConfig, seed: int) -> Run:
    torch.manual_seed(seed)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return Run(name, function, model, optimizer, torch.get_rng_state())


def _compare(run: Run, reference: Run) -> Verdict:
    differences: list[str] = []

    def series(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
        wrong = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if not _same(*pair)]
        if wrong:
            differences.append(
                f"{what} differs in {len(wrong)} of {len(ours)} steps, first in {wrong[0] + 1}"
            )
        return not wrong

    def tensors(what: str, pick: Callable[[nn.Parameter], Tensor | None]) -> bool:
        theirs = dict(reference.model.named_parameters())
        wrong = [
            name
            for name, parameter in run.model.named_parameters()
            if not _same(pick(parameter), pick(theirs[name]))
        ]
        if wrong:
            differences.append(
                f"{what} differ in {len(wrong)} of {len(theirs)} tensors, first in {wrong[0]}"
            )
        return not wrong

    return Verdict(
        losses=series("loss", run.losses, reference.losses),
        gradients=tensors("gradients", lambda parameter: parameter.grad),
        parameters=tensors("parameters", lambda parameter: parameter),
        random_state=series("random state", run.random_states, reference.random_states),
        differences=tuple(differences),
    )


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Equal values and equal bytes: 0.0 is not -0.0, and NaN is equal to nothing.

    A missing gradient is equal to nothing either: every parameter of the network has to have one.
    """
    if ours is None or theirs is None or not torch.equal(ours, theirs):
        return False
    with torch.no_grad():
        bytes_ours, bytes_theirs = (t.reshape(-1).view(torch.uint8) for t in (ours, theirs))
        return torch.equal(bytes_ours, bytes_theirs)


def measure_bookkeeping(report: Report) -> dict[str, float]:
    """Microseconds that each checkpoint function adds to one block, see the head of the file.

    Of the times of 15 rounds the minimum counts: it is what a busy machine disturbs least.
    """
    model = report.reference.model
    context = min(16, model.config.context)

    def step(call: BlockCall) -> None:
        torch.autograd.backward(model.run_blocks(hidden, call).sum())

    with torch_threads(1), torch.random.fork_rng(devices=[]):
        hidden = torch.randn(1, context, model.config.width, requires_grad=True)
        result = measure_overheads(
            partial(step, call_plainly),
            partial(model.run_blocks, hidden),
            {run.name: partial(step, run.call) for run in report.runs if run.checkpoint},
            rounds=15,
            target_s=0.01,
        )
    return {name: 1e6 * result.of(name).min / len(model.blocks) for name in result.steps}


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def exactness_table(report: Report) -> Table:
    """What is equal to the reference run, bit for bit."""
    table = Table(
        "Equal to the run without checkpointing, bit for bit?",
        ("run", "final loss", "every loss", "gradients", "parameters", "random state"),
    )
    for run in report.runs:
        loss = f"{float(run.losses[-1]):.6f}"
        if run is report.reference:
            table.add(run.name, loss, *["reference"] * 4)
        else:
            verdict = report.verdicts[run.name]
            parts = (verdict.losses, verdict.gradients, verdict.parameters, verdict.random_state)
            table.add(run.name, loss, *("equal" if part else "differs" for part in parts))
    return table


def cost_table(report: Report) -> Table:
    """Time and memory of one step, bookkeeping of one block."""
    table = Table(
        "What it costs",
        ("run", "time per step", "held for backward", "peak in a step", "bookkeeping"),
        caption=(
            "Time: median of the training steps. Memory: tensor bytes that the forward and\n"
            "backward of one step add. Bookkeeping: (step - step without checkpointing - one\n"
            "forward) for one block, on an input of 16 characters, minimum of 15 rounds. It can\n"
            "be below zero in the reentrant form, whose first forward builds no graph."
        ),
    )
    for run in report.runs:
        memory = run.memory
        assert memory is not None  # train() measures every run
        own = report.bookkeeping_us.get(run.name)
        table.add(
            run.name,
            f"{report.step_ms[run.name]:.1f} ms",
            mib(memory.held),
            mib(memory.peak),
            "-" if own is None else f"{own:.0f} us/block",
        )
    return table


def _show(screen: Screen, report: Report, steps: int) -> None:
    screen.line()
    screen.table(exactness_table(report))
    screen.table(cost_table(report))
    for name, verdict in report.verdicts.items():
        for difference in verdict.differences:
            screen.line(f"{name}: {difference}", style="bold red")
    tensors = len(list(report.reference.model.parameters()))
    if report.exact:
        screen.line(
            f"Exact: {len(report.verdicts)} checkpointed runs, each with {steps} losses, "
            f"{steps} random states, {tensors} gradients and {tensors} parameters equal bit for "
            "bit to the run without checkpointing.",
            style="bold green",
        )
    else:
        screen.line("NOT EXACT: see the differences above.", style="bold red")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torch_reprise demo",
        description="Trains a small GPT with and without checkpointing and compares every bit.",
    )
    positive = _positive
    parser.add_argument("--steps", type=positive, default=150, help="training steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs (%(default)s)")
    parser.add_argument("--batch", type=positive, default=6, help="texts a step (%(default)s)")
    parser.add_argument("--context", type=positive, default=64, help="characters (%(default)s)")
    parser.add_argument("--layers", type=positive, default=6, help="blocks (%(default)s)")
    parser.add_argument("--width", type=positive, default=64, help="model width (%(default)s)")
    parser.add_argument("--heads", type=positive, default=4, help="heads (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability (%(default)s)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="threads inside an operator (%(default)s); operators this small gain little from more",
    )
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(
            f"--width must be a multiple of --heads, got {options.width} and {options.heads}"
        )
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be at least 0 and below 1, got {options.dropout}")
    if not options.out.parent.is_dir():
        parser.error(f"--out must lie in an existing folder, got {options.out}")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None, functions: Implementations | None = None) -> int:
    """Runs the demo.

    Args:
        argv: command line without the program's name; None takes the process's own.
        functions: the runs to compare in place of ``implementations()``.

    Returns:
        0 if every checkpointed run is exact, 1 if one is not, 2 if the demo cannot run.
    """
    options = parse(argv)
    absent = missing("matplotlib", "rich")
    if absent is not None:
        print(f"demo: {absent}", file=sys.stderr)
        return 2
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    screen = Screen()
    started = time.perf_counter()
    with torch_threads(options.threads):
        screen.facts()
        chosen = implementations() if functions is None else functions
        with screen.progress(f"training {len(chosen)} runs", settings.steps) as bar:
            report = train(settings, chosen, lambda loss: bar.step(f"loss {loss:.3f}"))
        report.bookkeeping_us.update(measure_bookkeeping(report))
    _show(screen, report, settings.steps)
    plot.draw(report, options.out)
    screen.line(f"Picture: {options.out}   ({time.perf_counter() - started:.0f} s)")
    return 0 if report.exact else 1
