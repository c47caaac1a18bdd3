"""Devices that a segment's function is the first to touch, each program in a fresh process.

Before the segment such a device has no context, and nobody may ask for its generator, because that
would make one. What the function did there is exact, or the user is told which device it cannot be
exact for; other numbers without a word are what must not happen.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import testdev
from helpers import both_forms

PRELUDE = """
import functools, json, os, sys
import testdev
testdev.load()
import torch
from torch.nn.functional import dropout
import torch_reprise

form = json.loads(sys.argv[1])
if form is None:
    run = lambda function, *args: function(*args)
else:
    run = functools.partial(torch_reprise.checkpoint, use_reentrant=form)

def report(**values):
    values = {k: v.cpu().tolist() if torch.is_tensor(v) else v for k, v in values.items()}
    print(json.dumps(values), flush=True)
    # Not through the interpreter's end: there torch's autograd threads of the devices abort the
    # process if they drop the last reference to the backward that has just ended.
    os._exit(0)

def moved(device):
    def function(x):
        return dropout(x.to(device).sin(), 0.5).exp()
    return function

torch.manual_seed(3)
x = torch.randn(16, requires_grad=True)
"""


@functools.cache
def play(program: str, form: bool | None) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + program, json.dumps(form)],
        cwd=Path(__file__).parent,  # so that `testdev` is found
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("index", range(len(testdev.DEVICES)))
@both_forms
def test_one_device_in_use_and_the_others_untouched(index: int, use_reentrant: bool) -> None:
    program = f"""
seen = x.to({testdev.DEVICES[index]!r})
out = run(moved({testdev.DEVICES[index]!r}), seen)
torch.rand(3, device=seen.device)
out.sum().backward()
report(out=out.detach(), grad=x.grad, state=testdev.state({index}))
"""
    assert play(program, use_reentrant) == play(program, None)


@pytest.mark.parametrize("other_in_use", [False, True], ids=["first", "second"])
@both_forms
def test_a_device_first_touched_inside(other_in_use: bool, use_reentrant: bool) -> None:
    other, device = testdev.DEVICES
    program = f"""
if {other_in_use}:
    torch.ones(1, device={other!r})
assert not testdev.has_context(1)
try:
    out = run(moved({device!r}), x)
    torch.rand(3, device={device!r})
    out.sum().backward()
except torch_reprise.CheckpointError as error:
    report(error=str(error))
else:
    report(out=out.detach(), grad=x.grad, state=testdev.state(1))
"""
    found = play(program, use_reentrant)
    if "error" in found:
        assert device in found["error"]
    else:
        assert found == play(program, None)


@both_forms
def test_a_device_that_is_only_computed_on(use_reentrant: bool) -> None:
    """Nothing is drawn there, so that there is nothing to be exact about and no error."""
    program = """
out = run(lambda x: dropout(x, 0.5).to("testdev:1").sin().exp(), x)
out.sum().backward()
report(out=out.detach(), grad=x.grad, state=testdev.state(1))
"""
    assert play(program, use_reentrant) == play(program, None)


@both_forms
def test_a_segment_on_the_cpu_touches_no_device(use_reentrant: bool) -> None:
    program = """
out = run(moved("cpu"), x)
out.sum().backward()
report(contexts=[testdev.has_context(i) for i in range(len(testdev.DEVICES))])
"""
    assert play(program, use_reentrant) == {"contexts": [False, False]}
