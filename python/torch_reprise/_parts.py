"""Fingerprints of tensor subclasses that only Python can take apart."""

from __future__ import annotations

from typing import Any

from . import _C


def fingerprint(tensor: Any) -> int | None:
    """From the fingerprints of the parts that ``__tensor_flatten__`` names, if all have one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    total = 0
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        value = _C.fingerprint(part)
        if value is None:
            value = fingerprint(part)
        if value is None:
            return None
        total = _C.combine_fingerprints(total, value)
    return total
