"""Transformers: a small Llama with activation checkpointing, and its padded batches.

python examples/transformers_llama.py [--reentrant]
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: random weights, made-up tokens

import torch
from comparison import Watch, compare
from transformers import LlamaConfig, LlamaForCausalLM

REENTRANT = "--reentrant" in sys.argv


def batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 256, (4, 64), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1:, 40:] = 0
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def train(checkpointing: bool) -> Watch:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": REENTRANT})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch = Watch(model)
    for seed in range(6):
        loss = model(**batch(seed)).loss
        loss.backward()
        watch.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return watch


if __name__ == "__main__":
    sys.exit(compare(train))
