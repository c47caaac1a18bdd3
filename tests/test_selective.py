"""Selective checkpointing in all combinations with what is ours: the same bits.

The contexts are torch's, and so are the policies; which operator is saved is seen by counting.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Program,
    Run,
    assert_exact,
    assert_same_bits,
    checkpointed,
    grads,
    leaf,
    plain,
    play,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_reprise import (
    Checkpointer,
    CheckpointPolicy,
    GraphExecGroup,
    checkpoint,
    create_selective_checkpoint_contexts,
    install,
    ledger,
    uninstall,
)

SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def saving(*names: str) -> Callable[[], Any]:
    """Contexts that save the outputs of the operators whose name begins so."""

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return SAVE if operator.__name__.lstrip("_").startswith(names) else RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


POLICIES = {
    "products": saving("mm", "addmm", "bmm"),
    "random": saving("rand"),
    "products and random": saving("mm", "addmm", "rand"),
    "nothing": saving("no operator"),
    "a list": functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
    ),
}
policies = pytest.mark.parametrize("policy", list(POLICIES))


def drop(x: Tensor) -> Tensor:
    """Dropout whose draw is not changed in place: torch refuses to save those on the CPU."""
    return x * (torch.rand_like(x) > 0.4)


def assert_exact_run(program: Program, run: Run) -> None:
    """As `assert_exact`, for any way to run a segment."""
    expected = play(program, plain)
    before = ledger.replays()
    assert_same_bits(play(program, run), expected)
    assert ledger.replays() > before


class Net(nn.Module):
    """Products, draws, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = drop(self.first(x).tanh())
        return drop(self.second(self.norm(x)).sigmoid()) * x


def program(
    backward: Callable[[Tensor, Tensor, Net], Any], segments: int = 2, **contents: Any
) -> Program:
    def play(run: Run) -> Any:
        net = Net()
        x = leaf(4, 8)
        out = x
        for _ in range(segments):
            out = run(net, out)
        seen = backward(out, x, net)
        return out.detach(), seen, x.grad, grads(net), dict(net.named_buffers())

    return play


def once(out: Tensor, x: Tensor, net: Net) -> None:
    out.square().sum().backward()


def retained(out: Tensor, x: Tensor, net: Net) -> None:
    out.square().sum().backward(retain_graph=True)
    out.sin().sum().backward()


def twice(out: Tensor, x: Tensor, net: Net) -> None:
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    first.square().sum().backward()


def partly(out: Tensor, x: Tensor, net: Net) -> Any:
    first = torch.autograd.grad(out.square().sum(), [net.second.weight], retain_graph=True)
    return first, torch.autograd.grad(out.square().sum(), [x, net.first.bias])


def grouped(out: Tensor, x: Tensor, net: Net) -> Any:
    with GraphExecGroup():
        dx = torch.autograd.grad(out.square().sum(), [x], retain_graph=True)
        dw = torch.autograd.grad(out.square().sum(), [net.first.weight, net.second.weight])
    return dx, dw


BACKWARDS = {f.__name__: f for f in (once, retained, twice, partly, grouped)}


@policies
@pytest.mark.parametrize("backward", list(BACKWARDS))
def test_every_policy_with_every_way_of_calling_backward(policy: str, backward: str) -> None:
    assert_exact(program(BACKWARDS[backward]), context_fn=POLICIES[policy])


