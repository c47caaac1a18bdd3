"""Devices that a segment's function is the first to use, each program in a process of its own.

CUDA is initialised by its first use, and asking for a generator before that would initialise it.
Afterwards its default generators stand at offset 0 of the seed that torch was given, whatever the
function drew meanwhile, and that is where a replay has to begin.
"""

from __future__ import annotations

import pytest
from cuda_helpers import needs_devices, simulated_only
from fresh import play
from helpers import both_forms

pytestmark = [pytest.mark.cuda, needs_devices(4)]

# In front of each program.
START = """
seen = []

def noted(x):
    seen.append(offsets())
    return draws(x)

x = torch.ones(8, requires_grad=True)
"""


@both_forms
def test_cuda_first_initialised_inside(use_reentrant: bool) -> None:
    program = (
        START
        + """
def moved(x):
    y = noted(x.to("cuda:3"))
    return noted(y.to("cuda:1")).cpu()

out = run(moved, x)
assert torch.cuda.is_initialized()
after_forward = offsets()
torch.rand(100, device="cuda:3")
out.sum().backward()
report([after_forward, offsets(), seen])
"""
    )
    after_forward, after_backward, seen = play(program, form=None)
    found = play(program, form=use_reentrant)
    assert found[:2] == [after_forward, after_backward]
    assert found[2] == seen * 2, "the replay draws where the forward drew"
    assert seen[0] == [[3, 0]] * len(seen[0]), "at the seed that was given before, from the start"


@both_forms
def test_cuda_first_initialised_in_a_nested_segment(use_reentrant: bool) -> None:
    program = (
        START
        + """
def inner(x):
    return noted(x.to("cuda:2"))

def outer(x):
    return run(inner, x.sin()).cpu().exp()

out = run(outer, x)
after_forward = offsets()
torch.rand(100, device="cuda:2")
out.sum().backward()
report([after_forward, offsets(), seen])
"""
    )
    expected = play(program, form=None)
    found = play(program, form=use_reentrant)
    assert found[:2] == expected[:2]
    assert all(standing == expected[2][0] for standing in found[2]) and len(found[2]) > 1


@both_forms
def test_an_error_leaves_cuda_as_the_function_left_it(use_reentrant: bool) -> None:
    """A forward that raises after it was the first to draw; the numbers drawn stay drawn."""
    program = (
        START
        + """
def fails(x):
    draws(x.to("cuda:0"))
    raise KeyError("from the function")

try:
    run(fails, x)
except KeyError:
    report(offsets())
"""
    )
    assert play(program, form=use_reentrant) == play(program, form=None)


@simulated_only
@both_forms
def test_a_segment_on_the_cpu_initialises_nothing(use_reentrant: bool) -> None:
    program = (
        START
        + """
run(lambda t: dropout(t, 0.5).sin(), x).sum().backward()
report([torch.cuda.is_initialized(), used()])
"""
    )
    assert play(program, form=use_reentrant) == [False, []]


@simulated_only
@both_forms
def test_only_devices_in_use_get_a_context(use_reentrant: bool) -> None:
    """Generators are looked at on all eight, without making a context on the others."""
    program = (
        START
        + """
run(lambda t: dropout(t.to("cuda:3"), 0.5).sin(), x).sum().backward()
report(used())
"""
    )
    assert play(program, form=use_reentrant) == play(program, form=None)


@both_forms
def test_cuda_first_used_inside_and_its_generator_put_back(use_reentrant: bool) -> None:
    program = (
        START
        + """
def forked(x):
    c = x.to("cuda:1")
    with torch.random.fork_rng(devices=[1]):
        seen.append(offsets()[1])
        c = draws(c)
    return c.cpu().exp()

out = run(forked, x)
torch.rand(8, device="cuda:1")
out.sum().backward()
report([offsets(), seen])
"""
    )
    standing, seen = play(program, form=None)
    assert play(program, form=use_reentrant) == [standing, seen * 2]


@pytest.mark.parametrize("look", range(6))
def test_an_interrupted_look_at_the_devices_moves_no_generator(look: int) -> None:
    """After a fork each look asks Python whether CUDA is initialised, and Ctrl-C may come there."""
    program = """
torch.cuda.init()
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    report(status)
else:
    x = torch.ones(64, requires_grad=True)
    y = torch_reprise.checkpoint(draws, x, use_reentrant=False)
    torch.rand(5)
    before = torch.get_rng_state()
    asked = torch.cuda.is_initialized
    looks = []

    def interrupted():
        looks.append(1)
        if len(looks) > look:
            raise KeyboardInterrupt
        return asked()

    torch.cuda.is_initialized = interrupted
    try:
        y.sum().backward()
    except KeyboardInterrupt:
        pass
    torch.cuda.is_initialized = asked
    os._exit(0 if torch.equal(before, torch.get_rng_state()) and len(looks) > 0 else 1)
"""
    assert play(program, look=look, form=False) == 0
