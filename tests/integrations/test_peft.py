"""PEFT: LoRA on a frozen Llama, whose embeddings are made to ask for gradients."""

from __future__ import annotations

from typing import Any

import peft
from architectures import ARCHITECTURES
from comparing import STEPS, assert_exact, played, training
from helpers import both_forms

LLAMA = ARCHITECTURES["llama"]


def with_lora() -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=0.2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,  # B is not zero, so that every part gets a gradient at once
    )
    return peft.get_peft_model(LLAMA.build(), config)


def train(checkpointing: bool, use_reentrant: bool) -> dict[str, Any]:
    model = with_lora()
    model.enable_input_require_grads()
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    batches = [LLAMA.batch(seed) for seed in range(STEPS)]
    return training(model, batches, lambda batch: model(**batch).loss)


@both_forms
def test_lora_is_exact(use_reentrant: bool) -> None:
    assert_exact(
        lambda checkpointing: train(checkpointing, use_reentrant), replays=STEPS * LLAMA.segments
    )


def test_only_the_adapters_are_trained() -> None:
    rows = {path: about for path, about, _ in played(lambda on: train(on, False), False)}
    first = "result['steps'][0][1]"
    # A gradient that is missing is None in its row.
    trained = {path for path in rows if path.startswith(first) and rows[path][1] is not None}
    trained.discard(first)
    assert len(trained) == LLAMA.segments * 3 * 2
    assert all("lora_" in path for path in trained)
