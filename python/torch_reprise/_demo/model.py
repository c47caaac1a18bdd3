"""A small GPT: pre-norm transformer blocks with dropout in attention and in both residual paths.

The network does not know about checkpointing. Whoever runs it says how a block is called, which is
how the same network serves the plain run, ``torch.utils.checkpoint`` and this library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How one block is run: ``call(block, hidden)`` gives what ``block(hidden)`` gives.
BlockCall = Callable[[nn.Module, Tensor], Tensor]


def call_plainly(block: nn.Module, hidden: Tensor) -> Tensor:
    """Runs a block without checkpointing."""
    result: Tensor = block(hidden)
    return result


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network. ``width`` must be a multiple of ``heads``."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    dropout: float

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got width {self.width}, heads {self.heads}"
            )


class Block(nn.Module):
    """One transformer block, (batch, length, width) to the same shape.

    Dropout draws three times: on the attention weights and on what each half adds.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        drop = self.dropout if self.training else 0.0
        packed = self.project_in(self.norm_attention(hidden))
        query, key, value = packed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + F.dropout(self.project_out(mixed), drop)
        inner = F.gelu(self.mlp_in(self.norm_mlp(hidden)))
        return hidden + F.dropout(self.mlp_out(inner), drop)


class GPT(nn.Module):
    """Character-level language model in three parts: ``embed``, ``blocks``, ``loss``.

    The parts are apart so that a step can run and time the blocks, the part that is checkpointed,
    by itself. Input and output embeddings are not shared: every parameter is used once, so that no
    gradient is a sum whose order a checkpointed run could change.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.08)

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, length) character numbers to (batch, length, width)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        drop = self.config.dropout if self.training else 0.0
        return F.dropout(self.tokens(tokens) + self.positions(places), drop)

    def run_blocks(self, hidden: Tensor, call: BlockCall = call_plainly) -> Tensor:
        """All blocks in order, each through ``call``."""
        for block in self.blocks:
            hidden = call(block, hidden)
        return hidden

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per character."""
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
