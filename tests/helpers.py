"""Running one program plainly and checkpointed, and comparing what it did bit for bit.

A *program* is a function that takes `run` and calls `run(function, *args, **kwargs)` wherever a
segment begins; it returns everything that is to be compared (outputs, gradients, buffers) as nested
containers. `assert_exact` plays it twice from one seed, once with a `run` that is a plain call and
once with `torch_reprise.checkpoint`, and requires equal bits of everything returned and of the CPU
generator's state afterwards. It also requires a replay: a checkpoint that merely calls the function
would be exact as well.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_reprise
from torch_reprise import ledger

Run = Callable[..., Any]
Program = Callable[[Run], Any]

both_forms = pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
child_runs_backward = pytest.mark.skipif(
    torch.cuda.is_available(), reason="autograd's threads for a GPU let no child run a backward"
)


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def checkpointed(**options: Any) -> Run:
    """`torch_reprise.checkpoint` with these options; not reentrant unless said."""
    return functools.partial(torch_reprise.checkpoint, **{"use_reentrant": False, **options})


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


class _Altered:
    def __init__(self, altered: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.altered, self.change = altered, change

    def call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.change(result) if func is self.altered else result


class AlteredFunction(_Altered, TorchFunctionMode):
    """Changes the results of one function of torch."""

    __torch_function__ = _Altered.call


class AlteredOperator(_Altered, TorchDispatchMode):
    """Changes the results of one operator."""

    __torch_dispatch__ = _Altered.call


def random_steps(
    choose: random.Random,
    kinds: Sequence[str],
    blocks: Sequence[str],
    step: Callable[[str], Any],
    depth: int = 0,
) -> list[Any]:
    """A random program: what ``step`` makes of each kind, `inner` steps in those of ``blocks``."""
    found = []
    for _ in range(choose.randint(1, 4)):
        made = step(choose.choice([*kinds, *blocks] if depth < 3 else kinds))
        if made.kind in blocks:
            made.inner = random_steps(choose, kinds, blocks, step, depth + 1)
        found.append(made)
    return found


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def grads(owner: nn.Module | Iterable[Tensor]) -> list[Tensor | None]:
    tensors = owner.parameters() if isinstance(owner, nn.Module) else owner
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's elements as bytes: NaN equals itself here, and 0.0 differs from -0.0."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).clone()


def freeze(value: Any, path: str = "result") -> list[tuple[str, Any, Tensor | None]]:
    """`value` as rows (path, description, bytes) that hold no graph."""
    if isinstance(value, Tensor):
        about = (type(value).__name__, value.dtype, value.device, value.requires_grad)
        if hasattr(value, "__tensor_flatten__") and not value.is_nested:
            names, _ = value.__tensor_flatten__()
            parts = [freeze(getattr(value, n).detach(), f"{path}.{n}") for n in names]
            return [(path, (*about, tuple(value.shape)), None), *chain.from_iterable(parts)]
        if value.is_nested:
            inner = [p.detach() for p in value.unbind()]
        elif value.layout == torch.sparse_coo:
            whole = value.detach().coalesce()
            inner = [whole.indices(), whole.values()]
        elif value.layout == torch.sparse_csr:
            whole = value.detach()
            inner = [whole.crow_indices(), whole.col_indices(), whole.values()]
        else:
            base = value.detach().as_subclass(Tensor)
            return [(path, (*about, value.layout, tuple(value.shape)), bits(base))]
        parts = [freeze(part, f"{path}.part{i}") for i, part in enumerate(inner)]
        return [(path, (*about, value.layout), None), *chain.from_iterable(parts)]
    if isinstance(value, dict):
        parts = [freeze(v, f"{path}[{k!r}]") for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [freeze(v, f"{path}[{i}]") for i, v in enumerate(value)]
    else:
        return [(path, (type(value).__name__, value), None)]
    return [(path, (type(value).__name__, len(value)), None), *chain.from_iterable(parts)]


def play(program: Program, run: Run, seed: int = 7) -> list[tuple[str, Any, Tensor | None]]:
    torch.manual_seed(seed)
    random.seed(seed)
    rows = freeze(program(run))
    return [*rows, ("CPU generator", None, torch.get_rng_state())]


def assert_same_bits(
    found: list[tuple[str, Any, Tensor | None]], expected: list[tuple[str, Any, Tensor | None]]
) -> None:
    assert [row[0] for row in found] == [row[0] for row in expected]
    for (path, about, have), (_, about_expected, want) in zip(found, expected, strict=True):
        assert about == about_expected, f"{path}: {about} where {about_expected} was expected"
        if want is not None:
            assert have is not None and torch.equal(have, want), f"{path}: other bits"


def assert_exact(
    program: Program, *, replays: int | None = None, seed: int = 7, **options: Any
) -> None:
    """Plays `program` plainly and checkpointed with `options`; that must take `replays` replays."""
    expected = play(program, plain, seed)
    before = ledger.replays()
    found = play(program, checkpointed(**options), seed)
    count = ledger.replays() - before
    assert_same_bits(found, expected)
    if replays is None:
        assert count > 0, "nothing was replayed: the program did not exercise a segment"
    else:
        assert count == replays, f"{count} replays where {replays} were expected"


class Counted:
    """A function that knows how often it was called, and whether gradients were on each time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.grad_modes: list[bool] = []

    @property
    def calls(self) -> int:
        return len(self.grad_modes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.grad_modes.append(torch.is_grad_enabled())
        return self.function(*args, **kwargs)


class Changing:
    """Behaves as `first` in its first `times` calls and as `later` from then on."""

    def __init__(
        self, first: Callable[..., Any], later: Callable[..., Any], times: int = 1
    ) -> None:
        self.first = first
        self.later = later
        self.times = times
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return (self.first if self.calls <= self.times else self.later)(*args, **kwargs)


def message_of(expected: type[BaseException], call: Callable[[], object]) -> str:
    """The text of the `expected` error of `call()`.

    `with pytest.raises(...) as caught` keeps the exception in the frame that its traceback holds:
    a cycle, which would keep every segment of that frame alive until a collection.
    """
    try:
        call()
    except expected as error:
        return str(error)
    pytest.fail(f"no {expected.__name__} was raised")


def line_of(function: Callable[..., Any], part: str) -> str:
    """`file:line` of the line of `function` that contains `part`."""
    lines, first = inspect.getsourcelines(function)
    (index,) = (i for i, line in enumerate(lines) if part in line)
    return f"{inspect.getsourcefile(function)}:{first + index}"


def top_hooks() -> Any:
    """The innermost pair of saved-tensor hooks of this thread, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def in_threads(count: int, work: Callable[[int], object], timeout: float = 60.0) -> None:
    """Runs `work(i)` in `count` threads that start together; raises what one of them raised."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def body(index: int) -> None:
        try:
            barrier.wait(timeout)
            work(index)
        except BaseException as error:
            error.__traceback__ = None  # its frames hold the tensors of this thread
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs: deadlock?"
    if errors:
        raise errors.pop()
