"""Runs a program plain and checkpointed and compares every bit that can be seen of it.

From the command line (in tests/):

    python -m programs.run --seeds 0:2000                 look for differences
    python -m programs.run --seeds 17 --show              print a program
    python -m programs.run --seeds 17 --reduce            print a short program that still differs
    python -m programs.run --implementation torch ...     the same with torch.utils.checkpoint

A program that raises without checkpointing says nothing and is discarded: the next attempt of the
same seed takes its place.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import linecache
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import generate, prelude
from .generate import Block, Node, Program

OPTIONS = ("early_stop", "determinism_check", "preserve_rng_state", "context_fn", "debug")


def two_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return contextlib.nullcontext(), contextlib.nullcontext()


@dataclass(frozen=True)
class Implementation:
    """What a program knows as `ckpt`."""

    name: str
    checkpoint: Callable[..., Any]
    early_stop: Callable[[bool], AbstractContextManager[Any]]
    live: Callable[[], int] = lambda: 0  # segments that have not been freed

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(function, *args, **kwargs)


def _plain_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for option in OPTIONS:
        kwargs.pop(option, None)
    return function(*args, **kwargs)


PLAIN = Implementation("plain", _plain_call, lambda enable: contextlib.nullcontext())


def implementation(name: str, *, reentrant: bool = False, style: int = 0) -> Implementation:
    """`torch`, `reprise` or `plain`; `style` chooses among the ways in which ours can be called."""
    if name == "plain":
        return PLAIN
    if name == "torch":
        import torch.utils.checkpoint as module
    elif name == "reprise":
        import torch_reprise as module  # type: ignore[no-redef]
    else:
        raise ValueError(f"unknown implementation {name!r}: expected plain, torch or reprise")

    def direct(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            kwargs.pop("debug", None)  # torch's logging context can be entered by one replay only
        return module.checkpoint(function, *args, use_reentrant=reentrant, **kwargs)

    def curried(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        return module.checkpoint(use_reentrant=reentrant, **options)(function)(*args, **kwargs)

    def configured(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        checkpointer = module.Checkpointer(use_reentrant=reentrant, **options)
        return checkpointer(function, *args, **kwargs)

    live = module.ledger.live_segments if name == "reprise" else lambda: 0
    styles = [direct] if name == "torch" else [direct, direct, direct, curried, configured]
    return Implementation(name, styles[style % len(styles)], module.set_checkpoint_early_stop, live)


@dataclass(frozen=True)
class Snapshot:
    """A tensor as it was: everything about it that code can ask for, and its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    node: str
    data: bytes

    @staticmethod
    def of(t: Tensor) -> Snapshot:
        node = type(t.grad_fn).__name__
        if t.layout == torch.sparse_coo:
            parts = [Snapshot.of(t._indices()), Snapshot.of(t._values())]
            data = b"".join(p.data for p in parts)
            return Snapshot(t.dtype, tuple(t.shape), (), t.requires_grad, node, data)
        with torch.no_grad():
            flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().tobytes()
        return Snapshot(t.dtype, tuple(t.shape), t.stride(), t.requires_grad, node, data)

    def values(self) -> Tensor:
        return (
            torch.frombuffer(bytearray(self.data), dtype=self.dtype)
            if self.data
            else torch.empty(0)
        )

    def difference(self, other: Snapshot, same_nodes: bool) -> str:
        names = ["dtype", "shape", "requires_grad"] + ["stride", "node"] * same_nodes
        for name in names:
            a, b = getattr(self, name), getattr(other, name)
            if a != b:
                return f"{name}: plain {a}, checkpointed {b}"
        if self.data == other.data:
            return ""
        if len(self.data) != len(other.data):
            return f"{len(self.data)} bytes plain, {len(other.data)} checkpointed"
        size = len(self.data) // max(self.values().numel(), 1)
        pairs = zip(self.data, other.data, strict=True)
        first = next(i for i, (a, b) in enumerate(pairs) if a != b) // size
        wrong = sum(
            self.data[i : i + size] != other.data[i : i + size]
            for i in range(0, len(self.data), size)
        )
        values = (
            f"{self.values()[first].item()!r} plain, {other.values()[first].item()!r} checkpointed"
        )
        return (
            f"{wrong} of {len(self.data) // size} elements, first at flat index {first}: {values}"
        )


