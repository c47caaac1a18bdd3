"""Runs a training three times and prints what of it is equal: what every example ends with.

Plainly, on torch's checkpointing, and on ours, each from the same seed. An example hands over a
function `train(checkpointing) -> Watch`; nothing in it depends on which runtime it runs on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torch_reprise
from torch_reprise import ledger

SEED = 0


class Watch:
    """Notes the loss, the gradients and the time of every step of a training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: list[Tensor] = []
        self.gradients: list[list[Tensor | None]] = []
        self.times: list[float] = []
        self._last = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        """To be called when the gradients of a step are there, before the optimizer uses them."""
        self.losses.append(loss.detach().clone())
        self.gradients.append(
            [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        )
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now

    def noted(self) -> dict[str, list[Any]]:
        return {
            "losses": self.losses,
            "gradients": [gradient for step in self.gradients for gradient in step],
            "buffers": list(self.model.buffers()),
        }


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def compare(train: Callable[[bool], Watch]) -> int:
    """Prints the table; 0 if all of our run equals the plain one and something was replayed."""
    torch.set_num_threads(1)  # the examples' models are far too small to be shared by threads
    rows = [("run", "losses", "gradients", "buffers", "replays", "step")]
    reference: dict[str, list[Any]] = {}
    ours_is_exact = False
    for run in ("plain", "torch", "torch_reprise"):
        torch.manual_seed(SEED)
        before = ledger.replays()
        if run == "torch_reprise":
            with torch_reprise.installed():
                watch = train(True)
        else:
            watch = train(run == "torch")
        replays = ledger.replays() - before
        found = watch.noted()
        reference = reference or found
        verdicts = ["equal" if equal(found[key], reference[key]) else "differ" for key in found]
        ours_is_exact = replays > 0 and verdicts == ["equal"] * 3
        shown = ["reference"] * 3 if run == "plain" else verdicts
        # Not the first, which warms up.
        milliseconds = 1e3 * statistics.median(watch.times[1:])
        rows.append((run, *shown, str(replays), f"{milliseconds:.1f} ms"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0 if ours_is_exact else 1
