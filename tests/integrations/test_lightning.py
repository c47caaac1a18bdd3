"""Lightning: a module of its user's that calls checkpoint, trained by a Trainer."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from comparing import assert_exact, gradients, played_on_torch, state
from helpers import both_forms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # bound by name here, as in most programs

BATCHES = 6
LAYERS = 3


class Network(lightning.LightningModule):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2))
            for _ in range(LAYERS)
        )
        self.last = nn.Linear(16, 4)
        self.use_reentrant = use_reentrant
        self.noted: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.use_reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return self.last(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self(inputs), targets)
        self.log("loss", loss)
        self.noted.append(loss.detach().clone())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.noted.append(gradients(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(checkpointing: bool, use_reentrant: bool, precision: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(BATCHES)
    ]
    network = Network(use_reentrant if checkpointing else None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(network.noted) == BATCHES + BATCHES // 2
    return {"noted": network.noted, "state": state(network)}


@both_forms
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fitted_module_is_exact(precision: str, use_reentrant: bool) -> None:
    assert_exact(
        lambda checkpointing: train(checkpointing, use_reentrant, precision),
        replays=BATCHES * LAYERS,
    )


def test_torch_counts_the_batches_twice() -> None:
    """The BatchNorms' buffers, among what the test above compares, are what torch does not keep."""
    rows = {path: value for path, _, value in played_on_torch(lambda on: train(on, False, 32))}
    counted = rows["result['state']['layers.0.1.num_batches_tracked']"]
    assert counted is not None
    assert counted.view(torch.int64).item() == 2 * BATCHES
