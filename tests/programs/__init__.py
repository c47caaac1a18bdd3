"""Random programs for the differential test.

`generate.program(seed)` writes a random, deterministic training step as Python source.  `run`
executes it once without and once with checkpointing and compares everything that can be seen of it:
outputs, gradients, generator states, bit for bit.

    prelude.py    the names a program may use: containers, custom functions, small helpers
    builder.py    writing a program: its tree, its variables and the choice among them
    ops.py        the statements a program is made of, one function each
    generate.py   segments, calls, nesting
    plan.py       the loss and the ways to go backward
    run.py        implementations, execution, comparison, reduction of a failing program; a command
"""
