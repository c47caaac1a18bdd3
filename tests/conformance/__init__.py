"""The same small programs on several implementations of checkpointing: is it the plain program?

Each *case* is a program that is played plainly (checkpointing is a mere call) and with an
implementation, and everything that it returns is compared bit for bit, with the generators and the
number of replays. The rows (R1, A1, ...) are what users of checkpointing run into;
docs/conformance.md is the table that comes out.

    python tests/conformance/run.py                              the table, on the terminal
    python tests/conformance/run.py --write docs/conformance.md  and as a page
    python tests/conformance/run.py --implementation package.module:function
    python -m pytest tests/conformance                           ours alone, as tests

Cases that need CUDA devices run where torch sees some. Without a GPU they run under the simulation
of tests/cudasim, whose kernels never run: such cases compare where generators stand and how often
a function ran, and no values.

    python tests/cudasim/launch.py -m pytest tests/conformance -m cuda
    python tests/cudasim/launch.py tests/conformance/run.py --only-cuda --save cuda.json
    python tests/conformance/run.py --merge cuda.json --write docs/conformance.md

Nothing here needs torch_reprise to be there, except the column about it and the tests.
"""
