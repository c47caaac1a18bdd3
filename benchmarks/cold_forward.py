"""What a forward costs in the middle of a backward, where caches hold what the backward needs.

``python benchmarks/cold_forward.py [ROUNDS]`` takes the twelve GPT blocks of ``overhead.py``. No
checkpointing: each block's function is called once more and what it returns is dropped, in the
forward right after its call, or in its backward by a tensor hook, there once, twice or three times.
Printed is what each call more adds to a step besides one forward in a loop, in microseconds, by
minima and medians of the rounds. Replays go ahead for this reason: docs/design.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from torch_reprise._bench._common import calibrate, interleave
from torch_reprise._bench._programs import Segment, call_again, called_again, plainly
from torch_reprise._bench.overhead import workloads

STRETCH_S = 0.1


def in_forward(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    result = function(value)
    call_again(function, value)
    return result


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    torch.set_num_threads(1)
    workload = workloads()[2]
    segments: dict[str, Segment] = {
        "plain": plainly,
        "in forward": in_forward,
        **{f"in backward, {times}": called_again(times) for times in (1, 2, 3)},
    }
    thunks: dict[str, Callable[[], object]] = {"forward": workload.forward}
    for name, segment in segments.items():
        thunks[name] = lambda segment=segment: workload.step(segment)  # type: ignore[misc]
    times = interleave(
        thunks,
        rounds=rounds,
        inner={name: calibrate(thunk, STRETCH_S) for name, thunk in thunks.items()},
        after_round=workload.drop_gradients,
    )
    steps = (
        ("once more in forward", "in forward", "plain"),
        ("once more in backward", "in backward, 1", "plain"),
        ("and a second time there", "in backward, 2", "in backward, 1"),
        ("and a third time", "in backward, 3", "in backward, 2"),
    )
    print(f"torch {torch.__version__}, {workload.name}: microseconds besides one forward")
    for statistic in (min, statistics.median):
        taken = {name: 1e6 * statistic(values) for name, values in times.items()}
        base = f"plain step {taken['plain']:,.0f}, forward {taken['forward']:,.0f}"
        print(f"{statistic.__name__}: {base}")
        for what, name, before in steps:
            print(f"  {what:24} {taken[name] - taken[before] - taken['forward']:8,.0f}")


if __name__ == "__main__":
    main()
