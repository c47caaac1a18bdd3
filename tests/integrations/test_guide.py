"""The code in docs/trainers.md runs, section by section, on models like those it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from architectures import ARCHITECTURES

import torch_reprise
from torch_reprise import ledger

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
LLAMA = ARCHITECTURES["llama"]


def section(title: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    bodies = dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    return re.findall(r"```python\n(.*?)```", bodies[title], re.DOTALL)


def switched_on() -> Any:
    model = LLAMA.build()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def resnet() -> Any:
    return timm.create_model("resnet10t", num_classes=5).train()


# By section: how many blocks it has, how many segments they make, and the names that they use.
SECTIONS: dict[str, tuple[int, int, Any]] = {
    "Transformers": (1, 3, lambda: {"model": LLAMA.build()}),
    "PEFT": (
        1,
        3,
        lambda: {"peft": peft, "model": LLAMA.build(), "lora": peft.LoraConfig("CAUSAL_LM")},
    ),
    "timm": (1, 4, lambda: {"network": resnet(), "images": torch.randn(2, 3, 32, 32)}),
    "torchtitan, FSDP and others with `checkpoint_wrapper`": (
        1,
        2,
        lambda: {"blocks": torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Tanh())},
    ),
}


@pytest.fixture(autouse=True)
def put_back() -> Any:
    yield
    torch_reprise.uninstall()


def run(blocks: list[str], names: dict[str, Any]) -> None:
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)


def test_switching_runs_as_it_is_told() -> None:
    first, second = section("Switching")
    names: dict[str, Any] = {}
    run([first], names)
    assert torch_reprise.is_installed()
    names.update(model=switched_on(), batch=LLAMA.batch(0))
    before = ledger.replays()
    run([second], names)
    assert ledger.replays() == before + LLAMA.segments


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_runs_on_our_runtime(title: str) -> None:
    count, segments, make = SECTIONS[title]
    blocks = section(title)
    assert len(blocks) == count
    torch_reprise.install()
    names = {**make(), "batch": LLAMA.batch(0), "torch_reprise": torch_reprise}
    before = ledger.segments(), ledger.replays()
    run(blocks, names)
    if "blocks" in names:  # this one wraps, and leaves the rest to its reader
        names["blocks"](torch.ones(2, requires_grad=True)).sum().backward()
    assert (ledger.segments() - before[0], ledger.replays() - before[1]) == (segments, segments)


def test_every_block_of_the_page_is_run() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("```python\n") == 2 + sum(count for count, _, _ in SECTIONS.values())
