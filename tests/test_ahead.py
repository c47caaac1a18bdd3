"""Replays ahead: small segments that follow each other in backward are replayed together.

Seen by what a function finds in its replay: whether the weight of the segment after it has its
gradient already. It has if each segment is replayed when backward asks for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_exact, both_forms, checkpointed, in_threads, leaf, plain
from programs.prelude import ScalesInPlace
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils import checkpoint as torch_checkpoint

import torch_reprise
from torch_reprise import Checkpointer, CheckpointError, GraphExecGroup, checkpoint, ledger

LENGTH = 4
Call = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Chain:
    """Segments, each of which takes what the one before returned.

    Attributes:
        call: what runs a segment, if nothing else is given.
        replayed: the numbers of the segments in the order of their replays.
        ahead: of those, which were replayed before the one after them had its gradient.
    """

    def __init__(self, call: Call = plain, width: int = 4, length: int = LENGTH) -> None:
        self.call = call
        self.weights = [torch.full((width,), 0.5, requires_grad=True) for _ in range(length)]
        self.calls = [0] * length
        self.replayed: list[int] = []
        self.ahead: list[int] = []

    def segment(self, number: int) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            self.calls[number] += 1
            if self.calls[number] > 1:
                self.replayed.append(number)
                after = self.weights[number + 1 : number + 2]
                if any(weight.grad is None for weight in after):
                    self.ahead.append(number)
            return dropout((x * self.weights[number]).sin(), 0.2).exp()

        return function

    def forward(self, x: Tensor, call: Call | None = None) -> Tensor:
        for number in range(len(self.weights)):
            x = (call or self.call)(self.segment(number), x)
        return x


@pytest.fixture(params=[False, True], ids=["hooks", "reentrant"])
def call(request: pytest.FixtureRequest) -> Call:
    return checkpointed(use_reentrant=request.param)


@pytest.fixture
def chain(call: Call) -> Chain:
    return Chain(call)


@pytest.fixture
def in_hooks() -> Chain:
    return Chain(checkpointed())


ALL = [2, 1, 0]  # the last one is asked for


def test_a_chain_is_replayed_together(chain: Chain) -> None:
    before = ledger.replays()
    chain.forward(leaf(4)).sum().backward()
    assert chain.ahead == ALL and chain.replayed == [3, *ALL]
    assert ledger.replays() == before + LENGTH


@both_forms
def test_it_is_exact(use_reentrant: bool) -> None:
    def program(run: Any) -> Any:
        torch.manual_seed(1)
        chain, x = Chain(length=20), leaf(4)
        out = chain.forward(x, lambda function, x: run(function, x))
        out.sum().backward()
        return out, x.grad, [weight.grad for weight in chain.weights]

    assert_exact(program, replays=20, use_reentrant=use_reentrant)


def test_what_is_ahead_is_bounded(call: Call) -> None:
    large = Chain(call, width=100_000)  # each keeps three tensors or more: 1.2 MB
    large.forward(leaf(100_000)).sum().backward()
    assert large.ahead == []
    middle = Chain(call, width=30_000)
    middle.forward(leaf(30_000)).sum().backward()
    assert len(middle.ahead) in (1, 2)
    long = Chain(call, length=40)
    long.forward(leaf(4)).sum().backward()
    assert len(long.replayed) == 40
    assert [number for number in range(39) if number not in long.ahead] == [7, 23]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


class Sees(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def with_hook_of_a_tensor(chain: Chain, x: Tensor) -> None:
    out = chain.forward(x)
    out.register_hook(lambda grad: None)
    out.sum().backward()


def with_hook_of_a_node(chain: Chain, x: Tensor) -> None:
    out = chain.forward(x)
    assert out.grad_fn is not None
    out.grad_fn.register_prehook(lambda grads: None)
    out.sum().backward()


def with_hook_of_a_leaf(chain: Chain, x: Tensor) -> None:
    for weight in chain.weights:
        weight.register_post_accumulate_grad_hook(lambda weight: None)
    chain.forward(x).sum().backward()


def with_function_of_the_users(chain: Chain, x: Tensor) -> None:
    Doubled.apply(chain.forward(x)).sum().backward()


def with_mode(chain: Chain, x: Tensor) -> None:
    out = chain.forward(x)
    with Sees():
        out.sum().backward()


def with_something_between(chain: Chain, x: Tensor) -> None:
    chain.forward(x, lambda function, x: chain.call(function, x) + 1).sum().backward()


def with_several_outputs(chain: Chain, x: Tensor) -> None:
    chain.forward(
        x, lambda function, x: chain.call(lambda x: (function(x), 1), x)[0]
    ).sum().backward()


def with_group(chain: Chain, x: Tensor) -> None:
    with GraphExecGroup():
        chain.forward(x).sum().backward()


def with_saved_tensors_hooks(chain: Chain, x: Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = chain.forward(x)
    out.sum().backward()


def with_contexts(chain: Chain, x: Tensor) -> None:
    contexts = torch_reprise.create_selective_checkpoint_contexts
    chain.forward(
        x,
        lambda function, x: checkpoint(
            function, x, use_reentrant=False, context_fn=lambda: contexts([])
        ),
    ).sum().backward()


def with_debug(chain: Chain, x: Tensor) -> None:
    chain.forward(x, lambda f, x: Checkpointer(debug=True)(f, x)).sum().backward()


def with_recording(chain: Chain, x: Tensor) -> None:
    with ledger.record():
        chain.forward(x).sum().backward()


def inside_of_another(chain: Chain, x: Tensor) -> None:
    chain.calls = [-1] * LENGTH  # the outer one calls each once more
    chain.call(chain.forward, x).sum().backward()


def with_unpack_hook_inside(chain: Chain, x: Tensor) -> None:
    """Of the user's, inside of one of the functions: a hook could load what the next one needs."""

    def inside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def hooked(x: Tensor) -> Tensor:
            x = function(x)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return x.exp().sin()

        return chain.call(hooked, x)

    chain.forward(x, inside).sum().backward()


