"""Accelerate: a loop of one's own with accumulated gradients in bfloat16.

python examples/accelerate_loop.py [--reentrant]
"""

import sys

import torch
import torch.utils.checkpoint
from accelerate import Accelerator
from comparison import Watch, compare
from torch import nn

REENTRANT = "--reentrant" in sys.argv


class Network(nn.Module):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64), nn.LayerNorm(64)
            )
            for _ in range(4)
        )
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()  # what the reentrant form differentiates
        for block in self.blocks:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=REENTRANT)
            else:
                x = block(x)
        return x


def train(checkpointing: bool) -> Watch:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = Network(checkpointing).train()
    inputs = torch.randn(12, 32, 64, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(inputs, batch_size=None)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=3e-3), loader
    )
    watch = Watch(model)
    for x in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - x.detach().roll(1, 0)).square().mean()
            accelerator.backward(loss)
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()
    return watch


if __name__ == "__main__":
    sys.exit(compare(train))
