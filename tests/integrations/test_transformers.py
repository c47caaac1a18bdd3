"""Transformers: eight kinds of models with checkpointing on, against the same without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from comparing import (
    STEPS,
    Program,
    assert_exact,
    played,
    played_on_ours,
    played_on_torch,
    same_bits,
    training,
)
from helpers import assert_same_bits, both_forms

import torch_reprise
from torch_reprise import ledger

EXACT_REENTRANT = [name for name, kind in ARCHITECTURES.items() if kind.exact_reentrant]
AS_TORCH = [name for name, kind in ARCHITECTURES.items() if not kind.exact_reentrant]


def program(kind: Architecture, enable: Any = None, **options: Any) -> Program:
    """Trains a model; `options` are those of torch's checkpoint function."""

    def train(checkpointing: bool) -> dict[str, Any]:
        model = kind.build()
        if checkpointing:
            model.activation_checkpointing_enable(options, **(enable or {}))
        batches = [kind.batch(seed) for seed in range(STEPS)]
        return training(model, batches, lambda batch: model(**batch).loss)

    return train


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_form_with_hooks_is_exact(name: str) -> None:
    kind = ARCHITECTURES[name]
    assert_exact(program(kind, use_reentrant=False), replays=STEPS * kind.segments)


@pytest.mark.parametrize("name", EXACT_REENTRANT)
def test_the_reentrant_form_is_exact(name: str) -> None:
    kind = ARCHITECTURES[name]
    assert_exact(program(kind, use_reentrant=True), replays=STEPS * kind.segments)


@pytest.mark.parametrize("name", AS_TORCH)
def test_the_reentrant_form_has_torchs_bits_where_torchs_is_not_exact(name: str) -> None:
    kind = ARCHITECTURES[name]
    trained = program(kind, use_reentrant=True)
    torchs = played_on_torch(trained)
    assert not same_bits(torchs, played(trained, False)), "torch's is exact: test ours for it too"
    assert_same_bits(played_on_ours(trained, STEPS * kind.segments), torchs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_random_numbers_in_a_replay_would_show(name: str) -> None:
    """Or the tests above could not fail: dropout is inside of the segments of every model."""
    kind = ARCHITECTURES[name]
    drifting = program(kind, use_reentrant=False, preserve_rng_state=False)
    drifted = played_on_ours(drifting, STEPS * kind.segments)
    assert not same_bits(drifted, played(drifting, False))


@both_forms
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_ways_of_attention_are_exact(attention: str, use_reentrant: bool) -> None:
    kind = ARCHITECTURES["llama"]

    def train(checkpointing: bool) -> dict[str, Any]:
        model = kind.build()
        model.set_attn_implementation(attention)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        batches = [kind.batch(seed) for seed in range(STEPS)]
        return training(model, batches, lambda batch: model(**batch).loss)

    assert_exact(train, replays=STEPS * kind.segments)


@both_forms
def test_every_second_layer_is_exact(use_reentrant: bool) -> None:
    kind = ARCHITECTURES["gpt2"]
    trained = program(kind, {"every_n_layers": 2}, use_reentrant=use_reentrant)
    assert_exact(trained, replays=STEPS * 2)


def test_saved_inputs_that_are_offloaded_are_exact() -> None:
    """Transformers puts `save_on_cpu` around the segments."""
    kind = ARCHITECTURES["qwen2"]
    trained = program(kind, {"offload": True}, use_reentrant=False)
    assert_exact(trained, replays=STEPS * kind.segments)


@pytest.mark.parametrize("option", [{"determinism_check": "none"}, {"debug": True}])
def test_options_pass_through_the_partial(option: dict[str, Any]) -> None:
    kind = ARCHITECTURES["bert"]
    assert_exact(program(kind, use_reentrant=False, **option), replays=STEPS * kind.segments)


def test_the_old_name_switches_it_on_too() -> None:
    kind = ARCHITECTURES["llama"]

    def train(checkpointing: bool) -> dict[str, Any]:
        model = kind.build()
        if checkpointing:
            with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
        return training(model, [kind.batch(0)], lambda batch: model(**batch).loss)

    assert_exact(train, replays=kind.segments)


@both_forms
def test_a_cache_that_the_model_asks_for_is_left_out_of_the_segments(use_reentrant: bool) -> None:
    """The config says use_cache: Transformers takes the caches from the layers, and says so."""
    kind = ARCHITECTURES["llama"]

    def train(checkpointing: bool) -> dict[str, Any]:
        model = kind.build()
        if checkpointing:
            model.config.use_cache = True
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        batches = [kind.batch(seed) for seed in range(STEPS)]
        return training(model, batches, lambda batch: model(**batch).loss)

    assert_exact(train, replays=STEPS * kind.segments)


def test_evaluation_and_generation_begin_no_segment() -> None:
    kind = ARCHITECTURES["llama"]
    with torch_reprise.installed():
        model = kind.build()
        model.activation_checkpointing_enable({"use_reentrant": False})
        before = ledger.segments()
        batch = kind.batch(0)
        model.eval()
        plain = kind.build().eval()
        plain.load_state_dict(model.state_dict())
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
        tokens = batch["input_ids"][:1, :8]
        assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))
        assert ledger.segments() == before


def test_disabling_it_ends_it() -> None:
    kind = ARCHITECTURES["bert"]
    with torch_reprise.installed():
        model = kind.build()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.activation_checkpointing_disable()
        before = ledger.segments()
        model(**kind.batch(0)).loss.backward()
        assert ledger.segments() == before


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_switched_on_before_install_keeps_the_front_alone(use_reentrant: bool) -> None:
    """Its layers hold a partial of torch's function, which calls ours: docs/trainers.md."""
    kind = ARCHITECTURES["bert"]
    model = kind.build()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with torch_reprise.installed():
        before = ledger.segments()
        model(**kind.batch(0)).loss.backward()
        assert ledger.segments() > before