def with_unpack_hook_beside(chain: Chain, x: Tensor) -> None:
    x = chain.forward(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        x.exp().sum().backward()


def with_segments_inside(chain: Chain, x: Tensor) -> None:
    def inside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return chain.call(lambda x: checkpointed()(torch.sin, function(x)), x)

    chain.forward(x, inside).sum().backward()


def with_hook_of_the_root(chain: Chain, x: Tensor) -> None:
    for number in range(LENGTH - 1):
        x = chain.call(chain.segment(number), x)

    def last(x: Tensor) -> Tensor:
        x = chain.segment(LENGTH - 1)(x)
        return torch.dot(x, x)  # the root asks for what it saved

    loss = chain.call(last, x)
    assert loss.grad_fn is not None
    loss.grad_fn.register_hook(lambda *_: None)
    loss.backward()


def with_function_in_a_view(chain: Chain, x: Tensor) -> None:
    def inside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def changed(x: Tensor) -> Tensor:
            x = function(x).clone()
            ScalesInPlace.apply(x[:2])
            return x.sin()

        return chain.call(changed, x)

    chain.forward(x, inside).sum().backward()


def with_anomaly_mode(chain: Chain, x: Tensor) -> None:
    with torch.autograd.detect_anomaly(check_nan=False):
        chain.forward(x).sum().backward()


REASONS = [
    with_hook_of_a_tensor,
    with_hook_of_a_node,
    with_hook_of_a_leaf,
    with_function_of_the_users,
    with_mode,
    with_something_between,
    with_group,
    with_saved_tensors_hooks,
    with_recording,
    inside_of_another,
    with_unpack_hook_inside,
    with_segments_inside,
    with_hook_of_the_root,
    with_function_in_a_view,
    pytest.param(
        with_anomaly_mode,
        marks=pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
    ),
]
REASONS_IN_HOOKS = [with_several_outputs, with_contexts, with_debug, with_unpack_hook_beside]


@pytest.mark.parametrize("backward", REASONS)
def test_reasons_to_wait_until_it_is_asked_for(
    chain: Chain, backward: Callable[[Chain, Tensor], None]
) -> None:
    backward(chain, leaf(4))
    assert chain.ahead == [] and {0, 1, 2} <= set(chain.replayed)


@pytest.mark.parametrize("backward", REASONS_IN_HOOKS)
def test_reasons_with_saved_tensor_hooks_alone(
    in_hooks: Chain, backward: Callable[[Chain, Tensor], None]
) -> None:
    backward(in_hooks, leaf(4))
    assert in_hooks.ahead == [] and {0, 1, 2} <= set(in_hooks.replayed)


@pytest.mark.parametrize("what", ["hook", "function"])
def test_what_the_replay_puts_into_an_inner_graph(what: str) -> None:
    """Of the reentrant form: it is there after the replay, and runs in the inner backward."""
    chain = Chain(checkpointed(use_reentrant=True))

    def inside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def changed(x: Tensor) -> Tensor:
            out = function(x)
            if what == "function":
                return Doubled.apply(out)  # type: ignore[no-any-return]
            if out.requires_grad:
                out.register_hook(lambda grad: None)
            return out

        return chain.call(changed, x)

    chain.forward(leaf(4), inside).sum().backward()
    assert chain.ahead == [] and chain.replayed == [3, 2, 1, 0]


def test_another_segment_in_between() -> None:
    """What the graph of the other one runs is not known before its replay."""
    chain = Chain(checkpointed(use_reentrant=True), length=2)
    x = chain.call(chain.segment(0), leaf(4))
    side = chain.call(lambda x: Doubled.apply(x), x)
    (chain.call(chain.segment(1), x) + side).sum().backward()
    assert chain.replayed == [1, 0] and chain.ahead == []


def test_a_call_for_some_gradients_replays_what_it_needs(in_hooks: Chain) -> None:
    out = in_hooks.forward(leaf(4))
    torch.autograd.grad(out.sum(), in_hooks.weights[-2])
    assert in_hooks.replayed == [3, 2]


def test_a_call_for_the_gradient_of_the_input(chain: Chain) -> None:
    x = leaf(4)
    torch.autograd.grad(chain.forward(x).sum(), x)
    assert chain.replayed == [3, 2, 1, 0]


def test_what_is_not_asked_for_is_not_replayed(in_hooks: Chain) -> None:
    """The second half's graph ends at a detached tensor, though its segments follow the others."""

    def cut(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return in_hooks.call(lambda x: function(x.detach()), x)

    x = in_hooks.call(in_hooks.segment(1), in_hooks.call(in_hooks.segment(0), leaf(4)))
    cut(in_hooks.segment(2), x).sum().backward()
    assert in_hooks.replayed == [2]


def test_a_function_that_returns_what_it_did_not_make(in_hooks: Chain) -> None:
    kept: list[Tensor] = []
    made = leaf(4).sin()

    def keeps(x: Tensor) -> Tensor:
        kept.append(in_hooks.segment(0)(x))
        return made

    x = in_hooks.call(keeps, leaf(4))
    in_hooks.call(in_hooks.segment(1), x).sum().backward()
    assert in_hooks.replayed == [1]
    kept.clear()


def test_a_node_that_has_the_address_of_another(in_hooks: Chain) -> None:
    """The output's node is freed and the segment lives on, through another tensor of it."""
    kept: list[Tensor] = []

    def keeps(x: Tensor) -> Tensor:
        x = in_hooks.segment(0)(x)
        kept.append(x.exp())
        return x.cos()

    x = leaf(4).exp()
    in_hooks.call(keeps, leaf(4))
    for _ in range(5):  # one of them has the address
        in_hooks.call(torch.sin, x.cos()).sum().backward(retain_graph=True)
    assert in_hooks.replayed == []
    kept.clear()


def test_a_small_view_of_something_large() -> None:
    chain = Chain(checkpointed(), width=600, length=2)

    def first(x: Tensor) -> Tensor:
        x = chain.segment(0)(x)
        return (x[:, None] + torch.zeros(600, 600))[0].sin()  # 1.4 MB stay

    x = chain.call(first, leaf(600))
    chain.call(chain.segment(1), x).sum().backward()
    assert chain.replayed == [1, 0] and chain.ahead == []


def test_a_chain_that_is_long_is_freed(call: Call) -> None:
    x = leaf(4)
    out = x
    for _ in range(100_000):
        out = call(torch.sin, out)
    del out
    call(torch.cos, x).sum().backward()
    assert x.grad is not None


def test_a_graph_that_is_used_twice(chain: Chain) -> None:
    x = leaf(4)
    loss = chain.forward(x).sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    first = [x.grad, *(weight.grad for weight in chain.weights)]
    for tensor in [x, *chain.weights]:
        tensor.grad = None
    loss.backward()
    assert chain.calls == [3] * LENGTH and chain.ahead == ALL * 2
    for before, now in zip(first, [x.grad, *(w.grad for w in chain.weights)], strict=True):
        assert before is not None and now is not None and torch.equal(before, now)


def test_higher_derivatives_are_exact() -> None:
    def program(run: Any) -> Any:
        torch.manual_seed(2)
        chain, x = Chain(), leaf(4)
        out = chain.forward(x, lambda function, x: run(function, x))
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return out, gradient, x.grad, [weight.grad for weight in chain.weights]

    assert_exact(program, replays=None)


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_an_error_ahead(error: type[BaseException], call: Call) -> None:
    chain = Chain(call)
    whole = chain.segment(1)

    def breaks(x: Tensor) -> Tensor:
        if chain.calls[1] == 1:
            chain.calls[1] += 1
            raise error("in the replay")
        return whole(x)

    x = leaf(4)
    for function in (chain.segment(0), breaks, chain.segment(2), chain.segment(3)):
        x = call(function, x)
    loss = x.sum()
    standing = torch.get_rng_state()
    with pytest.raises(error, match="in the replay"):
        loss.backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), standing)
    assert chain.replayed == [3, 2]
    loss.backward()
    assert chain.calls == [2, 3, 3, 3]


