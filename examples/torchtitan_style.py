"""torchtitan's way: every block in a `checkpoint_wrapper`, with a policy that keeps some operators.

    python examples/torchtitan_style.py [full | every2 | selective] [--reentrant]

"selective" keeps the attention and every second matrix multiplication of a block, and computes the
rest again. The form with hooks is the only one that can.
"""

import sys
from functools import partial

import torch
from comparison import Watch, compare
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

MODE = next((mode for mode in ("full", "every2") if mode in sys.argv), "selective")
FORM = CheckpointImpl.REENTRANT if "--reentrant" in sys.argv else CheckpointImpl.NO_REENTRANT
MULTIPLICATIONS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Block(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(256, 64)
        self.layers = nn.ModuleDict({str(number): Block() for number in range(4)})
        self.output = nn.Linear(64, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x)


def selective_contexts():
    """Called for each segment: the policy counts the multiplications of forward and replay."""
    counts = {False: 0, True: 0}

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        kept = operator is ATTENTION
        if operator in MULTIPLICATIONS:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_checkpointing(model: Model) -> None:
    wrap = partial(checkpoint_wrapper, checkpoint_impl=FORM)
    if MODE == "selective":
        wrap = partial(checkpoint_wrapper, context_fn=selective_contexts)
    for number, (name, block) in enumerate(list(model.layers.items())):
        if MODE != "every2" or number % 2 == 0:
            model.layers[name] = wrap(block)


def train(checkpointing: bool) -> Watch:
    model = Model().train()
    if checkpointing:
        apply_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch = Watch(model)
    for seed in range(6):
        tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(seed))
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        watch.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return watch


if __name__ == "__main__":
    sys.exit(compare(train))
