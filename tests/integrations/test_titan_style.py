"""torchtitan's way: a `checkpoint_wrapper` around blocks: around all, every k-th, with a policy.

torchtitan itself is not installed here: what it does is written out (its wrapper, its counting of
matrix multiplications, every second of which is kept).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import STEPS, assert_exact, played, training
from helpers import assert_same_bits, both_forms
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import torch_reprise
from torch_reprise import ledger

WIDTH, HEADS, BLOCKS, VOCABULARY = 32, 4, 4, 64
aten = torch.ops.aten
MULTIPLICATIONS = {aten.mm.default, aten.addmm.default}
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).view(batch, length, 3, HEADS, WIDTH // HEADS).transpose(1, 3).unbind(2)
        query, key, value = (part.contiguous() for part in parts)
        attended = nn.functional.scaled_dot_product_attention(
            query * rotation, key * rotation, value, is_causal=True
        )
        return self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, WIDTH)
        )
        self.feed_forward_norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(number): Block() for number in range(BLOCKS)})
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("rotation", torch.linspace(0.5, 1.5, WIDTH // HEADS))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, self.rotation)
        return self.output(self.norm(x))


class Counter(TorchDispatchMode):
    """Counts the multiplications that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += function in MULTIPLICATIONS
        return function(*args, **(kwargs or {}))


def every_second_multiplication() -> Any:
    """The contexts for one segment: keeps attention and every second `mm`."""
    counts = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in MULTIPLICATIONS:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % 2 == 1
        else:
            kept = operator is ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def wrap_blocks(model: Model, every: int = 1, **options: Any) -> None:
    for number, (name, block) in enumerate(list(model.layers.items())):
        if number % every == 0:
            model.layers[name] = checkpoint_wrapper(block, **options)


def train(checkpointing: bool, wrap: Callable[[Model], None]) -> dict[str, Any]:
    model = Model().train()
    if checkpointing:
        wrap(model)
    batches = [
        torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
        for seed in range(STEPS)
    ]

    def loss_of(tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )

    return training(model, batches, loss_of)


def exact(wrap: Callable[[Model], None], replays: int) -> None:
    assert_exact(lambda checkpointing: train(checkpointing, wrap), replays=replays)


@both_forms
def test_whole_blocks_are_exact(use_reentrant: bool) -> None:
    form = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    exact(functools.partial(wrap_blocks, checkpoint_impl=form), replays=STEPS * BLOCKS)


@pytest.mark.parametrize(("every", "segments"), [(2, 2), (3, 2)])
def test_every_kth_block_is_exact(every: int, segments: int) -> None:
    exact(functools.partial(wrap_blocks, every=every), replays=STEPS * segments)


@pytest.mark.parametrize(
    "options", [{}, {"preserve_rng_state": True, "determinism_check": "default"}, {"debug": True}]
)
def test_selection_by_operator_is_exact(options: dict[str, Any]) -> None:
    wrap = functools.partial(wrap_blocks, context_fn=every_second_multiplication, **options)
    exact(wrap, replays=STEPS * BLOCKS)


def test_wrapping_by_a_check_is_exact() -> None:
    def wrap(model: Model) -> None:
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, (Attention, nn.Sequential))
        )

    exact(wrap, replays=STEPS * BLOCKS * 2)


def test_our_function_may_be_given_to_the_wrapper() -> None:
    """Without install: the wrapper takes any checkpoint function."""

    def wrap(model: Model) -> None:
        wrap_blocks(model, checkpoint_fn=torch_reprise.checkpoint, use_reentrant=False)

    assert not torch_reprise.is_installed()
    before = ledger.replays()
    ours = played(lambda checkpointing: train(checkpointing, wrap), True)
    assert ledger.replays() - before == STEPS * BLOCKS
    assert_same_bits(ours, played(lambda checkpointing: train(checkpointing, wrap), False))


def test_selection_by_operator_keeps_what_it_says() -> None:
    """Or the tests above would be those of a policy that selects nothing."""

    def multiplications(**options: Any) -> int:
        model = Model().train()
        wrap_blocks(model, **options)
        loss = model(torch.zeros(1, 4, dtype=torch.int64)).sum()
        with Counter() as counter:
            loss.backward()
        return counter.calls

    with torch_reprise.installed():
        whole = multiplications()
        selected = multiplications(context_fn=every_second_multiplication)
    # Of the four of a block the first and third are kept.
    assert whole - selected == BLOCKS * 2
