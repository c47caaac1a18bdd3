"""Segments while a stream is captured into a graph.

Nothing runs during a capture, and torch counts offsets from where the generator will stand when
the graph is launched: `in_graph(0)` below is that count. Offsets have to be those of the same
program without checkpointing, in the capture and after every launch; what a capture makes
impossible has to be an error. csrc/rng/stream_capture.h says how it works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import cudasim
import pytest
import torch
from cuda_helpers import draws, generator, leaf, needs_devices, offsets, simulated_only
from helpers import Run, both_forms, checkpointed, message_of, plain
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import _C, CheckpointError, checkpoint, checkpoint_sequential, ledger, rng

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("seeded", "philox")]


def in_graph(device: int) -> int:
    """How far into its capture the generator of a device is."""
    return int(generator(device).get_state().view(torch.int64)[1])


def draws_nothing(x: Tensor) -> Tensor:
    return x.sin().exp()


@pytest.fixture(autouse=True)
def one_stream() -> Iterator[None]:
    """All work on the stream that is captured; torch refuses nodes of another in a capture."""
    with torch.cuda.stream(torch.cuda.Stream(0)):
        yield


@contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    # Relaxed, since some tests use a second device meanwhile.
    stream = torch.cuda.current_stream(0)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        yield


def forked(x: Tensor) -> Tensor:
    """Draws, and puts the generator back: it stands where it stood, and a draw was made."""
    with torch.random.fork_rng(devices=[0]):
        return draws(x)


PROGRAMS: dict[str, Callable[[Run, Tensor], Tensor]] = {
    "one": lambda run, x: run(draws, x),
    "no draw": lambda run, x: run(draws_nothing, x),
    "two": lambda run, x: run(draws, dropout(run(draws, x), 0.5)),
    "nested": lambda run, x: run(lambda t: run(draws, draws(t)).sin(), x),
    "forked": lambda run, x: run(forked, x),
    "long": lambda run, x: run(lambda t: draws(draws(draws(t))), x),
}


@both_forms
@pytest.mark.parametrize("name", PROGRAMS)
def test_forward_and_backward_in_one_graph(name: str, use_reentrant: bool) -> None:
    def play(run: Run) -> list[Any]:
        torch.cuda.manual_seed_all(7)
        x = leaf("cuda:0")
        torch.rand(4, device="cuda:0")
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            dropout(x, 0.5)
            out = PROGRAMS[name](run, x)
            dropout(x, 0.5)
            after_forward = in_graph(0)
            out.sum().backward()
            after_backward = in_graph(0)
            dropout(x, 0.5)
        captured = offsets()
        graph.replay()
        first = offsets()
        graph.replay()
        return [after_forward, after_backward, captured, first, offsets()]

    expected = play(plain)
    before = ledger.replays()
    assert play(checkpointed(use_reentrant=use_reentrant)) == expected
    assert ledger.replays() > before


@pytest.mark.parametrize("drawn_before", [False, True])
def test_a_backward_inside_of_a_captured_forward(drawn_before: bool) -> None:
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(in_graph(0))
        y = draws(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        seen.append(in_graph(0))
        return draws(y * gradient)

    torch.rand(4, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        x = leaf("cuda:0").sin()
        if drawn_before:
            dropout(x, 0.5)
        checkpoint(fn, x, use_reentrant=False).sum().backward()
        end = in_graph(0)
    begin = 4 if drawn_before else 0
    # The forward, its own replay in the middle of it, and the replay in backward.
    assert seen[:3] == [begin, begin, begin + 4] and seen[3] == begin
    assert end == begin + 8
    assert offsets()[0] == (7, 4)


@both_forms
@pytest.mark.parametrize("fork", [False, True], ids=["drawn", "drawn and put back"])
def test_a_replay_draws_at_the_offsets_of_the_forward(fork: bool, use_reentrant: bool) -> None:
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[0], enabled=fork):
            seen.append(in_graph(0))
            return draws(draws(x))

    x = leaf("cuda:0")
    with capture(torch.cuda.CUDAGraph()):
        dropout(x, 0.5)
        y = checkpoint(fn, x, use_reentrant=use_reentrant)
        dropout(x, 0.5)
        y.sum().backward()
    assert seen == [4, 4]


def test_segments_in_sequence_in_one_graph() -> None:
    def play(run: Callable[..., Any]) -> list[Any]:
        torch.cuda.manual_seed_all(7)
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            run([draws] * 6, 3, leaf("cuda:0")).sum().backward()
        graph.replay()
        return offsets()

    def one_after_the_other(functions: list[Any], segments: int, x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    assert play(one_after_the_other) == play(
        lambda fs, n, x: checkpoint_sequential(fs, n, x, use_reentrant=False)
    )


@both_forms
def test_two_graphs_one_after_the_other(use_reentrant: bool) -> None:
    """Each with its own count; the second begins at nothing again."""
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(in_graph(0))
        return draws(x)

    x = leaf("cuda:0")
    for _ in range(2):
        with capture(torch.cuda.CUDAGraph()):
            y = checkpoint(fn, x, use_reentrant=use_reentrant)
            dropout(x, 0.5)
            y.sum().backward()
    assert seen == [0, 0, 0, 0]


@both_forms
def test_an_explicit_generator(use_reentrant: bool) -> None:
    explicit = torch.Generator("cuda:0").manual_seed(3)
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(int(explicit.get_state().view(torch.int64)[1]))
        return x.sin() * torch.empty_like(x).bernoulli_(0.5, generator=explicit)

    x = leaf("cuda:0")
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        torch.rand(4, device="cuda:0", generator=explicit)
        y = checkpoint(fn, x, use_reentrant=use_reentrant)
        torch.rand(4, device="cuda:0", generator=explicit)
        y.sum().backward()
    assert seen == [4, 4]
    assert (explicit.get_offset(), generator(0).get_offset()) == (0, 0)
    graph.replay()
    assert (explicit.get_offset(), generator(0).get_offset()) == (12, 0)


@both_forms
def test_a_replay_that_draws_more_is_an_error(use_reentrant: bool) -> None:
    counts = [1, 2]

    def fn(x: Tensor) -> Tensor:
        for _ in range(counts.pop(0)):
            torch.rand(4, device="cuda:0")
        return x.sin()

    x = leaf("cuda:0")
    with capture(torch.cuda.CUDAGraph()):
        y = checkpoint(fn, x, use_reentrant=use_reentrant, early_stop=False)
        message = "(?s)generator cuda:0.*offset 4 from the launch.*4 numbers in the forward and 8"
        with pytest.raises(CheckpointError, match=message):
            y.sum().backward()
        assert in_graph(0) == 4


@needs_devices(2)
@both_forms
def test_while_another_device_is_the_current_one(use_reentrant: bool) -> None:
    """torch asks the current device's stream; a draw asks the stream of its own device."""
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        with torch.cuda.device(0):
            seen.append(in_graph(0))
        return draws(x)

    x = leaf("cuda:0")
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        dropout(x, 0.5)
        with torch.cuda.device(1):
            y = checkpoint(fn, x, use_reentrant=use_reentrant)
        dropout(x, 0.5)
        with torch.cuda.device(1):
            y.sum().backward()
        assert in_graph(0) == 12
    assert seen == [4, 4]
    assert torch.cuda.current_device() == 0


