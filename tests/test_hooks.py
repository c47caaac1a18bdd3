"""Saved-tensor hooks of the user around and inside a segment, save_on_cpu, and context_fn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Run, assert_exact, checkpointed, grads, leaf, message_of, plain, top_hooks
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn.functional import dropout

from torch_reprise import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    ledger,
    noop_context_fn,
)


class Shelf:
    """Hooks that keep a copy of what they are given under a number, and count both directions."""

    def __init__(self) -> None:
        self.packed: list[int] = []
        self.unpacked = 0
        self.copies: list[Tensor] = []

    def pack(self, tensor: Tensor) -> int:
        self.packed.append(tensor.data_ptr())
        self.copies.append(tensor.detach().clone())
        return len(self.copies) - 1

    def unpack(self, number: int) -> Tensor:
        self.unpacked += 1
        return self.copies[number]

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)


def mixed(x: Tensor, *, weight: Tensor, extra: Any) -> Tensor:
    h = dropout(torch.tanh(x @ weight), 0.3)
    return torch.sin(h * extra["list"][0]).exp() + extra["pair"][1].cos()


def call_mixed(run: Run, shelf: Shelf | None = None) -> tuple[Tensor, list[Tensor]]:
    leaves = [leaf(3, 3) for _ in range(4)]
    x, w, a, b = leaves
    with contextlib.nullcontext() if shelf is None else shelf.hooks():
        out = run(mixed, x, weight=w, extra={"list": [a], "pair": (1, b)})
    return out, leaves


# Hooks around a segment.


def test_hooks_around_see_every_input_and_nothing_else() -> None:
    shelf = Shelf()
    out, leaves = call_mixed(checkpointed(), shelf)
    assert sorted(shelf.packed) == sorted(t.data_ptr() for t in leaves)
    assert shelf.unpacked == 0
    out.sum().backward()
    assert len(shelf.packed) == len(leaves), "the replay's own tensors are no business of theirs"
    assert shelf.unpacked == len(leaves), "one replay, one unpack of each input"


def test_hooks_around_are_exact() -> None:
    def program(run: Run) -> Any:
        out, leaves = call_mixed(run, Shelf())
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        return out, grads(leaves)

    assert_exact(program, replays=2)


def test_what_the_hooks_around_unpack_is_what_the_replay_uses() -> None:
    x = leaf(4)
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t * 2):
        out = checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False)
    out.sum().backward()
    # The hooks replace the input by its double, so the slots come from the doubled input.
    doubled = (x * 2).detach().requires_grad_()
    (expected,) = torch.autograd.grad(doubled.sin().exp().sum(), doubled)
    assert torch.equal(x.grad, expected)


def test_hooks_around_several_segments_and_plain_code() -> None:
    def program(run: Run) -> Any:
        shelf = Shelf()
        x, w = leaf(4, 4), leaf(4, 4)
        with shelf.hooks():
            h = torch.sin(x @ w)
            h = run(lambda a, b: torch.tanh(a @ b), h, w)
            h = torch.exp(h)
            h = run(lambda a, *, b: dropout(a * b, 0.5).sigmoid(), h, b=w)
        h.sum().backward()
        return h, grads([x, w])

    assert_exact(program, replays=2)


@pytest.mark.parametrize("where", ["around", "inside", "both"])
def test_save_on_cpu(where: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        with save_on_cpu() if where != "around" else contextlib.nullcontext():
            h = torch.tanh(x @ w)
        return dropout(h.exp(), 0.2) * w

    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        with save_on_cpu() if where != "inside" else contextlib.nullcontext():
            out = run(function, x.sin(), w)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=1)


def test_hooks_around_nested_segments_see_the_outer_inputs_only() -> None:
    shelf = Shelf()
    x, w = leaf(4), leaf(4)

    def outer(a: Tensor) -> Tensor:
        return checkpoint(lambda b, c: torch.sin(b * c), a.exp(), w, use_reentrant=False).tanh()

    with shelf.hooks():
        out = checkpoint(outer, x, use_reentrant=False)
    assert shelf.packed == [x.data_ptr()]
    out.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(torch.sin(x.exp() * w).tanh().sum(), x)[0])


# Hooks inside a segment.


def test_hooks_inside_win_for_what_is_saved_under_them() -> None:
    counts: list[tuple[int, int]] = []

    def program(run: Run) -> Any:
        shelf = Shelf()

        def function(x: Tensor) -> Tensor:
            h = x.sin()
            with shelf.hooks():
                h = h.exp()
            return dropout(h, 0.5).tanh()

        x = leaf(4)
        out = run(function, x)
        in_forward = len(shelf.packed)
        out.sum().backward()
        counts.append((in_forward, shelf.unpacked))
        return out, grads([x])

    assert_exact(program, replays=1)
    assert counts[0] == counts[1] == (1, 1), "plain and checkpointed: packed once, unpacked once"


def test_hooks_inside_that_change_what_is_saved() -> None:
    def function(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: t.to(torch.bfloat16), lambda t: t.float()):
            h = x.exp() * x.sin()
        return h.tanh()

    def program(run: Run) -> Any:
        x = leaf(16)
        out = run(function, x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)
    assert_exact(program, replays=1, early_stop=False)


def test_code_that_looks_at_the_hook_stack_sees_a_pair() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(top_hooks() is not None)
        return x.sin().exp()

    assert top_hooks() is None
    x = leaf(3)
    out = checkpoint(function, x, use_reentrant=False)
    assert top_hooks() is None
    out.sum().backward()
    assert top_hooks() is None
    assert seen == [True, True]


def test_the_hook_stack_is_balanced_between_the_users_hooks() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    def broken(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            raise KeyError("inside")

    x = leaf(3)
    with saved_tensors_hooks(pack, unpack):
        checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False).sum().backward()
        assert top_hooks() == (pack, unpack)
        message_of(KeyError, lambda: checkpoint(broken, x, use_reentrant=False))
        assert top_hooks() == (pack, unpack)
    assert top_hooks() is None


def test_forbidden_hooks_are_refused_with_the_users_message() -> None:
    x = leaf(3)
    with disable_saved_tensors_hooks("no hooks in this part"):
        with pytest.raises(RuntimeError, match="no hooks in this part"):
            checkpoint(torch.sin, x, use_reentrant=False)
        out = checkpointed(use_reentrant=True)(torch.sin, x)  # needs no hooks
    out.sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
    assert top_hooks() is None


def test_an_error_in_a_users_unpack_hook_comes_through() -> None:
    def unpack(tensor: Tensor) -> Tensor:
        raise LookupError("nothing on the shelf")

    x = leaf(3)
    with saved_tensors_hooks(lambda t: t, unpack):
        out = checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False)
    assert "nothing on the shelf" in message_of(LookupError, lambda: out.sum().backward())
    assert top_hooks() is None


# A custom autograd.Function saves through the same hooks.


def test_a_custom_function_may_read_its_saved_tensors_twice() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
            ctx.power = power
            ctx.save_for_backward(x, x.square())
            return x**power

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (x, _) = ctx.saved_tensors
            (_, squared) = ctx.saved_tensors
            assert torch.equal(x * x, squared)
            return grad * ctx.power * squared, None

    def program(run: Run) -> Any:
        x = leaf(5)
        out = run(lambda t: torch.sin(Cube.apply(t.exp(), 3)), x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program)


def test_saved_tensors_read_from_the_graph_outside_backward() -> None:
    x = leaf(4)
    out = checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False)
    node = out.grad_fn
    for _ in range(2):
        assert torch.equal(node._saved_result, out)
    out.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


# context_fn.


def test_context_fn_wraps_the_forward_and_the_replay() -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        log.append(f"into {name}")
        try:
            yield
        finally:
            log.append(f"out of {name}")

    def program(run: Run) -> Any:
        x = leaf(4)
        out = run(lambda t: dropout(t.sin().exp(), 0.5), x)
        out.sum().backward(retain_graph=run is not plain)
        return out, grads([x])

    assert_exact(program, replays=1, context_fn=lambda: (noted("forward"), noted("replay")))
    assert log == ["into forward", "out of forward", "into replay", "out of replay"]


def test_noop_context_fn_is_two_contexts_that_do_nothing() -> None:
    forward, replay = noop_context_fn()
    with forward, replay:
        assert top_hooks() is None


def by_list() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


def by_policy() -> Any:
    def policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kw: Any) -> CheckpointPolicy:
        save = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("context_fn", [by_list, by_policy])
def test_selective_checkpointing(context_fn: Callable[[], Any]) -> None:
    def program(run: Run) -> Any:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        x = leaf(3, 4)
        out = run(lambda t: torch.sin(model(t)), x)
        out.sum().backward()
        return out, grads([x]), grads(model)

    assert_exact(program, replays=1, context_fn=context_fn)


def test_selective_checkpointing_does_not_run_what_it_saved_again() -> None:
    ran: list[str] = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, w = leaf(3, 3), leaf(3, 3)
    with Log():
        out = checkpoint(
            lambda a, b: torch.sin(torch.tanh(a @ b) @ b),
            x,
            w,
            use_reentrant=False,
            context_fn=by_list,
        )
        assert ran.count("mm") == 2
        ran.clear()
        before = ledger.replays()
        out.sum().backward()
    assert ledger.replays() == before + 1
    assert ran.count("mm") == 4, "four products of the backward pass itself, none of the replay"
    assert ran.count("tanh") == 1


@pytest.mark.parametrize("respect", [True, False])
def test_what_selective_checkpointing_saves_and_the_users_hooks(respect: bool) -> None:
    seen: list[int] = []

    def program(run: Run) -> Any:
        shelf = Shelf()
        x, w = leaf(3, 3), leaf(3, 3)
        with shelf.hooks():
            out = run(lambda a, b: torch.sin(torch.tanh(a @ b) @ b), x, w)
        seen.append(len(shelf.packed))
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=1, context_fn=by_list, respect_saved_tensors_hooks=respect)
    # The two inputs of the segment, and, if it is asked for, the two products.
    assert seen[1] == (4 if respect else 2)
