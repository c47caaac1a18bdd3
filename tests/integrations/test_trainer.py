"""Transformers' Trainer, with both forms, by its new and its old argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Batch
from comparing import assert_exact, gradients, state
from helpers import both_forms

GPT2 = ARCHITECTURES["gpt2"]
BATCHES = 6


class Rows(torch.utils.data.Dataset[Batch]):
    """The rows of a few batches, one at a time; the Trainer puts them together again."""

    def __init__(self) -> None:
        batches = [GPT2.batch(seed) for seed in range(BATCHES)]
        self.rows = [
            {name: column[i] for name, column in batch.items()} for batch in batches for i in (0, 1)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index]


class Notes(transformers.TrainerCallback):
    """The gradients as the optimizer finds them, after accumulation and clipping."""

    def __init__(self) -> None:
        self.gradients: list[Any] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradients.append(gradients(model))


def train(checkpointing: bool, folder: Path, **options: Any) -> dict[str, Any]:
    model = GPT2.build()
    notes = Notes()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **(options if checkpointing else {}),
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Rows(), callbacks=[notes]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(notes.gradients) == 3
    return {"losses": losses, "gradients": notes.gradients, "state": state(model)}


@pytest.mark.needs_gc  # a Trainer and its callbacks hold each other
@both_forms
def test_the_trainer_is_exact(tmp_path: Path, use_reentrant: bool) -> None:
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    assert_exact(
        lambda checkpointing: train(checkpointing, tmp_path, **options),
        replays=BATCHES * GPT2.segments,
    )


@pytest.mark.needs_gc
def test_the_trainers_old_argument_is_exact(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
        assert_exact(
            lambda checkpointing: train(checkpointing, tmp_path, gradient_checkpointing=True),
            replays=BATCHES * GPT2.segments,
        )