@needs_devices(2)
@both_forms
def test_a_device_that_is_not_captured_draws_and_is_rewound_as_always(use_reentrant: bool) -> None:
    seen: list[tuple[int, int]] = []

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(1):
            seen.append((in_graph(0), generator(1).get_offset()))
        return draws(x), draws(draws(y))

    x, y = leaf("cuda:0"), leaf("cuda:1")
    torch.rand(4, device="cuda:1")
    with capture(torch.cuda.CUDAGraph()):
        outs = checkpoint(fn, x, y, use_reentrant=use_reentrant)
        torch.rand(4, device="cuda:1")
        dropout(x, 0.5)
        # Each by itself: a backward over both devices waits for events across the capture.
        torch.autograd.grad(outs[0].sum(), x, retain_graph=True)
        assert in_graph(0) == 8
    assert [o for _, o in offsets()[:2]] == [0, 16]
    assert len(seen) == 2 and seen[0] == seen[1] == (0, 4)


# What a capture makes impossible.


def the_backward(y: Tensor, graph: torch.cuda.CUDAGraph | None) -> Callable[[], None]:
    """Calls backward in a capture, or outside of any; an error of it does not spoil the capture."""

    def call() -> None:
        errors = []
        with nullcontext() if graph is None else capture(graph):
            torch.ones(3, device="cuda:0")
            try:
                y.sum().backward()
            except RuntimeError as error:
                error.__traceback__ = None  # its frames hold the graph
                errors.append(error)
        if errors:
            raise errors.pop()

    return call


