"""An ordinary training script with Transformers' Trainer. It knows nothing of torch_reprise:

    python examples/transformers_train.py --output_dir out --max_steps 4
    python -m torch_reprise run examples/transformers_train.py --output_dir out --max_steps 4 \\
        --activation_checkpointing True

All options are the Trainer's own. Losses and gradients of every step are written to
OUTPUT_DIR/steps.pt, where two runs can be compared.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: random weights, made-up text

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

TEXT = " ".join(f"{number} times {number} is {number * number}." for number in range(300)).encode()
LENGTH = 48


class Text(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(TEXT) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.tensor(list(TEXT[index * LENGTH : (index + 1) * LENGTH]))
        return {"input_ids": window, "labels": window}


class Steps(TrainerCallback):
    """Keeps the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    arguments.logging_steps = 1
    set_seed(arguments.seed)
    config = GPT2Config(
        vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=LENGTH, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    steps = Steps()
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Text(), callbacks=[steps])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save(
        {"losses": losses, "gradients": steps.gradients}, Path(arguments.output_dir) / "steps.pt"
    )


if __name__ == "__main__":
    main()