@dataclass
class Recorder:
    """`rec` of a program: labelled snapshots in the order in which the program took them."""

    rows: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, label: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.rows.append((label, Snapshot.of(value)))
        elif isinstance(value, dict):
            for key, item in value.items():
                self(f"{label}[{key!r}]", item)
        elif isinstance(value, list | tuple):
            self.rows.append((f"type({label})", type(value).__name__))
            for i, item in enumerate(value):
                self(f"{label}[{i}]", item)
        elif isinstance(value, prelude.Box):
            self(f"{label}.value", value.value)
        else:
            self.rows.append((label, repr(value)))

    def generators(self, label: str) -> None:
        self(f"CPU generator after {label}", torch.get_rng_state())

    def difference(self, other: Recorder, same_nodes: bool = True) -> str:
        """What the checkpointed run (`other`) has that the plain one has not; empty if nothing.

        `same_nodes`: outputs come from nodes of the same type and gradients have the same strides,
        as in the non-reentrant form.
        """
        for (label, mine), (label_too, its) in zip(self.rows, other.rows, strict=False):
            if label != label_too:
                return f"plain recorded {label}, checkpointed {label_too}"
            if isinstance(mine, Snapshot) and isinstance(its, Snapshot):
                found = mine.difference(its, same_nodes)
            else:
                found = "" if mine == its else f"plain {mine!r}, checkpointed {its!r}"
            if found:
                return f"{label}: {found}"
        if len(self.rows) != len(other.rows):
            return f"plain recorded {len(self.rows)} values, checkpointed {len(other.rows)}"
        return ""


def execute(program: Program, ckpt: Implementation) -> Recorder:
    """Runs the program; what it raises goes to the caller."""
    source, filename = program.source, f"<random program {program.seed}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names = {**prelude.NAMES, "two_contexts": two_contexts, "plain": PLAIN}
    exec(compile(source, filename, "exec"), names)
    recorder = Recorder()
    with warnings.catch_warnings():
        # Which op of a program is beta or deprecated is torch's affair.
        warnings.simplefilter("ignore")
        names["program"](ckpt, recorder)
    return recorder


def plain_or_none(program: Program) -> Recorder | None:
    try:
        return execute(program, PLAIN)
    except Exception:
        return None


@dataclass
class Verdict:
    """Of one seed: the program that was compared and the difference found, empty if none."""

    program: Program
    difference: str
    discarded: int


MAX_ATTEMPTS = 12
STRIDE = 1_000_003  # attempts of a seed: seed, seed + STRIDE, ...: no two seeds share one


def valid_program(seed: int, **options: Any) -> tuple[Program, Recorder, int]:
    """The first attempt of this seed that runs without checkpointing, and what it recorded."""
    for attempt in range(MAX_ATTEMPTS):
        program = generate.program(seed + attempt * STRIDE, **options)
        plain = plain_or_none(program)
        if plain is not None:
            return program, plain, attempt
    raise AssertionError(
        f"seed {seed}: {MAX_ATTEMPTS} attempts in a row raise without checkpointing"
    )


def compare(program: Program, plain: Recorder, ckpt: Implementation) -> str:
    """The first difference between the plain run and one with `ckpt`; empty if there is none."""
    before = ckpt.live()
    try:
        found = plain.difference(execute(program, ckpt), same_nodes=not program.reentrant)
    except Exception as error:
        where = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if "<random" in f.filename
        ]
        return f"raised {type(error).__name__} at line {where[-1:]} of the program: {error}"
    if found:
        again = plain_or_none(program)
        if again is None or plain.difference(again):
            return f"the program itself is not deterministic ({plain.difference(again or plain)})"
    if not found and ckpt.live() > before:
        left = ckpt.live() - before
        gc.collect()
        return f"left {left} segments behind, {ckpt.live() - before} after a garbage collection"
    return found


def check(seed: int, ckpt: Implementation, **options: Any) -> Verdict:
    program, plain, discarded = valid_program(seed, **options)
    return Verdict(program, compare(program, plain, ckpt), discarded)


