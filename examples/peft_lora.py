"""PEFT: LoRA on a frozen Llama.

    python examples/peft_lora.py [--reentrant]

`enable_input_require_grads` is what lets the reentrant form find something to differentiate:
all weights of the model proper are frozen.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: random weights, made-up tokens

import torch
from comparison import Watch, compare
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

REENTRANT = "--reentrant" in sys.argv


def train(checkpointing: bool) -> Watch:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
    base = LlamaForCausalLM(config)
    base.enable_input_require_grads()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": REENTRANT})
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.1, init_lora_weights=False)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    watch = Watch(model)
    for seed in range(6):
        tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        watch.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return watch


if __name__ == "__main__":
    sys.exit(compare(train))
