"""What the library leans on in torch's internals: each fence has a test that falls first."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import child_runs_backward
from torch import Tensor, nn

import torch_reprise
from torch_reprise import _C, _compat, checkpoint, ledger


def program(run: Any) -> list[Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 6))
    x = torch.randn(5, 6, requires_grad=True)
    y = run(model, x)
    y = run(lambda t: run(lambda u: (u * 2).sin(), t).exp(), y)
    y.square().sum().backward()
    grads = [p.grad for p in (x, *model.parameters())]
    return [y.detach(), torch.get_rng_state(), *(g for g in grads if g is not None)]


def assert_exact() -> None:
    expected = program(lambda fn, x: fn(x))
    before = ledger.replays()
    found = program(lambda fn, x: checkpoint(fn, x, use_reentrant=False))
    assert ledger.replays() - before == 3
    assert len(found) == len(expected) == 7
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextlib.contextmanager
def python_hooks() -> Iterator[None]:
    _C.enable_native_hooks(False)
    try:
        yield
    finally:
        _C.enable_native_hooks(True)


def saved_tensor_hook_calls() -> int:
    """How often torch calls the pack hook of a segment from Python."""
    calls = 0

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        pack = torch._C._autograd._top_saved_tensors_default_hooks(False)[0]
        assert type(pack).__name__ == "HookPack"
        calls += 1
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(count, x, use_reentrant=False).sum().backward()
    return calls


def test_our_engine_is_the_default_one() -> None:
    assert _C.native_hooks_installed()
    assert_exact()
    assert saved_tensor_hook_calls() == 2


def test_the_pair_on_the_stack_works_without_our_engine() -> None:
    with python_hooks():
        assert_exact()
    assert ledger.live_segments() == 0


def test_a_graph_may_begin_in_one_way_and_end_in_the_other() -> None:
    x = torch.randn(4, requires_grad=True)
    with python_hooks():
        y = checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False)
    y.sum().backward()
    expected = torch.autograd.grad(x.sin().exp().sum(), x)[0]
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_an_error_in_a_replay_with_python_hooks() -> None:
    calls = 0

    def changing(t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return t.sin() if calls == 1 else t[:2].sin()

    x = torch.randn(4, requires_grad=True)
    with python_hooks():
        y = checkpoint(changing, x, use_reentrant=False)
        with pytest.raises(torch_reprise.CheckpointError, match="position 0"):
            y.sum().backward()


def test_hooks_that_the_user_pushes_inside_win() -> None:
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.detach())
        return packed[-1]  # the tensor itself would keep its own node, and that one the tensor

    def inner(t: Tensor) -> Tensor:
        t = t.sin()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return t.exp()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(inner, x, use_reentrant=False)
    assert len(packed) == 1 and torch.equal(packed[0], y)
    assert ledger.live_slots() == 1


def test_a_pack_hook_knows_the_users_hooks_below_it() -> None:
    def pack(t: Tensor) -> Tensor:
        return t

    found = []

    def inner(t: Tensor) -> Tensor:
        found.append(_compat.user_hooks())
        return t.sin()

    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        checkpoint(lambda t: checkpoint(inner, t, use_reentrant=False), x, use_reentrant=False)
    checkpoint(inner, x, use_reentrant=False)
    assert found == [(pack, pack), None]


def test_hooks_that_are_disabled() -> None:
    x = torch.randn(3, requires_grad=True)
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("no hooks here, please"),
        pytest.raises(RuntimeError, match="no hooks here, please"),
    ):
        checkpoint(torch.sin, x, use_reentrant=False)
    y = checkpoint(torch.sin, x, use_reentrant=False)
    with torch.autograd.graph.disable_saved_tensors_hooks("not in backward either"):
        y.sum().backward()  # a replay is not something that the user pushes
        with pytest.raises(RuntimeError, match="not in backward either"):
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t).__enter__()
    assert x.grad is not None and torch.equal(x.grad, x.detach().cos())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_function_transform_over_a_segment(use_reentrant: bool) -> None:
    x = torch.randn(4)
    found = torch.func.grad(
        lambda t: checkpoint(lambda u: u.sin().exp(), t, use_reentrant=use_reentrant).sum()
    )(x)
    assert torch.equal(found, torch.func.grad(lambda t: t.sin().exp().sum())(x))


def test_selective_checkpointing_still_has_the_parts_we_use() -> None:
    forward, _ = torch_reprise.create_selective_checkpoint_contexts([torch.ops.aten.sin.default])
    assert _compat.is_selective(forward)
    assert not _compat.is_selective(contextlib.nullcontext())
    if not hasattr(forward, "respect_saved_tensors_hooks"):
        assert forward.storage.default_factory is dict


def test_what_selective_checkpointing_saves_goes_through_the_users_hooks() -> None:
    packed: list[Tensor] = []

    def pack(t: Tensor) -> tuple[str, Tensor]:
        packed.append(t.clone())
        return ("packed", t)

    def unpack(entry: tuple[str, Tensor]) -> Tensor:
        assert entry[0] == "packed"
        return entry[1]

    def contexts() -> Any:
        return torch_reprise.create_selective_checkpoint_contexts([torch.ops.aten.sin.default])

    x = torch.randn(3, requires_grad=True)
    for respect in (True, False):
        packed.clear()
        x.grad = None
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = checkpoint(
                lambda t: t.sin().exp(),
                x,
                use_reentrant=False,
                context_fn=contexts,
                respect_saved_tensors_hooks=respect,
            )
        saved_by_policy = [t for t in packed if torch.equal(t, x.detach().sin())]
        assert len(saved_by_policy) == (1 if respect else 0)
        y.sum().backward()
        expected = torch.autograd.grad(x.sin().exp().sum(), x)[0]
        assert x.grad is not None and torch.equal(x.grad, expected)


@child_runs_backward
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_goes_on() -> None:
    assert_exact()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert_exact()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _train_distributed(rank: int, port: int, static_graph: bool) -> None:
    """One DDP step plainly and checkpointed, on each of two processes."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    class Model(nn.Module):
        def __init__(self, run: Any) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)) for _ in range(3)
            )
            self.run = run

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = self.run(block, x)
            return x

    results = []
    for run in (lambda fn, x: fn(x), lambda fn, x: checkpoint(fn, x, use_reentrant=False)):
        torch.manual_seed(1)
        model = DistributedDataParallel(Model(run), static_graph=static_graph)
        torch.manual_seed(10 + rank)
        for _ in range(2):
            x = torch.randn(4, 8, requires_grad=True)
            model(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    dist.barrier()
    # Not to the end of Python: a thread of gloo that lets go of the last barrier there asks for
    # the interpreter lock, in a destructor, and ends the process (plain DDP too, one run in ten).
    os._exit(0)


def test_tested_versions_of_python_have_the_short_ways() -> None:
    version = sys.version_info[:3]
    assert _C.READS_FRAMES == ((3, 11) <= version < (3, 14))
    # Python 3.13.0 does not tell when an attribute is set.
    assert _C.SEES_CHANGES_OF_DICTS == (version < (3, 14) and version != (3, 13, 0))


@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel_finds_its_callbacks(static_graph: bool) -> None:
    """DDP queues a callback on the default engine, which is ours."""
    torch.multiprocessing.spawn(_train_distributed, (_free_port(), static_graph), nprocs=2)