def test_the_error_of_a_replay_that_does_not_match_names_its_segment(in_hooks: Chain) -> None:
    shapes = iter([3, 5])

    def grows(x: Tensor) -> Tensor:
        return x + x.sum().expand(next(shapes)).sin().sum()

    x = in_hooks.call(grows, leaf(4))
    message = ""
    try:
        in_hooks.call(in_hooks.segment(3), x).sum().backward()
    except CheckpointError as error:
        message = str(error)
    assert "grows saves other tensors" in message
    assert "Asked for by" not in message  # nobody has


def test_what_is_ahead_of_a_backward_that_fails_is_dropped(call: Call) -> None:
    made: list[weakref.ref[Tensor]] = []

    def first(x: Tensor) -> Tensor:
        x = x.exp()
        made.append(weakref.ref(x))
        return x.sin()

    def breaks(x: Tensor) -> Tensor:
        y = x.exp()
        y.mul_(2)  # which its backward needs as it was
        return y.sin()

    loss = call(breaks, call(first, leaf(4))).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    gc.collect()
    assert [tensor() for tensor in made[1:]] == [None] * (len(made) - 1)
    del loss


def test_threads_that_share_a_chain(chain: Chain) -> None:
    x = leaf(4)
    shared = chain.forward(x)
    losses = [shared.sin().sum(), shared.cos().sum()]
    in_threads(2, lambda i: losses[i].backward(retain_graph=True))
    assert sorted(chain.replayed) == sorted([*range(LENGTH)] * 2)


@both_forms
def test_models_of_modules_with_buffers(use_reentrant: bool) -> None:
    def program(run: Any) -> Any:
        torch.manual_seed(3)
        blocks = [
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.GELU())
            for _ in range(5)
        ]
        x = torch.randn(8, 6, requires_grad=True)
        results: list[Any] = []
        for _ in range(2):
            out = x
            for block in blocks:
                out = run(block, out)
            out.square().sum().backward()
            results.append(out)
        return (
            results,
            x.grad,
            [[*b.parameters()] for b in blocks],
            [[*b.buffers()] for b in blocks],
        )

    assert_exact(program, replays=10, use_reentrant=use_reentrant)


@both_forms
def test_the_upstream_entry_gives_the_same(use_reentrant: bool) -> None:
    """What torch computes for such a chain, by bits."""
    found = []
    for entry in (checkpoint, torch_checkpoint.checkpoint, plain):
        torch.manual_seed(4)
        chain, x = Chain(), leaf(4)
        call = (
            entry if entry is plain else lambda f, x, e=entry: e(f, x, use_reentrant=use_reentrant)
        )
        chain.forward(x, call).sum().backward()
        found.append([x.grad, *(weight.grad for weight in chain.weights), torch.get_rng_state()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
