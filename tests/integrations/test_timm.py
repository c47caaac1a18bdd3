"""timm: `set_grad_checkpointing` on networks with and without buffers, and `checkpoint_seq`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from comparing import STEPS, Program, assert_exact, played, played_on_torch, training
from helpers import both_forms
from timm.models import checkpoint_seq
from torch import Tensor, nn

# How to make the network, and how many segments its forward has.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (
        lambda: timm.models.VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=3,
            num_heads=4,
            num_classes=5,
            drop_rate=0.1,
            attn_drop_rate=0.1,
            proj_drop_rate=0.1,
            drop_path_rate=0.2,
        ),
        3,
    ),
    "resnet": (
        lambda: timm.create_model("resnet10t", num_classes=5, drop_path_rate=0.2, drop_rate=0.1),
        4,
    ),
    "convnext": (
        lambda: timm.models.ConvNeXt(
            depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, drop_path_rate=0.2
        ),
        5,
    ),
    "efficientnet": (
        lambda: timm.create_model("test_efficientnet", num_classes=5, drop_path_rate=0.2),
        5,
    ),
}


def images(seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, size, size, generator=generator)
    return pixels, torch.randint(5, (3,), generator=generator)


def fit(network: Callable[[Tensor], Tensor], model: nn.Module, size: int = 32) -> dict[str, Any]:
    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(network(pixels), labels)

    return training(model, [images(seed, size) for seed in range(STEPS)], loss_of)


def program(name: str) -> Program:
    build, _ = NETWORKS[name]

    def train(checkpointing: bool) -> dict[str, Any]:
        model: Any = build().train()
        model.set_grad_checkpointing(checkpointing)
        return fit(model, model, 16 if name == "vit" else 32)

    return train


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_checkpointing_is_exact(name: str) -> None:
    assert_exact(program(name), replays=STEPS * NETWORKS[name][1])


@pytest.fixture
def reentrant_by_default() -> Any:
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_checkpointing_in_the_reentrant_form_is_exact(
    name: str, reentrant_by_default: None
) -> None:
    assert_exact(program(name), replays=STEPS * NETWORKS[name][1])


def test_torch_counts_the_batches_twice() -> None:
    """What the tests above compare and torch does not keep: the running statistics."""
    trained = program("resnet")
    plain = {path: value for path, _, value in played(trained, False)}
    torchs = {path: value for path, _, value in played_on_torch(trained)}
    counts = [path for path in plain if "layer" in path and "num_batches_tracked" in path]
    assert counts
    for path in counts:
        once, twice = plain[path], torchs[path]
        assert once is not None and twice is not None
        assert once.view(torch.int64).item() == STEPS
        assert twice.view(torch.int64).item() == 2 * STEPS


class Stack(nn.Module):
    """Layers with buffers and random numbers, run by `checkpoint_seq`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)
                )
                for _ in range(5)
            )
        )
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.first(x)
        x = checkpoint_seq(self.layers, x, **options) if options else self.layers(x)
        return self.last(x.mean((2, 3)))


@both_forms
@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ({"every": 1}, 5),
        ({"every": 2}, 3),
        ({"every": 2, "skip_last": True}, 2),
        ({"every": 4, "flatten": True}, 5),
    ],
)
def test_a_checkpointed_sequence_is_exact(
    options: dict[str, Any], segments: int, use_reentrant: bool
) -> None:
    def train(checkpointing: bool) -> dict[str, Any]:
        model = Stack().train()
        more = {**options, "use_reentrant": use_reentrant} if checkpointing else {}
        return fit(lambda pixels: model(pixels, **more), model)

    assert_exact(train, replays=STEPS * segments)