def forward_and_backward(
    where: str, fn: Callable[..., Any], use_reentrant: bool, **options: Any
) -> Callable[[], None]:
    """Runs the forward of a segment, and returns its backward."""
    x = leaf("cuda:0")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    if where == "the same graph object, captured again":
        second = first
    with nullcontext() if where == "only backward captured" else capture(first):
        y = checkpoint(fn, x, use_reentrant=use_reentrant, **options)
    if where == "only forward captured":
        return the_backward(y, None)
    if second is first:
        first.reset()
    return the_backward(y, second)


APART = pytest.mark.parametrize(
    "where",
    [
        "only backward captured",
        "only forward captured",
        "two graphs",
        "the same graph object, captured again",
    ],
)


@both_forms
@APART
def test_numbers_that_cannot_be_drawn_again_are_an_error(where: str, use_reentrant: bool) -> None:
    backward = forward_and_backward(where, draws, use_reentrant)
    standing = offsets()
    message = message_of(CheckpointError, backward)
    in_a_capture = r"( from the launch of the graph of stream capture \d+)?\n"
    told = re.fullmatch(
        r"torch_reprise: the replay of draws cannot draw the random numbers of its forward again.\n"
        r"  generator cuda:0 cannot be put back to where it stood\n"
        rf"    then: philox seed 7, offset 0{in_a_capture}"
        rf"    now:  philox seed 7, offset \d{in_a_capture}"
        r"  While a stream .* Put forward and backward into one capture .*",
        message,
    )
    assert told is not None, message
    assert (told[1] is not None, told[2] is not None) == (
        where != "only backward captured",
        where != "only forward captured",
    )
    assert told[1] != told[2]
    assert offsets() == standing


@both_forms
@APART
def test_a_segment_that_draws_nothing_needs_no_capture(where: str, use_reentrant: bool) -> None:
    before = ledger.replays()
    forward_and_backward(where, draws_nothing, use_reentrant)()
    assert ledger.replays() == before + 1


@both_forms
@APART
def test_a_replay_that_draws_where_the_forward_did_not(where: str, use_reentrant: bool) -> None:
    drawn = [0, 1]

    def fn(x: Tensor) -> Tensor:
        for _ in range(drawn.pop(0)):
            torch.rand(4, device="cuda:0")
        return x.sin().exp()

    message = "(?s)generator cuda:0\n.*the forward did not draw from it, the replay did"
    with pytest.raises(CheckpointError, match=message):
        forward_and_backward(where, fn, use_reentrant)()
    assert offsets() == [(7, 0)] * torch.cuda.device_count()


@APART
def test_other_numbers_may_be_asked_for(where: str) -> None:
    before = ledger.replays()
    forward_and_backward(where, draws, False, preserve_rng_state=False)()
    assert ledger.replays() == before + 1


def test_snapshots_know_the_capture_that_they_belong_to() -> None:
    outside = rng.capture(["cuda:0"])
    with capture(torch.cuda.CUDAGraph()):
        inside = rng.capture(["cuda:0"])
        assert "offset 0 from the launch of the graph of stream capture" in repr(inside)
        assert inside != outside
        states = inside.state_tensors()
        torch.rand(4, device="cuda:0")
        assert in_graph(0) == 4
        with pytest.raises(RuntimeError, match="(?s)cuda:0 cannot be put back.*then.*now"):
            outside.restore()
        inside.restore()
        assert in_graph(0) == 0
        torch.rand(4, device="cuda:0")
        rng.RngSnapshot.from_state_tensors(states).restore()
        assert in_graph(0) == 0
        with rng.fork(["cuda:0"]):
            torch.rand(4, device="cuda:0")
        assert in_graph(0) == 0
        torch.rand(4, device="cuda:0")
    with pytest.raises(RuntimeError, match="cuda:0 cannot be put back"):
        inside.restore()
    outside.restore()
    assert rng.capture(["cuda:0"]) == outside


# Around graphs.


