"""Segments that draw on CUDA devices and on those of another accelerator, in one process.

The other one is the test device (tests/devices), whose memory is the host's: its numbers are real
also under the simulation, so they and the gradients that went through them have to be equal bit
for bit. Each program runs in a process of its own, since a backend stays once it is registered.

torch cannot run a backward through CUDA tensors in a process with a second accelerator (an internal
assertion about streams fails in its engine, without a checkpoint too), so here gradients go through
the other one.
"""

from __future__ import annotations

import textwrap
from typing import Any

import fresh
import pytest
from cuda_helpers import needs_devices
from device_library import LIBRARY, device_library
from helpers import both_forms

pytestmark = [pytest.mark.cuda, needs_devices(2)]
KINDS = pytest.mark.parametrize("kind", ["opaque", "philox"])

# In front of each program.
START = """
os.environ.update(variables)
import testdev
testdev.load()

def report_all(**values):
    values = {k: v.cpu().tolist() if torch.is_tensor(v) else v for k, v in values.items()}
    report({**values, "states": [s.tolist() for s in testdev.states()], "offsets": offsets(),
            "cpu": torch.randn(2).tolist(), "replays": ledger.replays()})

torch.cuda.init()
testdev.seed_devices()
x = torch.linspace(0.1, 1, 16).to("testdev:1").requires_grad_()
y = torch.ones(16, device="cuda:1")

def draw_between():
    torch.rand(3, device="testdev:1"), torch.rand(100, device="cuda:1")
    torch.rand(3, device="testdev:0"), torch.rand(100, device="cuda:0")
"""


def play(program: str, kind: str, form: bool | None) -> dict[str, Any]:
    variables = {LIBRARY: str(device_library()), "REPRISE_TEST_GENERATOR": kind}
    return dict(fresh.play(START + program, form=form, variables=variables))


PROGRAMS = {
    "both among the arguments": """
def both(x, y):
    z = draws(draws(y))
    return draws(x), z, dropout(torch.ones(4), 0.5)

a, b, c = run(both, x, y)
draw_between()
a.sum().backward()
report_all(out=a.detach(), grad=x.grad)
""",
    "moved from one to the other": """
def wanders(x):
    z = draws(draws(x).detach().to("cuda:0"))
    # What a kernel of CUDA should have written means nothing under the simulation.
    return draws(x.sin() + 0 * z.to("testdev:0").to("testdev:1").isnan())

out = run(wanders, x)
draw_between()
out.sum().backward()
report_all(out=out.detach(), grad=x.grad)
""",
    "two segments": """
def first(x):
    torch.rand(4, device="cuda:1")
    return draws(x)

def second(x):
    x = draws(x)
    torch.rand(4, device="cuda:1"), torch.rand(4, device="cuda:0")
    return x.to("testdev:0").exp()

h = run(first, x)
draw_between()
out = run(second, h)
draw_between()
out.sum().backward()
report_all(out=out.detach(), grad=x.grad)
""",
}


@both_forms
@KINDS
@pytest.mark.parametrize("name", PROGRAMS)
def test_draws_on_both(name: str, kind: str, use_reentrant: bool) -> None:
    expected = play(PROGRAMS[name], kind, None)
    found = play(PROGRAMS[name], kind, use_reentrant)
    assert expected.pop("replays") == 0
    assert found.pop("replays") == PROGRAMS[name].count("run(")
    assert found == expected
    assert any(offset > 0 for _, offset in expected["offsets"]), "something was drawn on CUDA"


@both_forms
def test_what_is_kept(use_reentrant: bool) -> None:
    """The generators of both types that the function drew from, and no others."""
    program = """
with ledger.record() as record:
    out = run(lambda x, y: draws(x).sum().cpu() + draws(y).sum().cpu(), x, y)
report_all(kept=[row.generators for row in record.rows], bytes=ledger.stashed_bytes(),
           all=rng.default_generators())
"""
    found = play(program, "opaque", use_reentrant)
    assert found["kept"] == [["cuda:1", "testdev:1"]]
    assert found["bytes"] == 16 + 24
    count = len(found["offsets"])
    cuda = [f"cuda:{index}" for index in range(count)]
    assert found["all"] == ["cpu", *cuda, "testdev:0", "testdev:1"]


CAPTURED = """
stream = torch.cuda.Stream(1)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
    z = draws(y)
    a = run(function, x)
    draw_between()
    a.sum().backward()
captured = offsets()
graph.replay()
report_all(out=a.detach(), grad=x.grad, captured=captured)
"""


@both_forms
def test_the_other_one_while_cuda_is_captured(use_reentrant: bool) -> None:
    """It draws as always, and is rewound as always."""
    program = "function = draws\n" + CAPTURED
    expected = play(program, "philox", None)
    found = play(program, "philox", use_reentrant)
    assert (expected.pop("replays"), found.pop("replays")) == (0, 1)
    assert found == expected


@both_forms
def test_a_replay_on_the_other_ones_thread_is_outside_of_the_capture(use_reentrant: bool) -> None:
    """Autograd makes the forward's stream the current one of the node's own accelerator alone."""
    program = """
def function(x):
    draws(y)
    return draws(x)

try:
%s
except torch_reprise.CheckpointError as error:
    report(str(error))
"""
    told = fresh.play(
        START + program % textwrap.indent(CAPTURED.strip(), "    "),
        form=use_reentrant,
        variables={LIBRARY: str(device_library()), "REPRISE_TEST_GENERATOR": "philox"},
    )
    assert "generator cuda:1 cannot be put back to where it stood" in told
