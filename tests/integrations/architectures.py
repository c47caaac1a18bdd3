"""Tiny Transformers models from their configs, with batches that fit: random weights, no download.

Each has dropout, so a replay that draws other numbers shows, and batches have padding, so masks go
through the segments. Caches are off in every part: Transformers switches them off itself where
checkpointing is on, and a program with a cache is another program (its attention takes another
path), so both runs go without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
Batch = dict[str, Tensor]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_batch(seed: int, *, labels: bool = True) -> Batch:
    """Three rows of token numbers; the last two are padded by other amounts."""
    tokens = torch.randint(2, VOCABULARY, (3, 12), generator=_generator(seed))
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    mask[2, 5:] = 0
    batch = {"input_ids": tokens * mask, "attention_mask": mask}
    if labels:
        batch["labels"] = tokens.masked_fill(mask == 0, -100)
    return batch


def pixel_batch(seed: int) -> Batch:
    generator = _generator(seed)
    return {
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "labels": torch.randint(5, (3,), generator=generator),
    }


def sound_batch(seed: int) -> Batch:
    generator = _generator(seed)
    return {
        "input_features": torch.randn(2, 8, 32, generator=generator),
        "labels": torch.randint(2, VOCABULARY, (2, 9), generator=generator),
    }


def translation_batch(seed: int) -> Batch:
    return {**text_batch(seed, labels=False), "labels": text_batch(seed + 1000)["labels"]}


@dataclass(frozen=True)
class Architecture:
    """How to make a model and its batches.

    Attributes:
        model: the class of Transformers.
        config: makes its config.
        batch: a batch from a seed.
        segments: how many segments a forward has when every layer is one.
        exact_reentrant: whether the reentrant form has the bits of the plain run. It has not
            where a tensor that needs a gradient (T5's position bias, an encoder's output) is used
            in several segments and more than once inside of one: its gradients are added up in
            another order, so the last bit may differ, in torch as in ours.
    """

    model: Any
    config: Callable[[], Any]
    batch: Callable[[int], Batch]
    segments: int
    exact_reentrant: bool = True

    def build(self) -> Any:
        """The model with weights drawn from the default generator, in training, without caches."""
        model = self.model(self.config())
        without_caches(model)
        return model.train()


def without_caches(model: torch.nn.Module) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", None):
            config.use_cache = False


def _decoder(config: Any, **more: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return config(**{**sizes, **more})


ARCHITECTURES = {
    "llama": Architecture(
        transformers.LlamaForCausalLM,
        lambda: _decoder(transformers.LlamaConfig, attention_bias=True),
        text_batch,
        segments=3,
    ),
    "qwen2": Architecture(  # every other layer looks at a sliding window: masks of two kinds
        transformers.Qwen2ForCausalLM,
        lambda: _decoder(
            transformers.Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        text_batch,
        segments=3,
    ),
    "gpt2": Architecture(
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=1,
        ),
        text_batch,
        segments=3,
    ),
    "mixtral": Architecture(
        transformers.MixtralForCausalLM,
        lambda: _decoder(
            transformers.MixtralConfig,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_jitter_noise=0.1,
        ),
        text_batch,
        segments=3,
    ),
    # Hooks carry the routers' logits out of the segments to the loss. In the reentrant form they
    # have no graph there, and that part of the gradient is missing, in torch and in ours.
    "mixtral-router-loss": Architecture(
        transformers.MixtralForCausalLM,
        lambda: _decoder(
            transformers.MixtralConfig,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
        ),
        text_batch,
        segments=3,
        exact_reentrant=False,
    ),
    # Layers put their keys and values into an object among the arguments, and later layers, which
    # are other segments, read them there. In the reentrant form they have no graph: as above.
    "gemma4": Architecture(
        transformers.Gemma4ForCausalLM,
        lambda: _decoder(
            transformers.Gemma4TextConfig,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=4,
            head_dim=8,
            global_head_dim=8,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
        text_batch,
        segments=4,
        exact_reentrant=False,
    ),
    "bert": Architecture(
        transformers.BertForMaskedLM,
        lambda: transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        text_batch,
        segments=3,
    ),
    "vit": Architecture(
        transformers.ViTForImageClassification,
        lambda: transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            num_labels=5,
        ),
        pixel_batch,
        segments=3,
    ),
    "t5": Architecture(
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        translation_batch,
        segments=4,
        exact_reentrant=False,
    ),
    "whisper": Architecture(
        transformers.WhisperForConditionalGeneration,
        lambda: transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=16,
            max_target_positions=32,
            dropout=0.1,
            attention_dropout=0.1,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        ),
        sound_batch,
        segments=4,
        exact_reentrant=False,
    ),
}
