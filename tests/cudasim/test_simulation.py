"""The simulation itself: what tests may build on, and what it does not do.

Needs torch's CUDA build and launch.py, and nothing of torch_reprise. "Offset" is the Philox offset
of a device's default generator: how much of its random stream was drawn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cudasim
import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
DEVICES = range(cudasim.DEVICES)
# Draws per call of curand: what any small draw of torch moves the offset by.
STEP = 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    assert cudasim.active(), f"run these tests with {HERE / 'launch.py'}"
    torch.cuda.init()
    states = torch.cuda.get_rng_state_all()
    torch.cuda.manual_seed_all(7)
    yield
    torch.cuda.set_rng_state_all(states)


def generator(device: int) -> torch.Generator:
    return torch.cuda.default_generators[device]


def offsets() -> list[int]:
    return [generator(device).get_offset() for device in DEVICES]


def seed_and_offset(state: Tensor) -> tuple[int, int]:
    seed, offset = state.view(torch.int64).tolist()
    return seed, offset


def run(program: str, **variables: str) -> str:
    """What a new process prints; it has to end well and complain of nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(HERE), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# Devices and memory.


def test_eight_devices() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == cudasim.DEVICES
    assert all(torch.cuda.get_device_capability(device) == (9, 0) for device in DEVICES)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_live_on_their_device(device: int) -> None:
    made = torch.empty(3, device=f"cuda:{device}")
    assert (made.device.type, made.device.index) == ("cuda", device)
    assert not made.is_pinned()


def test_no_device_beyond_the_last() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(3, device=f"cuda:{cudasim.DEVICES}")


def test_copies_are_real() -> None:
    values = torch.randn(1000)
    travelled = values.to("cuda:1").to("cuda:2").cpu()
    assert torch.equal(travelled, values)
    pinned = values.pin_memory()
    assert pinned.is_pinned() and torch.equal(pinned.to("cuda:3").cpu(), values)


def test_kernels_never_run() -> None:
    values = torch.arange(4.0)
    on_device = values.to("cuda:0")
    before = cudasim.launches()
    on_device.add_(1)
    assert cudasim.launches() == before + 1
    assert torch.equal(on_device.cpu(), values)


def test_what_is_not_simulated_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        torch.ones(3, device="cuda:0").untyped_storage()._share_cuda_()


def test_a_device_has_a_context_once_it_is_used() -> None:
    program = """
import torch
used = lambda: [device for device in range(8) if torch._C._cuda_hasPrimaryContext(device)]
torch.cuda.manual_seed_all(1)
print(used())
torch.empty(1, device="cuda:3")
print(used())
"""
    assert run(program) == "[]\n[3]"


# Generators.


@pytest.mark.parametrize(
    ("draw", "moved"),
    [
        (lambda x: torch.rand_like(x), STEP),
        (lambda x: torch.randn_like(x), STEP),
        (lambda x: dropout(x, 0.5), STEP),
        (lambda x: torch.empty_like(x).bernoulli_(0.5), STEP),
        (lambda x: torch.randint(9, (7,), device=x.device), STEP),
        # More than the grid of 132 multiprocessors draws at once: ten rounds.
        (lambda x: torch.rand(10_000_000, device=x.device), 10 * STEP),
        (lambda x: x.sin(), 0),
    ],
    ids=["rand", "randn", "dropout", "bernoulli", "randint", "large", "no draw"],
)
def test_a_draw_moves_the_offset(draw: Callable[[Tensor], Any], moved: int) -> None:
    x = torch.ones(1000, device="cuda:5")
    draw(x)
    draw(x)
    assert offsets() == [0, 0, 0, 0, 0, 2 * moved, 0, 0]


def test_seed_and_state() -> None:
    torch.cuda.set_device(0)
    torch.cuda.manual_seed(11)
    assert [generator(device).initial_seed() for device in DEVICES] == [11] + [7] * 7
    torch.rand(5, device="cuda:2")
    state = torch.cuda.get_rng_state(2)
    assert seed_and_offset(state) == (7, STEP)
    torch.rand(5, device="cuda:2")
    torch.cuda.set_rng_state(state, 2)
    assert seed_and_offset(torch.cuda.get_rng_state(2)) == (7, STEP)
    generator(2).set_offset(40)
    assert seed_and_offset(torch.cuda.get_rng_state(2)) == (7, 40)


def test_an_explicit_generator() -> None:
    explicit = torch.Generator("cuda:4").manual_seed(3)
    torch.rand(5, device="cuda:4", generator=explicit)
    assert (explicit.get_offset(), offsets()) == (STEP, [0] * 8)


# Autograd.


class DrawsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threads: dict[int, int]) -> Tensor:
        ctx.threads = threads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.threads[torch.cuda.current_device()] = threading.get_ident()
        return grad * torch.rand_like(grad), None


