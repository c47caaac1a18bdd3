"""Fingerprints of tensor subclasses that only Python can take apart."""

from __future__ import annotations

from typing import Any

import torch

from . import _C


def fingerprint(tensor: Any) -> int | None:
    """From the fingerprints of the parts that ``__tensor_flatten__`` names, if all have one.

    Parts that are no tensors (the mesh of a DTensor) have no values. The result of a collective
    that nobody has waited for is waited for: its memory is not written before.
    """
    if hasattr(tensor, "trigger_wait"):  # functional collectives' AsyncCollectiveTensor
        with torch.no_grad():
            return _of_part(tensor.trigger_wait())
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    total = 0
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if not isinstance(part, torch.Tensor):
            continue
        value = _of_part(part)
        if value is None:
            return None
        total = _C.combine_fingerprints(total, value)
    return total


def _of_part(part: torch.Tensor) -> int | None:
    value = _C.fingerprint(part)
    return fingerprint(part) if value is None else value
