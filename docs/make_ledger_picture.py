"""Records a step of the demo's GPT with nested segments, and writes what `Recording.save` makes.

python docs/make_ledger_picture.py                writes docs/pictures/ledger.png
python docs/make_ledger_picture.py report.html    writes that instead, in any form that save knows
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_reprise import checkpoint, ledger
from torch_reprise._demo.model import GPT, Block, GPTConfig

TARGET = Path(__file__).resolve().parent / "pictures" / "ledger.png"


def call(block: nn.Module, hidden: Tensor) -> Tensor:
    """A segment for the block and one for each half inside of it."""
    assert isinstance(block, Block)

    def attention(hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        packed = block.project_in(block.norm_attention(hidden))
        query, key, value = packed.view(batch, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
        return F.dropout(block.project_out(mixed.transpose(1, 2).reshape(hidden.shape)), 0.1)

    def mlp(hidden: Tensor) -> Tensor:
        inner = F.gelu(block.mlp_in(block.norm_mlp(hidden)))
        return F.dropout(block.mlp_out(inner), 0.1)

    def transformer_block(hidden: Tensor) -> Tensor:
        hidden = hidden + checkpoint(attention, hidden, use_reentrant=False)
        return hidden + checkpoint(mlp, hidden, use_reentrant=False)

    result: Tensor = checkpoint(transformer_block, hidden, use_reentrant=False)
    return result


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPTConfig(layers=6, width=64, heads=4, context=64, vocabulary=65, dropout=0.1)
    model = GPT(config)
    tokens = torch.randint(config.vocabulary, (16, config.context))

    def step() -> None:
        model.loss(model.run_blocks(model.embed(tokens), call), tokens).backward()

    step()  # the first one pays for memory that is new
    with ledger.record() as recording:
        step()
    recording.save(sys.argv[1] if len(sys.argv) > 1 else TARGET)


if __name__ == "__main__":
    main()