def test_every_device_has_its_own_backward_thread() -> None:
    threads: dict[int, int] = {}
    leaves = [torch.ones(9, device=f"cuda:{device}", requires_grad=True) for device in DEVICES]
    torch.autograd.backward([DrawsInBackward.apply(x, threads).sum() for x in leaves])
    assert set(threads) == set(DEVICES)
    assert len({threading.get_ident(), *threads.values()}) == 1 + cudasim.DEVICES
    assert offsets() == [STEP] * 8
    assert [x.grad.device.index for x in leaves if x.grad is not None] == list(DEVICES)


def test_the_checkpoint_of_torch_rewinds_and_puts_back() -> None:
    seen: list[list[int]] = []

    def draws(x: Tensor, y: Tensor) -> Tensor:
        seen.append(offsets())
        return dropout(x.sin(), 0.5).to("cuda:6") * dropout(y.sin(), 0.5)

    x, y = (torch.ones(9, device=f"cuda:{device}", requires_grad=True) for device in (1, 6))
    out = checkpoint(draws, x, y, use_reentrant=False)
    torch.rand(5, device="cuda:6")
    after = offsets()
    out.sum().backward()
    assert (len(seen), seen[0]) == (2, seen[1])
    assert offsets() == after == [0, STEP, 0, 0, 0, 0, 2 * STEP, 0]


# Stream capture.


@pytest.mark.parametrize("device", [0, 5])
@pytest.mark.parametrize("stream", [torch.cuda.default_stream, torch.cuda.Stream])
def test_the_switch(device: int, stream: Callable[[int], torch.cuda.Stream]) -> None:
    with torch.cuda.stream(stream(device)):
        assert not torch.cuda.is_current_stream_capturing()
        with cudasim.capturing():
            assert torch.cuda.is_current_stream_capturing()
            with pytest.raises(RuntimeError, match="could not find the CUDAGraph"):
                torch.rand(3, device=f"cuda:{device}")
            # What refuses to tell its state refuses to draw: segments rely on that.
            with pytest.raises(RuntimeError, match="could not find the CUDAGraph"):
                generator(device).get_state()
            with pytest.raises(RuntimeError, match="set_offset during CUDA graph capture"):
                generator(device).set_offset(8)
            with pytest.raises(RuntimeError, match="only if new seed is the same"):
                generator(device).manual_seed(8)
            generator(device).manual_seed(7)
        assert not torch.cuda.is_current_stream_capturing()
    assert offsets() == [0] * 8


def test_a_synchronization_is_counted_and_refused_in_a_capture() -> None:
    before = cudasim.synchronizations()
    torch.cuda.synchronize(0)
    assert cudasim.synchronizations() == before + 1
    with cudasim.capturing(), pytest.raises(RuntimeError, match="stream is capturing"):
        torch.cuda.synchronize(0)


def test_an_allocation_is_counted() -> None:
    torch.cuda.empty_cache()
    before = cudasim.allocations()
    block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
    assert cudasim.allocations() == before + 1
    del block
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
    assert cudasim.allocations() == before + 1  # from torch's cache


def test_a_graph_draws_anew_at_every_launch() -> None:
    x = torch.ones(1000, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        dropout(x, 0.5)
        assert seed_and_offset(generator(0).get_state()) == (7, STEP)
        with pytest.raises(RuntimeError, match="get_offset during CUDA graph capture"):
            generator(0).get_offset()
    assert offsets()[0] == 0
    for launched in (1, 2):
        graph.replay()
        assert offsets()[0] == launched * STEP


def test_a_synchronization_spoils_a_graph() -> None:
    with pytest.raises(RuntimeError, match="previous error during capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(3, device="cuda:0")
            torch.cuda.synchronize(0)
    assert not torch.cuda.is_current_stream_capturing()


# Processes.


def test_nothing_crashes_at_exit() -> None:
    program = """
import cudasim, torch
leaves = [torch.ones(9, device=f"cuda:{device}", requires_grad=True) for device in range(8)]
pinned = torch.ones(9).pin_memory()
stream, event = torch.cuda.Stream(), torch.cuda.Event()
event.record()
for round in range(3):
    torch.autograd.backward([torch.dropout(x, 0.5, True).sum() for x in leaves])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    kept = torch.rand(9, device="cuda:0")
graph.replay()
print([generator.get_offset() for generator in torch.cuda.default_generators])
"""
    assert run(program) == "[16, 12, 12, 12, 12, 12, 12, 12]"


def test_the_environment_sets_devices_and_capture() -> None:
    program = """
import torch
x = torch.empty(1, device="cuda:0")
print(torch.cuda.device_count(), torch.cuda.is_current_stream_capturing())
"""
    assert run(program) == "8 False"
    assert run(program, CUDASIM_DEVICES="2", CUDASIM_CAPTURING="1") == "2 True"


def test_not_collected_without_the_simulation() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", f"--confcutdir={HERE}", str(HERE)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "not collected, the simulation is not loaded" in done.stdout
