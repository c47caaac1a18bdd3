"""Random state: captured and restored natively, for whole processes or some generators.

    >>> from torch_reprise import rng
    >>> before = rng.capture()          # the CPU and every initialised device
    >>> ...
    >>> before.restore()

Segments do this in the compiled core and need none of it. :func:`capture` costs
about half a microsecond for the CPU and a few tens of nanoseconds for each
device with a Philox generator (CUDA, XPU, MPS), without a tensor, a
synchronisation or a change of the current device.

Also here: the functions that ``torch.utils.checkpoint`` has for random state,
with torch's meaning, for programs that call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

from . import _C
from ._errors import require_generators

__all__ = [
    "DefaultDeviceType",
    "RngSnapshot",
    "capture",
    "default_generators",
    "fork",
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
    return [_C.generator_name(g) for g in _C.default_generators()]


class RngSnapshot:
    """Where a set of generators stood when :func:`capture` was called.

    Equal to another snapshot if both are of the same generators, in the same
    states. Keeps the generators alive. About 2.5 KB for the CPU (snapshots between
    which nothing was drawn share them), 16 bytes for each Philox generator.
    """

    def __init__(self, snapshot: _C.RngSnapshot) -> None:
        self._snapshot = snapshot

    def restore(self) -> None:
        """Puts every generator back; those that did not move are not touched.

        Raises:
            RuntimeError: a state belongs to another stream capture (of a CUDA graph)
                than the one that its device is in now. The others are put back.
        """
        self._snapshot.restore()

    @property
    def generators(self) -> tuple[str, ...]:
        """The names of the generators: ``("cpu", "cuda:0", "explicit cpu")``."""
        return tuple(self._snapshot.names())

    @property
    def nbytes(self) -> int:
        """Bytes that the states take; a state that occurs twice counts once."""
        return self._snapshot.nbytes()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The states in torch's form, as ``get_state()`` of the generators gives them.

        Byte tensors on the CPU, by generator name. Only for snapshots without
        explicit generators: those have no name that tells them apart.
        """
        self._require_names("state_tensors()")
        return dict(zip(self._snapshot.names(), self._snapshot.tensors(), strict=True))

    @classmethod
    def from_state_tensors(cls, states: dict[str, torch.Tensor]) -> RngSnapshot:
        """The snapshot of default generators with states in torch's form.

        Raises:
            ValueError: a name is not that of a default generator that exists now.
            TypeError, RuntimeError: a state is not one of that generator.
        """
        known = {_C.generator_name(g): g for g in _C.default_generators()}
        for name in states:
            if name not in known:
                raise ValueError(
                    f"there is no default generator {name!r} in this process; there are "
                    f"{', '.join(known)} (a device counts once it is initialised)"
                )
            if not isinstance(states[name], torch.Tensor):
                raise TypeError(
                    f"states[{name!r}] must be a byte tensor, got {type(states[name]).__name__}"
                )
        generators = [known[name] for name in states]
        return cls(_C.RngSnapshot.from_tensors(generators, list(states.values())))

    def diff(self, other: RngSnapshot) -> str:
        """What differs, in words; empty if nothing does."""
        if not isinstance(other, RngSnapshot):
            raise TypeError(f"other must be an RngSnapshot, got {type(other).__name__}")
        mine = self._by_generator()
        others = other._by_generator()
        same = {id(g) for g, _, _ in mine} & {id(g) for g, _, _ in others}
        lines = [f"{n}: only in the first ({t})" for g, n, t in mine if id(g) not in same]
        states = {id(g): text for g, _, text in others}
        tensors = {
            id(g): t
            for g, t in zip(other._snapshot.generators(), other._snapshot.tensors(), strict=True)
        }
        for (g, name, text), tensor in zip(mine, self._snapshot.tensors(), strict=True):
            if id(g) in same and not torch.equal(tensor, tensors[id(g)]):
                lines.append(f"{name}: {text}, and {states[id(g)]}")
        lines += [f"{n}: only in the second ({t})" for g, n, t in others if id(g) not in same]
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RngSnapshot):
            return NotImplemented
        return self._snapshot.equal(other._snapshot)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        self._require_names("pickling")
        return (RngSnapshot.from_state_tensors, (self.state_tensors(),))

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {text}" for _, name, text in self._by_generator())
        return f"RngSnapshot({states})"

    def _by_generator(self) -> list[tuple[torch.Generator, str, str]]:
        snapshot = self._snapshot
        return list(zip(snapshot.generators(), snapshot.names(), snapshot.describe(), strict=True))

    def _require_names(self, what: str) -> None:
        for name in self._snapshot.names():
            if name.startswith("explicit "):
                raise TypeError(
                    f"{what} works for default generators only, and this snapshot has an "
                    f"{name} generator, which exists in this process alone"
                )


def _current_index(device_type: str) -> int:
    """The device that ``device_type`` without a number means."""
    module = getattr(torch, device_type, None)
    current = getattr(module, "current_device", None)
    is_initialized = getattr(module, "is_initialized", lambda: True)
    # Asking would initialise it.
    return int(current()) if current is not None and is_initialized() else 0


def _defaults_on(devices: str | torch.device | Iterable[Any]) -> list[torch.Generator]:
    existing = list(_C.default_generators())
    if isinstance(devices, (str, torch.device)):
        if devices == "all":
            return existing
        devices = [devices]
    known = {_C.generator_name(g): g for g in existing}
    chosen = []
    for device in devices:
        asked = torch.device(device)
        if asked.type == "cpu":
            name = "cpu"
        else:
            index = asked.index if asked.index is not None else _current_index(asked.type)
            name = f"{asked.type}:{index}"
        if name not in known:
            raise ValueError(
                f"devices: {device!r} has no default generator now; there are "
                f"{', '.join(known)} (a device counts once it is initialised)"
            )
        chosen.append(known[name])
    return chosen


def capture(
    devices: str | torch.device | Iterable[str | torch.device] = "all",
    generators: Iterable[torch.Generator] = (),
) -> RngSnapshot:
    """Notes where generators stand.

    Args:
        devices: ``"all"`` for the default generators of the CPU and of every device
            of every initialised accelerator, or the devices whose default
            generators are meant; an empty list for none.
        generators: explicit generators in addition. Each generator counts once.

    Raises:
        TypeError: ``generators`` has something else in it.
        ValueError: a device has no default generator, or is not initialised.
    """
    if isinstance(devices, str) and devices == "all" and generators == ():
        return RngSnapshot(_C.RngSnapshot.capture_defaults())
    return RngSnapshot(
        _C.RngSnapshot.capture(
            [*_defaults_on(devices), *require_generators("generators", generators)]
        )
    )


@contextmanager
def fork(
    devices: str | torch.device | Iterable[str | torch.device] = "all",
    generators: Iterable[torch.Generator] = (),
) -> Iterator[RngSnapshot]:
    """Puts the generators back at the end of the block, also after an error.

    The arguments are those of :func:`capture`. Unlike ``torch.random.fork_rng`` it
    covers every accelerator at once, in about a microsecond.
    """
    snapshot = capture(devices, generators)
    try:
        yield snapshot
    finally:
        snapshot.restore()


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
