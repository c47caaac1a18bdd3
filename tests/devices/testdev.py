"""Loads the test device (see runtime.h) into this process, and what tests say to it.

Once it is loaded, `torch.accelerator` means it, and that cannot be undone: the rest of the suite
runs in another process (see tests/test_devices.py).
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

LIBRARY = "REPRISE_TEST_DEVICE"  # the path of the shared library
KIND = "REPRISE_TEST_GENERATOR"  # opaque or philox; generator.cpp reads it too

DEVICES = ("testdev:0", "testdev:1")
STATE_BYTES = {"opaque": 24, "philox": 16}


def kind() -> str:
    return os.environ[KIND]


def load() -> None:
    torch.ops.load_library(os.environ[LIBRARY])
    # What torch itself asks of a backend that is not its own, and no more: `torch.testdev` must
    # be a module before a tensor can be moved, and torch.manual_seed warns without these two.
    # Nothing here tells where a generator stands or which devices are initialised.
    module = types.ModuleType("torch.testdev")
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = manual_seed_all  # type: ignore[attr-defined]
    torch._register_device_module("testdev", module)


def manual_seed_all(seed: int) -> None:
    """Of the devices that have a context; as CUDA's, it leaves alone what nobody has touched."""
    for index in range(len(DEVICES)):
        if has_context(index):
            torch.ops.testdev.manual_seed(index, seed + index)


def has_context(index: int) -> bool:
    return bool(torch.ops.testdev.has_context(index))


def state(index: int) -> Tensor:
    """The state of a default generator, a byte tensor in host memory; makes the context."""
    return torch.ops.testdev.generator_state(index)


def states() -> list[Tensor]:
    return [state(index) for index in range(len(DEVICES))]


def set_states(states: list[Tensor]) -> None:
    for index, value in enumerate(states):
        torch.ops.testdev.set_generator_state(index, value)


def seed_devices(seed: int = 11) -> None:
    for index in range(len(DEVICES)):
        torch.ops.testdev.manual_seed(index, seed + index)


def state_calls() -> tuple[int, int]:
    """How often the state of a generator was read and set since the process started."""
    return torch.ops.testdev.states_read(), torch.ops.testdev.states_set()


def to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, (list, tuple)):
        return [to_host(part) for part in value]
    return value


def on_devices(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program` from seeded devices; the devices' generators afterwards belong to its result."""

    def whole(run: Callable[..., Any]) -> Any:
        seed_devices()
        result = program(run)
        return to_host(result), states()

    return whole


def leaf_on(device: str, *shape: int) -> Tensor:
    """The same values on every device: they come from the CPU's generator."""
    return torch.randn(shape).to(device).requires_grad_()


def draws(x: Tensor) -> Tensor:
    return dropout(x.sin(), 0.5).exp()


def draws_nothing(x: Tensor) -> Tensor:
    return x.sin().exp()
