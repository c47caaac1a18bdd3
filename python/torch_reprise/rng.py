"""Random state: the functions that ``torch.utils.checkpoint`` has for it.

Segments capture and restore generators in the compiled core and need none of
these. They are here for programs that call them, with torch's meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

from . import _C

__all__ = [
    "DefaultDeviceType",
    "default_generators",
    "get_device_states",
    "set_device_states",
]

#: torch's own class: both libraries share one setting.
DefaultDeviceType = torch_checkpoint.DefaultDeviceType


def default_generators() -> list[str]:
    """The generators that a segment looks after, ``["cpu", "cuda:0", ...]``.

    The default generator of the CPU and of every device of every initialised
    accelerator. torch looks after the CPU and the devices of one type on which
    positional arguments lie.
    """
    return list(_C.default_generator_names())


def _device_module(device_type: str) -> Any:
    module = getattr(torch, device_type, None)
    if module is None:
        raise ValueError(
            f"device_type must name a device module of torch such as 'cuda', got {device_type!r}"
        )
    return module


def get_device_states(*args: Any) -> tuple[list[int], list[torch.Tensor]]:
    """The generator states of the devices on which tensors among ``args`` lie.

    Args:
        *args: tensors, or containers of tensors, anything else is passed over.

    Returns:
        ``(device_ids, states)``: the indices of the devices of one device type,
        each once and in the order met, and their states as byte tensors. With
        tensors on several device types, CUDA is taken if it is among them, else
        the type met first; ``torch_reprise.checkpoint`` itself has no such limit.

    Unlike torch's, twelve tensors on one device give one state, not twelve.
    """
    devices = [
        leaf.device
        for leaf in tree_leaves(args)
        if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta")
    ]
    if not devices:
        return [], []
    types = [device.type for device in devices]
    chosen = "cuda" if "cuda" in types else types[0]
    module = _device_module(chosen)
    ids = list(dict.fromkeys(d.index or 0 for d in devices if d.type == chosen))
    states = []
    for index in ids:
        with module.device(index):
            states.append(module.get_rng_state())
    return ids, states


def set_device_states(
    devices: Iterable[int], states: Iterable[torch.Tensor], *, device_type: str | None = None
) -> None:
    """Sets the generator states of devices.

    Args:
        devices: device indices, as :func:`get_device_states` gives them.
        states: one state (a byte tensor) per device.
        device_type: whose devices; ``DefaultDeviceType.get_device_type()`` if None.
    """
    if device_type is None:
        device_type = DefaultDeviceType.get_device_type()
    if device_type == "meta":
        return
    module = _device_module(device_type)
    for device, state in zip(devices, states, strict=False):
        with module.device(device):
            module.set_rng_state(state)
