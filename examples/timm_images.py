"""timm: a vision transformer, or a ResNet with its running statistics.

    python examples/timm_images.py [vit | resnet] [--reentrant]

The ResNet shows what torch's checkpointing changes: its BatchNorms count every batch twice.
"""

import sys

import timm
import torch
from comparison import Watch, compare
from torch import nn

NETWORK = "vit" if "vit" in sys.argv else "resnet"


def build() -> nn.Module:
    if NETWORK == "resnet":
        return timm.create_model("resnet10t", num_classes=10, drop_path_rate=0.1)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10,
        proj_drop_rate=0.1, drop_path_rate=0.1,
    )  # fmt: skip


def train(checkpointing: bool) -> Watch:
    model = build().train()
    model.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = Watch(model)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (4,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        watch.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return watch


if __name__ == "__main__":
    timm.layers.set_reentrant_ckpt("--reentrant" in sys.argv)
    sys.exit(compare(train))