@policies
@pytest.mark.parametrize(
    "options",
    [
        {"determinism_check": "bitwise"},
        {"determinism_check": "none"},
        {"early_stop": False},
        {"debug": True},
        {"ambient": "check"},
        {"ambient": "ignore"},
        {"respect_saved_tensors_hooks": True},
        {"check_rng": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_policy_with_every_option(policy: str, options: dict[str, Any]) -> None:
    run = Checkpointer(context_fn=POLICIES[policy], **options)
    assert_exact_run(program(once), run)


@policies
def test_in_segments_inside_of_segments(policy: str) -> None:
    def play(run: Run) -> Any:
        net, other = Net(), Net()
        x = leaf(4, 8)
        out = run(lambda t: run(net, other(t)).sin() + run(net, t), x)
        out.square().sum().backward()
        return out.detach(), x.grad, grads(net), grads(other), dict(net.named_buffers())

    assert_exact(play, context_fn=POLICIES[policy])


@policies
def test_inside_of_a_plain_segment(policy: str) -> None:
    selective = checkpointed(context_fn=POLICIES[policy])

    def inside(run: Run) -> Any:
        net = Net()
        x = leaf(4, 8)
        inner = plain if run is plain else selective
        out = run(lambda t: inner(net, t.sin()).cos(), x)
        out.sum().backward()
        return out.detach(), x.grad, grads(net), dict(net.named_buffers())

    assert_exact(inside)


@policies
def test_around_a_plain_segment(policy: str) -> None:
    def around(run: Run) -> Any:
        net = Net()
        x = leaf(4, 8)
        inner = plain if run is plain else checkpointed()
        out = run(lambda t: inner(net, t.sin()).cos(), x)
        out.sum().backward()
        return out.detach(), x.grad, grads(net), dict(net.named_buffers())

    assert_exact(around, context_fn=POLICIES[policy])


@policies
def test_under_autocast(policy: str) -> None:
    def play(run: Run) -> Any:
        net = Net()
        x = leaf(4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(net, run(net, x))
        out.float().square().sum().backward()
        return out.detach(), x.grad, grads(net), dict(net.named_buffers())

    assert_exact(play, context_fn=POLICIES[policy])


def test_with_pythons_random_numbers() -> None:
    def function(x: Tensor) -> Tensor:
        return (drop(x.tanh()) * random.random()).sin() * random.random()

    results = []
    for run in (
        lambda f, x: f(x),
        Checkpointer(preserve_host_rng=True, context_fn=POLICIES["random"]),
    ):
        torch.manual_seed(0)
        random.seed(0)
        x = torch.ones(8, requires_grad=True)
        run(function, x).sum().backward()  # type: ignore[operator]
        results.append((x.grad, random.random(), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])  # type: ignore[arg-type]
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])


def test_through_torchs_name_while_installed() -> None:
    import torch.utils.checkpoint as torch_checkpoint

    install()
    try:
        assert_exact_run(
            program(retained),
            lambda f, *a: torch_checkpoint.checkpoint(
                f, *a, use_reentrant=False, context_fn=POLICIES["products and random"]
            ),
        )
    finally:
        uninstall()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_saved_is_not_run_again_and_what_is_not_is() -> None:
    net = Net()
    out = checkpoint(net, leaf(4, 8), use_reentrant=False, context_fn=POLICIES["products"])
    with Counting() as again:
        out.sum().backward()
    assert again.counts["addmm"] == 0, "saved"
    assert again.counts["tanh"] == 1 and again.counts["native_batch_norm"] == 1, "recomputed"


def test_the_ledger_counts_it_as_any_segment() -> None:
    net = Net()
    with ledger.record() as recording:
        out = checkpoint(net, leaf(4, 8), use_reentrant=False, context_fn=POLICIES["products"])
        out.sum().backward()
    (row,) = recording.rows
    assert row.name == "Net" and row.replays == 1 and row.generators == ("cpu",)
    del out
    assert ledger.live_segments() == 0


# --- operators that change what they are given, and those that draw without saying so


class Following(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach(), alpha=0.1)
        return (x * self.mean).sin()


@pytest.mark.parametrize("saved", [["mul_"], ["add_"], ["mul_", "add_"]])
@pytest.mark.parametrize("allow", [False, True])
def test_a_buffer_that_a_saved_operator_changes(saved: list[str], allow: bool) -> None:
    operators = [getattr(torch.ops.aten, name).Tensor for name in saved]
    contexts = functools.partial(
        create_selective_checkpoint_contexts, operators, allow_cache_entry_mutation=allow
    )

    def program(run: Run) -> Any:
        module, x = Following(), leaf(4)
        for _ in range(2):
            run(module, x).sum().backward()
        return x.grad, module.mean

    assert_exact(program, context_fn=contexts)


def test_what_a_saved_operator_changes_is_changed_in_the_replay_too() -> None:
    def fn(x: Tensor) -> Tensor:
        h = x * 2
        h.sin_()  # what it returns is passed over
        return (h * h).tanh() * h

    def program(run: Run) -> Any:
        x = leaf(4)
        run(fn, x).sum().backward()
        return x.grad

    contexts = functools.partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten.sin_.default],
        allow_cache_entry_mutation=True,
    )
    assert_exact(program, context_fn=contexts)


def test_operators_that_change_something_and_are_not_saved_run_once() -> None:
    def fn(x: Tensor) -> Tensor:
        h = x.sin()
        return (h * torch.empty_like(h).bernoulli_(0.5)).mul_(0.5).add_(1).exp()

    def program(run: Run) -> Any:
        x = leaf(16)
        run(fn, x).sum().backward()
        return x.grad

    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    assert_exact(program, context_fn=contexts)


@torch.library.custom_op("reprise_tests::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x * torch.rand_like(x)


noisy.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output / inputs[0]),
)


def test_a_saved_custom_operator_that_does_not_say_that_it_draws() -> None:
    def program(run: Run) -> Any:
        x = torch.rand(3, 4).requires_grad_()
        run(lambda x: (noisy(x.exp()) * torch.rand(3, 4)).sin().exp(), x).sum().backward()
        return x.grad

    contexts = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.reprise_tests.noisy.default]
    )
    assert_exact(program, context_fn=contexts)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_looking_at_a_jagged_tensor_is_not_an_operator_of_the_program() -> None:
    aten = torch.ops.aten
    contexts = functools.partial(
        create_selective_checkpoint_contexts,
        [aten.mm.default, aten.addmm.default, aten.sin.default],
    )

    def program(run: Run) -> Any:
        x = torch.nested.nested_tensor(
            [torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged, requires_grad=True
        )
        linear = nn.Linear(4, 4)
        run(lambda x: linear(x).sin() * x, x).values().sum().backward()
        return grads(linear)

    assert_exact(program, context_fn=contexts, early_stop=False)
