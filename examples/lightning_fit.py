"""Lightning: a module that calls torch's checkpoint in its forward, and a Trainer.

    python examples/lightning_fit.py [--reentrant]

The BatchNorms show what torch's checkpointing changes: their statistics count every batch twice.
"""

import logging
import sys
import warnings

import lightning
import torch
from comparison import Watch, compare
from torch import nn
from torch.utils.checkpoint import checkpoint

REENTRANT = "--reentrant" in sys.argv
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers")


class Network(lightning.LightningModule):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1))
            for _ in range(4)
        )
        self.last = nn.Linear(64, 4)
        self.checkpointing = checkpointing
        self.watch = Watch(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=REENTRANT) if self.checkpointing else block(x)
        return self.last(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        self.loss = nn.functional.cross_entropy(self(inputs), targets)
        return self.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.watch.step(self.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(checkpointing: bool) -> Watch:
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(96, 16, generator=generator), torch.randint(4, (96,), generator=generator)
    )
    network = Network(checkpointing)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, torch.utils.data.DataLoader(data, batch_size=16))
    return network.watch


if __name__ == "__main__":
    sys.exit(compare(train))
