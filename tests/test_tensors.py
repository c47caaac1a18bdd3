"""Kinds of tensors that a segment takes, makes and saves: dtypes, layouts, subclasses, views."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from helpers import Run, assert_exact, both_forms, grads, leaf
from torch import Tensor, nn
from torch.utils._pytree import tree_map

sparse_warnings = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta",
    "ignore:Sparse invariant checks are implicitly disabled",
)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128],
    ids=str,
)
@both_forms
def test_dtypes(dtype: torch.dtype, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4, dtype=dtype), leaf(4, 4, dtype=dtype)
        out = run(lambda a, b: torch.tanh(a * b).exp() * a.sin(), x, w)
        out.abs().sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_conjugate_and_negative_views() -> None:
    def function(z: Tensor) -> Any:
        h = (z * z).conj()
        negative = h.imag  # a view with the negative bit, lazily
        assert h.is_conj() and negative.is_neg()
        return h.exp() * z, negative.sin() * negative, torch.view_as_real(h.resolve_conj()).exp()

    def program(run: Run) -> Any:
        z = leaf(5, dtype=torch.complex64)
        out = run(function, z.conj())
        sum(part.abs().sum() for part in out).backward()
        return out, grads([z])

    assert_exact(program, replays=1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)], ids=str)
@both_forms
def test_scalars_and_empty_tensors(shape: tuple[int, ...], use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(*shape), leaf()
        out = run(lambda a, b: torch.sin(a * b).exp(), x, w)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_nan_infinity_and_signed_zeros_keep_their_bits() -> None:
    def program(run: Run) -> Any:
        x = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45], requires_grad=True)
        out = run(lambda t: (t * t).exp().log() / t, x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)


def test_integer_and_bool_tensors_are_saved_too() -> None:
    def function(table: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(index, table)
        chosen = torch.where(mask, rows.sin(), rows.exp())
        return chosen.gather(0, index[:, None].remainder(2).expand(-1, 3)).max(dim=0).values

    def program(run: Run) -> Any:
        table = leaf(6, 3)
        index, mask = torch.tensor([5, 0, 3, 3]), torch.rand(4, 3) > 0.5
        out = run(function, table, index, mask)
        out.sum().backward()
        return out, grads([table])

    assert_exact(program, replays=1)


def test_in_place_operations_and_views_inside() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).clone()
        h[:, 1:3].mul_(2.0)
        h.view(-1)[::2].sub_(0.5)
        h.tanh_()
        row = h.unbind(0)[1].clone()
        out = torch.empty_like(h)
        out.copy_(h.exp())
        out[0] = row
        return out.transpose(0, 1).add_(w[0, 0]).sigmoid_()

    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(function, x, w)
        (out * torch.randn(4, 4)).sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=1)
    assert_exact(program, replays=1, early_stop=False)


def test_views_as_arguments_and_memory_formats() -> None:
    def function(image: Tensor, column: Tensor) -> Tensor:
        return torch.conv2d(image, column.expand(2, 3, 3, 3)).tanh().permute(1, 0, 2, 3).exp()

    def program(run: Run) -> Any:
        image, kernel = leaf(2, 3, 5, 5), leaf(6, 3)
        args = image.to(memory_format=torch.channels_last), kernel[::2].T.reshape(1, 3, 3, 1)
        out = run(function, *args)
        out.sum().backward()
        return out, out.stride(), grads([image, kernel])

    assert_exact(program, replays=1)


@both_forms
def test_autocast_of_the_forward_is_that_of_the_replay(use_reentrant: bool) -> None:
    def function(x: Tensor, linear: nn.Module) -> Tensor:
        h = linear(x)
        with torch.autocast("cpu", enabled=False):
            h = h.float() @ linear.weight
        return torch.tanh(linear(h).float())

    def program(run: Run) -> Any:
        linear, x = nn.Linear(4, 4), leaf(2, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(function, x, linear)
        plainly = run(function, out, linear)
        with torch.autocast("cpu", dtype=torch.float16):
            plainly.sum().backward()
        return out, grads([x]), grads(linear)

    assert_exact(program, replays=2, use_reentrant=use_reentrant)


# Layouts.


@sparse_warnings
def test_sparse_coo() -> None:
    def function(m: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.sparse.mm(m, x)) * torch.sparse.mm(m, x.sin())

    def program(run: Run) -> Any:
        values, x = leaf(4), leaf(5, 2)
        index = torch.tensor([[0, 1, 2, 2], [1, 0, 4, 3]])
        m = torch.sparse_coo_tensor(index, values, (3, 5)).coalesce()
        out = run(function, m, x)
        out.sum().backward()
        return out, grads([values, x])

    assert_exact(program, replays=1)


@sparse_warnings
def test_sparse_gradients() -> None:
    def program(run: Run) -> Any:
        bag = nn.Embedding(10, 3, sparse=True)
        out = run(lambda index: torch.sin(bag(index)).exp(), torch.tensor([1, 7, 1, 2]))
        out.sum().backward()
        return out, bag.weight.grad

    assert_exact(program, replays=1)


@sparse_warnings
def test_sparse_csr() -> None:
    def function(m: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(m @ x).exp() * torch.sparse.mm(m, x.sin())

    def program(run: Run) -> Any:
        dense, x = torch.randn(4, 5).relu(), leaf(5, 2)
        m = dense.to_sparse_csr().requires_grad_()
        out = run(function, m, x)
        out.sum().backward()
        return out, m.grad, grads([x])

    assert_exact(program, replays=1)


def test_jagged_tensors() -> None:
    def function(batch: Tensor, weight: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(torch.nn.functional.linear(batch, weight))
        return h.sin() * h

    def program(run: Run) -> Any:
        rows = [leaf(length, 4) for length in (2, 5, 3)]
        weight = leaf(4, 4)
        batch = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        out = run(function, batch, weight)
        out.values().sum().backward()
        return out, grads([*rows, weight])

    assert_exact(program, replays=1)


# Subclasses.


class Logged(Tensor):
    """A subclass that watches `__torch_function__`."""

    log: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.log.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_torch_function_subclass() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4), leaf(4)
        Logged.log.clear()
        out = run(lambda a, b: torch.sin(a * b).exp(), x.as_subclass(Logged), w)
        forward = list(Logged.log)
        assert type(out) is Logged
        Tensor.backward(out.as_subclass(Tensor).sum())
        return out, forward, grads([x, w])

    assert_exact(program, replays=1)
    Logged.log.clear()


class Doubled(Tensor):
    """A wrapper that carries two plain tensors and runs every operation on both."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Doubled:
        made = Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device, layout=first.layout
        )
        made.first, made.second = first, second
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> Doubled:
        return Doubled(inner["first"], inner["second"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Doubled({self.first}, {self.second})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def pick(name: str) -> Any:
            def one(value: Any) -> Any:
                return getattr(value, name) if isinstance(value, Doubled) else value

            return func(*tree_map(one, args), **tree_map(one, kwargs or {}))

        first, second = pick("first"), pick("second")
        return Doubled(first, second) if isinstance(first, Tensor) else first


@both_forms
def test_a_wrapper_subclass_with_torch_dispatch(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = Doubled(torch.randn(3, 3), torch.randn(3, 3)).requires_grad_()
        w = leaf(3, 3)
        out = run(lambda a, b: torch.tanh(a @ b).exp() * a, x, w)
        assert type(out) is Doubled
        out.sum().backward()
        return out, x.grad, w.grad

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_a_subclass_made_and_left_inside() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        both = Doubled(w.detach(), w.detach().neg())
        h = (both * 2).exp()
        return torch.sin(x * h.first) * h.second

    def program(run: Run) -> Any:
        x, w = leaf(4), leaf(4)
        out = run(function, x, w)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)


def test_the_replay_is_given_the_tensors_themselves() -> None:
    """Code hangs attributes on parameters (`main_grad`, sharding notes) and reads them later."""
    seen: list[tuple[type, Any]] = []

    def function(p: Tensor, *, h: Tensor) -> Tensor:
        seen.extend([(type(p), p.note), (type(h), h.note)])
        return torch.sin(p * h).exp()

    def program(run: Run) -> Any:
        parameter, x = nn.Parameter(torch.randn(3)), leaf(3)
        hidden = x.exp()
        parameter.note, hidden.note = "parameter", "hidden"
        out = run(function, parameter, h=hidden)
        out.sum().backward()
        return out, grads([parameter, x])

    assert_exact(program, replays=1)
    assert seen == [(nn.Parameter, "parameter"), (Tensor, "hidden")] * 3, "plain, forward, replay"