@both_forms
def test_a_graph_that_is_launched_inside_a_segment(use_reentrant: bool) -> None:
    """Its draws move the generator by what the graph draws, in the forward and in the replay."""
    kept = torch.ones(8, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        dropout(kept, 0.5)
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        graph.replay()
        seen.append(generator(0).get_offset())
        return draws(x * kept)

    y = checkpoint(fn, leaf("cuda:0"), use_reentrant=use_reentrant)
    torch.rand(4, device="cuda:0")
    y.sum().backward()
    assert seen == [4, 4] and generator(0).get_offset() == 12


def test_a_capture_inside_of_a_segment() -> None:
    """A function that records its graph when it is called: at its ends nothing is captured."""

    def fn(x: Tensor) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        kept = torch.ones(8, device="cuda:0")
        with capture(graph):
            dropout(kept, 0.5)
        graph.replay()
        return draws(x * kept)

    y = checkpoint(fn, leaf("cuda:0"), use_reentrant=False)
    y.sum().backward()
    assert generator(0).get_offset() == 8


class Block(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], run: Run) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, device="cuda:0"))
        self.function = function
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda t: self.function(t * self.weight), x)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of the backward that is refused
def test_graphed_callables() -> None:
    """They capture the forward in one graph and the backward in another."""
    run = checkpointed()
    graphed = torch.cuda.make_graphed_callables(Block(draws_nothing, run), (leaf("cuda:0"),))
    x = leaf("cuda:0")
    torch.autograd.grad(graphed(x).sum(), x)
    with pytest.raises(CheckpointError, match="Put forward and backward into one capture"):
        torch.cuda.make_graphed_callables(Block(draws, run), (leaf("cuda:0"),))


# Only what is allowed.


@simulated_only
@both_forms
def test_no_synchronization_and_no_allocation(use_reentrant: bool) -> None:
    def costs(run: Run, function: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        x = leaf("cuda:0")
        with capture(torch.cuda.CUDAGraph()):
            before = cudasim.synchronizations(), cudasim.allocations()
            run(function, x).sum().backward()
            after = cudasim.synchronizations(), cudasim.allocations()
        return after[0] - before[0], after[1] - before[1]

    def one_draw(x: Tensor) -> Tensor:
        torch.rand(4, device="cuda:0")
        return draws_nothing(x)

    run = checkpointed(use_reentrant=use_reentrant)
    assert costs(run, draws) == costs(plain, draws)
    # To look at a generator in a capture is what makes torch's count, as the first draw does.
    assert costs(run, draws_nothing) == costs(plain, one_draw)


@simulated_only
@needs_devices(8)
def test_no_context_is_made_on_devices_that_nobody_uses() -> None:
    used = [i for i in range(8) if torch._C._cuda_hasPrimaryContext(i)]
    with capture(torch.cuda.CUDAGraph()):
        checkpoint(draws, leaf("cuda:0"), use_reentrant=False).sum().backward()
    assert [i for i in range(8) if torch._C._cuda_hasPrimaryContext(i)] == used


@simulated_only
@both_forms
@pytest.mark.parametrize("stream", [torch.cuda.default_stream, torch.cuda.Stream])
def test_a_capture_that_torch_did_not_begin(
    stream: Callable[[int], torch.cuda.Stream], use_reentrant: bool
) -> None:
    """torch cannot draw there, with us or without; what draws nothing works."""
    if stream is torch.cuda.default_stream:
        # CUDA does not capture it, so that the members are read unasked: only the virtuals tell.
        _C.enable_philox_fields(False)  # the fixture puts it back
    x = leaf("cuda:0")
    with torch.cuda.stream(stream(0)):
        warm = checkpoint(draws_nothing, x, use_reentrant=use_reentrant)
        early = checkpoint(draws, x, use_reentrant=use_reentrant)
        standing = offsets()
        before = ledger.replays()
        with cudasim.capturing():
            checkpoint(draws_nothing, x, use_reentrant=use_reentrant).sum().backward()
            warm.sum().backward()
            with pytest.raises(RuntimeError, match="could not find the CUDAGraph"):
                draws(x)
            with pytest.raises(RuntimeError, match="could not find the CUDAGraph"):
                checkpoint(draws, x, use_reentrant=use_reentrant)
            with pytest.raises(CheckpointError, match="a stream capture that torch did not begin"):
                early.sum().backward()
            late = checkpoint(draws_nothing, x, use_reentrant=use_reentrant)
        late.sum().backward()
        assert ledger.replays() == before + 4
    assert offsets() == standing
