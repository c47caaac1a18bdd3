"""What the tests of segments on CUDA devices share.

They run under the simulation, and on a machine with GPUs as well, where those that need more
devices than there are get skipped.
"""

from __future__ import annotations

import cudasim
import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

simulated_only = pytest.mark.skipif(
    not cudasim.active(), reason="needs the switch or the counters of the simulation"
)


def needs_devices(count: int) -> pytest.MarkDecorator:
    # Without any device the `cuda` marker decides: it may be a failure, and not a skip.
    return pytest.mark.skipif(
        0 < torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices"
    )


def generator(device: int) -> torch.Generator:
    return torch.cuda.default_generators[device]


def offsets() -> list[tuple[int, int]]:
    """Seed and offset of every device's default generator."""
    return [(g.initial_seed(), g.get_offset()) for g in torch.cuda.default_generators]


def leaf(device: str = "cpu") -> Tensor:
    return torch.ones(8, device=device).requires_grad_()


def draws(x: Tensor) -> Tensor:
    return dropout(x.sin(), 0.5).exp()
