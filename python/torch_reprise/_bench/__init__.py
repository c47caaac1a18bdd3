"""Benchmarks that ship with the package, so that anyone can check the claims on their own machine.

``_common`` measures and prints, every other module is one benchmark with a ``main(argv) -> int``.
"""
