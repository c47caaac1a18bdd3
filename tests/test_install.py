"""install, uninstall, installed: torch.utils.checkpoint becomes this library, and itself again."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.algorithms._checkpoint.checkpoint_wrapper as wrapper
import torch.utils.checkpoint as torch_checkpoint
from helpers import leaf
from torch import Tensor, nn
from torch.nn.functional import dropout

import torch_reprise
from torch_reprise import ledger


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    assert not torch_reprise.is_installed()
    yield
    torch_reprise.uninstall()


def names_in_all_modules() -> dict[tuple[str, str], int]:
    """Every name of every loaded module that is bound to something of checkpointing."""
    of_interest = {
        id(value)
        for module in (torch_checkpoint, torch_reprise)
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("__")
    }
    return {
        (module.__name__, name): id(value)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if id(value) in of_interest
    }


def noisy(x: Tensor) -> Tensor:
    return dropout(torch.tanh(x), 0.5).sin()


def replays_of(call: Callable[[Tensor], Tensor]) -> int:
    before = ledger.replays()
    call(leaf(8)).sum().backward()
    return ledger.replays() - before


def through_torch(x: Tensor) -> Tensor:
    return torch_checkpoint.checkpoint(noisy, x, use_reentrant=False)


def test_calls_of_torchs_function_run_on_ours_while_installed() -> None:
    assert replays_of(through_torch) == 0
    torch_reprise.install()
    assert torch_reprise.is_installed()
    assert replays_of(through_torch) == 1
    torch_reprise.uninstall()
    assert not torch_reprise.is_installed()
    assert replays_of(through_torch) == 0


def test_every_name_of_every_module_is_as_it_was_after_uninstall() -> None:
    before = names_in_all_modules()
    contents = dict(vars(torch_checkpoint))
    torch_reprise.install()
    assert names_in_all_modules() != before
    torch_reprise.uninstall()
    assert names_in_all_modules() == before
    after = dict(vars(torch_checkpoint))
    assert list(after) == list(contents)
    assert all(after[name] is contents[name] for name in contents)


def test_modules_that_had_bound_the_function_by_name_are_changed_too() -> None:
    original = wrapper.torch_utils_checkpoint
    torch_reprise.install()
    assert wrapper.torch_utils_checkpoint is torch_checkpoint.checkpoint
    assert wrapper.torch_utils_checkpoint is not original
    torch_reprise.uninstall()
    assert wrapper.torch_utils_checkpoint is original


def test_modules_that_are_imported_while_installed_get_torchs_back(tmp_path: Any) -> None:
    (tmp_path / "imported_late.py").write_text(
        "from torch.utils.checkpoint import checkpoint\n"
        "from torch.utils.checkpoint import GraphExecGroup as Group\n"
        "from torch_reprise import checkpoint as ours\n"
    )
    original = torch_checkpoint.checkpoint
    sys.path.insert(0, str(tmp_path))
    try:
        with torch_reprise.installed():
            late = importlib.import_module("imported_late")
            assert late.checkpoint is torch_checkpoint.checkpoint is not original
        assert late.checkpoint is original
        assert late.Group is torch_checkpoint.GraphExecGroup
        assert late.ours is torch_reprise.checkpoint, "bound on purpose"
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("imported_late", None)


def test_a_name_that_somebody_else_changed_meanwhile_is_left_alone() -> None:
    original = torch_checkpoint.check_backward_validity
    torch_reprise.install()

    def theirs(inputs: Any) -> None: ...

    torch_checkpoint.check_backward_validity = theirs
    torch_reprise.uninstall()
    assert torch_checkpoint.check_backward_validity is theirs
    torch_checkpoint.check_backward_validity = original


def test_lazy_modules_are_not_woken() -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    sys.modules["a_lazy_module"] = Lazy("a_lazy_module")
    try:
        torch_reprise.install()
        torch_reprise.uninstall()
    finally:
        del sys.modules["a_lazy_module"]


def test_twice_is_once() -> None:
    before = names_in_all_modules()
    torch_reprise.install()
    once = names_in_all_modules()
    torch_reprise.install()
    assert names_in_all_modules() == once
    torch_reprise.uninstall()
    assert names_in_all_modules() == before
    torch_reprise.uninstall()
    assert names_in_all_modules() == before


def test_only_the_outermost_block_uninstalls() -> None:
    with torch_reprise.installed():
        with torch_reprise.installed():
            pass
        assert torch_reprise.is_installed()
    assert not torch_reprise.is_installed()
    torch_reprise.install()
    with torch_reprise.installed():
        pass
    assert torch_reprise.is_installed()


def test_the_block_ends_also_after_an_error() -> None:
    with pytest.raises(KeyError, match="mine"), torch_reprise.installed():
        raise KeyError("mine")
    assert not torch_reprise.is_installed()


def test_threads_that_install_at_once_leave_one_state() -> None:
    before = names_in_all_modules()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(20):
            torch_reprise.install()
            torch_reprise.uninstall()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch_reprise.uninstall()
    assert names_in_all_modules() == before


def test_our_own_modules_keep_what_they_have() -> None:
    own = sys.modules["torch_reprise.checkpoint"]
    before = dict(vars(own))
    with torch_reprise.installed():
        assert dict(vars(own)) == before


@pytest.mark.parametrize(
    "name",
    [
        "_infer_device_type",
        "_get_autocast_kwargs",
        "_get_device_module",
        "DefaultDeviceType",
        "CheckpointError",
        "_CachingTorchDispatchMode",
        "_CachedTorchDispatchMode",
        "create_selective_checkpoint_contexts",
        "CheckpointPolicy",
        "noop_context_fn",
    ],
)
def test_what_libraries_take_from_there_besides_is_torchs(name: str) -> None:
    before = getattr(torch_checkpoint, name)
    with torch_reprise.installed():
        assert getattr(torch_checkpoint, name) is before


def test_our_error_is_caught_by_who_names_torchs() -> None:
    state = {"wide": True}

    def fickle(x: Tensor) -> Tensor:
        return (torch.cat([x, x]) if state["wide"] else x).tanh().sum()

    with torch_reprise.installed():
        out = torch_checkpoint.checkpoint(fickle, leaf(4), use_reentrant=False)
        state["wide"] = False
        with pytest.raises(torch_checkpoint.CheckpointError, match="saved at .*test_install"):
            out.backward()


def test_installed_functions_say_they_are_at_home_there_and_pickle_by_name() -> None:
    with torch_reprise.installed():
        function = torch_checkpoint.checkpoint
        assert function.__module__ == "torch.utils.checkpoint"
        assert pickle.loads(pickle.dumps(function)) is function
        text = pickle.dumps(function)
    assert pickle.loads(text) is torch_checkpoint.checkpoint, "by name: torch's again"
    assert issubclass(torch_reprise.GraphExecGroup, torch_checkpoint.GraphExecGroup)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_partial_made_before_is_torchs_front_to_our_segments(use_reentrant: bool) -> None:
    partial = functools.partial(torch_checkpoint.checkpoint, use_reentrant=use_reentrant)
    assert replays_of(lambda x: partial(noisy, x)) == 0
    with torch_reprise.installed():
        assert replays_of(lambda x: partial(noisy, x)) == 1
    assert replays_of(lambda x: partial(noisy, x)) == 0


def test_a_partial_made_while_installed_stays_ours() -> None:
    with torch_reprise.installed():
        partial = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)
    assert replays_of(lambda x: partial(noisy, x)) == 1


def test_segments_of_before_end_as_they_began() -> None:
    x = leaf(8)
    out = through_torch(x)
    with torch_reprise.installed():
        inside = through_torch(x)
        before = ledger.replays()
        out.sum().backward()
        assert ledger.replays() == before
    inside.sum().backward()
    assert ledger.replays() == before + 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_every_form_is_exact(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = None
        for buffer in model.buffers():
            buffer.zero_()
        x = leaf(4, 8)
        if checkpointed:
            out = torch_checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
        else:
            out = model(x)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        return [out.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]  # type: ignore[list-item]

    expected = run(False)
    with torch_reprise.installed():
        found = run(True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_sequential_and_the_reentrant_function_are_ours() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    with torch_reprise.installed():
        assert (
            replays_of(
                lambda x: torch_checkpoint.checkpoint_sequential(model, 4, x, use_reentrant=False)
            )
            == 3
        )
        assert replays_of(lambda x: torch_checkpoint.CheckpointFunction.apply(noisy, True, x)) == 1


def test_a_group_of_torchs_name_shares_replays() -> None:
    with torch_reprise.installed():
        x, y = leaf(8), leaf(8)
        out = torch_checkpoint.checkpoint(
            lambda a, b: (a.sin() * b.cos()).tanh(), x, y, use_reentrant=False
        )
        before = ledger.replays()
        with torch_checkpoint.GraphExecGroup():
            torch.autograd.grad(out.sum(), x, retain_graph=True)
            torch.autograd.grad(out.sum(), y)
        assert ledger.replays() == before + 1
        assert ledger.live_segments() == 1
        del out
    assert ledger.live_segments() == 0


def test_early_stop_and_debug_settings_reach_ours() -> None:
    calls: list[str] = []

    def function(x: Tensor) -> Tensor:
        out = x.tanh()
        calls.append("end")
        return out * 2

    with torch_reprise.installed(), torch_checkpoint.set_checkpoint_early_stop(False):
        out = torch_checkpoint.checkpoint(function, leaf(4), use_reentrant=False)
    out.sum().backward()
    assert calls == ["end", "end"]


# The private generator, which libraries call around a forward of their own.


def run_by_generator(function: Any, *args: Any, error: Exception | None = None) -> Any:
    generator = torch_checkpoint._checkpoint_without_reentrant_generator(
        function, True, torch_checkpoint.noop_context_fn, "default", False, True, *args
    )
    next(generator)
    if error is not None:
        generator.throw(error)
    out = function(*args)
    with pytest.raises(StopIteration):
        next(generator)
    return out


def test_the_generator_makes_a_segment_of_what_runs_in_between() -> None:
    torch.manual_seed(0)
    x, y = leaf(8), leaf(8)
    expected = noisy(x)
    expected.sum().backward()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with torch_reprise.installed():
        before = ledger.replays()
        leaf(8), leaf(8)
        with torch.no_grad():
            y.copy_(x)
        out = run_by_generator(noisy, y)
        assert ledger.live_segments() == 1
        out.sum().backward()
        assert ledger.replays() == before + 1
    assert torch.equal(out, expected) and torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    del out
    assert ledger.live_segments() == 0


def test_an_error_between_ends_the_segment_and_takes_the_hooks_off() -> None:
    with torch_reprise.installed():
        with pytest.raises(ValueError, match="mine"):
            run_by_generator(noisy, leaf(8), error=ValueError("mine"))
        assert ledger.live_segments() == 0
        before = ledger.replays()
        leaf(8).tanh().sum().backward()
        assert ledger.replays() == before


def test_the_generator_without_gradients_does_nothing() -> None:
    with torch_reprise.installed(), torch.no_grad():
        before = ledger.segments()
        run_by_generator(noisy, leaf(8))
        assert ledger.segments() == before


def test_a_context_that_swallows_an_error_between_is_an_error() -> None:
    with torch_reprise.installed():
        generator = torch_checkpoint._checkpoint_without_reentrant_generator(
            noisy,
            True,
            lambda: (contextlib.suppress(ValueError), contextlib.nullcontext()),
            "default",
            False,
            True,
            leaf(8),
        )
        next(generator)
        with pytest.raises(torch_reprise.CheckpointError, match="suppressed an exception"):
            generator.throw(ValueError("mine"))
        assert ledger.live_segments() == 0


def test_composable_checkpoint_runs_on_ours() -> None:
    from torch.distributed._composable import checkpoint as composable

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh())
    wrapped = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh())
    wrapped.load_state_dict(plain.state_dict())

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        x = leaf(4, 8)
        model(x).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    expected = run(plain)
    with torch_reprise.installed():
        composable(wrapped)
        before = ledger.replays()
        found = run(wrapped)
        assert ledger.replays() == before + 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