def listing(program: Program) -> str:
    lines = program.source.splitlines()
    return "\n".join(f"{i:4d}  {line}" for i, line in enumerate(lines, 1))


# --- reduction ------------------------------------------------------------------------------------


def _edits(nodes: list[Node]) -> list[Callable[[list[Node]], None]]:
    """Every way to make the tree smaller by one step, as functions that change a copy of it."""
    edits: list[Callable[[list[Node]], None]] = []

    def visit(path: tuple[int, ...], siblings: list[Node]) -> None:
        for i, node in enumerate(siblings):
            edits.append(lambda tree, p=path, i=i: _body(tree, p).__delitem__(i))
            if isinstance(node, Block):
                if not node.header.startswith("def"):
                    edits.append(lambda tree, p=path, i=i: _unwrap(_body(tree, p), i))
                visit((*path, i), node.body)
                continue
            if "ckpt(" in node:
                edits.append(
                    lambda tree, p=path, i=i: _replace(_body(tree, p), i, "ckpt(", "plain(")
                )
            name, equals, expression = node.partition(" = ")
            if equals and name.isidentifier():
                for other in sorted(set(re.findall(r"\b[vxar]\d+\b", expression)) - {expression}):
                    new = f"{name} = {other}"
                    edits.append(
                        lambda tree, p=path, i=i, old=node, new=new: _replace(
                            _body(tree, p), i, old, new
                        )
                    )

    visit((), nodes)
    return edits


def _body(tree: list[Node], path: tuple[int, ...]) -> list[Node]:
    for i in path:
        block = tree[i]
        assert isinstance(block, Block)
        tree = block.body
    return tree


def _unwrap(siblings: list[Node], i: int) -> None:
    block = siblings[i]
    assert isinstance(block, Block)
    siblings[i : i + 1] = block.body


def _replace(siblings: list[Node], i: int, old: str, new: str) -> None:
    line = siblings[i]
    assert isinstance(line, str)
    siblings[i] = line.replace(old, new, 1)


def reduce(program: Program, ckpt: Implementation) -> Program:
    """Removes statements as long as the plain run works and a difference of that sort remains."""

    def sort(found: str) -> str:
        words = found.split()
        return " ".join(words[:2]) if words[:1] == ["raised"] else str(words[:1] == ["left"])

    def verdict(candidate: Program) -> str:
        plain = plain_or_none(candidate)
        return "" if plain is None else compare(candidate, plain, ckpt)

    wanted, best, progress = sort(verdict(program)), program, True
    while progress:
        progress = False
        for index in reversed(range(len(_edits(best.nodes)))):
            nodes = copy.deepcopy(best.nodes)
            edits = _edits(nodes)
            if index >= len(edits):
                continue
            edits[index](nodes)
            candidate = Program(best.seed, nodes, best.features, best.reentrant)
            found = verdict(candidate)
            if found and sort(found) == wanted and "not deterministic" not in found:
                best, progress = candidate, True
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0:300", help="one seed or first:last")
    parser.add_argument(
        "--implementation", default="reprise", choices=["reprise", "torch", "plain"]
    )
    parser.add_argument("--reentrant", action="store_true")
    parser.add_argument("--flat", action="store_true", help="positional tensor arguments only")
    parser.add_argument("--show", action="store_true", help="print each program")
    parser.add_argument("--reduce", action="store_true", help="shorten each program that differs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    features: Counter[str] = Counter()
    discarded = different = 0
    for seed in seeds:
        ckpt = implementation(options.implementation, reentrant=options.reentrant, style=seed)
        verdict = check(seed, ckpt, reentrant=options.reentrant, nested_arguments=not options.flat)
        discarded += verdict.discarded
        features.update(set(verdict.program.features))
        if options.show:
            print(listing(verdict.program))
        if verdict.difference:
            different += 1
            print(f"seed {seed}: {verdict.difference}")
            if options.reduce:
                print(listing(reduce(verdict.program, ckpt)))
    print(f"{len(seeds)} programs, {different} differ, {discarded} discarded")
    print("  ".join(f"{name} {n}" for name, n in sorted(features.items())))
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
