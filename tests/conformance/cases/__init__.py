"""The cases, a module for each chapter; importing them fills `registry.CASES`."""

from . import ambient, cuda, effects, graph, private_device, random_state, sequences

__all__ = [
    "ambient",
    "cuda",
    "effects",
    "graph",
    "private_device",
    "random_state",
    "sequences",
]
